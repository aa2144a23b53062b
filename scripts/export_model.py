"""Exports a trained model for programs that do not have this package, with a model card.

    python scripts/export_model.py --workdir=runs/demo --out=exported
    python scripts/export_model.py --workdir=runs/demo --out=exported --batch_size=8

Writes OUT/model.stablehlo (for jax.export, on CPU, CUDA and TPU), OUT/saved_model (TensorFlow),
OUT/class_names.json and OUT/model_card.md, which says what goes in and what comes out.
"""

import argparse
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # traced there, the program fits every platform

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax import cli
from dualpath_jax.runtime import environment


def parser() -> argparse.ArgumentParser:
    made = cli.build_parser(__doc__)
    add = made.add_argument
    cli.add_model_options(made)
    add("--out", required=True, help="folder to write")
    add(
        "--batch_size",
        type=cli.positive(int),
        help="views that the model takes at once (any number)",
    )
    add(
        "--formats",
        nargs="+",
        default=["stablehlo", "saved_model"],
        choices=["stablehlo", "saved_model"],
        help="what to write (stablehlo saved_model)",
    )
    return made


def main() -> None:
    arguments = parser().parse_args()
    from dualpath_jax.inference import export

    with cli.user_errors():
        model = cli.load_model(arguments)
        results = export.read_results(arguments.workdir) if arguments.workdir else None
        export.export_model(model, arguments.out, arguments.formats, arguments.batch_size, results)
    print(f"wrote {arguments.out}/model_card.md and what it describes")


if __name__ == "__main__":
    environment.configure_environment()
    main()

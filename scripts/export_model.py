"""Exports a trained model for programs that do not have this package, with a model card.

    python scripts/export_model.py --workdir=runs/demo --out=exported
    python scripts/export_model.py --workdir=runs/demo --out=exported --batch_size=8

Writes OUT/model.stablehlo (for jax.export, on CPU, CUDA and TPU), OUT/saved_model (TensorFlow),
OUT/class_names.json and OUT/model_card.md, which says what goes in and what comes out.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax import command, environment


def parser() -> argparse.ArgumentParser:
    made = command.new_parser(__doc__)
    add = made.add_argument
    model = made.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="of a training run, local or gs://")
    model.add_argument("--adapter", help="file of scripts/export_adapter.py, instead")
    add("--backbone", help="file of the converted backbone, where it is not where the run had it")
    add(
        "--checkpoint",
        choices=["latest", "best"],
        default="latest",
        help="of a run: the newest, or the best by top-1 during training (latest)",
    )
    add("--out", required=True, help="folder to write")
    add("--batch_size", type=int, help="views that the model takes at once (any number)")
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
    from dualpath_jax import export_model, trained

    try:
        path = arguments.workdir or arguments.adapter
        model = trained.load(path, arguments.backbone, arguments.checkpoint)
        results = export_model.read_results(arguments.workdir) if arguments.workdir else None
        export_model.export(model, arguments.out, arguments.formats, arguments.batch_size, results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {arguments.out}/model_card.md and what it describes")


if __name__ == "__main__":
    environment.prepare()
    main()

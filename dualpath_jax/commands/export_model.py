"""Exports a trained model for programs that do not have this package, with a model card.

    dualpath export --workdir=runs/demo --out=exported
    dualpath export --workdir=runs/demo --out=exported --frame_size=240x320 --num_frames=64

Writes OUT/model.stablehlo (for jax.export, on CPU, CUDA and TPU), OUT/saved_model (TensorFlow),
OUT/class_names.json and OUT/model_card.md, which describes input and output and has a program that
uses them. The exported programs take frames, uint8 [B, T, H, W, 3], and sample, crop, scale and
normalize them as evaluation does.

In a checkout, python scripts/export_model.py is the same command.
"""

import argparse
import dataclasses
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # a program traced on the CPU fits every platform


from dualpath_jax import cli
from dualpath_jax.runtime import environment


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = cli.build_parser(__doc__)
    add = arg_parser.add_argument
    cli.add_model_options(arg_parser)
    add("--out", required=True, help="folder to write")
    add(
        "--batch_size",
        type=cli.positive(int),
        help="number of videos per call (any number)",
    )
    help_ = "height and width of the frames, pixels (the square that the model sees)"
    add("--frame_size", metavar="HEIGHTxWIDTH", type=_parse_size, help=help_)
    help_ = "frames of a video, from which clips are sampled (those of one clip)"
    add("--num_frames", type=cli.positive(int), help=help_)
    add(
        "--formats",
        nargs="+",
        choices=["stablehlo", "saved_model"],
        help="formats to write (both; with jax 0.12 and later stablehlo)",
    )
    return arg_parser


def _parse_size(text: str) -> tuple[int, int]:
    """Parse "240x320"."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text} is not HEIGHTxWIDTH, such as 240x320")
    return int(height), int(width)


def main() -> None:
    """Export the model that the command line names."""
    environment.configure_environment()
    arguments = parser().parse_args()
    from dualpath_jax.inference import export

    with cli.user_errors():
        model = cli.load_model(arguments)
        results = export.read_results(arguments.workdir) if arguments.workdir else None
        formats = arguments.formats
        if formats is None:
            problems = {name: export.find_format_problem(name) for name in export.FORMATS}
            formats = [name for name, problem in problems.items() if problem is None]
            for problem in filter(None, problems.values()):
                print(f"no saved_model: {problem}", file=sys.stderr)
        shape = export.default_shape(model)
        if arguments.frame_size:
            height, width = arguments.frame_size
            shape = dataclasses.replace(shape, height=height, width=width)
        if arguments.num_frames:
            shape = dataclasses.replace(shape, num_frames=arguments.num_frames)
        export.export_model(model, arguments.out, formats, arguments.batch_size, results, shape)
    print(f"wrote {arguments.out}/model_card.md and the files that it describes")

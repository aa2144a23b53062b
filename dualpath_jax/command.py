"""What the command lines share: parsers, absl's flags, errors for the user.

Public: `new_parser`, `positive`, `add_model`, `load_model`, `run`, `user_errors`. Light: JAX is
imported where it is used.
"""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable

from absl import app, logging


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring, as it is written there."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(kind: type):
    """An argparse type: a number above 0."""

    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{value} is not positive")
        return value

    number.__name__ = {int: "whole number", float: "number"}[kind]  # for argparse's errors
    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a trained model, see `load_model`."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="of a training run, local or gs://")
    model.add_argument("--adapter", help="file of scripts/export_adapter.py, instead")
    parser.add_argument(
        "--backbone", help="file of the converted backbone, where it is not where the run had it"
    )
    parser.add_argument(
        "--checkpoint",
        choices=["latest", "best"],
        default="latest",
        help="of a run: the newest, or the best by top-1 during training (latest)",
    )


def load_model(arguments: argparse.Namespace):
    """The `trained.Trained` that the options of `add_model` name; errors as `trained.load`."""
    from dualpath_jax import trained

    if arguments.adapter and not arguments.adapter.endswith(".safetensors"):
        raise ValueError(
            f"--adapter={arguments.adapter!r} is no .safetensors file, which is what "
            "scripts/export_adapter.py writes; the folder of a run is --workdir"
        )
    path = arguments.workdir or arguments.adapter
    return trained.load(path, arguments.backbone, arguments.checkpoint)


def run(main: Callable[[list[str]], None]) -> None:
    """absl's `app.run`, but whoever asked for help did nothing wrong: exit status 0."""
    asked = any(argument.lstrip("-").startswith("help") for argument in sys.argv[1:])
    try:
        app.run(main)
    except SystemExit as end:
        sys.exit(0 if asked and end.code == 1 else end.code)


@contextlib.contextmanager
def user_errors():
    """Report what the user can mend as one line, without a traceback (-v=1 shows it)."""
    from dualpath_jax import distributed  # imports JAX
    from dualpath_jax.preemption import Preempted

    try:
        yield
    except Preempted as stop:
        print(f"{distributed.label()}{stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(stop.exit_code)
    except (ValueError, OSError, FloatingPointError) as error:
        if distributed.another_failed(error):
            raise
        if logging.level_debug():
            traceback.print_exc()
        print(f"{distributed.label()}error: {error}", file=sys.stderr)
        sys.exit(2)

"""What the command lines share: parsers, absl's flags, errors for the user.

Public: `build_parser`, `positive`, `add_model_options`, `load_model`, `check_output_file`, `run_app`,
`user_errors`. Light: JAX is imported where it is used.
"""

import argparse
import ast
import contextlib
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging


def build_parser(doc: str) -> argparse.ArgumentParser:
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
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
    """The `trained.Trained` that the options of `add_model_options` name; errors as `trained.load`."""
    from dualpath_jax.inference import trained_model

    if arguments.adapter and not arguments.adapter.endswith(".safetensors"):
        raise ValueError(
            f"--adapter={arguments.adapter!r} is no .safetensors file, which is what "
            "scripts/export_adapter.py writes; the folder of a run is --workdir"
        )
    path = arguments.workdir or arguments.adapter
    return trained_model.load(path, arguments.backbone, arguments.checkpoint)


def run_app(main: Callable[[list[str]], None]) -> None:
    """absl's `app.run`; help ends with status 0, what the user can mend as in `user_errors`."""
    asked = any(argument.lstrip("-").startswith("help") for argument in sys.argv[1:])
    try:
        app.run(main, flags_parser=_parse_flags)
    except SystemExit as end:
        sys.exit(0 if asked and end.code == 1 else end.code)


def _parse_flags(argv: list[str]) -> list[str]:
    """What is left of `argv`; a wrong flag or config ends the program with a line and status 2."""
    try:
        left = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            _ = flags.FLAGS["config"].value.items  # an OSError where there is no such file
        return left
    except (AttributeError, KeyError) as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_name == "get_config" for frame, _ in frames):
            raise  # a mistake in the file; else of an override, --config.KEY=VALUE
        said = str(error.args[0])
        with contextlib.suppress(SyntaxError, ValueError):
            said = ast.literal_eval(said)  # an AttributeError quotes the KeyError that it was
        said = f"the configuration has no {'. '.join(said.splitlines())}"
    except (flags.Error, OSError) as error:
        said = str(error)
        if "get_config() takes 0 positional arguments" in said:
            said = "--config: this file takes nothing behind a colon"
    print(f"error: {said}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """Report what the user can mend as one line, without a traceback (-v=1 shows it)."""
    from dualpath_jax.runtime import distributed  # imports JAX
    from dualpath_jax.runtime.preemption import Preempted

    try:
        yield
    except Preempted as stop:
        print(
            f"{distributed.process_label()}{stop}; the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(stop.exit_code)
    except (ValueError, OSError, FloatingPointError) as error:
        if distributed.is_peer_failure(error):
            raise
        if logging.level_debug():
            traceback.print_exc()
        print(f"{distributed.process_label()}error: {error}", file=sys.stderr)
        sys.exit(2)

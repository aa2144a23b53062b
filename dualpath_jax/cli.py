"""Parses command lines and reports errors, for main.py and the commands.

JAX and TensorFlow are imported only where they are used, so that --help is quick.
"""

import argparse
import ast
import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging

from dualpath_jax.config import loading, schema
from dualpath_jax.runtime import console, environment, preemption, progress_bar
from dualpath_jax.runtime.command_line import command_line


def build_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a command's docstring, unchanged."""
    return _Parser(
        description=doc,
        epilog="Parentheses at the end of a description give the default.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    """Expands "~" in the values of options, as `expand_home` does."""

    def parse_known_args(self, args=None, namespace=None):
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(expand_home(arguments), namespace)


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Replace "~" or "~USER" at the beginning of an argument, or of an option's value, by a folder.

    A shell does this for `--out ~/data`, but not for `--out=~/data`.
    """
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name.startswith("-"):
            expanded.append(f"{name}={os.path.expanduser(value)}")
        else:
            expanded.append(os.path.expanduser(argument))
    return expanded


def positive(kind: type) -> Callable[[str], float]:
    """Return an argparse type for numbers above 0 of `kind`, int or float."""

    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{value} is not positive")
        return value

    number.__name__ = {int: "whole number", float: "number"}[kind]  # for argparse's errors
    return number


def run_resumable(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace, list[str]], None]
) -> None:
    """Run a command that trains, and that the same command line continues.

    Args:
      parser: of the command line, with the option of `progress_bar.add_quiet_option`.
      command: called with the options and the overrides of the configuration.
    """
    preemption.install_sigterm_handler()  # the training loop has its own handler
    environment.configure_environment()
    arguments, overrides = parse_with_overrides(parser)
    console.protect_streams(is_log=True)
    progress_bar.set_quiet(arguments.quiet)
    try:
        with user_errors():
            command(arguments, overrides)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a trained model, see `load_model`."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="workdir of a training run, local or gs://")
    model.add_argument("--adapter", help="adapter file, instead of --workdir")
    add_backbone_option(parser)
    add_checkpoint_option(parser)


def add_backbone_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the backbone of a trained model."""
    parser.add_argument(
        "--backbone", help="file of the converted backbone, if it is not where the run had it"
    )


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses a checkpoint of a run."""
    parser.add_argument(
        "--checkpoint",
        choices=["latest", "best"],
        default="latest",
        help="checkpoint of the run: the newest, or the best by eval.criterion (latest)",
    )


def load_model(arguments: argparse.Namespace):
    """Load the `TrainedModel` that the options of `add_model_options` name.

    Raises:
      ValueError, OSError: as `trained_model.load`.
    """
    from dualpath_jax.inference import trained_model

    if arguments.adapter and not arguments.adapter.endswith(".safetensors"):
        raise ValueError(
            f"--adapter={arguments.adapter!r} is not a .safetensors file, which is what "
            f"{command_line('export-adapter')} writes; the folder of a run is --workdir"
        )
    path = arguments.workdir or arguments.adapter
    return trained_model.load(path, arguments.backbone, arguments.checkpoint)


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line that takes --config.KEY=VALUE in addition to the parser's options.

    Returns:
      The parsed options, and the overrides for `loading.load_config`.
    """
    options, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if not text.startswith("--config.") or "=" not in text]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, rest


def run_app(
    main: Callable[[list[str]], None],
    doc: str,
    complete: Callable[[list[str]], list[str]] = list,
) -> None:
    """Run `main` with absl's flags; end with status 2 if a flag or the config file is wrong.

    Args:
      main: called with the arguments that are not flags.
      doc: printed by --help, before the flags of the module of `main`.
      complete: adds arguments that follow from the others; may raise `flags.Error`.
    """
    arguments = sys.argv[1:]
    if "--help_config" in arguments:
        print(schema.format_keys())
        sys.exit(0)
    if "--help" in arguments or "-h" in arguments:
        module = main.__module__
        listed = flags.FLAGS.module_help(sys.argv[0] if module == "__main__" else module)
        print(f"{doc}\n{listed}\n\n--helpfull lists the flags of all libraries as well.")
        sys.exit(0)
    asked_for_help = any(argument.lstrip("-").startswith("help") for argument in arguments)
    try:
        app.run(main, flags_parser=functools.partial(_parse_flags, complete=complete))
    except SystemExit as end:
        environment.exit_process(0 if asked_for_help and end.code == 1 else end.code)


def _parse_flags(argv: list[str], complete: Callable[[list[str]], list[str]] = list) -> list[str]:
    """Parse absl's flags and the config file; return the other arguments.

    A wrong flag or config file ends the program with one line and status 2.
    """
    try:
        arguments = complete(expand_home(argv[1:]))
        arguments = loading.rename_overrides(_find_config_files(arguments))
        sys.argv[1:] = arguments  # the config flag reads its overrides there
        rest = flags.FLAGS([argv[0], *arguments])
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            _ = flags.FLAGS["config"].value.items  # raises OSError if there is no such file
        return rest
    except (AttributeError, KeyError) as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_name == "get_config" for frame, _ in frames):
            raise  # a mistake in the config file, not in an override
        message = loading.find_unknown_override(argv[1:])
        if message is None:
            message = str(error.args[0])
            with contextlib.suppress(SyntaxError, ValueError):
                message = ast.literal_eval(message)  # an AttributeError quotes its KeyError
            message = f"the configuration has no {'. '.join(message.splitlines())}"
    except (flags.Error, OSError) as error:
        message = loading.find_unknown_override(argv[1:]) or str(error)
        if "get_config() takes 0 positional arguments" in message:
            message = "--config: this file takes no :VARIANT after its name"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _find_config_files(arguments: Sequence[str]) -> list[str]:
    """Replace the value of --config by the path of the file, see `loading.find_config_file`."""
    replaced, is_value = [], False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if is_value:
            argument = loading.find_config_file(argument)
        elif name in ("--config", "-config") and equals:
            argument = f"{name}={loading.find_config_file(value)}"
        is_value = argument in ("--config", "-config")
        replaced.append(argument)
    return replaced


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the program with one line for an error that the user can fix; -v=1 adds the traceback.

    The exit status is 2, or that of the `Preempted` exception of a stopped run. If the program may
    use too little memory for JAX, it ends before it imports JAX.
    """
    if problem := environment.find_memory_problem():
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    from dualpath_jax.runtime import distributed  # imports JAX
    from dualpath_jax.runtime.preemption import Preempted

    try:
        yield
    except Preempted as stop:
        command = "the same command"
        if any(argument.lstrip("-") == "start_over" for argument in sys.argv):
            command += " without --start_over"
        message = f"{distributed.process_label()}{stop}; {command} resumes there"
        print(message, file=sys.stderr)
        sys.exit(stop.exit_code)
    except (ValueError, OSError, FloatingPointError) as error:
        if distributed.is_peer_failure(error):
            raise
        if logging.level_debug():
            traceback.print_exc()
        print(f"{distributed.process_label()}error: {error}", file=sys.stderr)
        sys.exit(2)

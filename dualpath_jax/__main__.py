"""Runs `dualpath COMMAND`, or `python -m dualpath_jax COMMAND` without installation."""

import importlib
import sys
from collections.abc import Sequence

from dualpath_jax.runtime import console, preemption

# Subcommand -> (module whose main() runs it, arguments that it adds, one line of help).
_MAIN = "dualpath_jax.main"
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "demo": (_MAIN, ("--config=demo",), "train and evaluate the embedded demo in runs/demo"),
    "finetune": ("dualpath_jax.commands.finetune", (), "train a model on your own videos"),
    "train": (_MAIN, (), "train the model of a config file, then evaluate it"),
    "eval": (_MAIN, ("--mode=eval",), "evaluate the checkpoint of a workdir"),
    "check": (_MAIN, ("--mode=check",), "check a configuration without weights, data or training"),
    "prepare": ("dualpath_jax.commands.prepare", (), "check and prepare videos for training"),
    "convert": ("dualpath_jax.commands.convert", (), "convert a checkpoint to a backbone file"),
    "predict": ("dualpath_jax.commands.predict", (), "predict the classes of video files"),
    "probe": ("dualpath_jax.commands.probe", (), "train heads on features of the frozen backbone"),
    "curve": ("dualpath_jax.commands.curve", (), "draw accuracy against videos of each class"),
    "report": ("dualpath_jax.commands.report", (), "write runs as one HTML page"),
    "attention": ("dualpath_jax.commands.attention", (), "draw what a model attends to"),
    "export": ("dualpath_jax.commands.export_model", (), "export a model as StableHLO"),
    "export-adapter": ("dualpath_jax.commands.export_adapter", (), "write an adapter file"),
    "merge": ("dualpath_jax.commands.merge", (), "compute a model's training into its backbone"),
    "efficiency": ("dualpath_jax.commands.efficiency", (), "count parameters and operations"),
    "show-batch": ("dualpath_jax.commands.show_batch", (), "draw a training batch"),
}
_SAVES_ON_SIGTERM = ("demo", "finetune", "curve", "train", "eval", "check")


def format_help() -> str:
    """Return the help of `dualpath`: every command with one line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dualpath COMMAND [OPTIONS]",
            "",
            "DualPath in JAX: frozen image transformers adapted to video.",
            "",
            *lines,
            "",
            "dualpath COMMAND --help lists the options of a command.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; exit with its status."""
    console.run(lambda: _run_command(arguments))


def _run_command(arguments: Sequence[str] | None) -> None:
    """Run a command; exit with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in ([], ["--help"], ["-h"], ["help"]):
        print(format_help())
        sys.exit(0 if arguments else 2)
    if arguments == ["--version"]:
        from dualpath_jax.version import __version__

        print(__version__)
        sys.exit(0)
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}: known are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module, added, _ = COMMANDS[name]
    if name in _SAVES_ON_SIGTERM:  # SIGTERM ends it with its status also while it imports
        preemption.install_sigterm_handler()
    sys.argv = [f"dualpath {name}", *added, *rest]
    sys.exit(importlib.import_module(module).main())


if __name__ == "__main__":
    main()

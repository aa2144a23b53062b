r"""Tries frozen weights in 8 bits, which the package does not have; see docs/notes/int8.md.

    python scripts/int8_trial.py errors --config=ssv2_vitb --videos FILE FILE
    python scripts/int8_trial.py weights scripts/compile_tpu.py --config=configs/ssv2_vitb.py \
        --topology=v5e:2x2 --step=eval
    python scripts/int8_trial.py weights dualpath_jax/main.py --config=configs/demo.py \
        --workdir=runs/demo --mode=eval

"errors" prints the largest errors of the logits. "weights" runs another program whose frozen
weights of attention and MLP are int8 with a scale for each output channel; "activations" also
quantizes the other factor of their products. Only for ViT and a method that leaves all blocks
frozen.
"""

import argparse
import json
import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax import cli
from dualpath_jax.config.loading import load_config
from dualpath_jax.runtime import console, environment


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = cli.build_parser(__doc__)
    commands = ("errors", "weights", "activations")
    result.add_argument("command", choices=commands, help="what to do")
    help_ = "options of errors, or a program and its arguments"
    result.add_argument("arguments", nargs=argparse.REMAINDER, help=help_)
    return result


def run_program(mode: str, program: str, *arguments: str) -> None:
    """Run a Python file as __main__ with frozen weights in 8 bits."""
    from scripts.benchmarks import int8

    int8.use_int8(mode)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def print_errors(arguments: list[str]) -> None:
    """Print what `int8.measure_errors` returns."""
    options = cli.build_parser(__doc__)
    options.add_argument("--config", default="ssv2_vitb", help="name of a config (ssv2_vitb)")
    options.add_argument("--videos", nargs="+", required=True, help="video files")
    sys.argv = [sys.argv[0], *arguments]
    parsed, overrides = cli.parse_with_overrides(options)
    try:
        config = load_config(parsed.config, overrides)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    from scripts.benchmarks import int8

    int8.FLOAT_PRODUCTS = True
    print(json.dumps(int8.measure_errors(config, parsed.videos), indent=1))


def main() -> None:
    parsed = parser().parse_args()
    if parsed.command == "errors":
        print_errors(parsed.arguments)
    elif parsed.arguments:
        run_program(parsed.command, *parsed.arguments)
    else:
        sys.exit(f"error: name the program to run after {parsed.command!r}")


if __name__ == "__main__":
    environment.configure_environment()
    console.run(main)

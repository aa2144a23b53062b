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

import json
import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, parse_with_overrides
from dualpath_jax.config.loading import load_config
from dualpath_jax.runtime import console, environment

_RUN_MODES = ("weights", "activations")


def run_program(mode: str, program: str, *arguments: str) -> None:
    """Run a Python file as __main__ with frozen weights in 8 bits."""
    from scripts.benchmarks import int8

    int8.use_int8(mode)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def print_errors() -> None:
    """Print what `int8.measure_errors` returns."""
    parser = build_parser(__doc__)
    parser.add_argument("command", choices=("errors", *_RUN_MODES), help="what to do")
    parser.add_argument("--config", default="ssv2_vitb", help="name of a config (ssv2_vitb)")
    parser.add_argument("--videos", nargs="+", required=True, help="video files")
    arguments, overrides = parse_with_overrides(parser)
    from scripts.benchmarks import int8

    int8.FLOAT_PRODUCTS = True
    config = load_config(arguments.config, overrides)
    print(json.dumps(int8.measure_errors(config, arguments.videos), indent=1))


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in _RUN_MODES and len(sys.argv) > 2:
        run_program(*sys.argv[1:])
    else:
        print_errors()


if __name__ == "__main__":
    environment.configure_environment()
    console.run(main)

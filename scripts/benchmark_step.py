"""DualPath's forward pass and training step beside PyTorch, on this machine.

    pip install -r requirements-bench.txt
    python scripts/benchmark_step.py
    python scripts/benchmark_step.py --config=k400_vitb --batch_size=4 --json

The same model with the same weights in PyTorch (scripts/benchmarks/torch_dualpath.py), checked to give
the same logits, takes turns with ours: forward pass and training step, float32 and bfloat16, and
the memory that a step needs. No data and no weights are needed. The limit is a product of two
square matrices in the faster framework. On a GPU take more clips, as --batch_size=32; float32 is
computed there in TF32, as JAX does unless told, by both. --torch_compile measures PyTorch's model
compiled by torch.compile as well.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys

# Processes that measure memory import this file again: its main is guarded.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive
from dualpath_jax.runtime import environment

_PEERS = {"torch": "", "torch_compiled": ", torch.compile"}  # and how a table calls them


def parser() -> argparse.ArgumentParser:
    made = build_parser(__doc__)
    add = made.add_argument
    add("--config", default="ssv2_vitb", help="of dualpath, as in configs/ (ssv2_vitb)")
    add("--batch_size", type=positive(int), default=1, help="clips (1)")
    add("--rounds", type=positive(int), default=5, help="times each is measured (5)")
    help_ = "forward passes or steps in a row of a measurement (10 on a GPU, else 1)"
    add("--calls", type=positive(int), help=help_)
    add("--torch_compile", action="store_true", help="PyTorch by torch.compile as well")
    dtypes = ["float32", "bfloat16"]
    help_ = "of the computation (float32 bfloat16)"
    add("--dtypes", nargs="+", default=dtypes, choices=dtypes, help=help_)
    help_ = "loop over blocks instead of writing them out; always so on a TPU"
    add("--scan_blocks", action="store_true", help=help_)
    add("--remat", default="cheap", help="config.model.remat (cheap)")
    add("--json", action="store_true", help="print JSON instead of Markdown")
    return made


def measure(settings: list, rounds: int, sides: list[str]) -> dict:
    """By what is measured, with the ratios of each dtype; a `step_benchmark.Setting` for each."""
    from scripts.benchmarks import train_step

    result: dict = {"forward": {}, "train_step": {}, "matmul_limit_gflops": {}, "dtypes": {}}
    for setting in settings:
        dtype = setting.dtype

        def tell(line: str, dtype: str = dtype) -> None:
            print(f"{dtype}: {line}", file=sys.stderr, flush=True)

        tell("compiling")
        seconds = train_step.compile_seconds(setting)
        tell("matrix product")
        limit = train_step.matmul_gflops(dtype)
        compared = train_step.compare_frameworks(setting, rounds, sides, tell)
        tell("memory")
        compared["step_mib"] = {s: train_step.peak_memory(setting, s) for s in sides}
        compared["compile_seconds"] = seconds
        result["matmul_limit_gflops"][dtype] = limit
        result["dtypes"][dtype] = compared
        for what in ("forward", "train_step"):
            for side in sides[1:]:
                name = f"ratio_vs_{side}"
                result[what][f"{name}_{dtype}"] = compared[what][name]
            fraction = compared[what]["gflops"] / limit
            result[what].setdefault("fraction_of_matmul_limit", {})[dtype] = fraction
    return result


def markdown(result: dict) -> str:
    """The tables for people."""
    lines = [
        "| | ours, s | PyTorch, s | PyTorch / ours | of the matrix product rate |",
        "|---|---|---|---|---|",
    ]
    for dtype, compared in result["dtypes"].items():
        for what in ("forward", "train_step"):
            row, fraction = compared[what], result[what]["fraction_of_matmul_limit"][dtype]
            name = f"{what.replace('_', ' ')}, {dtype}".replace("train step", "training step")
            for side in [side for side in _PEERS if side in row]:
                lines.append(
                    f"| {name}{_PEERS[side]} | {row['jax']:#.3g} | {row[side]:#.3g} "
                    f"| {row[f'ratio_vs_{side}']:.2f} | {fraction:.2f} |"
                )
    lines += ["", "| memory of a training step, MiB | ours | PyTorch |", "|---|---|---|"]
    for dtype, compared in result["dtypes"].items():
        memory = compared["step_mib"]
        for side in [side for side in _PEERS if side in memory]:
            lines.append(f"| {dtype}{_PEERS[side]} | {memory['jax']:.0f} | {memory[side]:.0f} |")
    limits = (f"{d} {g:.0f} GFLOP/s" for d, g in result["matmul_limit_gflops"].items())
    compiled = (f"{d} {c['compile_seconds']:.1f} s" for d, c in result["dtypes"].items())
    lines += ["", f"Our training step is compiled in: {', '.join(compiled)}."]
    return "\n".join([*lines, f"Matrix product: {', '.join(limits)}."])


def main() -> None:
    arguments = parser().parse_args()
    try:
        config = importlib.import_module(f"configs.{arguments.config}").get_config()
    except ModuleNotFoundError:
        sys.exit(f"error: no configs/{arguments.config}.py; check --config")
    import jax

    from scripts.benchmarks import train_step

    config.model.scan_blocks = arguments.scan_blocks or jax.default_backend() == "tpu"
    config.model.remat = arguments.remat
    calls = arguments.calls or (10 if jax.default_backend() == "gpu" else 1)
    settings = [
        train_step.Setting(config, dtype, arguments.batch_size, calls) for dtype in arguments.dtypes
    ]
    sides = [*train_step.USUAL_SIDES, *["torch_compiled"] * arguments.torch_compile]
    result = measure(settings, arguments.rounds, sides)
    print(json.dumps(result, indent=1) if arguments.json else markdown(result))


if __name__ == "__main__":
    # On a GPU JAX would take three quarters of the memory and leave PyTorch the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environment.configure_environment()
    main()

"""Compares DualPath's forward pass and training step with PyTorch on this machine.

    pip install ".[bench]"
    python scripts/benchmark_step.py
    python scripts/benchmark_step.py --config=k400_vitb --batch_size=4 --json

The same model with the same weights in PyTorch (scripts/benchmarks/torch_dualpath.py) must give the
same logits, and is then timed in turns with ours: forward pass and training step, in float32 and
bfloat16, and the memory that a step needs. Data and weights are not needed. The limit is a product
of two square matrices in the faster framework. On a GPU use more clips, such as --batch_size=32;
both compute float32 there in TF32, JAX's default. --torch_compile compares with PyTorch's model
compiled by torch.compile, in its default mode. Compile time is apart: seconds of the first step and
of the first forward pass, without the caches of earlier runs. TensorFlow and PyAV are not needed.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

# Processes that measure memory import this file again, therefore `main` is guarded.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, parse_with_overrides, positive
from dualpath_jax.config.loading import load_config
from dualpath_jax.runtime import console, environment

# Frameworks to compare with -> suffix of their rows in the tables.
_ROW_SUFFIXES = {"torch": "", "torch_compiled": ", torch.compile"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = build_parser(__doc__)
    add = result.add_argument
    add("--config", default="ssv2_vitb", help="name of a dualpath config in configs/ (ssv2_vitb)")
    add("--batch_size", type=positive(int), default=1, help="clips per call (1)")
    add("--rounds", type=positive(int), default=5, help="measurements of each framework (5)")
    help_ = "forward passes or steps in a row in one measurement (10 on a GPU, else 1)"
    add("--calls", type=positive(int), help=help_)
    help_ = "compare with torch.compile instead of eager PyTorch"
    add("--torch_compile", action="store_true", help=help_)
    help_ = "leave out a framework that takes longer to start and to compile (no limit)"
    add("--start_limit", type=positive(float), metavar="SECONDS", help=help_)
    add("--no_memory", action="store_true", help="do not measure memory, which compiles again")
    dtypes = ["float32", "bfloat16"]
    help_ = "compute dtypes to measure (float32 bfloat16)"
    add("--dtypes", nargs="+", default=dtypes, choices=dtypes, help=help_)
    help_ = "scan over the blocks instead of unrolling them; a TPU always scans"
    add("--scan_blocks", action="store_true", help=help_)
    add("--remat", default="save_matmuls", help="value of config.model.remat (save_matmuls)")
    add("--json", action="store_true", help="print JSON instead of Markdown")
    return result


def measure_settings(
    settings: list,
    rounds: int,
    frameworks: list[str],
    start_limit: float | None = None,
    memory: bool = True,
) -> dict:
    """Measure speed, memory, compile time and the matrix product rate for each setting.

    Args:
      settings: a `train_step.Setting` for each dtype.
      rounds: number of measurements of each framework.
      frameworks: names in `train_step.RUNNERS`, "jax" first.
      start_limit: see `train_step.compare_frameworks`.
      memory: measure memory too.

    Returns:
      {"forward", "train_step": ratios of each dtype to the other frameworks and to the limit;
      "matmul_limit_gflops": by dtype; "dtypes": by dtype, the result of `compare_frameworks` with
      "step_mib"}.
    """
    from scripts.benchmarks import train_step

    result: dict = {"forward": {}, "train_step": {}, "matmul_limit_gflops": {}, "dtypes": {}}
    for setting in settings:
        dtype = setting.dtype

        def log(line: str, dtype: str = dtype) -> None:
            print(f"{dtype}: {line}", file=sys.stderr, flush=True)

        log("matrix product")
        limit = train_step.measure_matmul_gflops(dtype)
        compared = train_step.compare_frameworks(setting, rounds, frameworks, log, start_limit)
        measured = [name for name in frameworks if name not in compared["too_slow"]]
        compared["step_mib"] = {}
        for name in measured if memory else ():
            log(f"memory of {name}")
            compared["step_mib"][name] = train_step.measure_peak_memory(setting, name)
        result["matmul_limit_gflops"][dtype] = limit
        result["dtypes"][dtype] = compared
        for part in ("forward", "train_step"):
            for framework in measured[1:]:
                name = f"ratio_vs_{framework}"
                result[part][f"{name}_{dtype}"] = compared[part][name]
            fraction = compared[part]["gflops"] / limit
            result[part].setdefault("fraction_of_matmul_limit", {})[dtype] = fraction
    return result


def format_markdown(result: dict) -> str:
    """Format the result of `measure_settings` as Markdown tables."""
    lines = [
        "| | ours, s | PyTorch, s | PyTorch / ours | of the matrix product rate | our first "
        "call, s | PyTorch's first call, s |",
        "|" + "---|" * 7,
    ]
    for dtype, compared in result["dtypes"].items():
        for part in ("forward", "train_step"):
            row, fraction = compared[part], result[part]["fraction_of_matmul_limit"][dtype]
            first = compared["first_call"][part]
            name = f"{part.replace('_', ' ')}, {dtype}".replace("train step", "training step")
            for framework, suffix in _ROW_SUFFIXES.items():
                if framework in row:
                    lines.append(
                        f"| {name}{suffix} | {row['jax']:#.3g} | {row[framework]:#.3g} "
                        f"| {row[f'ratio_vs_{framework}']:.2f} | {fraction:.2f} "
                        f"| {first['jax']:.1f} | {first[framework]:.1f} |"
                    )
                elif framework in compared["too_slow"]:
                    lines.append(
                        f"| {name}{suffix} | {row['jax']:#.3g} | too slow to compile | "
                        f"| {fraction:.2f} | {first['jax']:.1f} | |"
                    )
    memory = {dtype: compared["step_mib"] for dtype, compared in result["dtypes"].items()}
    if any(memory.values()):
        lines += ["", "| memory of a training step, MiB | ours | PyTorch |", "|---|---|---|"]
    for dtype, mib in memory.items():
        for framework, suffix in _ROW_SUFFIXES.items():
            if framework in mib:
                lines.append(f"| {dtype}{suffix} | {mib['jax']:.0f} | {mib[framework]:.0f} |")
    limits = (f"{d} {g:.0f} GFLOP/s" for d, g in result["matmul_limit_gflops"].items())
    return "\n".join([*lines, "", f"Matrix product: {', '.join(limits)}."])


def main() -> None:
    arguments, overrides = parse_with_overrides(parser())
    try:
        config = load_config(arguments.config, overrides)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    import jax

    from scripts.benchmarks import train_step

    config.model.scan_blocks = arguments.scan_blocks or jax.default_backend() == "tpu"
    config.model.remat = arguments.remat
    calls = arguments.calls or (10 if jax.default_backend() == "gpu" else 1)
    settings = [
        train_step.Setting(config, dtype, arguments.batch_size, calls) for dtype in arguments.dtypes
    ]
    frameworks = ["jax", "torch_compiled" if arguments.torch_compile else "torch"]
    result = measure_settings(
        settings, arguments.rounds, frameworks, arguments.start_limit, not arguments.no_memory
    )
    print(json.dumps(result, indent=1) if arguments.json else format_markdown(result))


def use_empty_caches(folder: str) -> None:
    """Make this process and those that it starts compile anew, with caches in a new `folder`."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[name] = os.path.join(folder, name.lower())


if __name__ == "__main__":
    # By default JAX reserves three quarters of a GPU's memory, which PyTorch could not use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory() as folder:
        use_empty_caches(folder)
        environment.configure_environment()
        console.run(main)

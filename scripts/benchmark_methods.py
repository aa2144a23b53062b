"""Measures latency and throughput of every method's forward pass on ViT-B/16 (Table A3).

    python scripts/benchmark_methods.py
    python scripts/benchmark_methods.py --methods dualpath aim st_adapter evl --json

DualPath uses the 16 frames of configs/ssv2_vitb.py, the other methods use 8 (section 3.2). The
methods are timed in turns, and the latency of a method is also given relative to DualPath's in the
same round. Throughput, at the largest batch that fits, is measured on a GPU or a TPU. Data and
weights are not needed.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive
from dualpath_jax.runtime import console, environment


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from dualpath_jax.models import registry as method_registry

    result = build_parser(__doc__)
    result.add_argument(
        "--methods",
        nargs="+",
        default=list(method_registry.METHODS),
        choices=list(method_registry.METHODS),
        help="methods to measure; dualpath is always measured (all)",
    )
    result.add_argument(
        "--rounds", type=positive(int), default=3, help="measurements of each method (3)"
    )
    result.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="compute dtype (float32 on a CPU, else bfloat16)",
    )
    result.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    return result


def format_markdown(speeds: dict) -> str:
    """Format the speeds of `measure_methods` as a Markdown table."""
    lines = [
        "| method | frames | trainable | GMAC per view | latency, ms | / DualPath's "
        "| views/s (batch) |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, speed in speeds.items():
        digits = 0 if speed.latency > 0.1 else 2
        views = "not measured"
        if speed.batch_size:
            views = f"{speed.throughput:.1f} ({speed.batch_size})"
        lines.append(
            f"| `{method}` | {speed.num_frames} | {speed.trainable_params:,} | {speed.gmacs:.1f} "
            f"| {1000 * speed.latency:.{digits}f} | {speed.relative:.2f} | {views} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parser().parse_args()
    import jax

    from configs import ssv2_vitb, ssv2_vitb_full
    from scripts.benchmarks import methods

    on_cpu = jax.default_backend() == "cpu"
    configs = {}
    for method in dict.fromkeys(["dualpath", *arguments.methods]):
        config = methods.method_config(ssv2_vitb.get_config(), ssv2_vitb_full.get_config(), method)
        config.model.dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
        config.model.scan_blocks = not on_cpu  # compiles faster
        configs[method] = config
    speeds = methods.measure_methods(
        configs, arguments.rounds, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if arguments.json:
        rows = {method: dataclasses.asdict(speed) for method, speed in speeds.items()}
        print(json.dumps(rows, indent=1))
    else:
        print(format_markdown(speeds))


if __name__ == "__main__":
    environment.configure_environment()
    console.run(main)

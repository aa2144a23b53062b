"""Latency and throughput of every method's forward pass on ViT-B/16, side by side (Table A3).

    python scripts/benchmark_methods.py
    python scripts/benchmark_methods.py --methods dualpath aim st_adapter evl --json

DualPath takes the 16 frames of configs/ssv2_vitb.py, the others 8 (section 3.2). The methods take
turns; a method's latency is given beside DualPath's in the same round. Throughput, at the largest
batch that fits, is measured where there is a GPU or a TPU. No data and no weights are needed.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive
from dualpath_jax.runtime import environment


def parser() -> argparse.ArgumentParser:
    from dualpath_jax.models import registry as method_registry

    made = build_parser(__doc__)
    made.add_argument(
        "--methods",
        nargs="+",
        default=list(method_registry.METHODS),
        choices=list(method_registry.METHODS),
        help="which; dualpath is always among them (all)",
    )
    made.add_argument("--rounds", type=positive(int), default=3, help="times each is measured (3)")
    made.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the computation (float32 on a CPU, else bfloat16)",
    )
    made.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    return made


def markdown(speeds: dict) -> str:
    """The table for people."""
    lines = [
        "| method | frames | trainable | GMAC per view | latency, ms | / DualPath's "
        "| views/s (batch) |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, one in speeds.items():
        digits = 0 if one.latency > 0.1 else 2  # a GPU's are a few ms
        views = f"{one.throughput:.1f} ({one.batch_size})" if one.batch_size else "not measured"
        lines.append(
            f"| `{method}` | {one.num_frames} | {one.trainable_params:,} | {one.gmacs:.1f} "
            f"| {1000 * one.latency:.{digits}f} | {one.relative:.2f} | {views} |"
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
        config.model.scan_blocks = not on_cpu  # compiles sooner; on an H200 2% slower
        configs[method] = config
    speeds = methods.measure_methods(
        configs, arguments.rounds, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if arguments.json:
        print(json.dumps({m: dataclasses.asdict(one) for m, one in speeds.items()}, indent=1))
    else:
        print(markdown(speeds))


if __name__ == "__main__":
    environment.configure_environment()
    main()

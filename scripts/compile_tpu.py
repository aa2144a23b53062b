"""Compiles the training and evaluation steps of a configuration for a TPU slice, without a TPU.

    pip install ".[tpu]"
    python scripts/compile_tpu.py --config=configs/ssv2_vitb.py --topology=v5e:4x4
    python scripts/compile_tpu.py --config=configs/ssv2_vitl.py --topology=v5e:2x2 --max_batch
    python scripts/compile_tpu.py --config=configs/ssv2_vitb.py --topology=v5e:2x2 --fits=16,24,80

Prints for one chip: memory, operations, bytes accessed, traffic between chips, and an estimate of
the clips per second. --fits prints a table of how many clips fit devices with the given memories,
and how many accumulation steps make batches of 64 and 128 of them. Any key of the configuration can
be set as in training, such as --config.model.remat=full or --config.mesh.fsdp=4. Data and weights
are not needed.
"""

import dataclasses
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation
os.environ["JAX_PLATFORMS"] = "cpu"  # the TPU is only described

from absl import app, flags
from ml_collections import config_flags

from dualpath_jax import cli
from dualpath_jax.runtime import console, environment

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration, see configs/.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice of TPUs to compile for: kind and chips, such as v5e:4x4."
)
PER_CHIP_BATCH = flags.DEFINE_integer(
    "per_chip_batch", 8, "Clips on a chip in a training step.", lower_bound=1
)
MAX_BATCH = flags.DEFINE_bool(
    "max_batch", False, "Find the most clips that fit a chip, starting at --per_chip_batch."
)
FITS = flags.DEFINE_list(
    "fits",
    None,
    "Memories of devices in GB: estimate how many clips fit each, by compiling --per_chip_batch "
    "clips and twice as many.",
)
STEPS = flags.DEFINE_multi_enum(
    "step", ["train", "eval"], ["train", "eval"], "Step to compile (both); may be repeated."
)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of Markdown.")

BATCHES = (64, 128)  # batch sizes of the recipes


def log(line: str) -> None:
    """Print progress to stderr, apart from the result."""
    print(line, file=sys.stderr, flush=True)


def print_fits(config, topology: str, clips: int, memories: list[float]) -> None:
    """Print how many clips fit devices with `memories` in GB."""
    from scripts.benchmarks import tpu_aot

    reports = []
    for size in (clips, 2 * clips):
        reports += tpu_aot.compile_steps(config, topology, size, ("train",))
        log(f"{size} clips on a chip need {reports[-1].peak / 1e9:.2f} GB")
    rows = tpu_aot.estimate_fits(*reports, memories, BATCHES)
    if JSON.value:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(tpu_aot.format_fits(rows, BATCHES))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    chosen = [f"--{name}" for name in ("fits", "max_batch", "step") if flags.FLAGS[name].present]
    if len(chosen) > 1:
        sys.exit(
            f"error: {' and '.join(chosen)} exclude each other: each decides what to compile; "
            "give one of them"
        )
    from scripts.benchmarks import tpu_aot

    config, topology, batch = CONFIG.value, TOPOLOGY.value, PER_CHIP_BATCH.value
    try:
        if FITS.value:
            print_fits(config, topology, batch, [float(memory) for memory in FITS.value])
            return
        if MAX_BATCH.value:
            _, reports = tpu_aot.find_largest_batch(config, topology, batch, log)
        else:
            reports = tpu_aot.compile_steps(config, topology, batch, tuple(STEPS.value))
    except tpu_aot.TooLarge as error:
        sys.exit(
            f"error: {error}: lower --per_chip_batch, or find the largest one with --max_batch"
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if JSON.value:
        steps = [dataclasses.asdict(report) for report in reports]
        print(json.dumps({"topology": TOPOLOGY.value, "steps": steps}, indent=1))
    else:
        print(tpu_aot.format_reports(TOPOLOGY.value, reports))


if __name__ == "__main__":
    environment.configure_environment()
    flags.mark_flags_as_required(["config", "topology"])
    console.run(lambda: cli.run_app(main, __doc__))

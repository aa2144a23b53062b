"""Compiles the training and evaluation steps of a configuration for a TPU slice, without a TPU.

    pip install -r requirements.txt -r requirements-tpu.txt
    python scripts/compile_tpu.py --config=configs/ssv2_vitb.py --topology=v5e:4x4
    python scripts/compile_tpu.py --config=configs/ssv2_vitl.py --topology=v5e:2x2 --max_batch
    python scripts/compile_tpu.py --config=configs/ssv2_vitb.py --topology=v5e:2x2 --fits=16,24,80

Prints what a chip needs and does: memory, operations, bytes, traffic between chips, and an estimate
of the clips per second. --fits is a table of how many clips devices of so much memory hold, and
how many accumulation steps make batches of 64 and 128 of them. Any key of the configuration can be
set as in training, such as --config.model.remat=full or --config.mesh.fsdp=4. Data and weights are
not needed.
"""

import dataclasses
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation
os.environ["JAX_PLATFORMS"] = "cpu"  # the TPU is described, not there

from absl import app, flags
from ml_collections import config_flags

from dualpath_jax import cli
from dualpath_jax.runtime import environment

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration, see configs/.")
TOPOLOGY = flags.DEFINE_string("topology", None, "The slice: kind and chips, as v5e:4x4.")
PER_CHIP_BATCH = flags.DEFINE_integer(
    "per_chip_batch", 8, "Clips on a chip in a training step.", lower_bound=1
)
MAX_BATCH = flags.DEFINE_bool(
    "max_batch", False, "Look for the most clips on a chip that fit, from --per_chip_batch on."
)
FITS = flags.DEFINE_list(
    "fits",
    None,
    "Memories, GB: what fits each, by compiling --per_chip_batch and twice as many clips.",
)
STEPS = flags.DEFINE_multi_enum(
    "step", ["train", "eval"], ["train", "eval"], "What to compile (both); repeat for several."
)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of Markdown.")

BATCHES = (64, 128)  # of the recipes


def tell(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


def fits(config, topology: str, clips: int, memories: list[float]) -> None:
    """Print what fits devices with `memories`."""
    from scripts.benchmarks import tpu_aot

    reports = []
    for size in (clips, 2 * clips):
        reports += tpu_aot.compile_steps(config, topology, size, ("train",))
        tell(f"{size} clips on a chip need {reports[-1].peak / 1e9:.2f} GB")
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
        sys.exit(f"error: {' and '.join(chosen)} do not go together: each says what to compile")
    from scripts.benchmarks import tpu_aot

    config, topology, batch = CONFIG.value, TOPOLOGY.value, PER_CHIP_BATCH.value
    try:
        if FITS.value:
            fits(config, topology, batch, [float(memory) for memory in FITS.value])
            return
        if MAX_BATCH.value:
            _, reports = tpu_aot.largest_batch(config, topology, batch, tell)
        else:
            reports = tpu_aot.compile_steps(config, topology, batch, tuple(STEPS.value))
    except tpu_aot.TooLarge as error:
        sys.exit(f"error: {error}: lower --per_chip_batch, or look for it by --max_batch")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if JSON.value:
        named = [dataclasses.asdict(one) for one in reports]
        print(json.dumps({"topology": TOPOLOGY.value, "steps": named}, indent=1))
    else:
        print(tpu_aot.format_reports(TOPOLOGY.value, reports))


if __name__ == "__main__":
    environment.configure_environment()
    flags.mark_flags_as_required(["config", "topology"])
    cli.run_app(main)

"""Compiles training and evaluation steps for a TPU slice on a machine without a TPU.

The programs are those of a run, with the same functions, shardings and donations. libtpu compiles
them for a described slice (`jax.experimental.topologies`) and reports their requirements; no
program is run. The command line is scripts/compile_tpu.py.
"""

import copy
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dualpath_jax import evaluate
from dualpath_jax.analysis import efficiency
from dualpath_jax.config.schema import check_values
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.models.abstract import clip_shapes
from dualpath_jax.training import sharding
from dualpath_jax.training.experiment import AbstractExperiment, build_abstract
from dualpath_jax.training.state import state_shardings
from dualpath_jax.training.step import jit_train_step, make_train_step
from scripts.benchmarks import hlo_cost


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes a TPU chip, as in cloud.google.com/tpu/docs/system-architecture-tpu-vm.

    Attributes:
      memory: HBM in GiB.
      tflops: 10^12 operations per second in bfloat16.
      bandwidth: 10^9 bytes per second of its HBM.
      options: further arguments of libtpu's description of a slice.
    """

    memory: int
    tflops: float
    bandwidth: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    "v4": Chip(32, 275, 1200, {"chip_config_name": "megacore"}),  # else each core is a device
    "v5e": Chip(16, 197, 800),
    "v5p": Chip(95, 459, 2765),
    "v6e": Chip(32, 918, 1600),
}
_MEMORY_NEEDED = re.compile(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm")


def describe_topology(topology: str) -> tuple[Chip, list[Any]]:
    """Return the chip and the devices of a slice, such as "v5e:4x4".

    Raises:
      ValueError: there is no such slice, or libtpu is missing or in use.
    """
    kind = topology.split(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ValueError(
            f"--topology={topology!r} must be a kind and its chips, such as v5e:4x4; known kinds "
            f"are {', '.join(CHIPS)}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is not a TPU host
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    chip = CHIPS[kind]
    try:
        return chip, topologies.get_topology_desc(topology, "tpu", **chip.options).devices
    except (RuntimeError, NotImplementedError) as error:
        if "lockfile" in str(error):
            raise ValueError(
                "another process uses libtpu: wait until it ends, or allow several processes by "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from error
        if "libtpu" in str(error) or "Unknown" in str(error) or "not found" in str(error):
            raise ValueError('libtpu is not installed: pip install ".[tpu]"') from error
        raise ValueError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Holds the requirements of a compiled step on one chip.

    Attributes:
      step: "train" or "eval".
      per_chip_batch: clips (in evaluation views) on a chip.
      compile_seconds: time to compile on this machine.
      arguments: bytes of the chip's memory that the arguments occupy.
      temporaries: bytes that are reserved for temporaries.
      peak: largest number of bytes in use at once, arguments included. It decides whether a step
        fits: the temporaries are not all in use at once.
      flops: operations of the executed matrix products and convolutions, two for each
        multiply-accumulate.
      bytes_accessed: traffic with the chip's memory, see `hlo_cost.HloProgram.bytes_accessed`.
      cycles: sum of the compiler's estimates for each instruction, with every branch of a random
        choice (RandAugment's operations); compare it only between programs for one kind of chip.
      collectives: traffic between chips.
      clips_per_second: roofline estimate for one chip: the slower of `flops` at the chip's peak and
        `bytes_accessed` at its bandwidth.
    """

    step: str
    per_chip_batch: int
    compile_seconds: float
    arguments: int
    temporaries: int
    peak: int
    flops: int
    bytes_accessed: int
    cycles: int
    collectives: list[hlo_cost.Collective]
    clips_per_second: float


class TooLarge(Exception):
    """Signals that a program needs more memory than a chip has."""


def compile_steps(
    config: Any, topology: str, per_chip_batch: int, steps: tuple[str, ...] = ("train", "eval")
) -> list[StepReport]:
    """Compile the steps of `config` for `topology`.

    Args:
      config: configuration of a run; the batch sizes are replaced in a copy.
      topology: such as "v5e:4x4".
      per_chip_batch: clips per chip in training; in evaluation as many views, rounded up to whole
        videos.
      steps: "train", "eval" or both.

    Raises:
      ValueError: there is no such slice, or the batch is not divisible as the config asks.
      TooLarge: a step does not fit the chip's memory.
    """
    chip, devices = describe_topology(topology)
    config = copy.deepcopy(config)
    mesh = sharding.make_mesh(config.mesh.fsdp, devices)
    views = config.eval.temporal_views * config.eval.spatial_crops
    videos = -(-per_chip_batch // views)
    config.data.batch_size = per_chip_batch * mesh.size
    config.eval.batch_size = videos * mesh.size
    check_values(config)
    sharding.check_batch_sizes(config, mesh.size)
    clips = {"train": per_chip_batch, "eval": videos * views}
    makers = {"train": _train_program, "eval": _eval_program}
    reports = []
    for step in steps:
        jitted, arguments, macs = makers[step](config, mesh)
        with sharding.with_mesh(mesh):
            lowered = jitted.lower(*arguments)
        reports.append(_compile_and_report(step, clips[step], chip, lowered, macs))
    return reports


def _with_shardings(tree: Any, shardings: Any) -> Any:
    """Add shardings to the abstract arrays of a tree."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings
    )


def _abstract_experiment(config: Any, mesh: Any) -> AbstractExperiment:
    """Describe a run whose arrays have the shardings of `mesh`."""
    num_classes = dataset_registry.NUM_CLASSES.get(
        config.data.source, dataset_registry.PLACEHOLDER_NUM_CLASSES
    )
    abstract = build_abstract(config, num_classes, steps_per_epoch=100.0)
    frozen_shardings = sharding.fsdp_sharding(abstract.frozen, mesh)
    return dataclasses.replace(
        abstract,
        state=_with_shardings(abstract.state, state_shardings(abstract.state, mesh)),
        frozen=_with_shardings(abstract.frozen, frozen_shardings),
    )


def _abstract_batch(
    config: Any, mesh: Any, lead: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Describe a batch of the pipeline with the leading axes `lead`: [B] or [videos, views]."""
    shapes = {"label": (lead[:1], jnp.int32), "mask": (lead[:1], jnp.float32)}
    for key, shape in zip(("spatial", "temporal"), clip_shapes(config), strict=True):
        if shape is not None:
            shapes[key] = ((*lead, *shape[1:]), jnp.uint8)
    layers = config.data.randaugment_layers
    if layers and len(lead) == 1:
        shapes["ops"] = ((*lead, layers), jnp.int32)
        shapes["op_values"] = ((*lead, layers), jnp.float32)
        shapes["tables"] = ((*lead, 3, 256), jnp.uint8)
    rows = sharding.batch_sharding(mesh)
    return {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for key, (shape, dtype) in shapes.items()
    }


def _train_program(config: Any, mesh: Any) -> tuple[Callable, tuple[Any, ...], int]:
    """Return the jitted training step, its arguments and the multiply-accumulates on a chip."""
    abstract = _abstract_experiment(config, mesh)
    module, state = abstract.model.module, abstract.state
    jitted = jit_train_step(module, config, abstract.optimizer, mesh, state)
    unsharded = make_train_step(module, config, abstract.optimizer)
    batch = _abstract_batch(config, mesh, (config.data.batch_size,))
    macs = efficiency.count_macs(unsharded, state, abstract.frozen, batch) // mesh.size
    return jitted, (state, abstract.frozen, batch), macs


def _eval_program(config: Any, mesh: Any) -> tuple[Callable, tuple[Any, ...], int]:
    """Return the jitted evaluation step, its arguments and the multiply-accumulates on a chip."""
    abstract = _abstract_experiment(config, mesh)
    module = abstract.model.module
    step = evaluate.make_eval_step(module, config)
    jitted = evaluate.jit_eval_step(module, config, mesh)
    views = config.eval.temporal_views * config.eval.spatial_crops
    batch = _abstract_batch(config, mesh, (config.eval.batch_size, views))
    arguments = (abstract.state.trainable, abstract.frozen, batch)
    return jitted, arguments, efficiency.count_macs(step, *arguments) // mesh.size


def _compile_and_report(
    step: str, clips: int, chip: Chip, lowered: jax.stages.Lowered, macs: int
) -> StepReport:
    """Compile a lowered step and report its requirements.

    Raises:
      TooLarge: the step does not fit the chip's memory.
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = _MEMORY_NEEDED.search(str(error))
        needs = f"{match[1]} {match[2]}B of {match[3]} {match[4]}B" if match else "too much memory"
        raise TooLarge(f"the {step} step with {clips} clips on a chip needs {needs}") from None
    compile_seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    program = hlo_cost.HloProgram(compiled.as_text())
    bytes_accessed = program.bytes_accessed()
    time_needed = max(2 * macs / (chip.tflops * 1e12), bytes_accessed / (chip.bandwidth * 1e9))
    return StepReport(
        step=step,
        per_chip_batch=clips,
        compile_seconds=compile_seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=2 * macs,
        bytes_accessed=bytes_accessed,
        cycles=program.cycles(),
        collectives=program.collectives(),
        clips_per_second=clips / time_needed,
    )


def find_largest_batch(
    config: Any, topology: str, start: int, log: Callable[[str], None] = print
) -> tuple[int, list[StepReport]]:
    """Find the largest number of training clips on a chip that fits.

    It is a power of two or 1.5 times a power of two. The search doubles `start` while it fits, or
    halves it until it fits, and then tries 1.5 times the result.

    Returns:
      (clips on a chip, the report of their training step in a list).

    Raises:
      TooLarge: one clip does not fit.
    """
    fits: dict[int, list[StepReport] | None] = {}

    def reports(size: int) -> list[StepReport] | None:
        if size not in fits:
            try:
                fits[size] = compile_steps(config, topology, size, ("train",))
            except TooLarge as error:
                if size == 1:
                    raise
                fits[size] = None
                log(str(error))
            else:
                log(f"{size} clips on a chip fit: {fits[size][0].peak / 1e9:.2f} GB")
        return fits[size]

    size = start
    while reports(size) is None:
        size = max(1, size // 2)
    while reports(2 * size) is not None:
        size *= 2
    if size > 1 and size % 2 == 0 and reports(3 * size // 2) is not None:
        size = 3 * size // 2
    return size, fits[size]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Holds an estimate of how many clips fit a device.

    Attributes:
      memory: the device's memory, 10^9 bytes.
      clips: the largest power of two that fits the device; 0 if not even one clip fits.
      accumulation_steps: on one device, by batch size.
    """

    memory: float
    clips: int
    accumulation_steps: dict[int, int]


def largest_power_of_two(compiled: dict[int, int], memory: float) -> int:
    """Estimate by linear extrapolation how many clips fit `memory` bytes, a power of two.

    Args:
      compiled: required bytes of two batch sizes, the smaller one first.
      memory: bytes of the device.

    Returns:
      The number of clips; 0 if not even one clip fits.
    """
    (few, few_bytes), (many, many_bytes) = compiled.items()
    bytes_per_clip = (many_bytes - few_bytes) / (many - few)
    clips = few + (memory - few_bytes) / bytes_per_clip
    return 2 ** math.floor(math.log2(clips)) if clips >= 1 else 0


# Of a device's memory; the runtime and fragmentation take the rest.
USABLE_FRACTION = 0.92


def estimate_fits(
    small: StepReport, large: StepReport, memories: Sequence[float], batches: Sequence[int]
) -> list[Fit]:
    """Estimate how many clips fit devices, from the reports of two batch sizes.

    Args:
      small: report of the training step with the smaller batch.
      large: report of the training step with the larger batch.
      memories: memories of the devices, 10^9 bytes.
      batches: batch sizes, powers of two, whose accumulation steps are computed.

    Raises:
      ValueError: a batch is not a power of two.
    """
    for batch in batches:
        if batch < 1 or batch & (batch - 1):
            raise ValueError(f"a batch of {batch} is not a power of two")
    compiled = {report.per_chip_batch: report.peak for report in (small, large)}
    rows = []
    for memory in memories:
        clips = largest_power_of_two(compiled, USABLE_FRACTION * memory * 1e9)
        steps = {batch: max(1, batch // clips) for batch in batches} if clips else {}
        rows.append(Fit(memory, clips, steps))
    return rows


def format_fits(rows: Sequence[Fit], batches: Sequence[int]) -> str:
    """Format estimates as a Markdown table."""
    heads = [f"`accumulation_steps` for {batch}" for batch in batches]
    lines = [
        "| ".join(["", "memory of a device, GB ", "clips per device ", *(f"{h} " for h in heads)])
        + "|",
        "|" + "---|" * (2 + len(batches)),
    ]
    for row in rows:
        steps = [str(row.accumulation_steps.get(batch, "none fits")) for batch in batches]
        lines.append(f"| {row.memory:g} | {row.clips} | {' | '.join(steps)} |")
    return "\n".join(lines)


def format_reports(topology: str, reports: list[StepReport]) -> str:
    """Format reports as a Markdown table; GB are 10^9 bytes."""
    lines = [
        "| slice | step | clips per chip | memory per chip, GB | temporaries per clip, GB | "
        "TFLOP | GB accessed | cycles, 10^6 | between chips, MB | compiled in | "
        "clips/s per chip, estimate |",
        "|" + "---|" * 11,
    ]
    for report in reports:
        traffic = ", ".join(f"{c.bytes / 1e6:.2f} {c.kind} {c.dtype}" for c in report.collectives)
        lines.append(
            f"| {topology} | {report.step} | {report.per_chip_batch} | {report.peak / 1e9:.2f} | "
            f"{report.temporaries / report.per_chip_batch / 1e9:.3f} | "
            f"{report.flops / 1e12:.2f} | {report.bytes_accessed / 1e9:.1f} | "
            f"{report.cycles / 1e6:.0f} | {traffic or 'none'} | {report.compile_seconds:.0f} s | "
            f"{report.clips_per_second:.0f} |"
        )
    return "\n".join(lines)

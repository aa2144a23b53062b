"""Training and evaluation steps compiled for a TPU slice, on a machine without one.

Public: `Chip`, `CHIPS`, `describe_topology`, `compile_steps`, `StepReport`, `largest_batch`, `format_reports`,
`Fit`, `estimate_fits`, `format_fits`.

The programs are those of a run: the same functions, shardings and donations. libtpu compiles for a
described slice (`jax.experimental.topologies`) and tells what a program needs; nothing is run.
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
from dualpath_jax.config.ranges import check_ranges
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.abstract import AbstractModel, abstract_model, clip_shapes
from dualpath_jax.training import sharding
from dualpath_jax.training.optimizer import make_optimizer, make_schedule
from dualpath_jax.training.state import TrainState, abstract_state, state_shardings
from dualpath_jax.training.step import jit_train_step, make_train_step
from scripts.benchmarks import hlo_cost


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one TPU chip, as cloud.google.com/tpu/docs/system-architecture-tpu-vm states.

    Attributes:
      memory: GiB of HBM.
      tflops: 10^12 operations per second in bfloat16.
      bandwidth: 10^9 bytes per second of its HBM.
      options: what libtpu wants to know besides the slice.
    """

    memory: int
    tflops: float
    bandwidth: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    "v4": Chip(32, 275, 1200, {"chip_config_name": "megacore"}),  # else each core a device
    "v5e": Chip(16, 197, 800),
    "v5p": Chip(95, 459, 2765),
    "v6e": Chip(32, 918, 1600),
}
_NEEDS = re.compile(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm")


def describe_topology(topology: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice, as "v5e:4x4".

    Raises:
      ValueError: there is no such slice, or libtpu is missing.
    """
    kind = topology.split(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ValueError(
            f"--topology={topology!r} must be a kind and its chips, as v5e:4x4; known kinds are "
            f"{', '.join(CHIPS)}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    chip = CHIPS[kind]
    try:
        return chip, topologies.get_topology_desc(topology, "tpu", **chip.options).devices
    except (RuntimeError, NotImplementedError) as error:
        if "lockfile" in str(error):
            raise ValueError(
                "another process uses libtpu: wait for its end, or let several use it by "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from error
        if "libtpu" in str(error) or "Unknown" in str(error) or "not found" in str(error):
            raise ValueError(
                "libtpu is not installed: pip install -r requirements-tpu.txt"
            ) from error
        raise ValueError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Of a compiled step, for one chip.

    Attributes:
      step: "train" or "eval".
      per_chip_batch: clips (views, in evaluation) on a chip.
      compile_seconds: on this machine.
      arguments, temporaries: bytes of the chip's memory that each are given.
      peak: bytes of it at the fullest moment, arguments included. It decides whether a step fits:
        temporaries are given more than is needed at once.
      flops: two for each multiply-accumulate of matrix products and convolutions that are executed.
      bytes_accessed: of the chip's memory, see `hlo.Program.bytes_accessed`.
      cycles: of the chip, the compiler's own estimates for each instruction, added; each branch of
        what is drawn (RandAugment's operations) counts. To compare programs for one kind of chip.
      collectives: traffic between chips.
      clips_per_second: roofline estimate for one chip: the longer of `flops` at the chip's peak and
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
    """A program needs more memory than a chip has."""


def compile_steps(
    config: Any, topology: str, per_chip_batch: int, steps: tuple[str, ...] = ("train", "eval")
) -> list[StepReport]:
    """Compile the steps of `config` for `topology`.

    Args:
      config: of a run; its batch sizes are replaced.
      topology: as "v5e:4x4".
      per_chip_batch: clips per chip in training; in evaluation as many views, rounded up to whole
        videos.

    Raises:
      ValueError: no such slice; the batch does not divide.
      TooLarge: a step does not fit the chip's memory.
    """
    chip, devices = describe_topology(topology)
    config = copy.deepcopy(config)
    mesh = sharding.make_mesh(config.mesh.fsdp, devices)
    views = config.eval.temporal_views * config.eval.spatial_crops
    videos = -(-per_chip_batch // views)
    config.data.batch_size = per_chip_batch * mesh.size
    config.eval.batch_size = videos * mesh.size
    check_ranges(config)
    sharding.check_batch_sizes(config, mesh.size)
    clips = {"train": per_chip_batch, "eval": videos * views}
    makers = {"train": _train_program, "eval": _eval_program}
    reports = []
    for step in steps:
        jitted, arguments, macs = makers[step](config, mesh)
        with sharding.with_mesh(mesh):
            lowered = jitted.lower(*arguments)
        reports.append(_report(step, clips[step], chip, lowered, macs))
    return reports


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings
    )


def _abstract_experiment(config: Any, mesh: Any) -> tuple[AbstractModel, Any, TrainState, Any]:
    """(model, optimizer, state, frozen weights), without values, as `run.build_run` makes them."""
    num_classes = dataset_registry.NUM_CLASSES.get(
        config.data.source, dataset_registry.UNKNOWN_CLASSES
    )
    model = abstract_model(config, num_classes)
    dtype = method_registry.compute_dtype(config)
    schedule = make_schedule(config.optimizer, 1000, 100.0)
    optimizer = make_optimizer(config.optimizer, schedule, model.mask)
    state, frozen = abstract_state(model, optimizer)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), frozen)
    state = _placed(state, state_shardings(state, mesh))
    return model, optimizer, state, _placed(frozen, sharding.fsdp_sharding(frozen, mesh))


def _batch(config: Any, mesh: Any, lead: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Clips as the pipeline gives them, with the leading axes `lead` ([B], or videos and views)."""
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
    """(jitted function, its arguments, multiply-accumulates on a chip)."""
    model, optimizer, state, frozen = _abstract_experiment(config, mesh)
    jitted = jit_train_step(model.model, config, optimizer, mesh, state)
    alone = make_train_step(model.model, config, optimizer)
    batch = _batch(config, mesh, (config.data.batch_size,))
    macs = efficiency.count_macs(alone, state, frozen, batch) // mesh.size
    return jitted, (state, frozen, batch), macs


def _eval_program(config: Any, mesh: Any) -> tuple[Callable, tuple[Any, ...], int]:
    """(jitted function, its arguments, multiply-accumulates on a chip)."""
    model, _, state, frozen = _abstract_experiment(config, mesh)
    step = evaluate.make_eval_step(model.model, config)
    jitted = evaluate.jit_eval_step(model.model, config, mesh)
    views = config.eval.temporal_views * config.eval.spatial_crops
    batch = _batch(config, mesh, (config.eval.batch_size, views))
    arguments = (state.trainable, frozen, batch)
    return jitted, arguments, efficiency.count_macs(step, *arguments) // mesh.size


def _report(
    step: str, clips: int, chip: Chip, lowered: jax.stages.Lowered, macs: int
) -> StepReport:
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = _NEEDS.search(str(error))
        needs = f"{match[1]} {match[2]}B of {match[3]} {match[4]}B" if match else "too much memory"
        raise TooLarge(f"the {step} step with {clips} clips on a chip needs {needs}") from None
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    program = hlo_cost.HloProgram(compiled.as_text())
    bytes_accessed = program.bytes_accessed()
    time_needed = max(2 * macs / (chip.tflops * 1e12), bytes_accessed / (chip.bandwidth * 1e9))
    return StepReport(
        step=step,
        per_chip_batch=clips,
        compile_seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=2 * macs,
        bytes_accessed=bytes_accessed,
        cycles=program.cycles(),
        collectives=program.collectives(),
        clips_per_second=clips / time_needed,
    )


def largest_batch(
    config: Any, topology: str, start: int, tell: Callable[[str], None] = print
) -> tuple[int, list[StepReport]]:
    """The largest number of training clips on a chip that fits, and its compilation.

    A power of two or 1.5 times one: batches are made of such. From `start` on it is doubled while
    it fits, or halved until it does; then what is half-way is tried.

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
                tell(str(error))
            else:
                tell(f"{size} clips on a chip fit: {fits[size][0].peak / 1e9:.2f} GB")
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
    """What fits a device by the line through the memory of two compiled batches: an estimate.

    Attributes:
      memory: 10^9 bytes that the device has.
      clips: per device, the largest power of two that fits; 0: not one.
      accumulation_steps: by batch size, on one device.
    """

    memory: float
    clips: int
    accumulation_steps: dict[int, int]


def largest_power_of_two(compiled: dict[int, int], memory: float) -> int:
    """The batch that fits `memory` bytes by the line through two batches' bytes; 0: not one."""
    (few, least), (many, most) = compiled.items()
    slope = (most - least) / (many - few)
    room = few + (memory - least) / slope
    return 2 ** math.floor(math.log2(room)) if room >= 1 else 0


USABLE = 0.92  # of a device's memory; the rest is the runtime's, and fragments


def estimate_fits(
    small: StepReport, large: StepReport, memories: Sequence[float], batches: Sequence[int]
) -> list[Fit]:
    """For devices with `memories`, 10^9 bytes, and batches of powers of two.

    Raises:
      ValueError: a batch is not a power of two.
    """
    for batch in batches:
        if batch < 1 or batch & (batch - 1):
            raise ValueError(f"a batch of {batch} is not a power of two")
    compiled = {report.per_chip_batch: report.peak for report in (small, large)}
    rows = []
    for memory in memories:
        clips = largest_power_of_two(compiled, USABLE * memory * 1e9)
        steps = {batch: max(1, batch // clips) for batch in batches} if clips else {}
        rows.append(Fit(memory, clips, steps))
    return rows


def format_fits(rows: Sequence[Fit], batches: Sequence[int]) -> str:
    """A table for people."""
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
    """A table for people; GB are 10^9 bytes."""
    lines = [
        "| slice | step | clips per chip | memory per chip, GB | temporaries per clip, GB | "
        "TFLOP | GB accessed | cycles, 10^6 | between chips, MB | compiled in | "
        "clips/s per chip, estimate |",
        "|" + "---|" * 11,
    ]
    for one in reports:
        traffic = ", ".join(f"{c.bytes / 1e6:.2f} {c.kind} {c.dtype}" for c in one.collectives)
        lines.append(
            f"| {topology} | {one.step} | {one.per_chip_batch} | {one.peak / 1e9:.2f} | "
            f"{one.temporaries / one.per_chip_batch / 1e9:.3f} | {one.flops / 1e12:.2f} | "
            f"{one.bytes_accessed / 1e9:.1f} | {one.cycles / 1e6:.0f} | "
            f"{traffic or 'none'} | {one.compile_seconds:.0f} s | {one.clips_per_second:.0f} |"
        )
    return "\n".join(lines)

"""Speed and memory of DualPath's forward pass and training step, beside PyTorch and the limit.

Public: `Setting`, `compare_frameworks`, `largest_difference`, `compile_seconds`, `peak_memory`,
`matmul_gflops`; the command line is scripts/benchmark_step.py.

Both frameworks get the same weights and the same clips, and their logits are compared before
anything is timed. They take turns, each in a process of its own, as it is used: in one, PyTorch
would find the memory that ours keeps between steps, and threads of both would be in each other's
way. Ratios are medians over rounds of what was measured in the same round. On a GPU each measures
several calls in a row, as in a training, and float32 is what JAX makes of it there, products in
TF32, in both; the logits are compared in full float32.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import gc
import io
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

with contextlib.suppress(ImportError):
    # Of PyTorch's builds for GPUs. First imported after TensorFlow, as PyTorch's optimizers do, it
    # ends the process (Triton 3.7, TensorFlow 2.21).
    import triton  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental.compilation_cache import compilation_cache

from dualpath_jax.analysis import efficiency
from dualpath_jax.data import synthetic
from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import abstract_inputs, abstract_model, clip_shapes
from dualpath_jax.models.backbones import layers
from dualpath_jax.models.methods import dualpath
from dualpath_jax.runtime import environment
from dualpath_jax.training import experiment, sharding
from dualpath_jax.training.step import make_train_step
from scripts.benchmarks.interleave import time_interleaved
from scripts.benchmarks.torch_dualpath import TorchDualPath

NUM_CLASSES = 174
TOLERANCE = 1e-4  # of the logits in float32
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      config: of a run with `model.method` "dualpath" on a CLIP ViT.
      dtype: "float32" or "bfloat16", of the computation; what trains is float32.
      batch_size: B clips.
      calls: of forward pass or step in a row, for which is waited at the end alone.
    """

    config: Any
    dtype: str
    batch_size: int
    calls: int = 1


@dataclasses.dataclass
class Side:
    """One framework, ready to run: each waits for the last result of so many calls and gives it."""

    forward: Callable[..., np.ndarray]  # (calls=1) -> logits [B, classes] float32
    train_step: Callable[..., float]  # (calls=1) -> loss


def _in_a_row(call: Callable[[], Any], fetch: Callable[[Any], Any]) -> Callable[..., Any]:
    """`call` once or several times, then `fetch` of what the last gave."""

    def run(calls: int = 1) -> Any:
        for _ in range(calls):
            result = call()
        return fetch(result)

    return run


def build_random_experiment(
    setting: Setting,
) -> tuple[experiment.Experiment, dict[str, np.ndarray]]:
    """A run with random weights, none of them zero, and a batch of random clips; no files."""
    config = setting.config.copy_and_resolve_references()
    config.model.dtype, config.data.batch_size = setting.dtype, setting.batch_size
    config.eval.batch_size = setting.batch_size
    config.data.synthetic, config.data.randaugment_layers = True, 0
    config.data.erasing_probability, config.num_train_steps = 0.0, 1000
    videos = synthetic.make_synthetic_split(config.data, setting.batch_size)
    videos.class_names = [str(i) for i in range(NUM_CLASSES)]
    environment.disable_async_dispatch()  # as a run does
    with contextlib.redirect_stdout(io.StringIO()):  # the table of parameters
        made = experiment.build_experiment(config, "", videos)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32), made.state.trainable
    )
    made.state = made.state.replace(
        trainable=jax.device_put(trainable, sharding.replicated_sharding(made.mesh))
    )
    batch = {"label": rng.integers(0, NUM_CLASSES, setting.batch_size).astype(np.int32)}
    for key, shape in zip(("spatial", "temporal"), clip_shapes(config), strict=True):
        batch[key] = rng.integers(0, 256, (setting.batch_size, *shape[1:]), dtype=np.uint8)
    return made, batch


def _jitted_step(made: experiment.Experiment) -> Callable:
    step = make_train_step(made.model, made.config, made.optimizer)
    return jax.jit(step, donate_argnums=0)


def _lowered_step(setting: Setting) -> jax.stages.Lowered:
    made, batch = build_random_experiment(setting)
    return _jitted_step(made).lower(made.state, made.frozen, sharding.shard_batch(batch, made.mesh))


def jax_side(made: experiment.Experiment, batch: dict[str, np.ndarray]) -> Side:
    """This package: the real training step, and the model of evaluation on one view."""
    config, step = made.config, _jitted_step(made)
    placed = sharding.shard_batch(batch, made.mesh)

    @jax.jit
    def forward(trainable, frozen, batch):
        params = param_tree.merge(trainable, frozen)
        return forward.clip_logits(made.model, config, params, batch)

    state = jax.tree.map(jnp.copy, made.state)

    def train_step() -> jax.Array:
        nonlocal state
        state, metrics = step(state, made.frozen, placed)
        return metrics["loss"]

    return Side(
        _in_a_row(lambda: forward(made.state.trainable, made.frozen, placed), np.asarray),
        _in_a_row(train_step, float),
    )


def torch_model(made: experiment.Experiment) -> TorchDualPath:
    """PyTorch's model with the weights of a run, frozen ones in the run's dtype."""
    merged = param_tree.merge(made.state.trainable, made.frozen)
    arrays = {k: np.asarray(v, np.float32) for k, v in param_tree.flatten(merged).items()}
    position = made.model.apply({"params": merged}, method=dualpath.DualPath._temporal_positions)
    model = TorchDualPath(
        arrays, np.asarray(position, np.float32), made.model.config.heads, made.model.config.eps
    )
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(_TORCH_DTYPES[made.config.model.dtype])
    return model


def torch_device() -> str:
    """Where PyTorch computes: on a GPU if JAX does."""
    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError("JAX has a GPU and this PyTorch has none: install its CUDA build")
    return "cuda"


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """In it, GPUs compute products of float32 in float32 instead of TF32, in both frameworks."""
    if torch_device() == "cpu":
        yield
        return
    _use_tf32(False)
    try:
        with layers.full_precision():
            yield
    finally:
        _use_tf32(True)


def _use_tf32(use: bool) -> None:
    """Of PyTorch on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use


def torch_side(
    made: experiment.Experiment, batch: dict[str, np.ndarray], compiled: bool = False
) -> Side:
    """PyTorch: AdamW on what trains, autocast where the computation is bfloat16.

    `compiled`: by `torch.compile`, each model whole.
    """
    device = torch_device()
    _use_tf32(True)  # as JAX does
    config = made.config
    model, trained = (torch_model(made).to(device) for _ in range(2))
    dtype = _TORCH_DTYPES[config.model.dtype]
    trainable = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=config.optimizer.weight_decay)
    if compiled:
        model, trained = torch.compile(model), torch.compile(trained)
    placed = {k: torch.tensor(v, device=device) for k, v in batch.items()}
    label = placed["label"].long()
    mean, std = (
        torch.tensor(config.data[k], device=device)[:, None, None] for k in ("mean", "std")
    )

    def run_model(model: TorchDualPath) -> torch.Tensor:
        images = [placed[k].permute(0, 1, 4, 2, 3) for k in ("spatial", "temporal")]
        images = [((x.float() / 255 - mean) / std).to(dtype) for x in images]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(*images).float()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run_model(model)

    def train_step() -> torch.Tensor:
        optimizer.zero_grad()
        smoothing = config.optimizer.label_smoothing
        logits = run_model(trained)
        loss = torch.nn.functional.cross_entropy(logits, label, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Side(
        _in_a_row(forward, lambda logits: logits.cpu().numpy()),
        _in_a_row(train_step, lambda loss: loss.item()),
    )


SIDES: dict[str, Callable[[experiment.Experiment, dict[str, np.ndarray]], Side]] = {
    "jax": jax_side,
    "torch": torch_side,
    "torch_compiled": functools.partial(torch_side, compiled=True),
}
USUAL_SIDES = ("jax", "torch")


def compare_frameworks(
    setting: Setting,
    rounds: int,
    sides: Sequence[str] = USUAL_SIDES,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Frameworks in turn.

    Args:
      setting: what is measured.
      rounds: times each is measured.
      sides: names of `SIDES`, "jax" among them.
      tell: told what is being done.

    Returns:
      {"largest_difference": of the logits; "forward" and "train_step": {by name of `sides`: median
      seconds of a call; for each but "jax", "ratio_vs_torch" or "ratio_vs_torch_compiled": its
      seconds over ours, the median of the rounds'; "gflops": 10^9 operations of a plain forward
      pass, or of that and its backward pass, two for each multiply-accumulate, over our seconds}}.

    Raises:
      RuntimeError: the logits differ by more than `TOLERANCE` in float32.
    """
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(_process(_start, setting, name)) for name in sides}
        logits = {}
        for name, process in processes.items():
            tell(f"{name}: compiling")
            logits[name] = process.submit(_logits, setting.dtype).result()
        ours, others = logits.pop("jax"), logits
        differences = (largest_difference(setting.dtype, ours, x) for x in others.values())
        result: dict[str, Any] = {"largest_difference": max(differences, default=0.0)}
        for what, operations in zip(("forward", "train_step"), _operations(setting), strict=True):
            runs = {
                name: lambda calls, process=process, what=what: process.submit(
                    _run, what, calls
                ).result()
                for name, process in processes.items()
            }
            seconds = _seconds_of_a_call(
                runs, setting.calls, rounds, lambda line, what=what: tell(f"{what}: {line}")
            )
            result[what] = {name: statistics.median(values) for name, values in seconds.items()}
            for name in others:
                pairs = zip(seconds[name], seconds["jax"], strict=True)
                result[what][f"ratio_vs_{name}"] = statistics.median(a / b for a, b in pairs)
            result[what]["gflops"] = operations / 1e9 / result[what]["jax"]
    return result


def _seconds_of_a_call(
    runs: dict[str, Callable[[int], Any]],
    calls: int,
    rounds: int,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """As `take_turns`, where each of `runs` is asked for so many calls in a row."""
    in_a_row = {name: functools.partial(run, calls) for name, run in runs.items()}
    seconds = time_interleaved(in_a_row, rounds, tell)
    return {name: [value / calls for value in values] for name, values in seconds.items()}


def largest_difference(dtype: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of logits computed in `dtype`; raises RuntimeError as `compare_frameworks` does."""
    difference = float(np.abs(ours - theirs).max())
    if dtype == "float32" and difference > TOLERANCE:
        raise RuntimeError(f"PyTorch's logits differ by {difference:.2e}, more than {TOLERANCE}")
    return difference


def _process(start: Callable | None = None, *arguments: Any) -> concurrent.futures.Executor:
    """One more process, which calls `start` with `arguments` first."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, start, arguments)


# What follows runs in a process of `compare_frameworks`, which has one framework.


def _start(setting: Setting, name: str) -> None:
    """One step, which compiles, and what a run of ours does after its first."""
    global _side
    _side = SIDES[name](*build_random_experiment(setting))
    _side.train_step()
    if name == "jax":
        environment.keep_freed_memory()


def _logits(dtype: str) -> np.ndarray:
    with full_precision() if dtype == "float32" else contextlib.nullcontext():
        return _side.forward()


def _run(what: str, calls: int) -> None:
    getattr(_side, what)(calls)


def _operations(setting: Setting) -> tuple[int, int]:
    """Of the plain model on a batch, two per multiply-accumulate: forward; forward and backward."""
    config = setting.config.copy_and_resolve_references()
    config.model.cls_token_only, config.model.remat = False, "none"
    config.model.dtype = (
        "float32"  # all products are counted so, see `efficiency.measure_efficiency`
    )
    model = abstract_model(config, NUM_CLASSES)
    trainable, frozen = param_tree.split(model.params, model.mask)

    def loss(trainable, frozen, *inputs):
        params = param_tree.merge(trainable, frozen)
        return model.model.apply({"params": params}, *inputs).sum()

    arguments = trainable, frozen, *abstract_inputs(config)
    counts = (efficiency.count_macs(f, *arguments) for f in (loss, jax.grad(loss)))
    return tuple(2 * setting.batch_size * count for count in counts)


def matmul_gflops(dtype: str, size: int | None = None, rounds: int = 5) -> float:
    """10^9 operations per second of a square matrix product: the faster framework's median.

    `size`: its side; None: 2048 on a CPU, 8192 on a GPU.
    """
    device = torch_device()
    size = size or (2048 if device == "cpu" else 8192)
    _use_tf32(True)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    b = torch.randn((size, size), device=device).to(_TORCH_DTYPES[dtype])
    product = jax.jit(jnp.matmul)
    calls = 1 if device == "cpu" else 20
    runs = {
        "jax": _in_a_row(lambda: product(a, a), lambda y: y[0, 0].item()),  # waits for the result
        "torch": _in_a_row(lambda: b @ b, lambda y: y[0, 0].item()),
    }
    seconds = _seconds_of_a_call(runs, calls, rounds)
    return 2 * size**3 / 1e9 / min(statistics.median(values) for values in seconds.values())


def compile_seconds(setting: Setting) -> float:
    """To compile our training step, from its lowered form; nothing kept from before is used."""
    lowered = _lowered_step(setting)
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def peak_memory(setting: Setting, side: str) -> float:
    """MiB that a training step needs above what lies in memory between steps.

    Of one framework, a name of `SIDES`. On a CPU what the process takes (Linux), in a process of
    its own; on a GPU what XLA's compiled step asks for, or PyTorch's allocator has given out.
    """
    if torch_device() != "cpu":
        return _xla_memory(setting) if side == "jax" else _torch_memory(setting, side)
    with _process() as process:
        return process.submit(_peak_memory, setting, side).result()


def _peak_memory(setting: Setting, side: str) -> float:
    step = SIDES[side](*build_random_experiment(setting)).train_step
    for _ in range(2):
        step()  # compiles, makes the optimizer's state, and fills what the frameworks keep
    gc.collect()
    time.sleep(1)  # JAX frees in the background
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free and kept would hide the need
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _xla_memory(setting: Setting) -> float:
    asked = _lowered_step(setting).compile().memory_analysis()
    new = asked.output_size_in_bytes - asked.alias_size_in_bytes
    return (asked.temp_size_in_bytes + new) / 2**20


def _torch_memory(setting: Setting, side: str) -> float:
    step = SIDES[side](*build_random_experiment(setting)).train_step
    for _ in range(2):
        step()  # makes the optimizer's state
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _status(key: str) -> int:
    """KiB, of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

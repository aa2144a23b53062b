"""Compares speed and memory of DualPath's forward pass and training step with PyTorch's.

Both frameworks get the same weights and the same clips, and their logits are compared before
anything is timed. They are timed in turns, each in its own process: within one process PyTorch
would reuse the memory that JAX keeps between steps, and the threads of both would disturb each
other. A ratio is the median over rounds of the ratios within a round. TensorFlow and PyAV are not
needed. On a GPU a measurement contains several calls in a row, as in training, and both frameworks
compute float32 products in TF32, JAX's default there; only the logits are compared in full float32.

The command line is scripts/benchmark_step.py.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import gc
import io
import multiprocessing
import os
import pathlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

with contextlib.suppress(ImportError):
    # Part of PyTorch's GPU builds. It crashes the process if it is imported after TensorFlow, as by
    # PyTorch's optimizers (Triton 3.7, TensorFlow 2.21).
    import triton  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualpath_jax.analysis import efficiency
from dualpath_jax.data.clip_spec import normalization
from dualpath_jax.data.video_source import FrameFormat
from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import abstract_inputs, abstract_model, clip_shapes
from dualpath_jax.models.backbones import layers
from dualpath_jax.models.forward import clip_logits
from dualpath_jax.models.methods import dualpath
from dualpath_jax.runtime import environment
from dualpath_jax.training import sharding
from dualpath_jax.training.experiment import Experiment, build_experiment
from dualpath_jax.training.state import TrainState
from dualpath_jax.training.step import make_train_step
from scripts.benchmarks.interleave import time_interleaved
from scripts.benchmarks.torch_dualpath import TorchDualPath

NUM_CLASSES = 174
TOLERANCE = 1e-4  # largest absolute difference of the logits in float32
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Describes what to measure.

    Attributes:
      config: configuration with `model.method` "dualpath" on a CLIP ViT.
      dtype: compute dtype, "float32" or "bfloat16"; trainable parameters are float32.
      batch_size: B clips.
      calls: number of calls in a row in one measurement, which waits only for the last.
    """

    config: Any
    dtype: str
    batch_size: int
    calls: int = 1


class _NoVideos:
    """Stands in for a split of which no frame is read, as real ones need TensorFlow."""

    def __init__(self, num_classes: int, num_videos: int):
        self.class_names = [str(i) for i in range(num_classes)]
        self.frame_format, self.identity = FrameFormat(), {}
        self._num_videos = num_videos

    def __len__(self) -> int:
        return self._num_videos


@dataclasses.dataclass
class Runner:
    """Holds the functions that run one framework; they return the result of the last call.

    Attributes:
      forward: (calls=1) -> logits [B, classes] float32.
      train_step: (calls=1) -> loss.
    """

    forward: Callable[..., np.ndarray]
    train_step: Callable[..., float]


def _repeat(call: Callable[[], Any], fetch: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return run(calls=1), which calls `call` that often and fetches the last result."""

    def run(calls: int = 1) -> Any:
        for _ in range(calls):
            result = call()
        return fetch(result)

    return run


def build_random_experiment(
    setting: Setting,
) -> tuple[Experiment, TrainState, dict[str, np.ndarray]]:
    """Build an experiment with random nonzero weights and a batch of random clips, without files.

    Returns:
      (experiment, state, batch): the batch has uint8 "spatial" and "temporal" and int32 "label".
    """
    config = setting.config.copy_and_resolve_references()
    config.model.dtype, config.data.batch_size = setting.dtype, setting.batch_size
    config.eval.batch_size = setting.batch_size
    config.data.synthetic, config.data.randaugment_layers = True, 0
    config.data.erasing_probability, config.num_train_steps = 0.0, 1000
    videos = _NoVideos(NUM_CLASSES, setting.batch_size)
    environment.disable_async_dispatch()  # as a run does
    with contextlib.redirect_stdout(io.StringIO()):  # the table of parameters
        experiment, state = build_experiment(config, "", videos)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32),
        state.trainable,
    )
    state = state.replace(
        trainable=jax.device_put(trainable, sharding.replicated_sharding(experiment.mesh))
    )
    batch = {"label": rng.integers(0, NUM_CLASSES, setting.batch_size).astype(np.int32)}
    for key, shape in zip(("spatial", "temporal"), clip_shapes(config), strict=True):
        if shape is None:
            continue
        batch[key] = rng.integers(0, 256, (setting.batch_size, *shape[1:]), dtype=np.uint8)
    return experiment, state, batch


def _jit_step(experiment: Experiment) -> Callable:
    """Return the jitted training step (state, frozen, batch) -> (state, metrics)."""
    step = make_train_step(experiment.model, experiment.config, experiment.optimizer)
    return jax.jit(step, donate_argnums=0)


def _lower_step(setting: Setting) -> jax.stages.Lowered:
    """Lower the training step."""
    experiment, state, batch = build_random_experiment(setting)
    return _jit_step(experiment).lower(
        state, experiment.frozen, sharding.shard_batch(batch, experiment.mesh)
    )


def make_jax_runner(
    experiment: Experiment, state: TrainState, batch: dict[str, np.ndarray]
) -> Runner:
    """Make the runner of this package: its training step, and evaluation's forward pass."""
    config, step = experiment.config, _jit_step(experiment)
    placed = sharding.shard_batch(batch, experiment.mesh)

    @jax.jit
    def forward(trainable, frozen, batch):
        params = param_tree.merge(trainable, frozen)
        return clip_logits(experiment.model, config, params, batch)

    current = jax.tree.map(jnp.copy, state)

    def train_step() -> jax.Array:
        nonlocal current
        current, metrics = step(current, experiment.frozen, placed)
        return metrics["loss"]

    return Runner(
        _repeat(lambda: forward(state.trainable, experiment.frozen, placed), np.asarray),
        _repeat(train_step, float),
    )


def make_torch_model(experiment: Experiment, state: TrainState) -> TorchDualPath:
    """Make the PyTorch model with an experiment's weights; frozen ones have the compute dtype."""
    merged = param_tree.merge(state.trainable, experiment.frozen)
    arrays = {k: np.asarray(v, np.float32) for k, v in param_tree.flatten(merged).items()}
    position = experiment.model.apply(
        {"params": merged}, method=dualpath.DualPath._temporal_positions
    )
    model = TorchDualPath(
        arrays,
        np.asarray(position, np.float32),
        experiment.model.config.heads,
        experiment.model.config.eps,
    )
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(_TORCH_DTYPES[experiment.config.model.dtype])
    return model


def torch_device() -> str:
    """Return the device of PyTorch: "cuda" if JAX computes on a GPU, else "cpu".

    Raises:
      RuntimeError: JAX computes on a GPU, but PyTorch cannot.
    """
    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError("JAX has a GPU, but this PyTorch cannot use it: install its CUDA build")
    return "cuda"


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Make GPUs compute float32 products in float32 instead of TF32, in both frameworks."""
    if torch_device() == "cpu":
        yield
        return
    _set_tf32(False)
    try:
        with layers.full_precision():
            yield
    finally:
        _set_tf32(True)


def _set_tf32(use: bool) -> None:
    """Switch TF32 products of PyTorch on a GPU on or off."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use


def make_torch_runner(
    experiment: Experiment, state: TrainState, batch: dict[str, np.ndarray], compiled: bool = False
) -> Runner:
    """Make the runner of PyTorch: AdamW on the trainable parameters.

    With bfloat16 it uses autocast and flash attention.

    Args:
      experiment: gives configuration and weights.
      state: trainable weights, from `build_random_experiment`.
      batch: random clips, from `build_random_experiment`.
      compiled: compile each model by `torch.compile`.
    """
    device = torch_device()
    _set_tf32(True)  # as JAX does
    config = experiment.config
    model, trained = (make_torch_model(experiment, state).to(device) for _ in range(2))
    dtype = _TORCH_DTYPES[config.model.dtype]
    trainable = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=config.optimizer.weight_decay)
    if compiled:
        model, trained = torch.compile(model), torch.compile(trained)
    placed = {k: torch.tensor(v, device=device) for k, v in batch.items()}
    label = placed["label"].long()
    mean, std = (
        torch.tensor(color, device=device)[:, None, None] for color in normalization(config.data)
    )

    def run_model(model: TorchDualPath) -> torch.Tensor:
        images = [placed[k].permute(0, 1, 4, 2, 3) for k in ("spatial", "temporal")]
        images = [((x.float() / 255 - mean) / std).to(dtype) for x in images]
        if dtype == torch.float32:
            return model(*images).float()
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # GPUs have it in half precision only
        with torch.autocast(device, dtype), flash:
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

    return Runner(
        _repeat(forward, lambda logits: logits.cpu().numpy()),
        _repeat(train_step, lambda loss: loss.item()),
    )


RUNNERS: dict[str, Callable[[Experiment, TrainState, dict[str, np.ndarray]], Runner]] = {
    "jax": make_jax_runner,
    "torch": make_torch_runner,
    "torch_compiled": functools.partial(make_torch_runner, compiled=True),
}
DEFAULT_RUNNERS = ("jax", "torch")


PARTS = ("train_step", "forward")  # in the order in which they are compiled


def compare_frameworks(
    setting: Setting,
    rounds: int,
    frameworks: Sequence[str] = DEFAULT_RUNNERS,
    log: Callable[[str], None] = lambda line: None,
    start_limit: float | None = None,
) -> dict[str, Any]:
    """Check that the frameworks compute the same logits, then time them in turns.

    Args:
      setting: what to measure.
      rounds: number of measurements of each framework.
      frameworks: names in `RUNNERS`, "jax" among them.
      log: receives a line about each step.
      start_limit: seconds that a framework may take to start and to compile; None for no limit.

    Returns:
      {"largest_difference": of the logits; "first_call": {each of `PARTS`: {name of each framework:
      seconds of its first call, which compiles}}; "too_slow": names of the frameworks that reached
      `start_limit` and are missing from the rest; "forward" and "train_step": {name of each
      framework: median seconds of a call; for each but "jax", "ratio_vs_torch" or
      "ratio_vs_torch_compiled": ratio of its seconds to ours, the median over rounds; "gflops":
      10^9 operations of a plain forward pass, or of that and its backward pass, two for each
      multiply-accumulate, divided by our seconds}}.

    Raises:
      RuntimeError: the logits differ by more than `TOLERANCE` in float32, or "jax" reached
        `start_limit`.
    """
    result: dict[str, Any] = {"first_call": {part: {} for part in PARTS}, "too_slow": []}
    with contextlib.ExitStack() as stack:
        processes, logits = {}, {}
        for name in frameworks:
            log(f"{name}: compiling")
            process = stack.enter_context(_spawn_process())
            try:
                seconds = _start_runner(process, setting, name, start_limit)
            except TimeoutError:
                if name == "jax":
                    message = f"this package did not start and compile within {start_limit:g} s"
                    raise RuntimeError(message) from None
                result["too_slow"].append(name)
                continue
            processes[name] = process
            logits[name] = process.submit(_compute_logits, setting.dtype).result()
            for part, value in seconds.items():
                log(f"{name}: first {part} in {value:.1f} s")
                result["first_call"][part][name] = value
        ours, others = logits.pop("jax"), logits
        differences = (check_logits_agree(setting.dtype, ours, x) for x in others.values())
        result["largest_difference"] = max(differences, default=0.0)
        operations = _count_operations(setting)
        for part in PARTS:
            seconds = _time_part(part, processes, setting.calls, rounds, log)
            result[part] = {name: statistics.median(values) for name, values in seconds.items()}
            for name in others:
                pairs = zip(seconds[name], seconds["jax"], strict=True)
                result[part][f"ratio_vs_{name}"] = statistics.median(a / b for a, b in pairs)
            result[part]["gflops"] = operations[part] / 1e9 / result[part]["jax"]
    return result


def _start_runner(
    process: concurrent.futures.Executor, setting: Setting, name: str, limit: float | None
) -> dict[str, float]:
    """Make a framework's runner in a process and call it, which compiles its programs.

    Args:
      process: with one worker, which is killed when `limit` is reached.
      setting: what to measure.
      name: of the framework.
      limit: seconds for all of this; None for no limit.

    Returns:
      Seconds of the first call of each of `PARTS`.

    Raises:
      TimeoutError: the limit was reached.
    """
    end = None if limit is None else time.monotonic() + limit
    pid = process.submit(os.getpid).result()

    def run(function: Callable, *arguments: Any) -> Any:
        left = None if end is None else max(0.0, end - time.monotonic())
        return process.submit(function, *arguments).result(left)

    try:
        run(_make_runner, setting, name)
        return {part: run(_time_first_call, part) for part in PARTS}
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise


def _time_part(
    part: str,
    processes: dict[str, concurrent.futures.Executor],
    calls: int,
    rounds: int,
    log: Callable[[str], None],
) -> dict[str, list[float]]:
    """Time one of `PARTS` of all frameworks in turns: seconds per call of each round, by name."""
    runs = {
        name: lambda calls, process=process: process.submit(_run_calls, part, calls).result()
        for name, process in processes.items()
    }
    return _measure_seconds_per_call(runs, calls, rounds, lambda line: log(f"{part}: {line}"))


def _measure_seconds_per_call(
    runs: dict[str, Callable[[int], Any]],
    calls: int,
    rounds: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """Time functions of the number of calls in a row, in turns; see `time_interleaved`."""
    repeated = {name: functools.partial(run, calls) for name, run in runs.items()}
    seconds = time_interleaved(repeated, rounds, log)
    return {name: [value / calls for value in values] for name, values in seconds.items()}


def check_logits_agree(dtype: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference of logits that were computed in `dtype`.

    Raises:
      RuntimeError: the difference is more than `TOLERANCE` in float32.
    """
    difference = float(np.abs(ours - theirs).max())
    if dtype == "float32" and difference > TOLERANCE:
        raise RuntimeError(f"PyTorch's logits differ by {difference:.2e}, more than {TOLERANCE}")
    return difference


def _spawn_process() -> concurrent.futures.Executor:
    """Return an executor with one new process."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context)


# The next four functions run in a process of `compare_frameworks`, which has one framework.


def _make_runner(setting: Setting, name: str) -> None:
    """Make the process's runner."""
    global _runner, _framework
    _runner, _framework = RUNNERS[name](*build_random_experiment(setting)), name


def _time_first_call(part: str) -> float:
    """Return the seconds of the first call of one of `PARTS`."""
    start = time.perf_counter()
    getattr(_runner, part)()
    seconds = time.perf_counter() - start
    if _framework == "jax":
        environment.keep_freed_memory()  # as a run does after its first step
    return seconds


def _compute_logits(dtype: str) -> np.ndarray:
    """Return the logits, in full precision if `dtype` is float32."""
    with full_precision() if dtype == "float32" else contextlib.nullcontext():
        return _runner.forward()


def _run_calls(part: str, calls: int) -> None:
    """Run "forward" or "train_step" `calls` times."""
    getattr(_runner, part)(calls)


def _count_operations(setting: Setting) -> dict[str, int]:
    """Count operations of the plain model on a batch, two for each multiply-accumulate.

    Returns:
      {"forward": of a forward pass; "train_step": of that and its backward pass}.
    """
    config = setting.config.copy_and_resolve_references()
    config.model.cls_token_only, config.model.remat = False, "none"
    config.model.dtype = "float32"  # counts all products, see `efficiency.measure_efficiency`
    model = abstract_model(config, NUM_CLASSES)
    trainable, frozen = param_tree.split(model.params, model.mask)

    def loss(trainable, frozen, *inputs):
        params = param_tree.merge(trainable, frozen)
        return model.module.apply({"params": params}, *inputs).sum()

    arguments = trainable, frozen, *abstract_inputs(config)
    functions = {"forward": loss, "train_step": jax.grad(loss)}
    return {
        part: 2 * setting.batch_size * efficiency.count_macs(function, *arguments)
        for part, function in functions.items()
    }


def measure_matmul_gflops(dtype: str, size: int | None = None, rounds: int = 5) -> float:
    """Measure a product of square matrices in both frameworks.

    Args:
      dtype: "float32" or "bfloat16".
      size: side of the matrices; None for 2048 on a CPU and 8192 on a GPU.
      rounds: number of measurements of each framework.

    Returns:
      10^9 operations per second, the median of the faster framework.
    """
    device = torch_device()
    size = size or (2048 if device == "cpu" else 8192)
    _set_tf32(True)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    b = torch.randn((size, size), device=device).to(_TORCH_DTYPES[dtype])
    product = jax.jit(jnp.matmul)
    calls = 1 if device == "cpu" else 20
    runs = {
        "jax": _repeat(lambda: product(a, a), lambda y: y[0, 0].item()),  # waits for the result
        "torch": _repeat(lambda: b @ b, lambda y: y[0, 0].item()),
    }
    seconds = _measure_seconds_per_call(runs, calls, rounds)
    return 2 * size**3 / 1e9 / min(statistics.median(values) for values in seconds.values())


def measure_peak_memory(setting: Setting, framework: str) -> float:
    """Measure the memory in MiB that a training step needs beyond the memory between steps.

    On a CPU it is that of a new process (Linux). On a GPU it is the requirement of XLA's compiled
    step, or the memory that PyTorch's allocator hands out.

    Args:
      setting: what to measure.
      framework: a name in `RUNNERS`.
    """
    if torch_device() != "cpu":
        return (
            _compute_xla_memory(setting)
            if framework == "jax"
            else _measure_torch_memory(setting, framework)
        )
    with _spawn_process() as process:
        return process.submit(_measure_process_memory, setting, framework).result()


def _measure_process_memory(setting: Setting, framework: str) -> float:
    """Measure the rise of this process's resident memory during a step, in MiB."""
    step = RUNNERS[framework](*build_random_experiment(setting)).train_step
    for _ in range(2):
        step()  # compiles, makes the optimizer's state, and fills the frameworks' caches
    gc.collect()
    time.sleep(1)  # JAX frees in the background
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the step would reuse freed memory
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _read_proc_status("VmRSS")
    step()
    return (_read_proc_status("VmHWM") - before) / 1024


def _compute_xla_memory(setting: Setting) -> float:
    """Return the MiB that the compiled step needs for temporaries and new results."""
    sizes = _lower_step(setting).compile().memory_analysis()
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (sizes.temp_size_in_bytes + new) / 2**20


def _measure_torch_memory(setting: Setting, framework: str) -> float:
    """Measure the rise of PyTorch's GPU memory during a step, in MiB."""
    step = RUNNERS[framework](*build_random_experiment(setting)).train_step
    for _ in range(2):
        step()  # makes the optimizer's state
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _read_proc_status(key: str) -> int:
    """Read a value in KiB of this process from /proc, such as "VmRSS"."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

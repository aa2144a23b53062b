"""Measures the speed of each method's forward pass, as in the paper's Table A3.

Latency is measured on one view; throughput, only on accelerators, on the largest batch that fits.
The command line is scripts/benchmark_methods.py.
"""

import contextlib
import dataclasses
import io
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dualpath_jax.analysis import efficiency
from dualpath_jax.data import synthetic
from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import clip_shapes
from dualpath_jax.models.forward import clip_logits
from dualpath_jax.training.experiment import build_experiment
from scripts.benchmarks import tpu_aot
from scripts.benchmarks.interleave import time_interleaved

_PROBE_BATCHES = 16, 32  # batch sizes whose memory is extrapolated to larger ones


@dataclasses.dataclass(frozen=True)
class MethodSpeed:
    """Holds the measurements of one method.

    Attributes:
      num_frames: T, frames of a view.
      trainable_params: number of trainable parameters with 174 classes.
      gmacs: 10^9 executed multiply-accumulates for one view.
      latency: median seconds for one view.
      relative: ratio of the latency to `dualpath`'s, the median over rounds.
      throughput: views per second at `batch_size`; None on a CPU.
      batch_size: the largest power of two that fits; None on a CPU.
    """

    num_frames: int
    trainable_params: int
    gmacs: float
    latency: float
    relative: float
    throughput: float | None = None
    batch_size: int | None = None


def method_config(dualpath: Any, baseline: Any, method: str) -> Any:
    """Return a copy of the configuration `dualpath` for that method, of `baseline` for others.

    The copy names the method and uses synthetic data without random augmentation.
    """
    config = (dualpath if method == "dualpath" else baseline).copy_and_resolve_references()
    config.model.method = method
    config.data.synthetic, config.data.randaugment_layers = True, 0
    config.data.erasing_probability = 0.0
    return config


class ForwardPass:
    """Runs the model of evaluation with random weights on random clips, made on the device."""

    def __init__(self, config: Any):
        config = config.copy_and_resolve_references()
        config.data.batch_size = config.eval.batch_size = jax.device_count()
        videos = synthetic.make_synthetic_split(config.data, 1)
        with contextlib.redirect_stdout(io.StringIO()):  # the table of parameters
            random_experiment, state = build_experiment(config, "", videos)
        model = random_experiment.model  # without the experiment, so that its state is freed
        names = ("spatial", "temporal")
        shapes = dict(zip(names, clip_shapes(config), strict=True))
        self._shapes = {k: shape[1:] for k, shape in shapes.items() if shape is not None}
        params = state.trainable, random_experiment.frozen
        self._params = jax.device_put(params, jax.devices()[0])
        self._logits = jax.jit(
            lambda trainable, frozen, batch: clip_logits(
                model, config, param_tree.merge(trainable, frozen), batch
            )
        )

    def _compile(self, batch_size: int) -> Any:
        """Compile the forward pass for a batch size."""
        batch = {
            key: jax.ShapeDtypeStruct((batch_size, *shape), np.uint8)
            for key, shape in self._shapes.items()
        }
        return self._logits.lower(*self._params, batch).compile()

    def required_bytes(self, batch_size: int) -> int:
        """Return the device memory that the compiled program needs, with arguments and result."""
        sizes = self._compile(batch_size).memory_analysis()
        return sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes

    def make_call(self, batch_size: int) -> Callable[[], None]:
        """Return a function that computes a batch and waits for the result."""
        compiled = self._compile(batch_size)
        batch = {
            key: jax.random.randint(jax.random.key(0), (batch_size, *shape), 0, 256, np.uint8)
            for key, shape in self._shapes.items()
        }
        return lambda: jax.block_until_ready(compiled(*self._params, batch))


def find_largest_batch(forward: ForwardPass, memory: int) -> tuple[int, float]:
    """Find the largest power of two that runs in `memory` bytes.

    The search begins at a linear extrapolation from the memory of two compiled batches, and halves
    the batch until it fits.

    Returns:
      (batch size, views per second at this size).
    """
    required = {size: forward.required_bytes(size) for size in _PROBE_BATCHES}
    size = max(1, tpu_aot.largest_power_of_two(required, memory))
    while True:
        try:
            seconds = time_interleaved({"largest": forward.make_call(size)}, 5)["largest"]
            return size, size / statistics.median(seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                raise
            size //= 2


def measure_methods(
    configs: dict[str, Any], rounds: int, log: Callable[[str], None]
) -> dict[str, MethodSpeed]:
    """Measure latencies in turns, then, on an accelerator, throughputs.

    Args:
      configs: configurations of `method_config` by method; "dualpath" must be among them.
      rounds: number of measurements of each method.
      log: receives a line about each step.
    """
    calls = {method: ForwardPass(config).make_call(1) for method, config in configs.items()}
    seconds = time_interleaved(calls, rounds, log)
    latencies = {method: statistics.median(values) for method, values in seconds.items()}
    for method, latency in latencies.items():
        log(f"{method}: {1000 * latency:.2f} ms for one view")
    calls.clear()  # frees their device memory
    speeds = {}
    for method, config in configs.items():
        counts = efficiency.measure_efficiency(config)
        pairs = zip(seconds[method], seconds["dualpath"], strict=True)
        speeds[method] = MethodSpeed(
            num_frames=config.data.num_frames,
            trainable_params=counts.trainable_params,
            gmacs=counts.gmacs_per_view,
            latency=latencies[method],
            relative=statistics.median(own / base for own, base in pairs),
        )
        if jax.default_backend() != "cpu":
            log(f"{method}: largest batch")
            memory = jax.devices()[0].memory_stats()["bytes_limit"]
            size, throughput = find_largest_batch(ForwardPass(config), memory)
            log(f"{method}: {throughput:.1f} views/s of {size}")
            speeds[method] = dataclasses.replace(
                speeds[method], throughput=throughput, batch_size=size
            )
    return speeds

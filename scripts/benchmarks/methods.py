"""Speed of the forward pass of each method, as the paper's Table A3 gives it.

Public: `MethodSpeed`, `method_config`, `Forward`, `largest_batch`, `measure_methods`; the command line is
scripts/benchmark_methods.py.

Latency is that of one view; throughput, on an accelerator, that of the largest batch that fits.
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
from dualpath_jax.training import experiment
from scripts.benchmarks import tpu_aot
from scripts.benchmarks.interleave import time_interleaved

_PROBES = 16, 32  # batches whose memory is asked for


@dataclasses.dataclass(frozen=True)
class MethodSpeed:
    """Of one method.

    Attributes:
      num_frames: T, frames of a view.
      trainable_params: of 174 classes.
      gmacs: 10^9 multiply-accumulates of a view that are executed.
      latency: seconds for one view, median.
      relative: the latency over `dualpath`'s, the median of the rounds'.
      throughput: views per second at `batch_size`; on a CPU None.
      batch_size: the largest that fits, a power of two; on a CPU None.
    """

    num_frames: int
    trainable_params: int
    gmacs: float
    latency: float
    relative: float
    throughput: float | None = None
    batch_size: int | None = None


def method_config(dualpath: Any, baseline: Any, method: str) -> Any:
    """`dualpath` for that method; for others `baseline` with the method in it."""
    config = (dualpath if method == "dualpath" else baseline).copy_and_resolve_references()
    config.model.method = method
    config.data.synthetic, config.data.randaugment_layers = True, 0
    config.data.erasing_probability = 0.0
    return config


class Forward:
    """The model of evaluation with random weights, on random clips that are made on the device."""

    def __init__(self, config: Any):
        config = config.copy_and_resolve_references()
        config.data.batch_size = config.eval.batch_size = jax.device_count()
        videos = synthetic.make_synthetic_split(config.data, 1)
        with contextlib.redirect_stdout(io.StringIO()):  # the table of parameters
            made = experiment.build_experiment(config, "", videos)
        model = made.model  # of `made` nothing else is held, such as the optimizer's state
        names = ("spatial", "temporal")
        shapes = dict(zip(names, clip_shapes(config), strict=True))
        self._shapes = {k: shape[1:] for k, shape in shapes.items() if shape is not None}
        self._params = jax.device_put((made.state.trainable, made.frozen), jax.devices()[0])
        self._logits = jax.jit(
            lambda trainable, frozen, batch: clip_logits(
                model, config, param_tree.merge(trainable, frozen), batch
            )
        )

    def _compiled(self, batch_size: int) -> Any:
        batch = {
            key: jax.ShapeDtypeStruct((batch_size, *shape), np.uint8)
            for key, shape in self._shapes.items()
        }
        return self._logits.lower(*self._params, batch).compile()

    def memory(self, batch_size: int) -> int:
        """Bytes of device memory that the compiled program asks for, arguments included."""
        asked = self._compiled(batch_size).memory_analysis()
        return asked.temp_size_in_bytes + asked.argument_size_in_bytes + asked.output_size_in_bytes

    def on(self, batch_size: int) -> Callable[[], None]:
        """Each call computes a batch and waits for the end."""
        compiled = self._compiled(batch_size)
        batch = {
            key: jax.random.randint(jax.random.key(0), (batch_size, *shape), 0, 256, np.uint8)
            for key, shape in self._shapes.items()
        }
        return lambda: jax.block_until_ready(compiled(*self._params, batch))


def largest_batch(forward: Forward, memory: int) -> tuple[int, float]:
    """(the largest power of two that runs in `memory` bytes, views per second there).

    Where to begin is told by the line through the memory of two compiled batches.
    """
    compiled = {size: forward.memory(size) for size in _PROBES}
    size = max(1, tpu_aot.largest_power_of_two(compiled, memory))
    while True:
        try:
            seconds = time_interleaved({"largest": forward.on(size)}, 5)["largest"]
            return size, size / statistics.median(seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                raise
            size //= 2


def measure_methods(
    configs: dict[str, Any], rounds: int, tell: Callable[[str], None]
) -> dict[str, MethodSpeed]:
    """Latencies in turns, with "dualpath" among `configs`; then, on an accelerator, throughputs.

    Args:
      configs: by method, of `method_config`.
      rounds: times each is measured.
      tell: told what is being done.
    """
    calls = {method: Forward(config).on(1) for method, config in configs.items()}
    seconds = time_interleaved(calls, rounds, tell)
    latencies = {method: statistics.median(values) for method, values in seconds.items()}
    for method, latency in latencies.items():
        tell(f"{method}: {1000 * latency:.2f} ms for one view")
    calls.clear()  # and what they hold on the device
    speeds = {}
    for method, config in configs.items():
        counted = efficiency.measure_efficiency(config)
        pairs = zip(seconds[method], seconds["dualpath"], strict=True)
        speeds[method] = MethodSpeed(
            num_frames=config.data.num_frames,
            trainable_params=counted.trainable_params,
            gmacs=counted.gmacs_per_view,
            latency=latencies[method],
            relative=statistics.median(own / base for own, base in pairs),
        )
        if jax.default_backend() != "cpu":
            tell(f"{method}: largest batch")
            memory = jax.devices()[0].memory_stats()["bytes_limit"]
            size, throughput = largest_batch(Forward(config), memory)
            tell(f"{method}: {throughput:.1f} views/s of {size}")
            speeds[method] = dataclasses.replace(
                speeds[method], throughput=throughput, batch_size=size
            )
    return speeds

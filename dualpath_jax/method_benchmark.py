"""Speed of the forward pass of each method, as the paper's Table A3 gives it.

Public: `MethodSpeed`, `method_config`, `measure`; the command line is scripts/benchmark_methods.py.

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

from dualpath_jax import efficiency, evaluate, run
from dualpath_jax import params as params_lib
from dualpath_jax.data import synthetic
from dualpath_jax.turns import take_turns


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


def _forward(config: Any, batch_size: int) -> Callable[[], None]:
    """The model of evaluation with random weights on random clips; each call waits for the end."""
    config = config.copy_and_resolve_references()
    config.data.batch_size = config.eval.batch_size = jax.device_count()
    videos = synthetic.synthetic_split(config.data, 1)
    with contextlib.redirect_stdout(io.StringIO()):  # the table of parameters
        made = run.build_run(config, "", videos)
    rng = np.random.default_rng(0)
    batch = {
        key: jax.device_put(rng.integers(0, 256, (batch_size, *shape[1:]), dtype=np.uint8))
        for key, shape in zip(("spatial", "temporal"), run.clip_shapes(config), strict=True)
        if shape is not None
    }
    device = jax.devices()[0]
    trainable, frozen = jax.device_put((made.state.trainable, made.frozen), device)

    @jax.jit
    def forward(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        params = params_lib.merge(trainable, frozen)
        return evaluate.clip_logits(made.model, config, params, batch)

    return lambda: jax.block_until_ready(forward(trainable, frozen, batch))


def largest_batch(make: Callable[[int], Callable[[], None]]) -> tuple[int, float]:
    """(the largest power of two whose `make(size)` runs, views per second there)."""
    size, best = 1, (0, 0.0)
    while True:
        try:
            seconds = take_turns({"largest": make(size)}, 5)["largest"]
            best = size, size / statistics.median(seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or not best[0]:
                raise
            return best
        size *= 2


def measure(
    configs: dict[str, Any], rounds: int, tell: Callable[[str], None]
) -> dict[str, MethodSpeed]:
    """Latencies in turns, with "dualpath" among `configs`; then, on an accelerator, throughputs.

    Args:
      configs: by method, of `method_config`.
      rounds: times each is measured.
      tell: told what is being done.
    """
    calls = {method: _forward(config, 1) for method, config in configs.items()}
    seconds = take_turns(calls, rounds, tell)
    calls.clear()
    speeds = {}
    for method, config in configs.items():
        counted = efficiency.measure(config)
        pairs = zip(seconds[method], seconds["dualpath"], strict=True)
        speeds[method] = MethodSpeed(
            num_frames=config.data.num_frames,
            trainable_params=counted.trainable_params,
            gmacs=counted.gmacs_per_view,
            latency=statistics.median(seconds[method]),
            relative=statistics.median(own / base for own, base in pairs),
        )
        if jax.default_backend() != "cpu":
            tell(f"{method}: largest batch")
            size, throughput = largest_batch(lambda size, config=config: _forward(config, size))
            speeds[method] = dataclasses.replace(
                speeds[method], throughput=throughput, batch_size=size
            )
    return speeds

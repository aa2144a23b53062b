"""Estimates what a training will take: time from counted products, memory from shapes."""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from dualpath_jax.analysis.efficiency import count_forward_macs
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.abstract import abstract_inputs, build_backbone_config
from dualpath_jax.models.backbones.registry import BackboneConfig

_STEP_PASSES = 2.1  # multiply-accumulates of a step, in forward passes (docs/training.md)
_SHARE_OF_PEAK = 0.45  # of a large product's speed that a step reaches
_SAVED_WIDTHS = 10  # numbers saved per token and block, in widths of the tokens
_PROGRAM_BYTES = 1.2e9  # Python, JAX and TensorFlow
_MEMORY_SHARE = 0.6  # of the free memory that a training may take


@dataclasses.dataclass(frozen=True)
class Cost:
    """Holds the estimate for one training.

    Attributes:
      clip_seconds: of a training step, per clip.
      eval_seconds: of evaluating a video.
      fixed_bytes: of parameters and optimizer.
      clip_bytes: of activations, per clip that is computed at a time.
      checkpoint_bytes: of one checkpoint.
    """

    clip_seconds: float
    eval_seconds: float
    fixed_bytes: float
    clip_bytes: float
    checkpoint_bytes: float


def estimate_cost(config: Any, num_classes: int) -> Cost:
    """Estimate the cost of training `config` on this machine's devices; good to a factor of two."""
    backbone = build_backbone_config(config)
    macs, model = count_forward_macs(config, num_classes)
    dtype = method_registry.compute_dtype(config)
    forward = 2 * macs / (_SHARE_OF_PEAK * _measure_flops(dtype) * jax.device_count())
    total = param_tree.count_params(model.params)
    trainable = param_tree.count_params(param_tree.split(model.params, model.mask)[0])
    size = jnp.dtype(dtype).itemsize
    pixels = sum(x.size / 3 for x in abstract_inputs(config) if x is not None)
    tokens, depth = _tokens_and_depth(backbone, pixels)
    views = config.eval.temporal_views * config.eval.spatial_crops
    return Cost(
        clip_seconds=_STEP_PASSES * forward,
        eval_seconds=views * forward,
        fixed_bytes=total * size + 16 * trainable,
        clip_bytes=_SAVED_WIDTHS * tokens * depth * backbone.width * size,
        checkpoint_bytes=12 * trainable,
    )


def _tokens_and_depth(backbone: BackboneConfig, pixels: float) -> tuple[float, int]:
    """Return the tokens of a clip of so many pixels, and the blocks that they pass."""
    depth = getattr(backbone, "depth", None) or sum(backbone.depths)
    return pixels / backbone.patch_size**2, depth


def _measure_flops(dtype: Any) -> float:
    """Return the operations per second of a large matrix product on one device."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def available_memory() -> float:
    """Return the bytes that a training may use: of the first device, or of a CPU's free memory."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def training_bytes(cost: Cost, clips_at_a_time: int) -> float:
    """Return the memory of a training that computes so many clips at a time."""
    return _PROGRAM_BYTES + cost.fixed_bytes + clips_at_a_time * cost.clip_bytes


def fit_accumulation(config: Any, cost: Cost, memory: float) -> int:
    """Set and return accumulation steps with which a part of a batch fits the memory, or nearly.

    Each part has clips for every device, see `sharding.check_batch_sizes`.

    Args:
      config: of the training; `optimizer.accumulation_steps` is never made smaller.
      cost: of `config`.
      memory: free bytes.
    """
    clips, steps = config.data.batch_size, config.optimizer.accumulation_steps
    while (
        training_bytes(cost, clips // steps) > _MEMORY_SHARE * memory
        and clips % (2 * steps * jax.device_count()) == 0
    ):
        steps *= 2
    config.optimizer.accumulation_steps = steps
    return steps

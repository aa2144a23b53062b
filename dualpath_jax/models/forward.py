"""Computes the logits of uint8 clips as the pipeline makes them."""

from typing import Any

import jax

from dualpath_jax.models import preprocess
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.preprocess import Batch


def clip_logits(model: Any, config: Any, params: Any, clips: Batch) -> jax.Array:
    """Compute logits [B, classes] float32 of uint8 clips, one view of each video."""
    dtype = method_registry.compute_dtype(config)
    return model.apply({"params": params}, *preprocess.model_inputs(clips, config.data, dtype))


def flatten_views(batch: Batch) -> Batch:
    """Merge the views of a batch into its first axis: [B, V, ...] -> [B V, ...]."""
    inputs = [key for key in ("spatial", "temporal") if key in batch]
    return {key: batch[key].reshape(-1, *batch[key].shape[2:]) for key in inputs}


def view_logits(model: Any, config: Any, params: Any, batch: Batch) -> jax.Array:
    """Compute logits [B, V, classes] float32 of all views, see `pipeline.eval_batches`."""
    logits = clip_logits(model, config, params, flatten_views(batch))
    images = batch["spatial"] if "spatial" in batch else batch["temporal"]
    return logits.reshape(*images.shape[:2], -1)

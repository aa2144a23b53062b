"""Multi-view evaluation: every video counts once, whatever the batch and the number of devices.

Public: `evaluate`, `eval_step_sums`, `Scores`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Scores:
    """Result over a split. Accuracies are fractions in 0..1."""

    top1: float
    top5: float
    mean_class_accuracy: float  # over the classes that occur in the split
    num_videos: int


def eval_step_sums(logits: jax.Array, label: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch, from which `Scores` follow.

    Args:
      logits: [B, V, classes] float32.
      label: [B] int32.
      mask: [B] float32, 0 for padding.

    Returns:
      `top1`, `top5`: number of real videos whose label is (among the five) most probable, by the
      probabilities averaged over views; `class_correct`, `class_count`: [classes]. All int32.
    """
    probabilities = jax.nn.softmax(logits, axis=-1).mean(axis=1)
    classes = probabilities.shape[-1]
    real = mask > 0
    _, best = jax.lax.top_k(probabilities, min(5, classes))
    hit = (best == label[:, None]) & real[:, None]
    one_hot = jax.nn.one_hot(label, classes, dtype=jnp.int32)
    return {
        "top1": hit[:, 0].sum(dtype=jnp.int32),
        "top5": hit.any(axis=1).sum(dtype=jnp.int32),
        "class_correct": (one_hot * hit[:, :1]).sum(axis=0),
        "class_count": (one_hot * real[:, None]).sum(axis=0),
    }


def evaluate(
    eval_step: Callable[[dict[str, Any]], dict[str, jax.Array]],
    batches: Iterator[dict[str, Any]],
    on_batch: Callable[[int], None] = lambda videos: None,
) -> Scores:
    """Scores over `batches`.

    Args:
      eval_step: batch -> the sums of `eval_step_sums`, over all hosts.
      batches: one pass over a split, padded with mask 0.
      on_batch: told the number of videos counted so far, for progress.
    """
    total: dict[str, np.ndarray] = {}
    for batch in batches:
        sums = jax.device_get(eval_step(batch))
        total = {
            key: np.asarray(value, np.int64) + total.get(key, 0) for key, value in sums.items()
        }
        on_batch(int(total["class_count"].sum()))
    videos = int(total["class_count"].sum())
    seen = total["class_count"] > 0
    return Scores(
        top1=float(total["top1"] / videos),
        top5=float(total["top5"] / videos),
        mean_class_accuracy=float(
            np.mean(total["class_correct"][seen] / total["class_count"][seen])
        ),
        num_videos=videos,
    )

"""Builds the learning rate schedule and the optimizer of a run."""

from typing import Any

import optax

from dualpath_jax.models import param_tree


def make_schedule(optimizer: Any, num_train_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then a cosine to zero after the last step.

    Of W steps of warm-up, step i = 0, 1, ... has (i + 1) / W of the peak: no step has rate 0.

    Args:
      optimizer: `config.optimizer`; its warm-up takes at most half of the steps.
      num_train_steps: length of the training.
      steps_per_epoch: training videos / batch size.
    """
    peak = optimizer.learning_rate
    warmup = min(round(optimizer.warmup_epochs * steps_per_epoch), num_train_steps // 2)
    cosine = optax.cosine_decay_schedule(peak, max(num_train_steps - warmup, 1))
    if not warmup:
        return cosine
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, cosine], [warmup])


def make_optimizer(
    optimizer: Any, schedule: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
    """Return AdamW on the leaves where `mask` is True, with weight decay only on kernels."""
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=param_tree.decay_mask,
    )
    if optimizer.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
    return optax.masked(adamw, mask)


def count_train_steps(config: Any, steps_per_epoch: float) -> int:
    """Return the length of the training in steps.

    It is `num_train_steps` where set; else `num_epochs` in steps, at least 1 unless they are 0.
    """
    if config.num_train_steps is not None:
        return config.num_train_steps
    return max(round(config.num_epochs * steps_per_epoch), min(1, config.num_epochs))

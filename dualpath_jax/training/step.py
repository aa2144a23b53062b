"""Defines the loss and the training step.

To train with another loss, pass a function with the signature of `loss_fn` to `make_train_step`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualpath_jax.models import param_tree, preprocess
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.preprocess import Batch
from dualpath_jax.training import sharding
from dualpath_jax.training.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]
# (model, config, params, batch, dropout_rng) -> (loss, metrics), means over the batch.
LossFn = Callable[[nn.Module, Any, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
# (trainable, frozen, batch, rng) -> (metrics, gradients), means over the batch.
_GradientFn = Callable[[Any, Any, Batch, jax.Array], tuple[Metrics, Any]]


def loss_fn(
    model: nn.Module,
    config: Any,
    params: Any,
    batch: Batch,
    dropout_rng: jax.Array,
    class_weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Compute softmax cross-entropy with label smoothing, averaged over the batch.

    Args:
      model: called as `method_registry.Method.build` describes.
      config: the whole configuration.
      params: all parameters, frozen and trainable.
      batch: uint8 clips and int32 labels, see `data.pipeline`.
      dropout_rng: jax key of this step.
      class_weights: float32 [classes], factors on the losses of clips by their label; None: 1.

    Returns:
      The loss, a float32 scalar, and the metrics "loss" and "accuracy" (top-1, 0..1).
    """
    dtype = method_registry.compute_dtype(config)
    inputs = preprocess.model_inputs(batch, config.data, dtype)
    logits = model.apply({"params": params}, *inputs, dropout_rng)
    loss = cross_entropy(logits, batch["label"], config.optimizer.label_smoothing, class_weights)
    accuracy = (logits.argmax(-1) == batch["label"]).mean()
    return loss, {"loss": loss, "accuracy": accuracy}


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float, class_weights: jax.Array | None
) -> jax.Array:
    """Return the mean softmax cross-entropy of logits [B, classes] and int labels [B].

    Args:
      logits, labels: see above.
      label_smoothing: share of the target that all classes get.
      class_weights: see `loss_fn`.
    """
    target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, target)
    if class_weights is not None:
        losses *= class_weights[labels]
    return losses.mean()


def weigh_classes(config: Any, labels: np.ndarray, num_classes: int) -> jax.Array | None:
    """Return the weights of classes, float32 [classes], that `data.class_weights` asks for.

    The weight of a class with n of N training videos is N / (classes n), where only classes with
    videos count: weights average to 1 over the training videos.

    Args:
      config: the whole configuration.
      labels: int [N], of the training videos.
      num_classes: of the data set.

    Returns:
      The weights, or None if all classes weigh the same.
    """
    if config.data.class_weights == "none":
        return None
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))
    return jnp.asarray(weights, jnp.float32)


def choose_loss_fn(config: Any, labels: np.ndarray, num_classes: int) -> LossFn:
    """Return `loss_fn` with the weights of `weigh_classes`."""
    return functools.partial(loss_fn, class_weights=weigh_classes(config, labels, num_classes))


def _accumulate(compute: _GradientFn, parts: int) -> _GradientFn:
    """Return a function that runs `compute` on `parts` of the batch in turn and averages."""

    def accumulated(trainable, frozen, batch, rng):
        # Strided parts keep each row on its device: [B, ...] -> [parts, B/parts, ...].
        batch = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
        )

        def body(total, indexed_part):
            index, part = indexed_part
            new = compute(trainable, frozen, part, jax.random.fold_in(rng, index))
            return jax.tree.map(lambda a, b: a + b / parts, total, new), None

        first_part = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(compute, trainable, frozen, first_part, rng)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(body, zeros, (jnp.arange(parts), batch))[0]

    return accumulated


def make_train_step(
    model: nn.Module,
    config: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None,
    loss_fn: LossFn = loss_fn,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Return the pure update (state, frozen, batch) -> (state, metrics), to be jitted.

    Args:
      model: the Flax module.
      config: the whole configuration.
      optimizer: of `optimizer.make_optimizer`.
      mesh: its devices share the rows of the batch and average gradients in
        `optimizer.reduce_dtype`; None: one device.
      loss_fn: see `LossFn`.
    """

    def compute(trainable, frozen, batch, rng):
        def loss(trainable):
            params = param_tree.merge(trainable, frozen)
            return loss_fn(model, config, params, batch, rng)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return metrics, grads

    if config.optimizer.accumulation_steps > 1:
        compute = _accumulate(compute, config.optimizer.accumulation_steps)
    if mesh is not None and mesh.size > 1:
        compute = sharding.data_parallel_mean(compute, mesh, config.optimizer.reduce_dtype)

    def train_step(state, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        metrics, grads = compute(state.trainable, frozen, batch, rng)
        metrics["gradient_norm"] = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        new = TrainState(state.step + 1, trainable, opt_state, state.skipped)
        # A step without a finite loss and gradient changes nothing but the counters.
        if config.optimizer.max_skipped_steps:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            unchanged = state.replace(step=state.step + 1, skipped=state.skipped + 1)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, unchanged)
            metrics["skipped_steps"] = new.skipped
        return new, metrics

    return train_step


def jit_train_step(
    model: nn.Module,
    config: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    loss_fn: LossFn = loss_fn,
) -> Callable:
    """Return the jitted `make_train_step`: the new state replaces `state`, with its shardings."""
    return jax.jit(
        make_train_step(model, config, optimizer, mesh, loss_fn),
        donate_argnums=0,
        out_shardings=(state_shardings(state, mesh), sharding.replicated_sharding(mesh)),
    )

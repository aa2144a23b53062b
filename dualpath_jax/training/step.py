"""Defines the loss and the training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dualpath_jax.models import param_tree, preprocess
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.preprocess import Batch
from dualpath_jax.training import sharding
from dualpath_jax.training.sharding import replicated_sharding
from dualpath_jax.training.state import TrainState, state_shardings


def make_train_step(
    model: Any,
    config: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure update (state, frozen, batch) -> (state, metrics), to be jitted.

    Over the devices of `mesh`, if given, the rows of the batch are divided and the gradients
    averaged, in `optimizer.reduce_dtype`.
    """
    parts = config.optimizer.accumulation_steps
    dtype = method_registry.compute_dtype(config)

    def loss_fn(trainable, frozen, batch, rng):
        logits = model.apply(
            {"params": param_tree.merge(trainable, frozen)},
            *preprocess.model_inputs(batch, config.data, dtype),
            rng,
        )
        target = jax.nn.one_hot(batch["label"], logits.shape[-1])
        target = optax.smooth_labels(target, config.optimizer.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        return loss, (logits.argmax(-1) == batch["label"]).mean()

    def grads_of(trainable, frozen, batch, rng):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            trainable, frozen, batch, rng
        )
        return {"loss": loss, "accuracy": accuracy}, grads

    def accumulated(trainable, frozen, batch, rng):
        # Strided parts, so that each device keeps its own rows: [B, ...] -> [parts, B/parts, ...].
        batch = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
        )

        def body(total, part):
            index, part = part
            new = grads_of(trainable, frozen, part, jax.random.fold_in(rng, index))
            return jax.tree.map(lambda a, b: a + b / parts, total, new), None

        zeros = jax.tree.map(jnp.zeros_like, ({"loss": 0.0, "accuracy": 0.0}, trainable))
        return jax.lax.scan(body, zeros, (jnp.arange(parts), batch))[0]

    compute = grads_of if parts == 1 else accumulated
    if mesh is not None and mesh.size > 1:
        compute = sharding.data_parallel_mean(compute, mesh, config.optimizer.reduce_dtype)

    def train_step(state, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        metrics, grads = compute(state.trainable, frozen, batch, rng)
        metrics["gradient_norm"] = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        new = TrainState(state.step + 1, trainable, opt_state, state.skipped)
        if config.optimizer.max_skipped_steps:
            ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            stay = state.replace(step=state.step + 1, skipped=state.skipped + 1)
            new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, stay)
            metrics["skipped_steps"] = new.skipped
        return new, metrics

    return train_step


def jit_train_step(
    model: Any,
    config: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    state: TrainState,
) -> Callable:
    """`make_train_step`, jitted: a new state takes the place of the old and lies as it does."""
    return jax.jit(
        make_train_step(model, config, optimizer, mesh),
        donate_argnums=0,
        out_shardings=(state_shardings(state, mesh), replicated_sharding(mesh)),
    )

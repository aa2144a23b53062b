"""Defines what training changes: the state of a run."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import AbstractModel
from dualpath_jax.training import sharding


@flax.struct.dataclass
class TrainState:
    """What training changes. `trainable` has `optax.MaskedNode` in place of frozen leaves."""

    step: jax.Array  # int32 scalar, number of updates done
    trainable: Any  # float32
    opt_state: optax.OptState
    skipped: jax.Array  # int32 scalar, steps left out since loss or gradient was not finite


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """How a state lies on the devices: whole on each, but for the optimizer's along `fsdp`."""
    everywhere = jax.tree.map(lambda leaf: sharding.replicated_sharding(mesh), state)
    return everywhere.replace(opt_state=sharding.fsdp_sharding(state.opt_state, mesh))


def abstract_state(
    model: AbstractModel, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Any]:
    """A run's state and its frozen weights, both float32, without values."""
    trainable, frozen = param_tree.split(model.params, model.mask)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, model.params)
    return TrainState(count, trainable, opt_state, count), frozen

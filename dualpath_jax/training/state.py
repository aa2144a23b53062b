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
    """Holds what training changes.

    Attributes:
      step: int32 scalar, number of updates done.
      trainable: float32 parameters; `optax.MaskedNode` in place of frozen leaves.
      opt_state: state of the optimizer.
      skipped: int32 scalar, steps skipped because loss or gradient was not finite.
    """

    step: jax.Array
    trainable: Any
    opt_state: optax.OptState
    skipped: jax.Array


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Return the shardings of a state: only the optimizer's state is divided, along `fsdp`."""
    replicated = jax.tree.map(lambda leaf: sharding.replicated_sharding(mesh), state)
    return replicated.replace(opt_state=sharding.fsdp_sharding(state.opt_state, mesh))


def abstract_state(
    model: AbstractModel, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Any]:
    """Return a run's initial state and its frozen weights as shapes, both float32."""
    trainable, frozen = param_tree.split(model.params, model.mask)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, model.params)
    return TrainState(count, trainable, opt_state, count), frozen

"""Runs that differ in nothing that is compiled share their programs, so that tests end sooner."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from dualpath_jax import evaluate
from dualpath_jax.training import experiment, step

_made = {}


def _key(model, config):
    """What programs follow from; when a run saves and evaluates is not part of it."""
    config = config.copy_and_resolve_references()
    for name in ("checkpoint", "eval", "init_from", "log_every_steps", "profile", "resume_changed"):
        del config[name]
    return model, config.to_json_best_effort(sort_keys=True)


@contextlib.contextmanager
def compiling_once():
    """Inside, training and evaluation steps and fresh parameters are made once a configuration."""

    def once(module, name):
        make = getattr(module, name)

        def shared(model, config, *rest):
            key = name, *_key(model, config)
            if key not in _made:
                _made[key] = make(model, config, *rest)
            return _made[key]

        return shared

    init = once(experiment, "init_params")

    def fresh(model, config, backbone):
        return jax.tree.map(jnp.copy, init(model, config, backbone))  # a run donates its own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", once(step, "make_train_step"))
        patch.setattr(evaluate, "make_eval_step", once(evaluate, "make_eval_step"))
        patch.setattr(experiment, "init_params", fresh)
        yield

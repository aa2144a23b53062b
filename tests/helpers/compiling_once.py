"""Shares compiled programs between runs with equal programs, to make tests faster."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from dualpath_jax import evaluate
from dualpath_jax.training import experiment, step

_cache = {}


def _key(model, config):
    """Return a key that is equal for equal programs; it ignores when a run saves and evaluates."""
    config = config.copy_and_resolve_references()
    for name in ("checkpoint", "eval", "init_from", "log_every_steps", "profile", "resume_changed"):
        del config[name]
    return model, config.to_json_best_effort(sort_keys=True)


@contextlib.contextmanager
def compiling_once():
    """Make steps and initial parameters only once per configuration while the block runs."""

    def cached(module, name):
        make = getattr(module, name)

        def shared(model, config, *rest):
            key = name, *_key(model, config)
            if key not in _cache:
                _cache[key] = make(model, config, *rest)
            return _cache[key]

        return shared

    init = cached(experiment, "init_params")

    def copied_params(model, config, backbone):
        return jax.tree.map(jnp.copy, init(model, config, backbone))  # a run donates its copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", cached(step, "make_train_step"))
        patch.setattr(evaluate, "make_eval_step", cached(evaluate, "make_eval_step"))
        patch.setattr(experiment, "init_params", copied_params)
        yield

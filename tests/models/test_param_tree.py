"""Tests the rules of weight decay, and that unrolled programs copy no block's frozen weights."""

import jax
import numpy as np
import pytest

from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import abstract_model
from tests.helpers.method_cases import CASES, TINY, tiny_config
from tests.models.test_remat import loss_of, small, values_for


@pytest.fixture(scope="module")
def weights():
    """Return (loss, trainable, frozen, inputs) of four unrolled blocks."""
    config = small("ssv2_vitb", "save_matmuls", scan=False)
    config.backbone.depth = 4
    loss, arguments = loss_of(config)
    trainable, frozen, *inputs = values_for(arguments)
    return loss, trainable, frozen, inputs


def test_merge_inverts_unstack(weights):
    _, trainable, frozen, _ = weights
    unstacked = param_tree.unstack_blocks(frozen)
    assert len(unstacked["backbone"]["blocks"]["mlp"]["hidden"]["kernel"]) == 4
    assert unstacked["backbone"]["projection"] is frozen["backbone"]["projection"]
    merged, want = (param_tree.merge(trainable, tree) for tree in (unstacked, frozen))
    jax.tree.map(np.testing.assert_array_equal, merged, want)
    reverse = jax.tree.map(
        lambda leaf: leaf[::-1], unstacked, is_leaf=lambda x: isinstance(x, tuple)
    )
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, param_tree.merge(trainable, reverse), want)


def test_no_copy_of_a_blocks_weights(weights):
    """Check that the compiler needs less memory for a forward pass than from a stack."""
    loss, trainable, frozen, inputs = weights

    def run(tree):
        compiled = jax.jit(loss).lower(trainable, tree, *inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(trainable, tree, *inputs)

    stacked_bytes, stacked_loss = run(frozen)
    unstacked_bytes, unstacked_loss = run(param_tree.unstack_blocks(frozen))
    assert unstacked_bytes < stacked_bytes
    np.testing.assert_allclose(unstacked_loss, stacked_loss, rtol=1e-6)


def made_up(**names):
    """Return (params, mask) of a backbone and a method with a parameter of each name."""
    params = {"backbone": {"gain": jax.ShapeDtypeStruct((7,), "float32")}, "adapters": {"mlp": {}}}
    for name, size in names.items():
        params["adapters"]["mlp"][name] = jax.ShapeDtypeStruct((size,), "float32")
    mask = jax.tree.map(lambda _: True, params) | {"backbone": {"gain": False}}
    return params, mask


def test_parameters_without_a_decay_rule_are_named(monkeypatch):
    """Check the table of a made-up method; frozen parameters need no rule."""
    params, mask = made_up(kernel=2, bias=3, position_3=4, query_token=5, shift=6)
    table = param_tree.parameter_table(params, mask).splitlines()
    assert table[0].split() == ["group", "parameters", "trainable", "decayed"]
    assert [line.split() for line in table if line.startswith(("adapters", "backbone"))] == [
        ["adapters/mlp*", "20", "20", "2"],
        ["backbone", "7", "0", "0"],
    ]
    assert table[-1] == (
        "* no rule of weight decay names adapters/mlp/shift, so they do not decay; name them in "
        "param_tree.DECAY_RULES"
    )
    for decays, count in ((True, "8"), (False, "2")):
        rules = [*param_tree.DECAY_RULES, ("shift", decays)]
        monkeypatch.setattr(param_tree, "DECAY_RULES", rules)
        table = param_tree.parameter_table(params, mask)
        assert ["adapters/mlp", "20", "20", count] in [line.split() for line in table.splitlines()]
        assert "no rule" not in table
        monkeypatch.undo()


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_of_a_method_has_a_decay_rule(case):
    model = abstract_model(tiny_config(case), 5, TINY)
    assert "no rule" not in param_tree.parameter_table(model.params, model.mask)
    decayed = param_tree.flatten(param_tree.decay_mask(model.params))
    names = {path.split("/")[-1] for path, decays in decayed.items() if decays}
    assert {name.split("_")[-1] for name in names} == {"kernel"}
    assert all(decays for path, decays in decayed.items() if path.endswith("/kernel"))

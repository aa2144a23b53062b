"""Frozen weights of blocks that are written out: each block's own, without copies."""

import jax
import numpy as np
import pytest

from dualpath_jax.models import param_tree
from tests.models.test_remat import loss_of, small, values_for


@pytest.fixture(scope="module")
def weights():
    """(loss, trainable, frozen, inputs) of four blocks, written out."""
    config = small("ssv2_vitb", "cheap", scan=False)
    config.backbone.depth = 4
    loss, arguments = loss_of(config)
    trainable, frozen, *inputs = values_for(arguments)
    return loss, trainable, frozen, inputs


def test_merge_puts_together_what_unstack_took_apart(weights):
    _, trainable, frozen, _ = weights
    apart = param_tree.unstack_blocks(frozen)
    assert len(apart["backbone"]["blocks"]["mlp"]["hidden"]["kernel"]) == 4
    assert apart["backbone"]["projection"] is frozen["backbone"]["projection"]
    merged, want = (param_tree.merge(trainable, tree) for tree in (apart, frozen))
    jax.tree.map(np.testing.assert_array_equal, merged, want)
    turned = jax.tree.map(lambda leaf: leaf[::-1], apart, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, param_tree.merge(trainable, turned), want)


def test_no_copy_of_a_blocks_weights(weights):
    """By the compiler: a forward pass needs less memory than from a stack."""
    loss, trainable, frozen, inputs = weights

    def temporaries(tree):
        compiled = jax.jit(loss).lower(trainable, tree, *inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(trainable, tree, *inputs)

    stacked, apart = temporaries(frozen), temporaries(param_tree.unstack_blocks(frozen))
    assert apart[0] < stacked[0]
    np.testing.assert_allclose(apart[1], stacked[1], rtol=1e-6)

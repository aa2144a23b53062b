"""Tests that unrolled programs use each block's frozen weights without copies."""

import jax
import numpy as np
import pytest

from dualpath_jax.models import param_tree
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

"""Tests activation checkpointing: equal gradients, less memory, amount of additional work."""

import jax
import numpy as np
import pytest

from dualpath_jax.analysis import efficiency
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.abstract import abstract_inputs, abstract_model, build_backbone_config
from dualpath_jax.models.backbones import block_loop
from tests.test_check_config import load

SMALL = {
    "ssv2_vitb": {"patch_size": 16, "width": 48, "depth": 2, "heads": 2, "mlp_dim": 96},
    "ssv2_swinb": {"patch_size": 4, "width": 32, "depths": (2, 2), "heads": 2, "mlp_dim": 64},
}


def small(name, remat, scan):
    """Return the configuration `name` with a small backbone and images of 64 pixels."""
    config = load(name)
    config.backbone.name = "custom-swin" if "swin" in name else "custom"
    config.backbone.update(SMALL[name])
    if "swin" in name:
        config.backbone.window_size = 4
    else:
        config.backbone.projection_dim = 32
    config.data.image_size = 64
    config.model.dtype = "float32"
    config.model.remat, config.model.scan_blocks = remat, scan
    return config


def loss_of(config):
    """Return loss(trainable, frozen, *inputs) and its arguments without values."""
    model = abstract_model(config, 174)
    trainable, frozen = param_tree.split(model.params, model.mask)

    def loss(trainable, frozen, *inputs):
        params = param_tree.merge(trainable, frozen)
        return (model.module.apply({"params": params}, *inputs) ** 2).mean()

    return loss, (trainable, frozen, *abstract_inputs(config))


def values_for(tree):
    """Return random values for abstract arrays."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scan"), [("ssv2_vitb", False), ("ssv2_vitb", True), ("ssv2_swinb", True)]
)
def test_gradients_are_the_same(name, scan):
    gradients = {}
    for remat in block_loop.REMAT:
        loss, arguments = loss_of(small(name, remat, scan))
        arguments = values_for(arguments)
        gradients[remat] = param_tree.flatten(jax.jit(jax.grad(loss))(*arguments))
    largest = max(np.abs(leaf).max() for leaf in gradients["none"].values())
    for remat in ("save_matmuls", "full"):
        for path, leaf in gradients["none"].items():
            assert np.abs(leaf - gradients[remat][path]).max() <= 1e-5 * largest, path
    assert largest > 1e-3


def test_memory_falls():
    """Compare the compiler's memory for temporaries of the scanned step on eight blocks."""
    sizes = []
    for remat in block_loop.REMAT:
        config = small("ssv2_vitb", remat, scan=True)
        config.backbone.depth = 8
        config.model.temporal_path = False  # compiles faster
        loss, arguments = loss_of(config)
        compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    none, save_matmuls, full = sizes
    assert full < save_matmuls < 0.7 * none


@pytest.mark.parametrize(
    ("name", "remat", "cls_token_only", "ratio"),
    [
        ("ssv2_vitb", "none", False, 2.085),
        ("ssv2_vitb", "none", True, 1.914),
        ("ssv2_vitb", "save_matmuls", True, 2.045),
        ("ssv2_vitb", "full", True, 2.569),
        ("ssv2_vitl", "save_matmuls", True, 2.120),
    ],
)
def test_work_of_a_step(name, remat, cls_token_only, ratio):
    """Check the ratio of both passes' multiply-accumulates to those of a plain forward pass."""
    config = load(name)
    config.model.cls_token_only, config.model.remat = False, "none"
    loss, arguments = loss_of(config)
    plain = efficiency.count_macs(loss, *arguments)
    config.model.cls_token_only, config.model.remat = cls_token_only, remat
    loss, arguments = loss_of(config)
    assert efficiency.count_macs(jax.grad(loss), *arguments) / plain == pytest.approx(
        ratio, abs=1e-3
    )


def test_unknown_names():
    config = small("ssv2_vitb", "some", scan=True)
    message = "unknown model.remat='some': known are none, save_matmuls, full"
    with pytest.raises(ValueError, match=message):
        method_registry.build_model(config, build_backbone_config(config), 3)
    with pytest.raises(ValueError, match="unknown activation 'softmax': known are qkv, hidden"):
        block_loop.checkpoint_activation(np.zeros(3), "softmax")

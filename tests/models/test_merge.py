"""Tests methods that cost nothing after training: merged weights, and every kernel of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpath_jax.models import merge
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import kernels as kernels_lib
from dualpath_jax.models.methods.zeroi2v import FrameShiftHooks
from tests.helpers.method_cases import (
    CLASSES,
    TINY,
    build_initialized,
    build_randomized,
    clips,
    tiny_config,
)
from tests.models.test_contract import FORMS
from tests.models.test_methods import SWIN

KERNELS = {
    "default": kernels_lib.DEFAULT,
    "cpu": kernels_lib.CPU,
    "gpu": kernels_lib.GPU,
    "gpu_scanned": kernels_lib.GPU_SCANNED,
}


def merged_logits(case, shape, params, **options):
    """Return the logits of the model without adapters, and the model with them on `params`."""
    config = tiny_config(case, scan_blocks=True, **options)
    model = method_registry.build_model(config, shape, CLASSES)
    weights = merge.merge_backbone(model.hooks, params["adapters"], params["backbone"])
    plain = method_registry.build_model(
        tiny_config(case, scan_blocks=True, merged=True, **options), shape, CLASSES
    )
    rest = {name: tree for name, tree in params.items() if name != "adapters"}
    inputs, run = clips(config), jax.jit(plain.apply)
    return (
        run({"params": rest | {"backbone": weights}}, *inputs),
        jax.jit(model.apply)({"params": params}, *inputs),
        run({"params": rest}, *inputs),
    )


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        *((case, TINY) for case in ("lora", "zeroi2v")),
        ("zeroi2v", FORMS["registers"]),
        ("zeroi2v_four", FORMS["attention"]),
        ("lora_all", FORMS["registers"]),
        ("lora_all", SWIN),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_merged_weights_have_the_same_logits(case, shape):
    """Check the logits; twin: the weights without what was merged."""
    _, params = build_randomized(tiny_config(case), shape)
    merged, tuned, unmerged = merged_logits(case, shape, params)
    np.testing.assert_allclose(merged, tuned, rtol=0, atol=1e-5 * np.abs(tuned).max())
    assert np.abs(unmerged - tuned).max() > 1e-2


def test_zeroi2v_starts_as_the_backbone_with_shifted_heads():
    """Check new adapters; twin: without a shift, the backbone has other features."""
    config = tiny_config("zeroi2v", scan_blocks=True)
    model, params = build_initialized(config)
    merged, tuned, unmerged = merged_logits("zeroi2v", TINY, params)
    np.testing.assert_allclose(tuned, unmerged, rtol=0, atol=1e-5)
    np.testing.assert_allclose(merged, unmerged, rtol=0, atol=1e-5)
    frames, _ = clips(config)
    params.pop("adapters")
    still = model.clone(hooks=None)
    assert np.abs(still.apply({"params": params}, frames) - tuned).max() > 1e-3


def test_merged_layer_scale_is_one():
    """Check that a tiny layer scale is not divided by."""
    shape = FORMS["registers"]
    _, params = build_randomized(tiny_config("zeroi2v"), shape)
    blocks = params["backbone"]["blocks"]
    blocks["attention"]["layer_scale"] = np.full_like(blocks["attention"]["layer_scale"], 1e-9)
    hooks = method_registry.build_model(tiny_config("zeroi2v"), shape, CLASSES).hooks
    merged = merge.merge_hooks(hooks, params["adapters"], blocks)
    assert np.array_equal(merged["attention"]["layer_scale"], np.ones((2, 48)))
    assert np.abs(merged["attention"]["out"]["kernel"]).max() < 1e-7
    assert np.isfinite(merged["attention"]["out"]["kernel"]).all()


def test_what_cannot_be_merged():
    model, params = build_randomized(tiny_config("adaptformer"))
    with pytest.raises(ValueError, match="AdaptFormerHooks cannot be merged into weights"):
        merge.merge_backbone(model.hooks, params["adapters"], params["backbone"])
    hooks = build_randomized(tiny_config("lora"))[0].hooks
    with pytest.raises(ValueError, match="only the blocks of ViT and Swin can be merged"):
        merge.merge_backbone(hooks, {}, {"blocks": {"attention": {"hidden": {}}}})


def test_heads_at_the_ends_of_a_clip_stay_in_their_frame():
    hooks = FrameShiftHooks(4, (-2, 1), 2, parent=None)
    x = jnp.arange(2 * 4).reshape(8, 1, 1, 1) * jnp.ones((1, 3, 5, 2), jnp.int32)
    shifted = np.asarray(hooks.shift_heads(x))[:, 0, :, 0]
    assert shifted[:4, 0].tolist() == shifted[:4, 1].tolist() == [0, 1, 0, 1]
    assert shifted[:4, 2].tolist() == shifted[:4, 3].tolist() == [1, 2, 3, 3]
    assert shifted[:, 4].tolist() == list(range(8))  # the other head
    assert shifted[4:, 0].tolist() == [4, 5, 4, 5]  # not from another clip


def gradient_of(case, kernels, monkeypatch, scan=False, remat="none"):
    """Return logits and gradients of a training step with these kernels."""
    monkeypatch.setattr(kernels_lib, "choose_kernels", lambda scan: kernels)
    rates = {"zeroi2v.adapter_dropout": 0.0, "zeroi2v.dropout": 0.0}
    config = tiny_config(case, scan_blocks=scan, remat=remat, **rates)
    model, params = build_randomized(config)
    frames, _ = clips(config)

    @jax.jit
    def run(adapters):
        def loss(adapters):
            logits = model.apply(
                {"params": params | {"adapters": adapters}}, frames, None, jax.random.key(0)
            )
            return (logits**2).sum(), logits

        return jax.grad(loss, has_aux=True)(adapters)

    gradients, logits = run(params["adapters"])
    return np.asarray(logits), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradients)])


@pytest.mark.parametrize(("case", "twin"), [("lora_all", "lora"), ("zeroi2v", "zeroi2v_four")])
def test_every_kernel_and_rematerialization(case, twin, monkeypatch):
    """Compare logits and gradients over kernels; twin: another case of the method."""
    logits, gradients = gradient_of(case, kernels_lib.DEFAULT, monkeypatch, scan=True)
    for kernels, scan, remat in [
        ("cpu", False, "save_matmuls"),
        ("gpu", False, "full"),
        ("gpu_scanned", True, "save_matmuls"),
    ]:
        other = gradient_of(case, KERNELS[kernels], monkeypatch, scan, remat)
        np.testing.assert_allclose(other[0], logits, rtol=0, atol=2e-5)
        largest = np.abs(gradients).max()
        np.testing.assert_allclose(other[1], gradients, rtol=0, atol=2e-5 * largest)
    assert largest > 1e-3
    twin, _ = gradient_of(twin, kernels_lib.DEFAULT, monkeypatch, scan=True)
    assert np.abs(twin - logits).max() > 1e-2


@pytest.mark.parametrize("case", ["lora_all", "zeroi2v_four"])
def test_only_the_class_token_in_the_last_block(case):
    """Compare with the computation of all tokens; the single query has its own form."""
    logits = []
    for only in (True, False):
        config = tiny_config(case, scan_blocks=True, cls_token_only=only)
        model, params = build_randomized(config)
        logits.append(jax.jit(model.apply)({"params": params}, *clips(config)))
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-5)

"""Runs the methods on every form of backbone that `backbones/contract.py` describes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpath_jax.analysis import attention_maps
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.models.backbones import swin
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.protuning import ProTuningHooks
from dualpath_jax.models.methods.st_adapter import STAdapterHooks
from dualpath_jax.models.methods.vpt import ShallowPromptModel
from dualpath_jax.training import experiment
from dualpath_jax.training.step import make_train_step
from tests.helpers.method_cases import CASES, CLASSES, FRAMES, TINY, clips, perturbed, tiny_config

PLAIN = dataclasses.replace(TINY, projection_dim=None, pre_norm=False, patch_bias=True, depth=2)
FORMS = {
    "class": PLAIN,
    "registers": dataclasses.replace(
        PLAIN, num_register_tokens=2, layer_scale=True, gated_mlp=True, activation="silu"
    ),
    "attention": dataclasses.replace(
        PLAIN, class_token=False, readout="attention", activation="gelu_tanh"
    ),
    "mean": dataclasses.replace(PLAIN, class_token=False, readout="mean"),
}
SWIN = swin.SwinConfig("custom-swin", 32, 4, 16, (2, 2), 1, 32, 4)
KEY = jax.random.key(0)
HOOKS = ("on_input", "before_attention", "parallel_to_attention", "after_attention")
HOOKS += ("weight_update", "shift_heads", "on_middle", "before_mlp", "parallel_to_mlp", "after_mlp")
HOOKS += ("on_output",)


def _trace_step(case, form):
    """Trace a training step, and return the abstract run and the metrics' shapes."""
    config = tiny_config(case, scan_blocks=True)
    run = experiment.build_abstract(config, CLASSES, 10, FORMS[form])
    step = make_train_step(run.model.module, config, run.optimizer)
    batch = {"label": jax.ShapeDtypeStruct((2,), jnp.int32)}
    for name, clip in zip(("spatial", "temporal"), clips(config), strict=True):
        if clip is not None:
            batch[name] = jax.ShapeDtypeStruct(clip.shape, jnp.uint8)
    return run, jax.eval_shape(step, run.state, run.frozen, batch)[1]


@pytest.mark.parametrize(
    ("case", "form"),
    [
        *((case, form) for case in CASES for form in ("registers", "attention")),
        *((case, "mean") for case in ("dualpath", "vpt_shallow", "evl")),
    ],
)
def test_every_method_traces_a_step(case, form):
    _, metrics = _trace_step(case, form)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("form", FORMS)
def test_what_dualpath_trains(form):
    run, _ = _trace_step("dualpath", form)
    trained = {path: set(run.state.trainable[path]) for path in ("spatial", "temporal")}
    class_token = {"class_token"} if form in ("class", "registers") else set()
    assert trained["spatial"] == {"adapters", "position"} | class_token
    assert trained["temporal"] == {"adapters"} | class_token
    rows = run.state.trainable["spatial"]["position"].shape[0]
    assert rows == 16 + len(class_token)  # registers have no position


@pytest.mark.parametrize("form", ["registers", "attention"])
def test_dualpath_trains_a_step(form):
    config = tiny_config("dualpath", scan_blocks=True)
    run = experiment.build_abstract(config, CLASSES, 10, FORMS[form])
    params = experiment.init_params(run.model.module, config, None)
    inputs = clips(config)

    def loss(params):
        logits = run.model.module.apply({"params": params}, *inputs, KEY)
        return jax.nn.logsumexp(logits - logits[:, :1]).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    for path in ("spatial", "temporal"):
        norms = jax.tree.map(jnp.linalg.norm, gradients[path]["adapters"])
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(norms))
        assert norms["mlp"]["up"]["kernel"] > 0


def test_parameters_with_a_backbone_are_those_without():
    """Check that leaving out the frozen parameters' random values changes no other value."""
    config = tiny_config("dualpath", scan_blocks=True)
    model = experiment.build_abstract(config, CLASSES, 10, FORMS["class"]).model.module
    fresh = experiment.init_params(model, config, None)
    backbone = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), fresh["backbone"])
    loaded = experiment.init_params(model, config, backbone)
    assert list(loaded) == list(fresh)
    jax.tree.map(np.testing.assert_array_equal, loaded, fresh)
    # Twin: another seed gives other values.
    config.seed += 1
    other = experiment.init_params(model, config, backbone)
    pairs = zip(jax.tree.leaves(other), jax.tree.leaves(loaded), strict=True)
    assert any(np.any(a != b) for a, b in pairs)


@pytest.mark.parametrize("config", [*FORMS.values(), SWIN], ids=[*FORMS, "swin"])
def test_contract(config):
    """Check what configs and modules say of themselves, and that each hook is called."""
    called = set()

    class Hooks(BlockHooks):
        pass

    for name in HOOKS:

        def hook(self, x, *rest, name=name):
            called.add(name)
            return getattr(BlockHooks, name)(self, x, *rest)

        setattr(Hooks, name, hook)

    model = backbone_registry.build_backbone(config)
    images = jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(model.init, KEY, images)["params"]

    def run(params):
        variables = {"params": params}
        h = model.apply(variables, images, method="embed")
        after = model.apply(variables, h, Hooks(parent=None), method="encode")
        return h, after, model.apply(variables, after, method="pool")

    h, _, features = jax.eval_shape(run, params)
    assert called == set(HOOKS)
    assert h.size == 2 * config.num_tokens * config.width
    assert features.shape == (2, config.feature_dim)
    assert ("class_embedding" in params) == config.has_class_token
    assert ("position_embedding" in params) == config.has_position_table
    side = config.image_size // config.patch_size
    assert config.num_leading_tokens == config.num_tokens - side**2
    if not config.has_class_token:
        with pytest.raises(ValueError, match="has no class token: pass None"):
            model.apply({"params": params}, images, jnp.zeros(config.width), method="embed")


def _random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _random_params(model, *inputs):
    """Return nontrivial parameters without compiling the initialization."""
    shapes = jax.eval_shape(model.init, KEY, *inputs)["params"]
    return perturbed(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes))


def test_registers_have_no_position():
    config = FORMS["registers"]
    model = backbone_registry.build_backbone(config)
    params = _random_params(model, jnp.zeros((1, 32, 32, 3)))
    images, position = _random(1, 32, 32, 3), _random(17, config.width)
    zero, moved = (
        model.apply({"params": params}, images, None, p, method="embed")
        for p in (np.zeros_like(position), position)
    )
    np.testing.assert_array_equal(zero[0, 1:3], params["register_tokens"])
    np.testing.assert_array_equal(moved[:, 1:3], zero[:, 1:3])
    rest = np.delete(np.asarray(moved - zero), [1, 2], axis=1)[0]
    np.testing.assert_allclose(rest, position, atol=1e-5)


def test_st_adapter_convolves_each_leading_token_over_time():
    x = _random(FRAMES, 3 + 16, 6)
    options = {"num_frames": FRAMES, "width": 4, "kernel_size": (3, 3, 3), "parent": None}
    three = STAdapterHooks(**options, leading_tokens=3)
    params = perturbed(three.init(KEY, x, method="parallel_to_mlp"))
    y = three.apply(params, x, method="parallel_to_mlp")
    one = STAdapterHooks(**options, leading_tokens=1)
    for token in range(3):
        alone = np.concatenate([x[:, token : token + 1], x[:, 3:]], axis=1)
        expected = one.apply(params, alone, method="parallel_to_mlp")
        np.testing.assert_allclose(y[:, token], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(y[:, 3:], expected[:, 1:], atol=1e-5)


def test_protuning_leaves_leading_tokens():
    h = _random(2, 3 + 16, 6)
    hooks = ProTuningHooks(width=4, leading_tokens=3, parent=None)
    params = perturbed(hooks.init(KEY, h, method="on_output"))
    y = hooks.apply(params, h, method="on_output")
    np.testing.assert_array_equal(y[:, :3], h[:, :3])
    assert np.abs(y[:, 3:] - h[:, 3:]).min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_readout_does_not_see_prompts(form):
    config = tiny_config("vpt_shallow", scan_blocks=True)
    model = method_registry.build_model(config, FORMS[form], CLASSES)
    assert isinstance(model, ShallowPromptModel)
    first = FORMS[form].num_leading_tokens
    params = {"params": _random_params(model, *clips(config))}
    h = _random(2, first + 16, 48)
    prompted = np.insert(h, [first] * 3, 5.0, axis=1)
    features, expected = (
        model.apply(params, tokens, method=method)
        for tokens, method in (
            (prompted, lambda m, tokens: m.pool(tokens)),
            (h, lambda m, tokens: m.backbone.pool(tokens)),
        )
    )
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_attention_maps_leave_registers_out():
    config = tiny_config("dualpath")
    model = method_registry.build_model(config, FORMS["registers"], CLASSES)
    params = _random_params(model, *clips(config))
    maps = attention_maps._build_map_fn(model, True, False)(params, *clips(config))
    assert {name: rows.shape for name, rows in maps.items()} == {
        "spatial": (2, 2, 16),
        "temporal": (2, 1, 16),
    }
    for rows in maps.values():
        np.testing.assert_allclose(rows.sum(axis=-1), 1, rtol=1e-5)
    without = method_registry.build_model(config, FORMS["attention"], CLASSES)
    with pytest.raises(ValueError, match="has no class token: attention maps need a backbone"):
        jax.eval_shape(lambda key: without.init(key, *clips(config), method="attention"), KEY)


def test_impossible_forms_are_refused():
    for fields, message in [
        ({"class_token": False}, "readout 'class' of tiny needs class_token=True"),
        ({"readout": "max"}, "unknown readout 'max': known are class, mean, attention"),
        ({"position_resize": "nearest"}, "unknown way to resize positions 'nearest'"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **fields)
    with pytest.raises(ValueError, match="position table of 18 rows is not a square plus one"):
        TINY.resize_positions(np.zeros((18, 48)), (4, 4))

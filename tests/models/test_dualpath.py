"""Tests DualPath on CLIP: parameter counts of the paper, zero-initialized adapters, positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import attention, vit
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.models.backbones.kernels import choose_kernels
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.adapters import Adapter, ParallelAdapterHooks, SerialAdapterHooks
from dualpath_jax.models.methods.dualpath import DualPath, sincos3d
from tests.helpers.method_cases import EXACT, apply

TINY = vit.ViTConfig("tiny", 32, 8, 48, 3, 4, 96, 24)


def tiny_model(**options):
    """Build DualPath on TINY, with the kernels that the registry would choose."""
    options = {"config": TINY, "num_classes": 5, "frame_size": 8} | options
    kernels = choose_kernels(options.get("scan_blocks", False))
    return DualPath(adapter=Adapter(bottleneck=16, kernels=kernels, parent=None), **options)


def tiny_inputs(framesets=1):
    rng = np.random.default_rng(0)
    spatial = rng.normal(size=(2, 3, 32, 32, 3)).astype(np.float32)
    return spatial, rng.normal(size=(2, framesets, 32, 32, 3)).astype(np.float32)


def perturbed(params, scale=0.3):
    """Add noise to every leaf, so that no bias is zero and no scale is one."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(x.dtype), params)


@functools.cache
def _init(model, framesets):
    params = dict(jax.jit(model.init)(jax.random.key(0), *tiny_inputs(framesets))["params"])
    params["backbone"] = perturbed(params["backbone"])
    return model.start_from_backbone(params)


def init(model, framesets=1):
    """Return parameters with a nontrivial backbone and freshly initialized adapters."""
    params = _init(model.clone(scan_blocks=True), framesets)  # compiles faster
    return jax.tree.map(jnp.asarray, params)  # copies the dictionaries for the test


# Trainable parameters, PAPER.md's table. (backbone, classes, fifth adapter, options) -> count.
COUNTS = [
    ("ViT-B/16", 400, False, {}, 10_363_024),
    ("ViT-B/16", 174, True, {}, 12_617_134),
    ("ViT-B/16", 51, False, {}, 10_183_987),
    ("ViT-B/16", 48, False, {}, 10_182_448),
    ("ViT-L/14", 400, False, {}, 27_029_648),
    ("ViT-L/14", 174, True, {}, 33_174_958),
    ("ViT-B/16", 174, True, {"spatial_path": False}, 7_724_974),
    ("ViT-B/16", 174, True, {"temporal_path": False}, 5_506_222),
    ("ViT-B/16-IN21K", 174, True, {}, 13_317_294),
    ("ViT-B/16-IN21K", 51, False, {}, 10_852_659),
    ("Swin-B", 174, True, {}, 10_014_766),
    ("Swin-B", 51, False, {}, 8_341_043),
]


@pytest.mark.parametrize(("backbone", "classes", "fifth", "options", "expected"), COUNTS)
def test_trainable_parameters_of_the_paper(backbone, classes, fifth, options, expected):
    model = DualPath(
        backbone_registry.MODELS[backbone], classes, pre_attention_adapter=fifth, **options
    )
    frames = jnp.zeros((1, 8, 224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), frames, frames[:, :1])["params"]
    mask = param_tree.trainable_mask(params, method_registry.is_trainable_fn("dualpath"))
    trainable, _ = param_tree.split(params, mask)
    assert param_tree.count_params(trainable) == expected


def test_frozen_tokens_are_not_counted():
    model = DualPath(vit.MODELS["ViT-B/16"], 174, pre_attention_adapter=True, train_tokens=False)
    frames = jnp.zeros((1, 8, 224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), frames, frames[:, :1])["params"]
    assert (
        param_tree.count_params(params) - param_tree.count_params(params["backbone"]) == 12_464_302
    )


def test_backbone_parameters_of_clip():
    """Check the count of CLIP ViT-B/16's image tower with its projection (openai/CLIP)."""
    model = vit.ViT(vit.MODELS["ViT-B/16"])
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert param_tree.count_params(params) == 86_192_640


def test_parameter_names():
    names = set(param_tree.flatten(init(tiny_model(pre_attention_adapter=True))))
    trainable = {name for name in names if method_registry.is_trainable_fn("dualpath")(name)}

    def adapter(path, hook):
        leaves = ("down/kernel", "down/bias", "up/kernel", "up/bias")
        return {f"{path}/adapters/{hook}/{leaf}" for leaf in leaves}

    assert trainable == {
        "spatial/class_token",
        "spatial/position",
        "temporal/class_token",
        "classifier/hidden/kernel",
        "classifier/hidden/bias",
        "classifier/output/kernel",
        "classifier/output/bias",
    }.union(
        *(adapter("spatial", hook) for hook in ("attention", "mlp")),
        *(adapter("temporal", hook) for hook in ("before", "attention", "mlp")),
    )
    assert all(name.startswith("backbone/") for name in names - trainable)


def test_adapter_initialization():
    params = init(tiny_model())["spatial"]["adapters"]["mlp"]
    assert params["down"]["kernel"].shape == (TINY.depth, 48, 16)  # stacked [L, D, R]
    assert not np.any(params["up"]["kernel"])
    assert not np.any(params["down"]["bias"])
    big = Adapter(bottleneck=512).init(jax.random.key(0), jnp.zeros((1, 768)))["params"]
    kernel = np.asarray(big["down"]["kernel"])
    assert np.std(kernel) == pytest.approx((2 / 768) ** 0.5, rel=0.01)
    # Normal without truncation at two standard deviations, unlike `he_normal`.
    assert np.max(np.abs(kernel)) > 4 * np.std(kernel)
    # Blocks differ.
    assert not np.array_equal(params["down"]["kernel"][0], params["down"]["kernel"][1])


@functools.cache
def programs(model, path):
    """Return compiled functions of the frozen backbone's blocks and of the blocks of `path`."""

    def frozen(model, h):
        return model.backbone.encode(h)

    def adapted(model, h):
        hooks = {"spatial": model.spatial_sites, "temporal": model.temporal_sites}[path]
        return model.backbone.encode(h, hooks, getattr(model, path)["adapters"])

    methods = (functools.partial(model.apply, method=f) for f in (frozen, adapted))
    return [jax.jit(f, compiler_options=EXACT) for f in methods]


def frozen_and_adapted(model, params, path):
    """Return tokens before and after the blocks, frozen and of `path`, by separate programs."""
    h = np.random.default_rng(2).normal(size=(6, TINY.num_tokens, 48)).astype(np.float32)
    return h, *(np.asarray(run({"params": params}, h)) for run in programs(model, path))


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_spatial_path_starts_as_the_frozen_backbone(scan_blocks):
    model = tiny_model(scan_blocks=scan_blocks)
    params = init(model)
    _, frozen, adapted = frozen_and_adapted(model, params, "spatial")
    assert np.array_equal(frozen, adapted)
    # Twin: one moved weight shows.
    up = params["spatial"]["adapters"]["attention"]["up"]
    up["kernel"] = up["kernel"].at[1, 0, 0].set(1e-2)
    _, frozen, adapted = frozen_and_adapted(model, params, "spatial")
    assert not np.array_equal(frozen, adapted)


@pytest.mark.parametrize("cls_token_only", [False, True])
def test_spatial_features_start_as_clips(cls_token_only):
    model = tiny_model(cls_token_only=cls_token_only)
    params = init(model)
    spatial, _ = tiny_inputs()
    y_sp = apply(model, params, spatial, method=DualPath.spatial_features)

    def features(backbone, images):
        return backbone.pool(backbone.encode(backbone.embed(images), cls_token_only=cls_token_only))

    images = spatial.reshape(-1, 32, 32, 3)
    clip = apply(vit.ViT(TINY), params["backbone"], images, method=features)
    assert np.array_equal(y_sp, clip.reshape(2, 3, -1).mean(axis=1))
    all_tokens = apply(vit.ViT(TINY), params["backbone"], images)[1]  # CLIP's computation
    np.testing.assert_allclose(clip, all_tokens, rtol=0, atol=1e-5)


def test_cls_token_only_does_not_change_results():
    """Compare logits and gradients; twin: it has no effect on a method that mixes tokens."""
    inputs = tiny_inputs()
    params = perturbed(init(tiny_model()), 0.1)
    out = {}
    for cls_token_only in (False, True):
        model = tiny_model(cls_token_only=cls_token_only, pre_attention_adapter=False)

        def loss(params, model=model):
            logits = model.apply({"params": params}, *inputs)
            return (logits**2).sum(), logits

        gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        out[cls_token_only] = (logits, gradient)
    for plain, fast in zip(*(jax.tree.leaves(out[key]) for key in (False, True)), strict=True):
        np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5 * max(1, abs(plain).max()))
    mixing = BlockHooks(parent=None)
    assert not mixing.pointwise
    encode = functools.partial(vit.ViT.encode, hooks=mixing, cls_token_only=True)
    tokens = vit.ViT(TINY).apply(
        {"params": params["backbone"]}, jnp.ones((1, TINY.num_tokens, TINY.width)), method=encode
    )
    assert tokens.shape[1] == TINY.num_tokens


@pytest.mark.parametrize("scan", [False, True])
def test_a_backbone_of_one_block(scan):
    config = vit.ViTConfig("one", 32, 8, 24, 1, 3, 48)
    model = vit.ViT(config, scan_blocks=scan)
    h = jax.random.normal(jax.random.key(0), (2, config.num_tokens, 24))
    params = model.init(jax.random.key(1), h, method=vit.ViT.encode)
    all_tokens, cls_token = (
        model.apply(params, h, cls_token_only=cls_token_only, method=vit.ViT.encode)
        for cls_token_only in (False, True)
    )
    np.testing.assert_allclose(cls_token, all_tokens[:, :1], rtol=0, atol=1e-5)


def gradients(function, arrays, dy):
    """Return the concatenated gradients of sum(function(*arrays) * dy).

    They are compiled with the option that `environment` sets.
    """

    def loss(*arrays):
        return (function(*arrays).astype(jnp.float32) * dy).sum()

    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    grad = jax.jit(jax.grad(loss, argnums=range(len(arrays))), compiler_options=options)
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in grad(*arrays)])


def test_attention_and_its_gradient():
    """Compare attention with JAX's own."""
    rng = np.random.default_rng(0)
    *arrays, dy = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), jnp.float32) for _ in range(4))
    theirs = jax.nn.dot_product_attention
    np.testing.assert_allclose(
        attention.dot_product_attention(*arrays), theirs(*arrays), rtol=0, atol=1e-6
    )
    want = gradients(theirs, arrays, dy)
    np.testing.assert_allclose(
        gradients(attention.dot_product_attention, arrays, dy), want, rtol=0, atol=2e-6
    )
    scaled = gradients(lambda q, k, v: attention.dot_product_attention(2 * q, k, v), arrays, dy)
    assert np.abs(scaled - want).max() > 0.1
    rounded = [x.astype(jnp.bfloat16) for x in arrays]
    np.testing.assert_allclose(
        gradients(attention.dot_product_attention, rounded, dy), want, rtol=0, atol=0.05
    )


@pytest.mark.parametrize("num_images", [1, 3])
def test_attention_of_one_query_and_its_gradient(num_images):
    """Compare it with attention to projected keys and values; a key bias has no effect."""
    rng = np.random.default_rng(0)
    shapes = (num_images, 3, 8), (num_images, 5, 24), (24, 3, 8), (24, 3, 8), (3, 8)
    q, x, *weights = arrays = [jnp.asarray(rng.normal(size=n) / 2, jnp.float32) for n in shapes]
    dy = rng.normal(size=q.shape)

    def plain(q, x, key_kernel, value_kernel, value_bias, key_bias=0.7):
        k = jnp.einsum("mnw,wkd->mnkd", x, key_kernel) + key_bias
        v = jnp.einsum("mnw,wkd->mnkd", x, value_kernel) + value_bias
        return jax.nn.dot_product_attention(q[:, None], k, v)[:, 0]

    y = attention.single_query_attention(*arrays)
    np.testing.assert_allclose(y, plain(*arrays), rtol=0, atol=1e-6)
    want = gradients(plain, arrays, dy)
    np.testing.assert_allclose(
        gradients(attention.single_query_attention, arrays, dy), want, rtol=0, atol=5e-6
    )
    rounded = [array.astype(jnp.bfloat16) for array in arrays]
    np.testing.assert_allclose(
        gradients(attention.single_query_attention, rounded, dy), want, rtol=0, atol=0.1
    )
    swapped = attention.single_query_attention(q, x, weights[1], weights[0], weights[2])
    assert np.abs(swapped - y).max() > 0.1


def test_temporal_path_starts_as_the_identity():
    """Check eq. 9 as printed, without skip connections around the adapters."""
    model = tiny_model(pre_attention_adapter=True)
    h, frozen, adapted = frozen_and_adapted(model, init(model), "temporal")
    assert np.array_equal(h, adapted)
    assert not np.array_equal(frozen, adapted)


def test_serial_skip_starts_as_the_frozen_backbone():
    model = tiny_model(serial_skip=True, pre_attention_adapter=True)
    _, frozen, adapted = frozen_and_adapted(model, init(model), "temporal")
    assert np.array_equal(frozen, adapted)


def test_pre_attention_without_residual_starts_with_zero_input():
    model = tiny_model(serial_skip=True, pre_attention_adapter=True, pre_attention_residual=False)
    _, frozen, adapted = frozen_and_adapted(model, init(model), "temporal")
    assert not np.array_equal(frozen, adapted)


@pytest.mark.parametrize("path", ["spatial", "temporal"])
def test_equations_of_a_block(path):
    """Compare the hooks with eq. 7 and eq. 9, written in steps of numpy."""
    model = tiny_model(pre_attention_adapter=True)
    params = perturbed(init(model), 0.1)
    h, _, adapted = frozen_and_adapted(model, params, path)
    hooks = {"spatial": ParallelAdapterHooks, "temporal": SerialAdapterHooks}[path]
    assert hooks is not None
    for layer in range(TINY.depth):
        block = jax.tree.map(lambda leaf, i=layer: leaf[i], params["backbone"]["blocks"])
        adapters = jax.tree.map(lambda leaf, i=layer: leaf[i], params[path]["adapters"])

        def norm(x, name, block=block):
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
            return x * block[name]["scale"] + block[name]["bias"]

        def linear(x, p):
            return x @ p["kernel"] + p["bias"]

        def attend(x, block=block):
            q, k, v = np.split(np.asarray(linear(x, block["attention"]["qkv"])), 3, axis=-1)
            heads = [t.reshape(*t.shape[:2], 4, -1).transpose(0, 2, 1, 3) for t in (q, k, v)]
            weights = heads[0] @ heads[1].transpose(0, 1, 3, 2) / np.sqrt(12)
            y = jax.nn.softmax(weights) @ heads[2]
            return linear(y.transpose(0, 2, 1, 3).reshape(x.shape), block["attention"]["out"])

        def mlp(x, block=block):
            y = linear(x, block["mlp"]["hidden"])
            return linear(y / (1 + np.exp(-1.702 * y)), block["mlp"]["output"])

        def adapter(x, name, adapters=adapters):
            y = jax.nn.gelu(linear(x, adapters[name]["down"]), approximate=False)
            return linear(y, adapters[name]["up"])

        x = norm(h, "ln_1")
        if path == "spatial":
            z = h + attend(x) + adapter(x, "attention")
            h = z + mlp(norm(z, "ln_2")) + adapter(norm(z, "ln_2"), "mlp")
        else:
            x = x + adapter(x, "before")
            z = h + adapter(attend(x), "attention")
            h = z + adapter(mlp(norm(z, "ln_2")), "mlp")
    assert np.max(np.abs(h - adapted)) < 1e-3 * np.max(np.abs(h))


def test_scanned_and_unrolled_agree():
    spatial, temporal = tiny_inputs()
    params = perturbed(init(tiny_model()), 0.1)
    outputs = [
        apply(tiny_model(scan_blocks=scan), params, spatial, temporal) for scan in (False, True)
    ]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    assert outputs[0].shape == (2, 5)
    assert outputs[0].dtype == jnp.float32


def test_without_a_path_its_input_does_not_matter():
    spatial, temporal = tiny_inputs()
    for option, moved in (
        ("spatial_path", (spatial + 1, temporal)),
        ("temporal_path", (spatial, temporal + 1)),
    ):
        model = tiny_model(**{option: False})
        params = perturbed(init(model), 0.1)
        run = jax.jit(model.apply)
        same = run({"params": params}, spatial, temporal)
        assert np.array_equal(same, run({"params": params}, *moved))
    with pytest.raises(ValueError, match="both False"):
        init(tiny_model(spatial_path=False, temporal_path=False))


def test_tokens_start_at_the_backbones():
    model = tiny_model(temporal_position="learned", num_framesets=2)
    params = init(model, framesets=2)
    backbone = params["backbone"]
    for path in ("spatial", "temporal"):
        assert np.array_equal(params[path]["class_token"], backbone["class_embedding"])
    assert np.array_equal(params["spatial"]["position"], backbone["position_embedding"])
    assert params["temporal"]["position"].shape == (2, TINY.num_tokens, 48)
    assert np.array_equal(params["temporal"]["position"][1], backbone["position_embedding"])


@pytest.mark.parametrize("kind", ["sincos3d", "sincos3d+clip", "clip", "learned"])
def test_temporal_positions(kind):
    model = tiny_model(temporal_position=kind, num_framesets=2)
    params = init(model, framesets=2)
    table = np.asarray(model.apply({"params": params}, method=DualPath._temporal_positions))
    clip = np.asarray(params["backbone"]["position_embedding"])
    fixed = sincos3d(2, (4, 4), 8, 8, 48)
    patches = {
        "sincos3d": fixed,
        "sincos3d+clip": fixed + clip[1:],
        "clip": clip[1:],
        "learned": clip[1:],
    }
    assert table.shape == (2, 17, 48)
    np.testing.assert_allclose(table[:, 0], np.stack([clip[0]] * 2), atol=0)
    np.testing.assert_allclose(table[:, 1:], np.broadcast_to(patches[kind], (2, 16, 48)), atol=1e-6)
    with pytest.raises(ValueError, match="sincos3d"):
        init(dataclasses.replace(tiny_model(), temporal_position="fourier"))


def encode(place, channels=8):
    angles = place / 10000 ** (np.arange(channels) / channels)
    return np.concatenate([np.sin(angles), np.cos(angles)])


def test_sincos3d_of_aligned_patches():
    """Check L/14's case at a small size: two patches of 4 pixels across each frame of 8."""
    table = sincos3d(2, (4, 4), 8, 4, 48).reshape(2, 8, 8, 48)
    # Frameset 1, frame in row 2, column 3 of the grid; its patch in row 1, column 0.
    expected = np.concatenate([encode(16 + 2 * 4 + 3), encode(1), encode(0)])
    np.testing.assert_allclose(table[1, 2 * 2 + 1, 3 * 2], expected, atol=1e-6)
    # Cut to D: 2 ceil(50/6) = 18 channels an axis, 54 in all.
    cut = sincos3d(1, (4, 4), 8, 8, 50)
    assert cut.shape == (1, 16, 50)
    np.testing.assert_allclose(cut[0, 5, :18], encode(5, 9), atol=1e-6)


def test_sincos3d_of_patches_over_several_frames():
    """Check B/16's case: a frame is 3.5 patches long; 52 of 196 tokens cover several frames."""
    table = sincos3d(1, (4, 4), 56, 16, 96).reshape(14, 14, 96)
    code = {time: encode(time, 16) for time in (0, 1, 4, 5)}
    np.testing.assert_allclose(table[0, 3, :32], (code[0] + code[1]) / 2, atol=1e-6)
    np.testing.assert_allclose(table[3, 3, :32], sum(code.values()) / 4, atol=1e-6)
    # Row 3 of patches: its upper half is the last half patch of frame row 0 (center 2.75 + 0.5
    # patches from the top, place 2.75), its lower half the first of frame row 1 (place -0.25).
    halves = (encode(2.75, 16) + encode(-0.25, 16)) / 2
    np.testing.assert_allclose(table[3, 0, 32:64], halves, atol=1e-6)
    # A patch inside one frame, offset by half a patch from the frame's grid.
    np.testing.assert_allclose(table[4, 0, 32:64], encode(0.5, 16), atol=1e-6)
    straddling = [(i, j) for i in range(14) for j in range(14) if 3 in (i % 7, j % 7)]
    assert len(straddling) == 52


class Doubling(BlockHooks):
    """Adds one on input and doubles on output, so that each call is visible."""

    def on_input(self, h, block):
        assert isinstance(block, vit.Block)
        return h + 1

    def before_attention(self, x):
        return 0 * x

    def on_output(self, h):
        return 2 * h


def test_hooks_are_called_in_their_places():
    h = np.random.default_rng(0).normal(size=(1, 17, 48)).astype(np.float32)
    model = vit.ViT(TINY)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    # Zero parameters: only the hooks change the tokens.
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    method = functools.partial(vit.ViT.encode, hooks=Doubling(parent=None))
    out = apply(model, params, h, method=method)
    expected = h
    for _ in range(TINY.depth):
        expected = 2 * (expected + 1)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_adapter_options():
    x = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32)
    plain = Adapter(16)
    params = perturbed(plain.init(jax.random.key(0), x)["params"])
    y = plain.apply({"params": params}, x)
    np.testing.assert_allclose(
        Adapter(16, scale=0.1).apply({"params": params}, x), 0.1 * y, atol=1e-6
    )
    np.testing.assert_allclose(
        Adapter(16, skip=True).apply({"params": params}, x), x + y, atol=1e-6
    )
    dropout = Adapter(16, dropout=0.5)
    assert np.array_equal(dropout.apply({"params": params}, x), y)
    dropped = dropout.apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})
    assert not np.array_equal(dropped, y)
    assert "ln" in Adapter(16, layer_norm=True).init(jax.random.key(0), x)["params"]


def test_dropout_differs_between_blocks_and_calls():
    model = tiny_model().clone(adapter=Adapter(16, dropout=0.5, parent=None))
    params = perturbed(init(model), 0.1)
    run = jax.jit(model.apply)
    calls = [run({"params": params}, *tiny_inputs(), jax.random.key(s)) for s in (0, 0, 1)]
    assert np.array_equal(calls[0], calls[1])
    assert not np.array_equal(calls[0], calls[2])


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="image_size 225 is not divisible by patch_size 16"):
        backbone_registry.backbone_config("ViT-B/16", image_size=225)
    with pytest.raises(ValueError, match="ViT-L/14"):
        backbone_registry.backbone_config("ViT-X")
    with pytest.raises(ValueError, match="depth"):
        backbone_registry.backbone_config(
            "custom", image_size=32, patch_size=8, width=48, heads=4, mlp_dim=96
        )
    params, image = init(tiny_model()), np.zeros((1, 1, 30, 32, 3))
    with pytest.raises(ValueError, match="30x32"):
        tiny_model().apply({"params": params}, image, method=DualPath.spatial_features)


def test_resize_positions_keeps_the_class_token():
    table = np.random.default_rng(0).normal(size=(17, 8)).astype(np.float32)
    assert TINY.resize_positions(table, (4, 4)) is table
    larger = TINY.resize_positions(table, (6, 8))
    assert larger.shape == (49, 8)
    np.testing.assert_array_equal(larger[0], table[0])


@pytest.mark.parametrize("path", ["spatial_path", "temporal_path"])
def test_the_input_of_a_path_that_is_off_may_be_missing(path):
    """Check that logits are equal to the bit, and that the other path's input is needed."""
    model, inputs = tiny_model(**{path: False}), list(tiny_inputs())
    params = init(model)
    logits = model.apply({"params": params}, *inputs)
    place = ["spatial_path", "temporal_path"].index(path)
    missing = [None if i == place else x for i, x in enumerate(inputs)]
    assert np.array_equal(model.apply({"params": params}, *missing), logits)
    with pytest.raises(ValueError, match="path needs frame"):
        model.apply({"params": params}, *[None if i != place else x for i, x in enumerate(inputs)])

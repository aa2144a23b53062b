"""Tests the model's attention, the maps computed from it, and the masks of the demo's object."""

import types

import jax
import numpy as np
import pytest

from configs import demo as demo_config
from dualpath_jax.analysis import attention_maps
from dualpath_jax.data import framesets, pipeline
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.demo import object_masks, render
from dualpath_jax.models.backbones import attention as attend_module
from dualpath_jax.models.backbones import vit
from dualpath_jax.models.methods.adapters import Adapter
from dualpath_jax.models.methods.dualpath import DualPath

TINY = vit.ViTConfig("tiny", 32, 8, 48, 3, 4, 96, 24)


def build_tiny_model(scan: bool = False):
    """Return a model of both paths and its parameters; no adapter weight is zero."""
    module = DualPath(
        TINY,
        num_classes=5,
        frame_size=8,
        adapter=Adapter(bottleneck=16, parent=None),
        pre_attention_adapter=True,
        scan_blocks=scan,
    )
    params = jax.jit(module.init)(jax.random.key(0), *make_inputs())["params"]
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), params)
    return module, moved


def make_inputs():
    """Return "spatial" [2, 3, 32, 32, 3] and "temporal" [2, 1, 32, 32, 3] images."""
    rng = np.random.default_rng(0)
    shapes = (2, 3, 32, 32, 3), (2, 1, 32, 32, 3)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def compute_attention(module, params, *options):
    """Call `DualPath.attention` on the inputs, compiled."""

    def attention(params):
        return module.apply({"params": params}, *make_inputs(), *options, method=DualPath.attention)

    return jax.device_get(jax.jit(attention)(params))


def layer_norm(x, params):
    centered = x - x.mean(-1, keepdims=True)
    normalized = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return normalized * params["scale"] + params["bias"]


def select_block(tree, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf[index], np.float64), tree)


def split_heads(x, block):
    """Return queries, keys and values [3, M, K, N, D/K] of x [M, N, D], in numpy."""
    qkv = x @ block["attention"]["qkv"]["kernel"] + block["attention"]["qkv"]["bias"]
    return qkv.reshape(*x.shape[:2], 3, 4, 12).transpose(2, 0, 3, 1, 4)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("adapted", [True, False])
def test_temporal_attention_is_that_of_the_equations(adapted):
    """Compute the last block's attention in numpy from its input; a wrong scale must not match."""
    module, params = build_tiny_model()
    temporal = make_inputs()[1]
    weights = compute_attention(module, params, adapted)["temporal"]
    assert weights.shape == (1, 2, 1, 17, 17)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)

    def enters_last(module):
        hooks, own, position = module._path_parts("temporal")
        token, fill = own["class_token"], (hooks, own["adapters"])
        if not adapted:
            token, fill = None, (None, None)
        h = module._embed(temporal, token, position)
        return module.backbone.encode(h, *fill, blocks=slice(0, 2))

    enters = jax.jit(lambda p: module.apply({"params": p}, method=enters_last))
    h = np.asarray(enters(params), np.float64)
    block = select_block(params["backbone"]["blocks"], 2)
    x = layer_norm(h, block["ln_1"])
    if adapted:  # the fifth adapter reads LN(h) and is added to it
        before = select_block(params["temporal"]["adapters"]["before"], 2)
        hidden = x @ before["down"]["kernel"] + before["down"]["bias"]
        hidden = np.asarray(jax.nn.gelu(hidden, approximate=False))
        x = x + hidden @ before["up"]["kernel"] + before["up"]["bias"]
    q, k, _ = split_heads(x, block)
    logits = q @ k.swapaxes(-1, -2)
    expected, wrong = (softmax(logits * 12.0**power).mean(axis=1) for power in (-0.5, -1.0))
    np.testing.assert_allclose(weights[0, :, 0], expected, atol=1e-4)
    assert np.abs(weights[0, :, 0] - wrong).max() > 0.01


def test_maps_of_a_readout_are_the_mean_over_all_patches():
    """Check a model whose classifier reads patches: the class token would explain nothing."""
    module, _ = build_tiny_model()
    module = module.clone(readout_width=4)
    params = jax.jit(module.init)(jax.random.key(0), *make_inputs())["params"]
    weights = compute_attention(module, params)
    maps = attention_maps._build_map_fn(module, True, False)(params, *make_inputs())
    for name, rows in (("spatial", slice(0, 1)), ("temporal", slice(1, None))):
        expected = weights[name][-1][..., rows, 1:].mean(axis=-2)
        expected /= expected.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(maps[name], expected, atol=1e-5)
    class_token = weights["temporal"][-1][..., 0, 1:]
    assert np.abs(maps["temporal"] - class_token / class_token.sum(-1, keepdims=True)).max() > 1e-4


def test_attention_times_values_is_the_blocks_own_output():
    """Apply each head's weights to its values; the weights of another head must not match."""
    _, params = build_tiny_model()
    block = jax.tree.map(lambda leaf: leaf[0], params["backbone"]["blocks"])
    x = np.random.default_rng(2).normal(size=(2, 17, 48)).astype(np.float32)
    layer = vit.Attention(48, 4)
    own = layer.apply({"params": block["attention"]}, x)
    q, k, v = layer.apply({"params": block["attention"]}, x, method=vit.Attention.project)
    weights = np.asarray(attend_module.attention_weights(q, k))
    out = block["attention"]["out"]

    def output(weights):
        y = np.einsum("mkqp,mpkd->mqkd", weights, v).reshape(2, 17, 48)
        return y @ out["kernel"] + out["bias"]

    np.testing.assert_allclose(output(weights), own, atol=1e-4)
    assert np.abs(output(weights[:, ::-1]) - own).max() > 0.01


def test_all_blocks_end_with_the_last_one_and_scan_gives_the_same():
    module, params = build_tiny_model()
    scanned, _ = build_tiny_model(scan=True)

    def run(module, all_blocks):
        return compute_attention(module, params, True, all_blocks)

    last, blocks = run(module, False), run(module, True)
    assert {name: w.shape[0] for name, w in blocks.items()} == {"spatial": 3, "temporal": 3}
    for name in ("spatial", "temporal"):
        np.testing.assert_allclose(blocks[name][-1], last[name][0], atol=1e-5)
        np.testing.assert_allclose(run(scanned, False)[name], last[name], atol=1e-4)
        assert np.abs(blocks[name][0] - last[name][0]).max() > 0.01


def test_without_adaptation_nothing_trained_counts_but_the_positions():
    """Check that other adapters and class tokens change only the maps with adaptation."""
    module, params = build_tiny_model()
    other = dict(params)
    for path in ("spatial", "temporal"):
        other[path] = jax.tree.map(lambda x: 2 * x, params[path])
    other["spatial"]["position"] = params["spatial"]["position"]
    frozen, adapted = (
        [compute_attention(module, p, kind) for p in (params, other)] for kind in (False, True)
    )

    for name in ("spatial", "temporal"):
        assert np.array_equal(frozen[0][name], frozen[1][name])
        assert np.abs(adapted[0][name] - adapted[1][name]).max() > 0.01


def test_rollout_by_hand():
    first, second = np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([[0.2, 0.8], [1.0, 0.0]])
    rolled = attention_maps.attention_rollout(np.stack([first, second]).astype(np.float32))
    np.testing.assert_allclose(rolled, [[0.45, 0.55], [0.375, 0.625]], atol=1e-6)
    swapped = attention_maps.attention_rollout(np.stack([second, first]).astype(np.float32))
    assert np.abs(rolled - swapped).max() > 0.01


def test_split_framesets_returns_the_frames():
    frames = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    tiled = framesets.tile_framesets(frames, (3, 2)).numpy()
    assert np.array_equal(attention_maps.split_framesets(tiled[None], (3, 2))[0], frames)
    square = framesets.tile_framesets(frames, (2, 2)).numpy()
    assert not np.array_equal(
        attention_maps.split_framesets(square[None], (4, 1))[0].ravel(), frames.ravel()
    )


def test_share_of_uniform_attention_is_the_area():
    masks = np.zeros((1, 2, 16, 16))
    masks[0, 0, :4, :8] = 1  # an eighth of the first image, half of its first patch
    coverage = attention_maps.patch_coverage(masks, 8)
    share = attention_maps.mean_attention_share(np.full((1, 2, 2, 2), 0.25), coverage)
    np.testing.assert_allclose(share, [1 / 16])
    on_it = np.zeros((1, 2, 2, 2))
    on_it[:, :, 0, 0] = 1
    np.testing.assert_allclose(attention_maps.mean_attention_share(on_it, coverage), [0.25])
    np.testing.assert_allclose(
        attention_maps.mean_attention_share(on_it[..., ::-1, :], coverage), [0]
    )


def test_maps_of_clips():
    module, params = build_tiny_model()
    model = types.SimpleNamespace(module=module, params=params, config=demo_config.get_config())
    rng = np.random.default_rng(0)
    shapes = {"spatial": (2, 3, 32, 32, 3), "temporal": (2, 1, 32, 32, 3)}
    clips = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in shapes.items()}
    for rollout in (False, True):
        maps = attention_maps.class_token_attention(model, clips, rollout=rollout)
        assert {k: v.shape for k, v in maps.items()} == {
            "spatial": (2, 3, 4, 4),
            "temporal": (2, 1, 4, 4),
        }
        np.testing.assert_allclose(maps["temporal"].sum((-2, -1)), 1, atol=1e-5)


def test_other_methods_and_swin_are_refused():
    config = demo_config.get_config()
    config.model.method = "aim"
    with pytest.raises(ValueError, match="dualpath, but this model was tuned with 'aim'"):
        attention_maps.class_token_attention(
            types.SimpleNamespace(module=object(), config=config), {}
        )
    from dualpath_jax.models.backbones import swin

    module = DualPath(swin.MODELS["Swin-T"], num_classes=5)
    with pytest.raises(ValueError, match="Swin-T has no class token"):
        jax.eval_shape(
            lambda: module.init(jax.random.key(0), *make_inputs(), method=DualPath.attention)
        )


def test_the_mask_covers_the_object():
    """Check that frames differ from the photograph only inside their own mask."""
    for number in range(8):
        scene, other = render.find_scene("test", number), render.find_scene("test", number + 8)
        changed = (scene.frames() != scene.background).any(axis=-1)
        assert changed.any()
        assert not changed[scene.masks() == 0].any()
        assert changed[other.masks() == 0].any()


def test_masks_are_processed_like_the_videos(config, demo_data):
    """Check that the masks' patches are bright where the videos' patches show the object."""
    dataset = VideoDataset(demo_data, "test")
    masks = object_masks.ObjectMasks(dataset, "test")
    (videos, objects) = (
        next(pipeline.eval_batches(source, config.data, Views(1, 1), 8))
        for source in (dataset, masks)
    )
    backgrounds = [render.find_scene("test", int(dataset.ids[i]) - 48).background for i in range(8)]
    small = np.stack([image.reshape(8, 9, 8, 9, 3).mean(axis=(1, 3)) for image in backgrounds])
    frames, alpha = (
        attention_maps.split_framesets(batch["temporal"][:, 0].astype(np.float32), (4, 4))
        for batch in (videos, objects)
    )
    changed = np.abs(frames - small[:, None]).mean(axis=-1)
    alpha = alpha.mean(axis=-1) / 255
    assert changed[alpha == 0].max() < 12 < 40 < changed[alpha > 0.9].mean()
    assert changed[alpha[::-1] == 0].max() > 40  # another video's masks
    assert 0.02 < alpha.mean() < 0.3


def test_masks_of_other_videos_are_refused():
    other = types.SimpleNamespace(class_names=["run", "sit"], ids=["a", "b"])
    with pytest.raises(ValueError, match="the classes here are run, sit"):
        object_masks.ObjectMasks(other, "test")

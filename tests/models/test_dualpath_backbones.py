"""Tests DualPath on backbones other than CLIP's: Swin, and a ViT without projection."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.models.backbones import swin, vit
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.adapters import Adapter
from dualpath_jax.models.methods.dualpath import DualPath, sincos3d
from dualpath_jax.weights import convert
from tests.helpers.method_cases import apply
from tests.helpers.runs import build_run
from tests.models.test_dualpath import perturbed, programs

# Maps of 8 and 4 tokens a side: the windows of the first stage are shifted.
SWIN = swin.SwinConfig("tiny", 32, 4, 24, (4, 2), 2, 48, 4)
IN21K = dataclasses.replace(
    vit.MODELS["ViT-B/16-IN21K"],
    image_size=32,
    patch_size=8,
    width=48,
    depth=2,
    heads=4,
    mlp_dim=96,
)


def tiny_model(config=SWIN, dropout=0.0, **options):
    options = {"num_classes": 5, "frame_size": 8, "num_framesets": 2} | options
    return DualPath(config, adapter=Adapter(16, dropout=dropout, parent=None), **options)


def tiny_inputs():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, n, 32, 32, 3)).astype(np.float32) for n in (3, 2))


@functools.cache
def _init(model):
    params = dict(jax.jit(model.init)(jax.random.key(0), *tiny_inputs())["params"])
    params["backbone"] = perturbed(params["backbone"])
    return model.start_from_backbone(params)


def init(model):
    """Return parameters with a nontrivial backbone and freshly initialized adapters."""
    params = _init(model.clone(scan_blocks=True))  # compiles faster
    return jax.tree.map(jnp.asarray, params)  # copies the dictionaries for the test


def test_parameters_on_swin():
    """Check adapters of each stage's width in the window blocks only (App. B.1); no tokens."""
    model = tiny_model(pre_attention_adapter=True)
    params = init(model)
    predicate = method_registry.is_trainable_fn("dualpath")
    shapes = {n: p.shape for n, p in param_tree.flatten(params).items() if predicate(n)}

    def adapter(path, hook):
        return {
            f"{path}/adapters/stage_{stage}/{hook}/{name}": (blocks, *shape)
            for stage, (blocks, width) in enumerate(((2, 24), (1, 48)))
            for name, shape in {
                "down/kernel": (width, 16),
                "down/bias": (16,),
                "up/kernel": (16, width),
                "up/bias": (width,),
            }.items()
        }

    assert shapes == {
        **adapter("spatial", "attention"),
        **adapter("spatial", "mlp"),
        **adapter("temporal", "before"),
        **adapter("temporal", "attention"),
        **adapter("temporal", "mlp"),
        "classifier/hidden/kernel": (96, 48),
        "classifier/hidden/bias": (48,),
        "classifier/output/kernel": (48, 5),
        "classifier/output/bias": (5,),
    }
    every = jax.eval_shape(
        tiny_model(adapt_shifted_windows=True).init, jax.random.key(0), *tiny_inputs()
    )
    down = every["params"]["spatial"]["adapters"]["stage_0"]["mlp"]["down"]["kernel"]
    assert down.shape == (4, 24, 16)


def frozen_and_adapted(model, params, path):
    """Return maps before and after all stages, frozen and of `path`, by separate programs."""
    h = np.random.default_rng(2).normal(size=(2, 8, 8, 24)).astype(np.float32)
    return h, *(np.asarray(run({"params": params}, h)) for run in programs(model, path))


@pytest.mark.parametrize("shifted", [False, True])
def test_paths_that_start_as_the_frozen_swin(shifted):
    model = tiny_model(scan_blocks=True, adapt_shifted_windows=shifted, serial_skip=True)
    params = init(model)
    for path in ("spatial", "temporal"):
        _, frozen, adapted = frozen_and_adapted(model, params, path)
        assert np.array_equal(frozen, adapted)
        # Twin: one moved weight of the last block that has adapters shows.
        up = params[path]["adapters"]["stage_1"]["attention"]["up"]
        up["bias"] = up["bias"].at[-1, 0].set(1e-2)
        _, frozen, adapted = frozen_and_adapted(model, params, path)
        assert not np.array_equal(frozen, adapted)


@pytest.mark.parametrize("shifted", [False, True])
def test_temporal_path_starts_as_the_identity_where_it_is_adapted(shifted):
    """Check eq. 9 as printed; blocks without adapters stay unchanged."""
    model = tiny_model(adapt_shifted_windows=shifted)
    params = init(model)
    h, _, adapted = frozen_and_adapted(model, params, "temporal")

    def expected(model, h):
        backbone = model.backbone
        for stage, depth in enumerate(SWIN.depths):
            rows, columns, width = h.shape[1:]
            h = h.reshape(2, -1, width)
            for i in range(depth):
                if i % 2 and not shifted:
                    block = backbone._block(stage, (rows, columns), shifted=True)
                    params = jax.tree.map(lambda leaf, i=i: leaf[i], backbone.blocks[stage])
                    h = block.apply({"params": params}, h, BlockHooks(parent=None).bind({}))
            h = h.reshape(2, rows, columns, width)
            h = backbone.merge[stage](h) if stage == 0 else h
        return h

    reference = apply(model, params, h, method=expected)
    np.testing.assert_allclose(adapted, reference, atol=1e-4)  # values are of order 10


class Counting(BlockHooks):
    """Adds one on input and doubles on output, so that each call is visible."""

    def on_input(self, h, block):
        assert isinstance(block, swin.Block)
        assert h.shape == (1, 64, 24)
        return h + 1

    def on_output(self, h):
        return 2 * h


@pytest.mark.parametrize(("shifted", "times"), [(True, 4), (False, 2)])
def test_hooks_are_called_in_the_chosen_blocks(shifted, times):
    config = dataclasses.replace(SWIN, depths=(4,))
    model = swin.Swin(config)
    h = np.random.default_rng(0).normal(size=(1, 8, 8, 24)).astype(np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), params
    )  # only the hooks change the tokens
    hooks = Counting(shifted_windows=shifted, parent=None)
    method = functools.partial(swin.Swin.encode, hooks=hooks)
    out = apply(model, params["params"], h, method=method)
    expected = h
    for _ in range(times):
        expected = 2 * (expected + 1)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "shifted"),
    [(SWIN, False), (SWIN, True), (IN21K, False)],
    ids=["swin", "swin-every-block", "in21k"],
)
def test_scanned_and_unrolled_agree(config, shifted):
    params = perturbed(init(tiny_model(config, adapt_shifted_windows=shifted)), 0.1)
    outputs = []
    for scan in (False, True):
        model = tiny_model(config, 0.5, adapt_shifted_windows=shifted, scan_blocks=scan)
        dropout = jax.random.key(3)
        outputs.append(jax.jit(model.apply)({"params": params}, *tiny_inputs(), dropout))
    assert outputs[0].shape == (2, 5)
    np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_bfloat16_stays_bfloat16(scan_blocks):
    model = swin.Swin(SWIN, dtype=jnp.bfloat16, scan_blocks=scan_blocks)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    tokens, features = jax.eval_shape(model.apply, params, image)
    assert (tokens.shape, features.shape) == ((1, 4, 4, 48), (1, 48))
    assert tokens.dtype == features.dtype == jnp.bfloat16


def test_dropout_differs_between_blocks_and_calls():
    model = tiny_model(dropout=0.5)
    params = perturbed(init(model), 0.1)
    run = jax.jit(model.apply)
    calls = [run({"params": params}, *tiny_inputs(), jax.random.key(s)) for s in (0, 0, 1)]
    assert np.array_equal(calls[0], calls[1])
    assert not np.array_equal(calls[0], calls[2])


def test_positions_are_added_after_the_patch_embedding():
    """Check the positions of each frameset, with 2x2 patches in a frame."""
    model = tiny_model()
    params = init(model)
    table = model.apply({"params": params}, method=DualPath._temporal_positions)
    fixed = sincos3d(2, (4, 4), 8, 4, 24)
    np.testing.assert_array_equal(table, fixed)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    plain, moved = (
        model.apply(
            {"params": params}, images, method=lambda m, x, p=p: m.backbone.embed(x, None, p)
        )
        for p in (None, fixed)
    )
    np.testing.assert_allclose(moved - plain, fixed.reshape(2, 8, 8, 24), atol=1e-5)


def test_features_start_as_the_backbones():
    for config in (SWIN, IN21K):
        model = tiny_model(config)
        params = init(model)
        spatial, _ = tiny_inputs()
        y_sp = apply(model, params, spatial, method=DualPath.spatial_features)
        backbone = backbone_registry.build_backbone(config)
        _, features = apply(backbone, params["backbone"], spatial.reshape(-1, 32, 32, 3))
        assert features.shape == (6, config.feature_dim)
        np.testing.assert_allclose(y_sp, features.reshape(2, 3, -1).mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("kind", ["sincos3d+clip", "clip", "learned"])
def test_positions_that_need_a_backbone_table_are_rejected(kind):
    message = (
        f"temporal_position '{kind}' takes the backbone's position table, but tiny does not have"
    )
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        init(tiny_model(temporal_position=kind))


def test_training_on_a_swin_of_the_config(config, tmp_path):
    """Convert a timm checkpoint, train six steps and evaluate."""
    pytest.importorskip("torch")
    from tests.helpers.torch_imagenet import timm_swin
    from tests.helpers.torch_reference import torch_to_numpy

    arrays = {
        name: np.ascontiguousarray(torch_to_numpy(value))
        for name, value in timm_swin(SWIN).state_dict().items()
    }
    safetensors.numpy.save_file(arrays, tmp_path / "timm.safetensors")
    convert.convert_checkpoint(tmp_path / "timm.safetensors", tmp_path / "backbone.safetensors")
    shape = dataclasses.asdict(SWIN)
    for key in ("name", "image_size", "activation", "eps"):
        del shape[key]
    for key in config.backbone:
        config.backbone[key] = shape.get(key)
    config.backbone.name = "custom-swin"
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Swin's
    config.model.temporal_position = "sincos3d"
    config.backbone.checkpoint = str(tmp_path / "backbone.safetensors")
    config.num_train_steps = 6
    dataset = VideoDataset(config.data.dir, "train")
    run = build_run(config, str(tmp_path / "run"), dataset)
    before = {n: np.asarray(x) for n, x in param_tree.flatten(run.state.trainable).items()}
    run.train(dataset, VideoDataset(config.data.dir, "test"))
    after = {n: np.asarray(x) for n, x in param_tree.flatten(run.state.trainable).items()}
    assert not [name for name in after if np.array_equal(before[name], after[name])]
    assert np.isfinite(after["classifier/output/kernel"]).all()
    config.backbone.depths = (2, 2)
    with pytest.raises(ValueError, match=r"holds custom-swin .*\(4, 2\).*asks for.*\(2, 2\)"):
        build_run(config, str(tmp_path / "other"), dataset)

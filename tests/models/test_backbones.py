"""Compares ViT and Swin with timm and transformers on random weights; tests sources and errors."""

import dataclasses
import operator
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.config import schema
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import layers, swin, vit
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.weights import catalog, convert

torch = pytest.importorskip("torch")

from tests.helpers import torch_imagenet as reference  # noqa: E402
from tests.helpers.torch_reference import torch_to_numpy  # noqa: E402
from tests.helpers.vit_stages import compile_block, vit_stages  # noqa: E402

TOLERANCE = 1e-4  # absolute, float32, for outputs of order 1

VIT = dataclasses.replace(
    vit.MODELS["ViT-B/16-IN21K"],
    name="custom",
    image_size=32,
    patch_size=8,
    width=128,
    depth=3,
    heads=2,
    mlp_dim=256,
)
# Maps of 16, 8 and 4 tokens a side: the last is one window, without shift.
SWIN = swin.SwinConfig("custom-swin", 64, 4, 32, (2, 2, 2), 1, 64, 4)


def _images(size, count=2):
    """Return random images [M, H, W, 3] for size (H, W), or a side."""
    size = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(0).standard_normal((count, *size, 3), np.float32)


def _save_safetensors(state, path):
    """Save a torch state dict as a safetensors file and return its path."""
    arrays = {k: np.ascontiguousarray(torch_to_numpy(v)) for k, v in state.items()}
    safetensors.numpy.save_file(arrays, path)
    return path


def _converted(source, tmp_path, **options):
    """Convert a checkpoint and return (information, arrays by path)."""
    out = tmp_path / "backbone.safetensors"
    options = {"normalization": "half"} | options
    return convert.convert_checkpoint(source, out, **options), convert._read_backbone(out)[0]


def _tree(arrays):
    return convert.traverse_util.unflatten_dict(arrays, sep="/")


# ---------------------------------------------------------------- our stages


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embedding_equals_a_convolution(bias):
    """Compare parameters and results on non-square images; twin: transposed patches."""
    images = _images((24, 40))
    patches = layers.PatchEmbedding(16, 8, bias)
    convolution = nn.Conv(16, (8, 8), strides=8, padding="VALID", use_bias=bias)
    params = convolution.init(jax.random.key(0), images)
    shapes = [
        jax.tree.map(jnp.shape, m.init(jax.random.key(0), images)) for m in (patches, convolution)
    ]
    assert shapes[0] == shapes[1]
    want = convolution.apply(params, images)
    assert want.shape == (2, 3, 5, 16)
    np.testing.assert_allclose(patches.apply(params, images), want, rtol=0, atol=1e-5)
    gradients = (
        jax.grad(lambda params, m=m: (m.apply(params, images) ** 2).sum())(params)
        for m in (patches, convolution)
    )
    for got, wanted in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)
    transposed = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf, params)
    assert np.abs(patches.apply(transposed, images) - want).max() > 0.1


def _swin_stages(params, config, images):
    model, variables = swin.Swin(config), {"params": params}
    h = model.apply(variables, images, method="embed")
    stages = {"embed": h}
    for s, depth in enumerate(config.depths):
        if s:
            h = model.apply(variables, h, method=lambda m, h, s=s: m.merge[s - 1](h))
            stages[f"merge_{s - 1}"] = h
        for i in range(depth):
            block = swin.Block(config, s, h.shape[1:3], shifted=i % 2 == 1, parent=None)
            params_i = jax.tree.map(operator.itemgetter(i), params[f"blocks_{s}"])
            tokens = compile_block(block)(params_i, h.reshape(h.shape[0], -1, h.shape[-1]))
            h = stages[f"block_{s}_{i}"] = tokens.reshape(h.shape)
    stages["features"] = model.apply(variables, h, method="pool")
    return stages


STAGES = {"vit": vit_stages, "swin": _swin_stages}


def _differences(params, config, images, expected):
    """Return the maximum of |ours - torch's| by stage, in order."""
    ours = STAGES[backbone_registry.family_of(config)](params, config, images)
    assert ours.keys() == expected.keys()
    differences = {}
    for name, value in ours.items():
        value = np.asarray(value)
        value = value if value.ndim == 2 else value.reshape(len(value), -1, value.shape[-1])
        assert value.shape == tuple(expected[name].shape), name
        assert 0.03 < np.std(value) < 30, f"{name} is not of order 1"
        differences[name] = float(np.abs(value - expected[name].numpy()).max())
    return differences


def _torch_stages(model, images):
    return reference.stages(model, torch.from_numpy(images).permute(0, 3, 1, 2))


def _check_parity(model, source, config, images, tmp_path, record_property):
    info, _ = _converted(source, tmp_path)
    params, loaded, _ = convert.load_backbone(info["out"], config)
    assert loaded == config
    expected = _torch_stages(model, images)
    differences = _differences(params, config, images, expected)
    record_property("differences", differences)
    worst = max(differences, key=differences.get)
    print(f"{info['layout']}: largest difference {differences[worst]:.1e}, at {worst}")
    assert differences[worst] <= TOLERANCE, differences
    whole = backbone_registry.build_backbone(config, scan_blocks=True)
    tokens, features = jax.jit(whole.apply)({"params": params}, images)
    last = [name for name in expected if name.startswith("block")][-1]
    np.testing.assert_allclose(
        tokens.reshape(expected[last].shape), expected[last], rtol=0, atol=TOLERANCE
    )
    np.testing.assert_allclose(features, expected["features"], rtol=0, atol=TOLERANCE)
    return info


# ---------------------------------------------------------------- parity


B16 = vit.MODELS["ViT-B/16-IN21K"]
SWIN_B = swin.MODELS["Swin-B"]


@pytest.mark.parametrize("publisher", ["timm", "huggingface"])
@pytest.mark.parametrize(
    "config", [pytest.param(VIT, id="small"), pytest.param(B16, id="b16", marks=pytest.mark.slow)]
)
def test_vit_parity(publisher, config, tmp_path, record_property):
    if publisher == "timm":
        model = reference.timm_vit(config)
        source = _save_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    else:
        config = dataclasses.replace(config, eps=1e-12)  # transformers' default
        model = reference.huggingface_vit(config)
        model.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    images = _images(config.image_size, count=1 if config.depth > 3 else 2)
    info = _check_parity(model, source, config, images, tmp_path, record_property)
    assert info["config"] == config
    assert info["layout"] == f"{publisher}-vit"
    if config.depth > 3:
        assert info["parameters"] == 85_798_656


@pytest.mark.parametrize(
    ("publisher", "config", "size"),
    [
        pytest.param("timm", SWIN, 64, id="timm-small"),
        pytest.param("huggingface", SWIN, 64, id="huggingface-small"),
        # Maps of 18x14, 9x7 (odd: merging pads) and 5x4; windows of 4 divide none of them.
        pytest.param("huggingface", SWIN, (72, 56), id="huggingface-padded"),
        # Maps of 8, 4 and 2: the last is smaller than the window.
        pytest.param("timm", dataclasses.replace(SWIN, image_size=32), 32, id="timm-shrunk"),
        pytest.param("timm", SWIN_B, 224, id="timm-b", marks=pytest.mark.slow),
        pytest.param("huggingface", SWIN_B, 224, id="huggingface-b", marks=pytest.mark.slow),
    ],
)
def test_swin_parity(publisher, config, size, tmp_path, record_property):
    if publisher == "timm":
        model = reference.timm_swin(config)
        source = _save_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    else:
        model = reference.huggingface_swin(config)
        model.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    images = _images(size, count=1 if len(config.depths) > 3 else 2)
    info = _check_parity(model, source, config, images, tmp_path, record_property)
    assert info["layout"] == f"{publisher}-swin"
    if len(config.depths) > 3:
        assert info["config"] == config
        assert info["parameters"] == 86_743_224


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return (our arrays, config, images, torch's stages) of timm's small models, by family."""
    result = {}
    for config, build in ((VIT, reference.timm_vit), (SWIN, reference.timm_swin)):
        folder = tmp_path_factory.mktemp(config.name)
        model, images = build(config), _images(config.image_size)
        source = _save_safetensors(model.state_dict(), folder / "model.safetensors")
        _, arrays = _converted(source, folder)
        family = backbone_registry.family_of(config)
        result[family] = (arrays, config, images, _torch_stages(model, images))
    return result


def _no_bias(arrays):
    for name in arrays:
        if name.endswith("relative_position_bias"):
            arrays[name] = np.zeros_like(arrays[name])


def _columns_before_rows(arrays):
    for name, table in arrays.items():
        if name.endswith("relative_position_bias"):
            side = round(table.shape[1] ** 0.5)
            grid = table.reshape(-1, side, side, table.shape[-1])
            arrays[name] = grid.swapaxes(1, 2).reshape(table.shape)


def _no_patch_bias(arrays):
    arrays["patch_embedding/bias"] = np.zeros_like(arrays["patch_embedding/bias"])


def _rows_outside(arrays):
    """Order the four tokens of merging by rows."""
    for name in arrays:
        if name.startswith("merge_0/") and not name.endswith("reduction/kernel"):
            a, b, c, d = np.split(arrays[name], 4)
            arrays[name] = np.concatenate([a, c, b, d])


@pytest.mark.parametrize(
    ("family", "edit", "override", "first"),
    [
        ("vit", None, {"activation": "quick_gelu"}, "block_0_0"),
        ("vit", None, {"eps": 1e-5}, "block_0_0"),
        ("vit", _no_patch_bias, {}, "embed"),
        ("swin", None, {"activation": "quick_gelu"}, "block_0_0"),
        ("swin", None, {"eps": 1e-6}, "embed"),
        ("swin", _no_bias, {}, "block_0_0"),
        ("swin", _columns_before_rows, {}, "block_0_0"),
        ("swin", _rows_outside, {}, "merge_0"),
    ],
)
def test_mistakes_exceed_the_tolerance(family, edit, override, first, small):
    arrays, config, images, expected = small[family]
    arrays = dict(arrays)
    if edit:
        edit(arrays)
    config = dataclasses.replace(config, **override)
    differences = _differences(_tree(arrays), config, images, expected)
    wrong = [stage for stage, difference in differences.items() if difference > TOLERANCE]
    assert (wrong[0], wrong[-1]) == (first, "features"), differences


def test_no_shift_mask_exceeds_the_tolerance(small, monkeypatch):
    arrays, config, images, expected = small["swin"]
    same_region = swin._same_region
    monkeypatch.setattr(swin, "_same_region", lambda *args: np.ones_like(same_region(*args)))
    differences = _differences(_tree(arrays), config, images, expected)
    wrong = [stage for stage, difference in differences.items() if difference > TOLERANCE]
    assert (wrong[0], wrong[-1]) == ("block_0_1", "features"), differences


def test_shift_mask_of_a_small_map():
    """Check 4x4 tokens, windows of 2, shift 1: the last window joins four corners."""
    same = swin._same_region((4, 4), 2, 1)
    assert same.shape == (4, 1, 4, 4)
    assert same[0].all()  # rows and columns 1, 2
    assert np.array_equal(same[1, 0], np.equal.outer([0, 1, 0, 1], [0, 1, 0, 1]))  # columns 3 | 0
    assert np.array_equal(same[2, 0], np.equal.outer([0, 0, 1, 1], [0, 0, 1, 1]))  # rows 3 | 0
    assert np.array_equal(same[3, 0], np.eye(4, dtype=bool))


# ---------------------------------------------------------------- sources


def _with_buffers(state):
    """Add the buffers that older files contain."""
    names = [n.removesuffix("relative_position_bias_table") for n in state if n.endswith("_table")]
    state = {**state, **{n + "relative_position_index": torch.zeros(16, 16) for n in names}}
    return {**state, "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


def _microsoft(state):
    """Rename a state like Microsoft's: merging belongs to the stage before; head, buffers."""
    state = {
        re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name): value
        for name, value in state.items()
    }
    state = {name.replace("head.fc", "head"): value for name, value in state.items()}
    return _with_buffers(state)


def test_swin_of_its_authors(small, tmp_path):
    state = _microsoft(reference.timm_swin(SWIN).state_dict())
    torch.save({"model": state}, tmp_path / "swin.pth")
    info, arrays = _converted(tmp_path / "swin.pth", tmp_path)
    assert (info["container"], info["layout"]) == ("torch", "microsoft-swin")
    expected = small["swin"][0]
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], expected[name]) for name in arrays)


@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_huggingface_in_memory_and_in_files(family, classifier, tmp_path):
    """Check that both names are read: transformers 5 writes older ones than it has in memory."""
    config, build = {
        "vit": (VIT, reference.huggingface_vit),
        "swin": (SWIN, reference.huggingface_swin),
    }[family]
    model = build(config, classifier)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (a, arrays), (b, same) = (
        _converted(tmp_path / name, tmp_path) for name in ("model.safetensors", "pytorch_model.bin")
    )
    assert a["layout"] == b["layout"] == f"huggingface-{family}"
    assert a["config"] == b["config"] == config  # eps and image size from config.json
    assert arrays.keys() == same.keys()
    assert all(np.array_equal(arrays[name], same[name]) for name in arrays)


def test_huggingface_config_of_another_model(tmp_path):
    reference.huggingface_swin(SWIN).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = re.sub(r'("depths": \[\s+2,\s+2,\s+)2', r"\g<1>6", config.read_text())
    config.write_text(text)
    message = r"describes another model.*\(32, \(2, 2, 6\)\).*\(32, \(2, 2, 2\)\)"
    with pytest.raises(ValueError, match=message):
        _converted(tmp_path / "model.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("build", "config", "missing", "extra"),
    [
        (reference.timm_vit, VIT, "blocks.1.mlp.fc1.bias", "blocks.0.ls1.gamma"),
        (reference.timm_vit, VIT, "norm.bias", "blocks.0.attn.q_norm.weight"),
        (reference.timm_swin, SWIN, "layers.1.downsample.norm.bias", "absolute_pos_embed"),
        (reference.timm_swin, SWIN, "patch_embed.norm.bias", "layers.0.blocks.0.attn.logit_scale"),
    ],
)
def test_left_over_and_missing_names_are_listed(build, config, missing, extra, tmp_path):
    state = build(config).state_dict()
    del state[missing]
    source = _save_safetensors({**state, extra: torch.zeros(1)}, tmp_path / "a.safetensors")
    message = f"left over: {re.escape(extra)}; missing: {re.escape(missing)}"
    with pytest.raises(ValueError, match=message):
        _converted(source, tmp_path)


def test_widened_windows_are_logged_and_change_nothing(tmp_path, caplog):
    """Check 32 pixels, where timm's last stage has windows of 2 and tables of that size."""
    config = dataclasses.replace(SWIN, image_size=32)
    state = reference.timm_swin(config).state_dict()
    source = _save_safetensors(state, tmp_path / "a.safetensors")
    with caplog.at_level("INFO", logger="absl"):
        _, arrays = _converted(source, tmp_path)
    assert "blocks_2/attention/relative_position_bias: windows of 2 tokens widened to 4" in (
        caplog.text
    )
    table = arrays["blocks_2/attention/relative_position_bias"].reshape(2, 7, 7, 4)
    name = "layers.2.blocks.1.attn.relative_position_bias_table"
    np.testing.assert_array_equal(table[1, 2:5, 2:5].reshape(9, 4), state[name])
    assert not np.any(table[:, :2])


# ---------------------------------------------------------------- loading


def test_published_shapes_are_named():
    for config in (*vit.MODELS.values(), *swin.MODELS.values()):
        assert (
            backbone_registry.find_named_config(dataclasses.replace(config, name="custom"))
            == config
        )
    larger = dataclasses.replace(B16, name="custom", image_size=384)
    assert backbone_registry.find_named_config(larger) == dataclasses.replace(B16, image_size=384)


def test_load_resizes_the_tables_of_another_window(small, tmp_path, caplog):
    source = _save_safetensors(reference.timm_swin(SWIN).state_dict(), tmp_path / "a.safetensors")
    info, arrays = _converted(source, tmp_path)
    wanted = dataclasses.replace(SWIN, window_size=8)
    with caplog.at_level("INFO", logger="absl"):
        params, config, _ = convert.load_backbone(info["out"], wanted)
    message = "position table resized from windows of 4x4 tokens to windows of 8x8 tokens"
    assert message in caplog.text
    assert config == wanted
    table = params["blocks_1"]["attention"]["relative_position_bias"]
    assert table.shape == (2, 225, 2)
    grid = arrays["blocks_1/attention/relative_position_bias"].reshape(2, 7, 7, 2)
    expected = layers.resize_grid(grid[1], (15, 15)).reshape(225, 2)
    np.testing.assert_allclose(table[1], expected, atol=1e-6)
    _, features = swin.Swin(config).apply({"params": params}, _images(64))
    assert features.shape == (2, 128)


@pytest.mark.parametrize(
    ("name", "field", "wanted_text"),
    [
        ("custom-swin", {"depths": (2, 2, 4)}, "'depths': (2, 2, 4)"),
        ("custom-swin", {"width": 64}, "'width': 64"),
        ("ViT-B/16", {}, "ViT-B/16 {'width': 768"),
        ("ViT-B/16-IN21K", {}, "ViT-B/16-IN21K {'width': 768"),
    ],
)
def test_load_rejects_another_architecture(name, field, wanted_text, small, tmp_path):
    source = _save_safetensors(reference.timm_swin(SWIN).state_dict(), tmp_path / "a.safetensors")
    info, _ = _converted(source, tmp_path)
    wanted = backbone_registry.MODELS.get(name) or dataclasses.replace(SWIN, **field)
    holds = "holds custom-swin {'width': 32, 'depths': (2, 2, 2)"
    with pytest.raises(ValueError, match=f"{re.escape(holds)}.*asks for.*{re.escape(wanted_text)}"):
        convert.load_backbone(info["out"], wanted)


def test_clip_and_imagenet_weights_differ_in_architecture():
    clip = vit.MODELS["ViT-B/16"]
    without = dataclasses.replace(clip, projection_dim=None)
    assert without.architecture != B16.architecture  # by ln_pre and the patch bias


# ---------------------------------------------------------------- names and shapes


def test_bad_shapes_are_named():
    for name, overrides, message in [
        ("Swin-B", {"depth": 12}, "'Swin-B' has no config.backbone.depth"),
        ("ViT-B/16", {"window_size": 7}, "'ViT-B/16' has no config.backbone.window_size"),
        ("custom-swin", {"width": 32}, "needs its shape in config.backbone.*depths"),
        ("Swin-B", {"depths": (2, 3)}, r"depths \(2, 3\) of Swin-B must be even"),
        ("Swin-B", {"image_size": 226}, "226 is not divisible by patch_size 4 of Swin-B"),
        ("Swin-X", {}, "unknown backbone 'Swin-X': known are ViT-B/32.*Swin-B.*custom-swin"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbone_registry.backbone_config(name, **overrides)
    model = swin.Swin(SWIN)
    with pytest.raises(ValueError, match="66x64 pixels is not divisible by the patch size 4"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 66, 64, 3)))
    image = jnp.zeros((1, 64, 64, 3))
    with pytest.raises(ValueError, match="custom-swin has no class token"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), image, image, method="embed"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # with CLIP's projection, without classifiers
        ("ViT-B/32", 87_849_216),
        ("ViT-L/14", 303_966_208),
        ("ViT-L/14@336", 304_293_888),
        ("ViT-B/16-IN21K", 85_798_656),
        ("ViT-L/16-IN21K", 303_301_632),
        ("Swin-T", 27_519_354),
        ("Swin-S", 48_837_258),
        ("Swin-B", 86_743_224),
    ],
)
def test_backbone_parameters(name, parameters):
    config = backbone_registry.MODELS[name]
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    tree = jax.eval_shape(backbone_registry.build_backbone(config).init, jax.random.key(0), image)
    assert param_tree.count_params(tree) == parameters == catalog.PARAMETERS[name]


def test_method_names_what_it_needs(monkeypatch):
    config = schema.get_config()
    method = dataclasses.replace(method_registry.METHODS["dualpath"], needs="a plain ViT")
    monkeypatch.setitem(method_registry.METHODS, "dualpath", method)
    method_registry.build_model(config, B16, 5)
    with pytest.raises(
        ValueError, match="method 'dualpath' .*'Swin-B'.* needs a plain ViT; choose"
    ):
        method_registry.build_model(config, SWIN_B, 5)

"""Compares DINOv2 and SigLIP with timm and transformers on random weights, by several names."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.models import param_tree
from dualpath_jax.models.backbones import layers, vit
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.weights import catalog, convert

torch = pytest.importorskip("torch")

from tests.helpers import torch_families as reference  # noqa: E402
from tests.helpers.torch_reference import torch_to_numpy  # noqa: E402
from tests.helpers.vit_stages import vit_stages  # noqa: E402

TOLERANCE = 1e-4  # largest difference of a stage, relative to its largest value


def _small(name, **fields):
    """Return the shape of a named model with few and narrow blocks, at 4x4 patches."""
    config = vit.MODELS[name]
    size = 4 * config.patch_size
    small = {"image_size": size, "width": 64, "depth": 2, "heads": 2, "mlp_dim": 128} | fields
    return dataclasses.replace(config, name="custom", **small)


DINOV2 = _small("DINOv2-S/14", mlp_dim=256)
REGISTERS = _small("DINOv2-S/14-reg", mlp_dim=256)
GIANT = _small("DINOv2-g/14-reg", mlp_dim=128)
SIGLIP = _small("SigLIP-B/16")
GAP = dataclasses.replace(SIGLIP, readout="mean")
S14 = vit.MODELS["DINOv2-S/14"]


def _save(model, path, rename=()):
    """Write a model's weights as safetensors, with names changed by (pattern, replacement)."""
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in rename:
            name = re.sub(pattern, replacement, name)
        state[name] = np.ascontiguousarray(torch_to_numpy(tensor))
    safetensors.numpy.save_file(state, path)
    return path


def _build(publisher, config, folder):
    """Return a reference with random weights, and the file of its weights."""
    if publisher == "timm":
        model = reference.timm_model(config)
        return model, _save(model, folder / "model.safetensors")
    siglip = config.readout == "attention"
    build = reference.huggingface_siglip if siglip else reference.huggingface_dinov2
    model = build(config)
    model.save_pretrained(folder)
    return model, folder / "model.safetensors"


def _images(size, count=2):
    return np.random.default_rng(0).standard_normal((count, size, size, 3), np.float32)


def _differences(params, config, images, expected):
    """Return max |ours - theirs| / max |theirs| by stage, in order."""
    ours = vit_stages(params, config, images)
    assert ours.keys() == expected.keys()
    differences = {}
    for name, value in ours.items():
        wanted = expected[name].numpy()
        assert value.shape == wanted.shape, name
        differences[name] = float(np.abs(value - wanted).max() / np.abs(wanted).max())
    return differences


def _torch_stages(model, images):
    return reference.stages(model, torch.from_numpy(images).permute(0, 3, 1, 2))


def _check_parity(publisher, config, sizes, folder, record_property, **options):
    """Convert a model of random weights and compare it at several image sizes."""
    model, source = _build(publisher, config, folder)
    options = {"heads": config.heads} | options  # a bare file does not state them
    info = convert.convert_checkpoint(source, folder / "backbone.safetensors", **options)
    for size in sizes:
        wanted = dataclasses.replace(config, image_size=size)
        params, loaded, _ = convert.load_backbone(info["out"], wanted)
        images = _images(size, count=1 if config.depth > 3 else 2)
        differences = _differences(params, loaded, images, _torch_stages(model, images))
        record_property(f"differences_{size}", differences)
        print(f"{info['layout']} at {size}: largest {max(differences.values()):.1e}")
        assert max(differences.values()) <= TOLERANCE, (size, differences)
    whole = backbone_registry.build_backbone(loaded, scan_blocks=True)
    _, features = jax.jit(whole.apply)({"params": params}, images)
    expected = _torch_stages(model, images)["features"]
    np.testing.assert_allclose(features, expected, rtol=0, atol=TOLERANCE * expected.abs().max())
    return info


@pytest.mark.parametrize(
    ("publisher", "config", "layout"),
    [
        pytest.param("timm", DINOV2, "timm-dinov2", id="timm-dinov2"),
        pytest.param("timm", REGISTERS, "timm-dinov2", id="timm-registers"),
        pytest.param("timm", GIANT, "timm-dinov2", id="timm-swiglu"),
        pytest.param("timm", SIGLIP, "timm-siglip", id="timm-siglip"),
        pytest.param("timm", GAP, "timm-vit", id="timm-siglip-gap"),
        pytest.param("huggingface", DINOV2, "huggingface-dinov2", id="hf-dinov2"),
        pytest.param("huggingface", REGISTERS, "huggingface-dinov2", id="hf-registers"),
        pytest.param("huggingface", GIANT, "huggingface-dinov2", id="hf-swiglu"),
        pytest.param("huggingface", SIGLIP, "huggingface-siglip", id="hf-siglip"),
    ],
)
def test_small_parity(publisher, config, layout, tmp_path, record_property):
    """Compare at the size of the table and, where the reference can, at two others."""
    resized = (3, 7) if layout != "huggingface-siglip" else ()
    sizes = [n * config.patch_size for n in (*resized, 4)]
    options = {"normalization": "half", "activation": "gelu_tanh"} if config == GAP else {}
    info = _check_parity(publisher, config, sizes, tmp_path, record_property, **options)
    resize = "bicubic" if publisher == "huggingface" and config == DINOV2 else "antialias"
    assert info["config"] == dataclasses.replace(config, position_resize=resize)
    assert info["layout"] == layout


@pytest.mark.slow
@pytest.mark.parametrize(("table", "sizes"), [(168, (224, 168)), (518, (168,))])
@pytest.mark.parametrize("publisher", ["timm", "huggingface"])
def test_vit_s14_parity(publisher, table, sizes, tmp_path, record_property):
    config = dataclasses.replace(S14, image_size=table)
    info = _check_parity(publisher, config, sizes, tmp_path, record_property)
    assert (info["config"].name, info["config"].heads) == ("DINOv2-S/14", 6)
    assert info["parameters"] == 21_530_496 + (table // 14) ** 2 * 384
    assert (info["mean"], info["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.slow
def test_siglip_b16_parity(tmp_path, record_property):
    config = vit.MODELS["SigLIP-B/16"]
    info = _check_parity("huggingface", config, (224,), tmp_path, record_property)
    assert info["config"] == config
    assert info["mean"] == info["std"] == [0.5] * 3


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return (our arrays, images, torch's stages) of small models of timm, by config."""
    result = {}
    for config in (GIANT, SIGLIP):
        folder = tmp_path_factory.mktemp("small")
        model, source = _build("timm", config, folder)
        out = folder / "backbone.safetensors"
        convert.convert_checkpoint(source, out, heads=config.heads)
        images = _images(config.image_size)
        arrays = convert._read_backbone(out)[0]
        result[config] = arrays, images, _torch_stages(model, images)
    return result


def _set(name, change):
    def edit(arrays):
        arrays[name] = change(arrays[name])

    return edit


def _swap_halves(array):
    return np.concatenate(np.split(array, 2, axis=-1)[::-1], axis=-1)


@pytest.mark.parametrize(
    ("config", "edit", "override", "first"),
    [
        (SIGLIP, None, {"activation": "quick_gelu"}, "block_0_0"),
        (SIGLIP, None, {"readout": "mean"}, "features"),
        (SIGLIP, _set("attention_pool/probe", np.zeros_like), {}, "features"),
        (SIGLIP, _set("attention_pool/attention/qkv/bias", np.zeros_like), {}, "features"),
        (GIANT, None, {"activation": "gelu"}, "block_0_0"),
        (GIANT, _set("blocks/mlp/hidden/kernel", _swap_halves), {}, "block_0_0"),
        (GIANT, _set("blocks/attention/layer_scale", np.ones_like), {}, "block_0_0"),
        (GIANT, _set("blocks/mlp/layer_scale", np.ones_like), {}, "block_0_0"),
        (GIANT, _set("register_tokens", np.zeros_like), {}, "embed"),
        (GIANT, _set("position_embedding", lambda x: np.roll(x, 1, axis=0)), {}, "embed"),
    ],
)
def test_mistakes_exceed_the_tolerance(config, edit, override, first, small):
    arrays, images, expected = small[config]
    arrays = dict(arrays)
    if edit:
        edit(arrays)
    params = convert.traverse_util.unflatten_dict(arrays, sep="/")
    config = dataclasses.replace(config, **override)
    differences = _differences(params, config, images, expected)
    wrong = [stage for stage, difference in differences.items() if difference > TOLERANCE]
    assert (wrong[0], wrong[-1]) == (first, "features"), differences


@pytest.mark.parametrize(("side", "grid"), [(37, (16, 16)), (37, (12, 16)), (4, (7, 5))])
@pytest.mark.parametrize("method", layers.RESIZE_METHODS)
def test_resized_positions_are_torchs(method, side, grid):
    """Compare with torch; twin: the other two ways give other tables."""
    table = np.random.default_rng(0).standard_normal((side, side, 8), np.float32)
    options = {"size": grid}
    if method == "dinov2":
        options = {"scale_factor": tuple((n + 0.1) / side for n in grid)}
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(table).permute(2, 0, 1)[None],
        mode="bicubic",
        align_corners=False,
        antialias=method == "antialias",
        **options,
    )
    expected = resized[0].permute(1, 2, 0).numpy()
    assert expected.shape[:2] == grid
    for name in layers.RESIZE_METHODS:
        difference = np.abs(layers.resize_grid(table, grid, name) - expected).max()
        assert (difference <= TOLERANCE) == (name == method), (name, difference)


# ---------------------------------------------------------------- other names


def _read(source, folder, **options):
    out = folder / "backbone.safetensors"
    info = convert.convert_checkpoint(source, out, **options)
    return info, convert._read_backbone(out)[0]


def _assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("registers", [0, 4])
def test_names_of_dinov2s_authors(registers, tmp_path):
    """Compare with timm, which loads the same names by a conversion of its own."""
    import timm.models.vision_transformer as timm_vit

    config = dataclasses.replace(GIANT, num_register_tokens=registers)
    model = reference.timm_model(config)
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (("reg_token", "register_tokens"), ("fc1", "w12"), ("fc2", "w3")):
            name = name.replace(ours, theirs)
        state[name] = tensor
    state["mask_token"] = torch.ones(1, config.width)
    if registers:  # the authors' class token has a position
        position = torch.randn(1, 1, config.width) / 20
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = timm_vit.checkpoint_filter_fn(dict(state), model)
    model.load_state_dict(loaded)
    info, arrays = _read(tmp_path / "dinov2.pth", tmp_path, heads=2)
    assert info["config"].position_resize == ("antialias" if registers else "dinov2")
    images = _images(config.image_size)
    params = convert.traverse_util.unflatten_dict(arrays, sep="/")
    differences = _differences(params, info["config"], images, _torch_stages(model, images))
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("config", [GIANT, SIGLIP], ids=["dinov2", "siglip"])
def test_huggingface_in_memory_and_in_files(config, tmp_path):
    """Check that both names are read: transformers 5 writes older ones than it has in memory."""
    model, source = _build("huggingface", config, tmp_path)
    torch.save(model.state_dict(), tmp_path / "memory.bin")
    (info, arrays), (_, same) = (_read(f, tmp_path) for f in (source, tmp_path / "memory.bin"))
    assert info["config"].heads == 2  # of config.json
    _assert_same(same, arrays)


def _name_as_big_vision(state, stacked):
    """Return the image tower of a Hugging Face SigLIP by big_vision's names."""
    width, heads = SIGLIP.width, SIGLIP.heads

    def attention(prefix, parts):
        named = {}
        for name, (weight, bias) in parts.items():
            out = name == "out"
            shape = (heads, -1, width) if out else (width, heads, width // heads)
            named[f"{prefix}/{name}/kernel"] = weight.T.reshape(shape)
            named[f"{prefix}/{name}/bias"] = bias if out else bias.reshape(heads, -1)
        return named

    def layer(prefix, source, kernel):
        weight = state[f"{source}.weight"]
        weight = weight.T if kernel == "kernel" else weight
        return {f"{prefix}/{kernel}": weight, f"{prefix}/bias": state[f"{source}.bias"]}

    def pair(source):
        return state[f"{source}.weight"], state[f"{source}.bias"]

    arrays = {
        "embedding/kernel": state["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["embeddings.patch_embedding.bias"],
        "pos_embedding": state["embeddings.position_embedding.weight"][None],
        "MAPHead_0/probe": state["head.probe"],
        **layer("Transformer/encoder_norm", "post_layernorm", "scale"),
        **layer("MAPHead_0/LayerNorm_0", "head.layernorm", "scale"),
        **layer("MAPHead_0/MlpBlock_0/Dense_0", "head.mlp.fc1", "kernel"),
        **layer("MAPHead_0/MlpBlock_0/Dense_1", "head.mlp.fc2", "kernel"),
    }
    weights = np.split(state["head.attention.in_proj_weight"], 3)
    biases = np.split(state["head.attention.in_proj_bias"], 3)
    qkv = dict(zip(("query", "key", "value"), zip(weights, biases, strict=True), strict=True))
    parts = qkv | {"out": pair("head.attention.out_proj")}
    arrays |= attention("MAPHead_0/MultiHeadDotProductAttention_0", parts)
    blocks = []
    for i in range(SIGLIP.depth):
        source = f"encoder.layers.{i}"
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        parts = {ours: pair(f"{source}.self_attn.{theirs}") for ours, theirs in names.items()}
        blocks.append(
            attention("MultiHeadDotProductAttention_0", parts)
            | layer("LayerNorm_0", f"{source}.layer_norm1", "scale")
            | layer("LayerNorm_1", f"{source}.layer_norm2", "scale")
            | layer("MlpBlock_0/Dense_0", f"{source}.mlp.fc1", "kernel")
            | layer("MlpBlock_0/Dense_1", f"{source}.mlp.fc2", "kernel")
        )
    for name in blocks[0]:
        if stacked:
            stack = np.stack([block[name] for block in blocks])
            arrays[f"Transformer/encoderblock/{name}"] = stack
            continue
        for i, block in enumerate(blocks):
            arrays[f"Transformer/encoderblock_{i}/{name}"] = block[name]
    return arrays


@pytest.mark.parametrize("stacked", [False, True])
def test_official_siglip(stacked, tmp_path):
    """Convert an .npz as big_vision writes it, with and without a text tower, from one of HF."""
    model, source = _build("huggingface", SIGLIP, tmp_path)
    state = {name: torch_to_numpy(tensor) for name, tensor in model.state_dict().items()}
    _, expected = _read(source, tmp_path)
    arrays = _name_as_big_vision(state, stacked)
    arrays = {f"params/img/{name}": array for name, array in arrays.items()}
    arrays |= {"params/t": np.ones(1), "params/txt/head/bias": np.ones(8, np.float32)}
    np.savez(tmp_path / "siglip.npz", **arrays)
    info, ours = _read(tmp_path / "siglip.npz", tmp_path)
    assert (info["layout"], info["config"]) == ("jax-siglip", SIGLIP)
    _assert_same(ours, expected)


def test_gated_mlps_have_their_own_activation(tmp_path):
    _, source = _build("timm", GIANT, tmp_path)
    with pytest.raises(ValueError, match=r"gated MLPs.* silu: leave out --activation=gelu"):
        _read(source, tmp_path, activation="gelu")


# ---------------------------------------------------------------- names and counts


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of open_clip's, timm's and transformers' models; those of registers in timm have a row less
        ("ViT-H/14", 632_076_800),
        ("ViT-g/14", 1_012_645_632),
        ("ViT-bigG/14", 1_844_907_264),
        ("DINOv2-S/14", 22_056_192),
        ("DINOv2-B/14", 86_579_712),
        ("DINOv2-L/14", 304_367_616),
        ("DINOv2-g/14", 1_136_479_232),
        ("DINOv2-S/14-reg", 22_057_728),
        ("DINOv2-B/14-reg", 86_582_784),
        ("DINOv2-L/14-reg", 304_371_712),
        ("DINOv2-g/14-reg", 1_136_485_376),
        ("SigLIP-B/32", 94_552_320),
        ("SigLIP-B/16", 92_884_224),
        ("SigLIP-L/16", 315_956_224),
        ("SigLIP-So400m/14", 427_680_704),
        ("SigLIP-So400m/16", 427_888_064),
        ("SigLIP-g/16", 1_163_168_256),
    ],
)
def test_parameters_and_names(name, parameters):
    """Count by shapes only, and find name and heads from the shapes."""
    config = vit.MODELS[name]
    shapes = convert.parameter_shapes(config)
    arrays = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    assert param_tree.count_params(arrays) == parameters == catalog.PARAMETERS[name]
    stated = {"activation": config.activation, "eps": config.eps}
    assert convert._infer_config(arrays, stated, "vit", "file") == config

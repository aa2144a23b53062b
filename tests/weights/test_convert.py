"""Tests convert.py against CLIP in torch: parity of all stages, source layouts and refusals."""

import argparse
import dataclasses
import hashlib
import json
import operator
import pathlib
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.config import schema
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.models.backbones import vit
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.weights import convert, source_files

torch = pytest.importorskip("torch")

from tests.helpers import torch_reference as reference  # noqa: E402
from tests.helpers.torch_reference import torch_to_numpy  # noqa: E402

pytestmark = [  # OpenAI's archives are TorchScript, which is deprecated
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

GELU = {"activation": "gelu", "normalization": "clip"}
QUICK_GELU = {"activation": "quick_gelu", "normalization": "clip"}
TOLERANCE = 1e-4  # absolute, float32, for outputs of order 1
ROOT = pathlib.Path(__file__).resolve().parents[2]


def _make_config(shape, activation="quick_gelu", **overrides):
    return backbone_registry.backbone_config(
        "custom", mlp_dim=4 * shape["width"], activation=activation, **shape | overrides
    )


SMALL = _make_config(reference.SMALL)


def _make_images(config):
    return np.random.default_rng(0).standard_normal(
        (2, config.image_size, config.image_size, 3), np.float32
    )


def _compute_stages(params, config, images):
    """Compute the stages of `torch_reference.open_clip_stages` with our ViT."""
    model, variables = vit.ViT(config), {"params": params}
    position = params["position_embedding"]
    h = model.apply(variables, images, params["class_embedding"], position, method="embed")
    stages = {"embed": h}
    hooks = BlockHooks(parent=None).bind({})
    block = jax.jit(lambda p, h: vit.Block(config, parent=None).apply({"params": p}, h, hooks))
    for i in range(config.depth):
        h = block(jax.tree.map(operator.itemgetter(i), params["blocks"]), h)
        stages[f"block_{i}"] = h
    stages["ln_post"] = model.apply(variables, h, method=lambda m, h: m.ln_post(h[:, 0]))
    stages["projection"] = model.apply(variables, h, method="pool")
    return stages


def _max_differences(params, config, expected):
    """Return max |ours - torch's| of each stage."""
    ours = _compute_stages(params, config, _make_images(config))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.shape == tuple(expected[name].shape), name
        assert 0.05 < np.std(value) < 20, f"{name} is not of order 1"
    return {k: float(np.abs(np.asarray(v) - expected[k].numpy()).max()) for k, v in ours.items()}


def _torch_images(config):
    return torch.from_numpy(_make_images(config)).permute(0, 3, 1, 2)


def _save_safetensors(state, path, metadata=None):
    """Write a torch state dict as safetensors, and return the path."""
    arrays = {k: np.ascontiguousarray(torch_to_numpy(v)) for k, v in state.items()}
    safetensors.numpy.save_file(arrays, path, metadata)
    return path


@pytest.fixture(scope="module")
def small_clip():
    return reference.open_clip_model(reference.SMALL, quick_gelu=True)


@pytest.fixture(scope="module")
def small_state(small_clip):
    return small_clip.state_dict()


@pytest.fixture(scope="module")
def small_file(small_state, tmp_path_factory):
    """Return the small CLIP as safetensors with its activation, like our demo's backbone."""
    path = tmp_path_factory.mktemp("small") / "clip.safetensors"
    return _save_safetensors(small_state, path, {"activation": "quick_gelu", "heads": "2"})


@pytest.fixture(scope="module")
def small_backbone(small_file, tmp_path_factory):
    """Return the converted file of the small CLIP."""
    out = tmp_path_factory.mktemp("converted") / "backbone.safetensors"
    convert.convert_checkpoint(small_file, out, normalization="clip")
    return out


@pytest.fixture(scope="module")
def small_stages(small_clip):
    return reference.open_clip_stages(small_clip, _torch_images(SMALL))


def _copy_edited(path, edit, out):
    """Copy a backbone file after `edit(arrays, meta)` has changed its arrays or metadata."""
    arrays, meta, _ = convert._read_backbone(path)
    edit(arrays, meta)
    safetensors.numpy.save_file(arrays, out, {convert.CONVERTED_KEY: json.dumps(meta)})
    return out


# ---------------------------------------------------------------- parity


def _check_parity(shape, model, stages, source, tmp_path, record_property):
    """Check each stage of the converted model against torch, and return the loaded config."""
    converted = tmp_path / "backbone.safetensors"
    info = convert.convert_checkpoint(source, converted, normalization="clip")
    wanted = _make_config(shape, activation="gelu", eps=1e-6)  # the file's values replace these
    params, config, _ = convert.load_backbone(converted, wanted)
    differences = _max_differences(params, config, stages(model, _torch_images(config)))
    record_property("differences", differences)
    print({name: f"{value:.1e}" for name, value in differences.items()})
    assert max(differences.values()) <= TOLERANCE, differences
    assert info["parameters"] == {3: 628_352, 12: 86_192_640}[config.depth]
    return config


SHAPES = [
    pytest.param(reference.SMALL, id="small"),
    pytest.param(reference.B16, id="b16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_parity_with_open_clip(shape, activation, tmp_path, record_property):
    model = reference.open_clip_model(shape, quick_gelu=activation == "quick_gelu")
    source = tmp_path / "open_clip.safetensors"
    heads = str(shape["heads"])
    _save_safetensors(model.state_dict(), source, {"activation": activation, "heads": heads})
    stages = reference.open_clip_stages
    config = _check_parity(shape, model, stages, source, tmp_path, record_property)
    assert config == _make_config(shape, activation)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vision_only", [False, True])
def test_parity_with_huggingface(shape, vision_only, tmp_path, record_property):
    activation = "gelu" if vision_only else "quick_gelu"
    model = reference.huggingface_model(shape, activation, vision_only)
    model.save_pretrained(tmp_path)
    source = tmp_path / "model.safetensors"
    stages = reference.huggingface_stages
    config = _check_parity(shape, model, stages, source, tmp_path, record_property)
    assert config == _make_config(shape, activation)


def test_whole_model_matches_the_stages(small_backbone, small_stages):
    params, config, _ = convert.load_backbone(small_backbone, SMALL)
    for scan in (False, True):
        model = vit.ViT(config, scan_blocks=scan)
        tokens, features = model.apply({"params": params}, _make_images(config))
        np.testing.assert_allclose(tokens, small_stages["block_2"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(features, small_stages["projection"], rtol=0, atol=TOLERANCE)


def _swap_query_and_key(arrays):
    for name in ("kernel", "bias"):
        q, k, v = np.split(arrays["blocks/attention/qkv/" + name], 3, axis=-1)
        arrays["blocks/attention/qkv/" + name] = np.concatenate([k, q, v], axis=-1)


def _transpose_out(arrays):
    arrays["blocks/attention/out/kernel"] = arrays["blocks/attention/out/kernel"].swapaxes(1, 2)


def _transpose_patch(arrays):
    arrays["patch_embedding/kernel"] = arrays["patch_embedding/kernel"].swapaxes(0, 1)


def _drop_positions(arrays):
    arrays["position_embedding"] = np.zeros_like(arrays["position_embedding"])


@pytest.mark.parametrize(
    ("edit", "override", "first"),
    [
        (None, {"activation": "gelu"}, "block_0"),
        (None, {"eps": 1e-6}, "embed"),
        (None, {"heads": 4}, "block_0"),
        (_swap_query_and_key, {}, "block_0"),
        (_transpose_out, {}, "block_0"),
        (_transpose_patch, {}, "embed"),
        (_drop_positions, {}, "embed"),
    ],
)
def test_mistakes_exceed_the_tolerance(edit, override, first, small_backbone, small_stages):
    arrays, _, _ = convert._read_backbone(small_backbone)
    if edit:
        edit(arrays)
    params = convert.traverse_util.unflatten_dict(arrays, sep="/")
    differences = _max_differences(params, dataclasses.replace(SMALL, **override), small_stages)
    wrong = [stage for stage, difference in differences.items() if difference > TOLERANCE]
    assert (wrong[0], wrong[-1]) == (first, "projection"), differences


# ---------------------------------------------------------------- sources


class _Archive(torch.nn.Module):
    """Mimics OpenAI's archives: they hold the tower under "visual" and some bookkeeping."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, images):
        return self.visual(images)


@pytest.fixture(scope="module")
def archive(small_clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "ViT.pt"
    module = _Archive(small_clip.visual).eval()
    torch.jit.trace(module, torch.zeros(1, 3, 32, 32), check_trace=False).save(path)
    return path


def _read_arrays(path):
    return convert._read_backbone(path)[0]


def _assert_same_arrays(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_names_shapes_and_metadata(small_file, small_backbone):
    arrays, meta, _ = convert._read_backbone(small_backbone)
    assert {name: array.shape for name, array in arrays.items()} == {
        "class_embedding": (128,),
        "position_embedding": (17, 128),
        "patch_embedding/kernel": (8, 8, 3, 128),
        "ln_pre/scale": (128,),
        "ln_pre/bias": (128,),
        "blocks/ln_1/scale": (3, 128),
        "blocks/ln_1/bias": (3, 128),
        "blocks/attention/qkv/kernel": (3, 128, 384),
        "blocks/attention/qkv/bias": (3, 384),
        "blocks/attention/out/kernel": (3, 128, 128),
        "blocks/attention/out/bias": (3, 128),
        "blocks/ln_2/scale": (3, 128),
        "blocks/ln_2/bias": (3, 128),
        "blocks/mlp/hidden/kernel": (3, 128, 512),
        "blocks/mlp/hidden/bias": (3, 512),
        "blocks/mlp/output/kernel": (3, 512, 128),
        "blocks/mlp/output/bias": (3, 128),
        "ln_post/scale": (128,),
        "ln_post/bias": (128,),
        "projection": (128, 48),
    }
    assert meta == {
        "version": 1,
        "family": "vit",
        "config": convert._describe_config(SMALL),
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "container": "safetensors",
        "layout": "openai",
        "source": "clip.safetensors",
        "source_sha256": source_files.compute_sha256(small_file),
    }


@pytest.mark.parametrize("kind", ["bare", "nested", "legacy"])
def test_torch_state_dict(kind, small_state, small_backbone, tmp_path):
    state, path = small_state, tmp_path / "model.pt"
    if kind == "nested":
        state = {"epoch": 3, "state_dict": {"module." + k: v for k, v in state.items()}}
    torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    info = convert.convert_checkpoint(path, tmp_path / "out", **QUICK_GELU)
    assert (info["container"], info["layout"]) == ("torch", "openai")
    _assert_same_arrays(_read_arrays(tmp_path / "out"), _read_arrays(small_backbone))


def test_openai_state_dict_has_quick_gelu(small_state, tmp_path):
    torch.save({**small_state, "input_resolution": torch.tensor(32)}, tmp_path / "a.pt")
    info = convert.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    assert info["config"] == SMALL


def test_huggingface_state_dict(tmp_path):
    model = reference.huggingface_model(reference.SMALL, "gelu")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    a = convert.convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "a")
    b = convert.convert_checkpoint(tmp_path / "pytorch_model.bin", tmp_path / "b")
    assert a["config"] == b["config"] == _make_config(reference.SMALL, "gelu")
    assert (b["container"], b["layout"]) == ("torch", "huggingface")
    _assert_same_arrays(_read_arrays(tmp_path / "a"), _read_arrays(tmp_path / "b"))


def test_torchscript_is_read_without_torch(archive, small_backbone, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    info = convert.convert_checkpoint(archive, tmp_path / "out")
    assert (info["container"], info["published"]) == ("torchscript", None)
    assert info["config"] == SMALL  # "input_resolution" implies quick_gelu and CLIP's mean
    _assert_same_arrays(_read_arrays(tmp_path / "out"), _read_arrays(small_backbone))


def test_published_archive_is_named(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(convert.PUBLISHED_SHA256, source_files.compute_sha256(archive), "ViT-Z/8")
    info = convert.convert_checkpoint(archive, tmp_path / "out")
    assert info["published"] == "ViT-Z/8"


def test_pickle_with_code_is_refused(small_state, tmp_path):
    class Code:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    torch.save({**small_state, "code": Code()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="refused: other pickled objects can run code"):
            convert.convert_checkpoint(tmp_path / name, tmp_path / "out", **GELU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_torch_files_are_read_without_torch(
    new_format, small_state, small_backbone, tmp_path, monkeypatch
):
    torch.save(small_state, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
    monkeypatch.setitem(sys.modules, "torch", None)
    convert.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out", **QUICK_GELU)
    _assert_same_arrays(_read_arrays(tmp_path / "out"), _read_arrays(small_backbone))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_source_dtypes_are_kept(suffix, small_state, tmp_path):
    """Check files like those of open_clip and OpenAI: cast matrices, LayerNorm in float32."""
    dtypes = {2: torch.float16, 3: torch.float16, 4: torch.bfloat16}
    state = {k: v.to(dtypes.get(v.ndim, torch.float32)) for k, v in small_state.items()}
    source = tmp_path / f"a.{suffix}"
    (_save_safetensors if suffix == "safetensors" else torch.save)(state, source)
    convert.convert_checkpoint(source, tmp_path / "out", **GELU)
    params, _, _ = convert.load_backbone(tmp_path / "out", SMALL)
    assert params["patch_embedding"]["kernel"].dtype == jnp.bfloat16
    assert params["blocks"]["attention"]["qkv"]["kernel"].dtype == np.float16
    assert params["blocks"]["ln_1"]["scale"].dtype == np.float32
    kernel = state["visual.conv1.weight"].float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["patch_embedding"]["kernel"].astype(np.float32), kernel)
    integers = {k: v.to(torch.int8) for k, v in small_state.items()}
    with pytest.raises(ValueError, match="dtypes int8, but only BF16, F16, F32 are supported"):
        convert.convert_checkpoint(_save_safetensors(integers, source), tmp_path / "b", **GELU)


def test_same_source_gives_same_bytes(small_file, small_backbone, tmp_path):
    for name in ("a", "b"):
        info = convert.convert_checkpoint(small_file, tmp_path / name, normalization="clip")
        assert (tmp_path / name).read_bytes() == small_backbone.read_bytes()
        assert info["sha256"] == source_files.compute_sha256(small_backbone)


# ---------------------------------------------------------------- what the weights do not state


def _write_json(path, content):
    path.write_text(json.dumps(content))


def test_activation_must_be_known(small_state, tmp_path):
    source = _save_safetensors(small_state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="pass --activation=quick_gelu .*OpenAI.*=gelu .*LAION"):
        convert.convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        convert.convert_checkpoint(source, tmp_path / "out", **GELU | {"activation": "relu"})
    with pytest.raises(ValueError, match="heads is 0"):
        convert.convert_checkpoint(source, tmp_path / "out", **GELU, heads=0)
    info = convert.convert_checkpoint(source, tmp_path / "out", **GELU, heads=4)
    assert info["config"] == _make_config(reference.SMALL, "gelu", heads=4)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"quick_gelu": True}, {"activation": "quick_gelu"}),
        ({}, {"activation": "gelu"}),
        ({"vision_cfg": {"head_width": 32}}, {"activation": "gelu", "heads": 4}),
        ({"vision_cfg": {"norm_kwargs": {"eps": 1e-6}}}, {"activation": "gelu", "eps": 1e-6}),
    ],
)
def test_open_clip_config(model, expected, small_state, tmp_path):
    source = _save_safetensors(small_state, tmp_path / "a.safetensors")
    vision = {"width": 128, "layers": 3, **model.get("vision_cfg", {})}
    _write_json(tmp_path / "open_clip_config.json", {"model_cfg": {**model, "vision_cfg": vision}})
    info = convert.convert_checkpoint(source, tmp_path / "out")
    assert info["config"] == dataclasses.replace(SMALL, **expected)


def test_huggingface_config(tmp_path):
    model = reference.huggingface_model(reference.SMALL, "gelu")
    source = _save_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pass --activation"):
        convert.convert_checkpoint(source, tmp_path / "out")
    vision = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    path = tmp_path / "config.json"
    _write_json(path, {"model_type": "clip", "vision_config": {**vision, "layer_norm_eps": 1e-6}})
    info = convert.convert_checkpoint(source, tmp_path / "out")
    assert info["config"] == dataclasses.replace(SMALL, heads=4, eps=1e-6)
    _write_json(path, {"model_type": "clip", "vision_config": {**vision, "hidden_act": "relu"}})
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        convert.convert_checkpoint(source, tmp_path / "out")
    _write_json(path, {"model_type": "clip", "vision_config": {}})  # transformers' default: B/32
    with pytest.raises(ValueError, match=r"describes another model.*\(768, 12\).*\(128, 3\)"):
        convert.convert_checkpoint(source, tmp_path / "out")
    path.write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        convert.convert_checkpoint(source, tmp_path / "out")


def test_flag_wins_over_metadata(small_file, tmp_path):
    info = convert.convert_checkpoint(small_file, tmp_path / "out", **GELU)
    assert info["config"].activation == "gelu"


def test_known_architecture_is_named():
    arrays = {
        "blocks/mlp/hidden/kernel": np.zeros((12, 768, 3072), np.int8),
        "patch_embedding/kernel": np.zeros((16, 16, 3, 768), np.int8),
        "position_embedding": np.zeros((577, 768), np.int8),
        "projection": np.zeros((768, 512), np.int8),
        "ln_pre/scale": np.zeros(768, np.int8),
    }
    config = convert._infer_config(arrays, {"activation": "gelu"}, "vit", "clip.pt")
    expected = dataclasses.replace(vit.MODELS["ViT-B/16"], image_size=384, activation="gelu")
    assert config == expected


# ---------------------------------------------------------------- refusals


def test_left_over_and_missing_names_are_listed(small_state, tmp_path):
    state = {**small_state, "visual.extra": torch.zeros(1), "head.weight": torch.zeros(1)}
    del state["visual.ln_post.bias"], state["visual.transformer.resblocks.1.mlp.c_fc.bias"]
    source = _save_safetensors(state, tmp_path / "a.safetensors")
    expected = (
        "left over: head.weight, visual.extra; missing: visual.ln_post.bias, "
        "visual.transformer.resblocks.1.mlp.c_fc.bias"
    )
    with pytest.raises(ValueError, match=expected):
        convert.convert_checkpoint(source, tmp_path / "out", **GELU)


def test_missing_block_is_named(small_state, tmp_path):
    state = {k: v for k, v in small_state.items() if ".resblocks.1." not in k}
    source = _save_safetensors(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"left over: .*resblocks\.2\..*missing: .*resblocks\.1\."):
        convert.convert_checkpoint(source, tmp_path / "out", **GELU)


def test_wrong_shapes(small_state, tmp_path):
    for name, value in {
        "visual.transformer.resblocks.1.ln_1.bias": torch.zeros(7),
        "visual.conv1.weight": torch.zeros(128, 3),
        "visual.ln_post.bias": torch.zeros(127),
        "visual.positional_embedding": torch.zeros(18, 128),
    }.items():
        source = _save_safetensors({**small_state, name: value}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="wrong (names or )?shape"):
            convert.convert_checkpoint(source, tmp_path / "out", **GELU)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["visual.layer1.0.conv1.weight", "visual.conv1.weight"], "a ResNet image tower"),
        (["visual.attn_pool.query"], "attention pooling"),
        (["text_model.final_layer_norm.bias", "text_projection.weight"], "only a text tower"),
        (["transformer.resblocks.0.ln_1.bias", "positional_embedding"], "only a text tower"),
        (
            ["blocks.0.norm.weight", "head.bias"],
            "DINOv2, ViT or Swin checkpoint: its names are blocks.0.norm.weight",
        ),
        ([], "not a CLIP"),
    ],
)
def test_other_models(names, message, tmp_path):
    state = {name: torch.zeros(1) for name in names}
    sources = [_save_safetensors(state, tmp_path / "a.safetensors"), tmp_path / "a.pt"]
    torch.save(state, sources[1])
    for source in sources:
        with pytest.raises(ValueError, match=message):
            convert.convert_checkpoint(source, tmp_path / "out", **GELU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_other_files(content, message, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")


def test_state_dict_must_hold_tensors(tmp_path):
    for content in ([1], {}, {"epoch": 3}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="not a CLIP"):
            convert.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")


def test_truncated_sources(small_file, small_state, archive, tmp_path):
    torch.save(small_state, tmp_path / "new.pt")
    torch.save(small_state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for source in (small_file, archive, tmp_path / "new.pt", tmp_path / "old.pt"):
        data = source.read_bytes()
        for size in (100, len(data) // 2, len(data) - 1):
            (tmp_path / "cut").write_bytes(data[:size])
            with pytest.raises(ValueError, match="truncated|damaged"):
                convert.convert_checkpoint(tmp_path / "cut", tmp_path / "out")


def test_converted_file_is_not_converted_again(small_backbone, tmp_path):
    with pytest.raises(ValueError, match="already converted"):
        convert.convert_checkpoint(small_backbone, tmp_path / "out")


def test_out_is_written_whole_or_not_at_all(small_file, tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"garbage")
    with pytest.raises(OSError, match="cannot write .*garbage"):  # before the source is read
        convert.convert_checkpoint(garbage, garbage / "out")  # a file is not a folder
    with pytest.raises(OSError, match="cannot write .*is a directory"):
        convert.convert_checkpoint(garbage, tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        convert.convert_checkpoint(tmp_path / "absent", tmp_path / "out")
    out = tmp_path / "out"
    out.write_bytes(b"before")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        convert.convert_checkpoint(garbage, out)
    assert out.read_bytes() == b"before"
    with pytest.raises(ValueError, match="the checkpoint itself"):
        convert.convert_checkpoint(small_file, small_file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["garbage", "out"]


def test_files_of_the_checkpoint_are_not_overwritten(shards, small_file, tmp_path):
    folder, first = shards.parent, shards.with_name("model-00001-of-00002.safetensors")
    _write_json(folder / "config.json", {})
    (tmp_path / "link").symlink_to(first)
    whole = tmp_path / "whole" / "model.safetensors"
    whole.parent.mkdir()
    whole.write_bytes(small_file.read_bytes())
    for source, out in (
        (whole.parent, whole),
        (folder, first),
        (folder, shards),
        (shards, tmp_path / "link"),
        (shards.with_name("model-00002-of-00002.safetensors"), first),
        (first, folder / "config.json"),
    ):
        before = out.read_bytes()
        with pytest.raises(ValueError, match="is the checkpoint itself, its folder or one of its"):
            convert.convert_checkpoint(source, out, **QUICK_GELU)
        assert out.read_bytes() == before
    convert.convert_checkpoint(shards, folder / "converted.safetensors", **QUICK_GELU)


# ---------------------------------------------------------------- loading


def test_load_gives_the_tree_of_the_vit(small_file, small_backbone):
    wanted = dataclasses.replace(SMALL, activation="gelu", eps=1e-6, heads=4)
    params, config, info = convert.load_backbone(small_backbone, wanted)
    assert config == SMALL
    images = jnp.zeros((1, 32, 32, 3))
    tree = jax.eval_shape(lambda: vit.ViT(SMALL).init(jax.random.key(0), images)["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, tree)
    arrays, meta, _ = convert._read_backbone(small_backbone)
    old = {key: value for key, value in meta.items() if key not in ("mean", "std")}
    data = safetensors.numpy.save(arrays, {convert.CONVERTED_KEY: json.dumps(old, sort_keys=True)})
    assert info == convert.BackboneInfo(
        name="custom",
        sha256=hashlib.sha256(data).hexdigest(),  # as of a file that version 0.1.0 wrote
        source_sha256=source_files.compute_sha256(small_file),
        source="clip.safetensors",
        normalization=(tuple(meta["mean"]), tuple(meta["std"])),
    )


@pytest.mark.parametrize(("side", "grid"), [(4, 7), (7, 4), (14, 16), (14, 7), (16, 24)])
def test_resize_matches_torch(side, grid):
    table = np.random.default_rng(0).standard_normal((side * side + 1, 64), np.float32)
    patches = torch.from_numpy(table[1:]).reshape(1, side, side, 64).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    ours = np.asarray(SMALL.resize_positions(table, (grid, grid)))
    expected = expected.permute(0, 2, 3, 1).reshape(grid * grid, 64).numpy()
    np.testing.assert_array_equal(ours[0], table[0])
    assert np.abs(ours[1:] - expected).max() <= TOLERANCE


def test_load_resizes_positions(small_backbone, caplog):
    wanted = dataclasses.replace(SMALL, image_size=56)
    with caplog.at_level("INFO", logger="absl"):
        params, config, _ = convert.load_backbone(small_backbone, wanted)
    assert "resized from 4x4 patches (32 pixels) to 7x7 patches (56 pixels)" in caplog.text
    expected = SMALL.resize_positions(_read_arrays(small_backbone)["position_embedding"], (7, 7))
    np.testing.assert_array_equal(params["position_embedding"], expected)
    _, features = vit.ViT(config).apply({"params": params}, _make_images(config))
    assert features.shape == (2, 48)


@pytest.mark.parametrize("field", ["width", "depth", "patch_size", "mlp_dim", "projection_dim"])
def test_load_refuses_another_architecture(field, small_backbone):
    wanted = dataclasses.replace(SMALL, name="mine", **{field: 2 * getattr(SMALL, field)})
    sides = [f"'{field}': {getattr(config, field)}" for config in (SMALL, wanted)]
    with pytest.raises(ValueError, match="holds custom .*{}.*mine .*{}".format(*sides)):
        convert.load_backbone(small_backbone, wanted)


def test_load_refuses_other_files(small_file, small_backbone, tmp_path):
    command = "python scripts/convert_clip.py --checkpoint=FILE --out="
    with pytest.raises(FileNotFoundError, match=f"no backbone at .*absent.*{command}.*absent"):
        convert.load_backbone(tmp_path / "absent", SMALL)
    torch.save({}, tmp_path / "a.pt")
    for path in (small_file, tmp_path / "a.pt"):
        command = f"python scripts/convert_clip.py --checkpoint={re.escape(str(path))} --out=NEW"
        with pytest.raises(ValueError, match=f"not a converted backbone: .*{command}"):
            convert.load_backbone(path, SMALL)
    (tmp_path / "cut").write_bytes(small_backbone.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated or damaged"):
        convert.load_backbone(tmp_path / "cut", SMALL)


def test_load_checks_names_and_shapes(small_backbone, tmp_path):
    def drop(arrays, meta):
        arrays["ln_postt/bias"] = arrays.pop("ln_post/bias")

    def cut(arrays, meta):
        arrays["ln_post/bias"] = arrays["ln_post/bias"][1:]

    def outdate(arrays, meta):
        meta["version"] = 0

    for edit, message in [
        (
            drop,
            r"ln_post/bias: expected \(128,\), found nothing, "
            r"ln_postt/bias: expected nothing, found \(128,\)",
        ),
        (cut, r"ln_post/bias: expected \(128,\), found \(127,\)"),
        (outdate, "not a converted backbone"),
    ]:
        path = _copy_edited(small_backbone, edit, tmp_path / "edited")
        with pytest.raises(ValueError, match=message):
            convert.load_backbone(path, SMALL)


# ---------------------------------------------------------------- the script


def _run_script(*arguments):
    command = [sys.executable, "scripts/convert_clip.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_script_converts_and_reports(small_file, small_backbone, tmp_path):
    out = tmp_path / "out.safetensors"
    result = _run_script(f"--checkpoint={small_file}", f"--out={out}", "--normalization=clip")
    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == small_backbone.read_bytes()  # from another process
    for text in ("openai names in a safetensors file", "custom: width 128, depth 3", "628,352"):
        assert text in result.stdout
    assert source_files.compute_sha256(small_file) in result.stdout


def test_script_reports_errors_in_a_line(tmp_path):
    result = _run_script(f"--checkpoint={tmp_path / 'absent'}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: no checkpoint file at {tmp_path / 'absent'}\n"


# ---------------------------------------------------------------- files as people have them


def _convert(source, tmp_path, **options):
    """Convert a checkpoint; return its description and arrays."""
    info = convert.convert_checkpoint(source, tmp_path / "out", **QUICK_GELU | options)
    return info, _read_arrays(tmp_path / "out")


@pytest.fixture
def shards(small_state, tmp_path):
    """Return the index of the small CLIP in two shards."""
    folder, weight_map = tmp_path / "shards", {}
    folder.mkdir()
    names = sorted(small_state)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        _save_safetensors({name: small_state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    _write_json(index, {"weight_map": weight_map})
    return index


def test_shards(shards, small_backbone, tmp_path):
    for source in (shards, shards.parent, shards.with_name("model-00002-of-00002.safetensors")):
        _, arrays = _convert(source, tmp_path)
        _assert_same_arrays(arrays, _read_arrays(small_backbone))


def test_incomplete_shards_are_refused(shards, tmp_path):
    shards.with_name("model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="2 shards, of which 1 are missing: .*model-00001"):
        _convert(shards.parent, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../clip.safetensors", "/clip.safetensors", "a\\b", ".."])
def test_index_with_outside_paths_is_refused(name, shards, tmp_path):
    _write_json(shards, {"weight_map": {"visual.proj": name}})
    with pytest.raises(ValueError, match="a path outside its folder"):
        _convert(shards, tmp_path)


BAD_WEIGHT_MAPS = [["a"], None, {}, {"a": 1, "b": "model.safetensors"}, {"a": ["b"]}]


@pytest.mark.parametrize("weight_map", BAD_WEIGHT_MAPS)
def test_index_without_names_is_refused(weight_map, shards, tmp_path, monkeypatch):
    """Check indices on disk and of Hugging Face; the names of the latter are not asked for."""
    hub = pytest.importorskip("huggingface_hub")
    _write_json(shards, {"weight_map": weight_map})
    asked = []

    def hf_hub_download(repo, name, revision):
        asked.append(name)
        if name != shards.name:
            raise hub.errors.LocalEntryNotFoundError("offline")
        return str(shards)

    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    for source in (shards, "hf:a/b"):
        with pytest.raises(ValueError, match="it has no weight_map of files"):
            _convert(source, tmp_path)
    assert asked[-1] == shards.name


def test_index_of_hugging_face_is_checked_before_its_files_are_fetched(shards, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    _write_json(shards, {"weight_map": {"a": "../b"}})
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, revision: str(shards))
    monkeypatch.setattr(source_files, "_WEIGHT_FILES", (shards.name,))
    with pytest.raises(ValueError, match="a path outside its folder"):
        source_files.find_source("hf:a/b")


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.module.", "image_encoder.model."])
@pytest.mark.parametrize("wrapper", ["model", "model_state", "ema"])
def test_wrappers_and_prefixes(prefix, wrapper, small_state, small_backbone, tmp_path):
    state = {prefix + name: value for name, value in small_state.items()}
    torch.save({wrapper: state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pt")
    _, arrays = _convert(tmp_path / "a.pt", tmp_path)
    _assert_same_arrays(arrays, _read_arrays(small_backbone))


def test_tower_without_projection(small_state, small_backbone, tmp_path):
    state = {name: value for name, value in small_state.items() if name != "visual.proj"}
    info, arrays = _convert(_save_safetensors(state, tmp_path / "a.safetensors"), tmp_path)
    assert info["config"] == dataclasses.replace(SMALL, projection_dim=None)
    expected = _read_arrays(small_backbone)
    del expected["projection"]
    _assert_same_arrays(arrays, expected)


def _timm_names(state):
    """Return OpenAI's image tower under timm's names."""
    names = {
        "visual.class_embedding": "cls_token",
        "visual.positional_embedding": "pos_embed",
        "visual.conv1": "patch_embed.proj",
        "visual.ln_pre": "norm_pre",
        "visual.ln_post": "norm",
        "visual.transformer.resblocks": "blocks",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj": "attn.proj",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed = {"head.weight": state["visual.proj"].T, "head.bias": torch.zeros(48)}
    for name, value in state.items():
        for theirs, timm in names.items():
            name = name.replace(theirs, timm)
        if name.startswith(("cls_token", "pos_embed", "patch_embed", "norm", "blocks")):
            axes = {"cls_token": 2, "pos_embed": 1}.get(name, 0)
            renamed[name] = value[(None,) * axes]
    return renamed


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_clip_by_names_of_timm(prefix, small_state, small_backbone, tmp_path):
    state = {prefix + name: value for name, value in _timm_names(small_state).items()}
    source = _save_safetensors(state, tmp_path / "model.safetensors")
    info, arrays = _convert(source, tmp_path, heads=2)
    assert info["layout"] == "timm-clip"
    _assert_same_arrays(arrays, _read_arrays(small_backbone))
    state[prefix + "head.bias"] += 1  # a classifier
    _, arrays = _convert(_save_safetensors(state, source), tmp_path, heads=2)
    assert "projection" not in arrays
    del state[prefix + "head.weight"]
    assert "projection" not in _convert(_save_safetensors(state, source), tmp_path, heads=2)[1]


def test_official_npz(tmp_path):
    config = dataclasses.replace(
        SMALL, projection_dim=None, activation="gelu", eps=1e-6, pre_norm=False, patch_bias=True
    )
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in convert.parameter_shapes(config).items()
    }
    names = {
        "cls": arrays["class_embedding"][None, None],
        "Transformer/posembed_input/pos_embedding": arrays["position_embedding"][None],
        "head/kernel": np.zeros((128, 10)),
    }
    for ours, theirs in (("patch_embedding", "embedding"), ("ln_post", "Transformer/encoder_norm")):
        for name in (n for n in arrays if n.startswith(ours)):
            names[name.replace(ours, theirs)] = arrays[name]
    layers = {
        "ln_1": "LayerNorm_0",
        "ln_2": "LayerNorm_2",
        "mlp/hidden": "MlpBlock_3/Dense_0",
        "mlp/output": "MlpBlock_3/Dense_1",
    }
    for i in range(config.depth):
        block = f"Transformer/encoderblock_{i}/"
        for name, array in arrays.items():
            for ours, theirs in layers.items():
                if name.startswith(f"blocks/{ours}/"):
                    names[name.replace(f"blocks/{ours}", block + theirs)] = array[i]
        attention = block + "MultiHeadDotProductAttention_1/"
        for leaf in ("kernel", "bias"):
            qkv = np.split(arrays[f"blocks/attention/qkv/{leaf}"][i], 3, axis=-1)
            for part, array in zip(("query", "key", "value"), qkv, strict=True):
                names[f"{attention}{part}/{leaf}"] = array.reshape(*array.shape[:-1], 2, 64)
        kernel = arrays["blocks/attention/out/kernel"][i]
        names[attention + "out/kernel"] = kernel.reshape(2, 64, 128)
        names[attention + "out/bias"] = arrays["blocks/attention/out/bias"][i]
    np.savez(tmp_path / "ViT.npz", **names)
    info = convert.convert_checkpoint(tmp_path / "ViT.npz", tmp_path / "out")
    assert (info["config"], info["container"]) == (config, "npz")
    assert (info["mean"], info["std"]) == ([0.5] * 3, [0.5] * 3)
    _assert_same_arrays(_read_arrays(tmp_path / "out"), arrays)
    flat = {
        n: a.ravel() if re.search("(query|key|value)/kernel", n) else a for n, a in names.items()
    }
    np.savez(tmp_path / "flat.npz", **flat)
    with pytest.raises(ValueError, match="flat.npz: wrong shapes for an ImageNet ViT"):
        convert.convert_checkpoint(tmp_path / "flat.npz", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.visual.q.lora_A.weight", (4, 128), "LoRA matrices .*merge_and_unload"),
        ("visual.transformer.resblocks.0.mlp.c_fc.SCB", (4,), "is quantized: use the float"),
        ("visual.conv1.weight", (128, 1, 8, 8), "of another modality: .* reads 1 channels"),
        ("visual.conv1.weight", (128, 3, 2, 8, 8), "of another modality: .* reads videos"),
    ],
)
def test_other_weights_are_refused(name, shape, message, small_state, tmp_path):
    state = {**small_state, name: torch.ones(shape)}
    with pytest.raises(ValueError, match=message):
        _convert(_save_safetensors(state, tmp_path / "a.safetensors"), tmp_path)
    assert not (tmp_path / "out").exists()


def test_repository_of_hugging_face(small_state, small_backbone, tmp_path, monkeypatch):
    errors = pytest.importorskip("huggingface_hub").errors
    _save_safetensors(small_state, tmp_path / "open_clip_model.safetensors")
    asked = []

    def hf_hub_download(repo, name, revision):
        asked.append((repo, revision))
        if not (tmp_path / name).is_file():
            raise errors.LocalEntryNotFoundError("offline")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    info, arrays = _convert("hf:laion/clip@v1", tmp_path)
    assert (set(asked), info["source"]) == ({("laion/clip", "v1")}, "hf:laion/clip@v1")
    _assert_same_arrays(arrays, _read_arrays(small_backbone))
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="hf:laion/clip has none of model.safetensors"):
        _convert("hf:laion/clip", tmp_path)


def test_normalization_must_be_known(small_state, tmp_path):
    source = _save_safetensors(small_state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="--activation=quick_gelu .*--normalization=clip"):
        convert.convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown normalization 'mine': known are clip, imagenet"):
        convert.convert_checkpoint(source, tmp_path / "out", normalization="mine")
    vision = {"width": 128, "layers": 3}
    path = tmp_path / "open_clip_config.json"
    content = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    _write_json(path, content)
    info = convert.convert_checkpoint(source, tmp_path / "out")
    assert info["mean"] == [0.1, 0.2, 0.3]
    _write_json(path, content | {"preprocess_cfg": {"mean": [123.0, 1, 1]}})
    with pytest.raises(ValueError, match=r"impossible mean: \[123.0, 1, 1\]"):
        convert.convert_checkpoint(source, tmp_path / "out")


def test_file_and_config_with_other_normalization(small_backbone):
    config = schema.get_config()
    _, _, info = convert.load_backbone(small_backbone, SMALL)
    convert.check_normalization("backbone", info, config.data)
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    with pytest.raises(
        ValueError, match=r"mean \(0.481, 0.458, 0.408\).*data.mean=\(0.5, 0.5, 0.5"
    ):
        convert.check_normalization("backbone", info, config.data)
    config.data.keep_normalization = True
    convert.check_normalization("backbone", info, config.data)

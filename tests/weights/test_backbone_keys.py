"""Tests which keys of a configuration the file of the backbone answers."""

import dataclasses

import numpy as np
import pytest

from dualpath_jax import check_config
from dualpath_jax.config import loading, schema
from dualpath_jax.data.clip_spec import normalization
from dualpath_jax.models.abstract import build_backbone_config
from dualpath_jax.models.backbones import registry, vit
from dualpath_jax.weights import convert
from dualpath_jax.weights.backbone_keys import fill_backbone_keys
from dualpath_jax.weights.source_configs import NORMALIZATIONS

TINY = vit.ViTConfig(
    "custom", 28, 14, 48, 2, 4, 96, pre_norm=False, patch_bias=True, num_register_tokens=2,
    layer_scale=True, gated_mlp=True, activation="silu", position_resize="bicubic",
)  # fmt: skip
IMAGENET = NORMALIZATIONS["imagenet"]
CLIP = NORMALIZATIONS["clip"]


def _write(folder, config, stated=IMAGENET, arrays=()):
    """Write a backbone file with the header of a config, and return its path."""
    meta = {
        "version": convert.FORMAT_VERSION,
        "family": registry.family_of(config),
        "config": convert._describe_config(config),
        **{key: list(values) for key, values in stated.items()},
        "container": "torch",
        "layout": "test",
        "source": "a.pt",
        "source_sha256": "0" * 64,
    }
    path = folder / "backbone.safetensors"
    path.write_bytes(convert._serialize(dict(arrays), meta))
    return str(path)


def _config(path=None, **keys):
    config = schema.get_config()
    config.backbone.checkpoint = path
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in keys.items()})
    return config


@pytest.mark.parametrize("name", ["DINOv2-S/14-reg", "SigLIP-So400m/14", "ViT-H/14", "Swin-T"])
def test_named_backbone(name, tmp_path):
    config = _config(_write(tmp_path, registry.MODELS[name]))
    assert fill_backbone_keys(config)
    assert config.backbone.name == name
    assert (config.data.mean, config.data.std) == (IMAGENET["mean"], IMAGENET["std"])
    shape = dataclasses.replace(registry.MODELS[name], image_size=config.data.image_size)
    assert build_backbone_config(config) == shape
    assert all(
        config.backbone[k] is None for k in config.backbone if k not in ("name", "checkpoint")
    )


def test_shape_without_a_name(tmp_path):
    """Check that the weights load with the filled keys, and no others."""
    rng = np.random.default_rng(0)
    shapes = convert.parameter_shapes(TINY)
    arrays = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    config = _config(_write(tmp_path, TINY, arrays=arrays), data__image_size=28)
    assert fill_backbone_keys(config)
    assert (config.backbone.name, config.backbone.num_register_tokens) == ("custom", 2)
    wanted = build_backbone_config(config)
    params, loaded, info = convert.load_backbone(config.backbone.checkpoint, wanted)
    assert loaded == TINY
    np.testing.assert_array_equal(params["register_tokens"], arrays["register_tokens"])
    convert.check_normalization("file", info, config.data)
    config.backbone.layer_scale = False
    with pytest.raises(ValueError, match=r"holds custom .*'layer_scale': True.*asks for custom"):
        convert.load_backbone(config.backbone.checkpoint, build_backbone_config(config))


def test_defaults_may_be_written(tmp_path):
    """Check a header with all fields, of which num_register_tokens is 0; twin: width 0."""
    config = registry.MODELS["ViT-B/16"]
    for fields, valid in [({}, True), ({"width": 0}, False), ({"class_token": 0}, False)]:
        path = _write(tmp_path, config)
        meta = convert._read_backbone(path)[1]
        meta["config"] = dataclasses.asdict(config) | fields
        (tmp_path / "backbone.safetensors").write_bytes(convert._serialize({}, meta))
        if valid:
            assert convert.read_description(path)[0] == config
            continue
        with pytest.raises(ValueError, match=f"invalid fields {next(iter(fields))}"):
            convert.read_description(path)


def test_keys_that_are_set_stay(tmp_path):
    path = _write(tmp_path, registry.MODELS["DINOv2-S/14"])
    config = _config(path, backbone__name="ViT-B/16", data__mean=(0.5, 0.5, 0.5))
    assert fill_backbone_keys(config)
    assert (config.backbone.name, config.data.mean) == ("ViT-B/16", (0.5, 0.5, 0.5))
    info = convert.BackboneInfo("DINOv2-S/14", "", "", "", (IMAGENET["mean"], IMAGENET["std"]))
    with pytest.raises(ValueError, match=r"mean \(0.485, .* data.mean=\(0.5, 0.5, 0.5\).*leave"):
        convert.check_normalization(path, info, config.data)
    config.data.keep_normalization = True
    convert.check_normalization(path, info, config.data)


def test_key_of_the_shape_that_disagrees_is_named(tmp_path):
    path = _write(tmp_path, registry.MODELS["DINOv2-S/14"])
    fill_backbone_keys(_config(path, backbone__heads=6))
    message = r"backbone.heads=12, but .*backbone.safetensors holds DINOv2-S/14 with 6: leave"
    with pytest.raises(ValueError, match=message):
        fill_backbone_keys(_config(path, backbone__heads=12))


@pytest.mark.parametrize("keys", [{}, {"data__synthetic": True}])
def test_defaults_without_a_file(keys, tmp_path):
    path = _write(tmp_path, TINY) if keys else str(tmp_path / "missing.safetensors")
    config = _config(path, **keys)
    assert not fill_backbone_keys(config)
    assert config.backbone.name == "ViT-B/16"
    assert (config.data.mean, config.data.std) == (CLIP["mean"], CLIP["std"])


def test_file_of_an_older_version_has_clips_normalization(tmp_path):
    config = _config(_write(tmp_path, registry.MODELS["ViT-B/16"], stated={}))
    assert fill_backbone_keys(config)
    assert (config.data.mean, config.data.std) == (CLIP["mean"], CLIP["std"])
    assert normalization(schema.get_config().data) == (CLIP["mean"], CLIP["std"])


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\x05" + b"\x00" * 7 + b"{}   "])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a converted backbone: if it is a checkpoint"):
        fill_backbone_keys(_config(str(path)))


def test_checkpoint_alone_is_enough(tmp_path, capsys):
    """Check a run of configs/finetune.py that names only the file."""
    path = _write(tmp_path, dataclasses.replace(TINY, image_size=224))
    overrides = [f"--config.backbone.checkpoint={path}", "--config.data.image_size=56"]
    config = loading.load_config("finetune", overrides)
    check_config.check_config(config, ["backbone.checkpoint", "data.image_size"])
    printed = capsys.readouterr().out
    assert "neither was read; backbone: custom, of the header of that file" in printed
    assert config.backbone.name is None  # the caller's config stays
    assert "training batch of two clips" in printed

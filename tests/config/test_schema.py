"""Checks the table of configuration keys: allowed values, choices, and the texts made from it."""

import dataclasses
import pathlib

import pytest

from dualpath_jax.config import schema
from dualpath_jax.data import frame_sampling
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.demo import setup as demo_setup
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import block_loop
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.models.methods import dualpath
from dualpath_jax.training import sharding

ROOT = pathlib.Path(__file__).resolve().parents[2]


def override(key, value):
    """Return the default configuration with another value of `key`."""
    config = schema.get_config()
    config.update_from_flattened_dict({key: value})
    return config


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.learning_rate", -1e-3, "above 0"),
        ("optimizer.learning_rate", float("nan"), "above 0"),
        ("optimizer.clip_norm", 0.0, "above 0"),
        ("optimizer.b1", 1.0, r"in \[0, 1\)"),
        ("optimizer.label_smoothing", 1.5, r"in \[0, 1\)"),
        ("optimizer.weight_decay", -1.0, "0 or more"),
        ("seed", -1, r"in \[0, 4294967295\]"),
        ("seed", 2**32, r"in \[0, 4294967295\]"),
        ("data.mean", (123.7, 116.3, 103.5), r"in \[0, 1\]"),
        ("data.mean", (0.5,), "3 numbers"),
        ("data.std", (0.0, 1.0, 1.0), r"in \(0, 1\]"),
        ("data.std", (0.5, 0.5), "3 numbers"),
        ("data.grid", (4, 4, 1), "2 numbers"),
        ("data.grid", (0, 4), r"in \[1, 4096\]"),
        ("data.frame_scale", 0, r"in \[1, 4096\]"),
        ("data.crop_scale", (0.0, 1.0), r"in \(0, 1\]"),
        ("data.crop_scale", (0.9, 0.1), "two numbers, the smallest and the largest"),
        ("data.crop_scale", (0.5,), "two numbers, the smallest and the largest"),
        ("data.randaugment_magnitude", 11.0, r"in \[0, 10\]"),
        ("data.erasing_probability", 25.0, r"in \[0, 1\]"),
        ("log_every_steps", 0, "1 or more"),
        ("checkpoint.every_steps", 0, "1 or more"),
        ("checkpoint.keep", 0, "1 or more"),
        ("data.num_frames", 2**24, r"in \[1, 4096\]"),
        ("backbone.heads", 0, r"in \[1, 65536\]"),
        ("backbone.depth", 4000, r"in \[1, 256\]"),
        ("checkpoint.every_minutes", 0.0, "above 0"),
        ("mesh.fsdp", 0, "1 or more"),
    ],
)
def test_number_out_of_range_is_refused(key, value, words):
    with pytest.raises(ValueError, match=f"^{key}=.* must be {words}$"):
        schema.check_values(override(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.clip_norm", 1e-9),
        ("optimizer.b1", 0.0),
        ("seed", 2**32 - 1),
        ("data.mean", (0.0, 0.5, 1.0)),
        ("data.split", "all"),
        ("data.crop_scale", (1.0, 1.0)),
        ("data.erasing_probability", 1.0),
        ("eval.spatial_crops", 3),
    ],
)
def test_edge_of_a_range_is_allowed(key, value):
    schema.check_values(override(key, value))


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("eval.spatial_crops", 2, "1, 3"),
        ("model.method", "rola", "dualpath, full, .*, probe"),
        ("backbone.name", "ViT-B/8", "ViT-B/32, .*, custom, custom-swin"),
        ("data.source", "jhmdb", "k400, .*, folder, csv, demo, paths, paths_large"),
        ("data.split", "4", "1, 2, 3, all"),
        ("data.sampling", "sparse", "dense, segments"),
        ("model.dtype", "float16", "float32, bfloat16"),
        ("model.remat", "some", "none, save_matmuls, full"),
        ("model.temporal_position", "none", r"sincos3d, sincos3d\+clip, clip, learned"),
        ("optimizer.reduce_dtype", "float16", "float32, bfloat16"),
        ("eval.checkpoint", "worst", "latest, best"),
    ],
)
def test_unknown_choice_is_refused(key, value, known):
    with pytest.raises(ValueError, match=f"^unknown {key}={value!r}: known are {known}$"):
        schema.check_values(override(key, value))


@pytest.mark.parametrize(
    ("key", "registered"),
    [
        ("model.method", method_registry.METHODS),
        ("backbone.name", [*backbone_registry.MODELS, *backbone_registry._CUSTOM]),
        ("data.source", [*dataset_registry.DATASETS, *demo_setup.GENERATED]),
        ("data.sampling", frame_sampling.SAMPLINGS),
        ("model.dtype", method_registry.DTYPES),
        ("model.remat", block_loop.REMAT),
        ("model.temporal_position", dualpath.TEMPORAL_POSITIONS),
        ("optimizer.reduce_dtype", sharding.REDUCE_DTYPES),
    ],
)
def test_choices_are_those_of_the_registry(key, registered):
    assert schema.choices(key) == tuple(registered)


def test_choice_can_be_added(monkeypatch):
    """Check that a method of another repository is known everywhere once it is added."""
    monkeypatch.setattr(schema, "_ADDED_CHOICES", {})
    config = override("model.method", "scale_shift")
    with pytest.raises(ValueError, match="unknown model.method='scale_shift'"):
        schema.check_values(config)
    schema.add_choice("model.method", "scale_shift")
    schema.check_values(config)
    assert schema.choices("model.method")[-2:] == ("probe", "scale_shift")
    assert "probe, scale_shift." in schema.format_keys()
    with pytest.raises(ValueError, match="data.batch_size is not restricted to a list of values"):
        schema.add_choice("data.batch_size", 3)


def test_keys_are_complete():
    """Check that names are unique, defaults are allowed, and descriptions are a sentence."""
    names = [key.name for key in schema.KEYS]
    assert len(set(names)) == len(names)
    schema.check_values(schema.get_config())
    faults = [key.name for key in schema.KEYS if not is_described(key)]
    assert faults == []
    assert not is_described(dataclasses.replace(schema.KEYS[0], description=""))
    assert not is_described(dataclasses.replace(schema.KEYS[0], description="seed of a | b."))


def is_described(key):
    """Return whether a description ends a sentence, on one line that fits a table's cell."""
    text = key.description
    return text.endswith(".") and "\n" not in text and "|" not in text


def test_format_keys_has_every_key_with_its_default():
    lines = schema.format_keys().splitlines()
    settings = [line for line in lines if not line.startswith("    ")]
    assert len(settings) == len(schema.KEYS)
    assert "--config.data.batch_size=64" in settings
    assert "--config.data.dir=None (str)" in settings
    assert "--config.model.remat='save_matmuls'" in settings
    assert max(map(len, lines)) <= 96
    text = " ".join(schema.format_keys().split())
    assert "M, RandAugment's magnitude; ours. Allowed: in [0, 10]." in text
    assert all(key.description in text for key in schema.KEYS)


def test_configuration_page_is_the_table():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == schema.markdown_table(), (
        "write it again: python -m dualpath_jax.config.schema > docs/configuration.md"
    )
    assert all(f"\n| `{key.name}` | " in page for key in schema.KEYS)

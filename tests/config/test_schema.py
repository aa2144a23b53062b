"""Numbers of a configuration that make no sense, and that every other one does."""

import importlib

import pytest

from dualpath_jax.config import schema
from dualpath_jax.config.values import flatten_config
from tests.config.test_configs import CONFIGS


def changed(key, value):
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
        ("data.std", (0.0, 1.0, 1.0), "above 0"),
        ("data.grid", (0, 4), r"in \[1, 4096\]"),
        ("data.frame_scale", 0, r"in \[1, 4096\]"),
        ("data.crop_scale", (0.0, 1.0), r"in \(0, 1\]"),
        ("data.crop_scale", (0.9, 0.1), "the smallest and the largest"),
        ("data.crop_scale", (0.5,), "the smallest and the largest"),
        ("data.randaugment_magnitude", 11.0, r"in \[0, 10\]"),
        ("data.erasing_probability", 25.0, r"in \[0, 1\]"),
        ("log_every_steps", 0, "1 or more"),
        ("checkpoint.every_steps", 0, "1 or more"),
        ("checkpoint.keep", 0, "1 or more"),
        ("data.num_frames", 2**24, r"in \[1, 4096\]"),
        ("backbone.heads", 0, r"in \[1, 65536\]"),
        ("backbone.depth", 4000, r"in \[1, 256\]"),
        ("eval.spatial_crops", 2, "1 or 3"),
        ("checkpoint.every_minutes", 0.0, "above 0"),
        ("mesh.fsdp", 0, "1 or more"),
    ],
)
def test_refused(key, value, words):
    with pytest.raises(ValueError, match=f"^{key}=.* must be {words}$"):
        schema.check_values(changed(key, value))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_is_refused(name):
    schema.check_values(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.clip_norm", 1e-9),
        ("optimizer.b1", 0.0),
        ("data.crop_scale", (1.0, 1.0)),
        ("data.erasing_probability", 1.0),
    ],
)
def test_at_the_edge(key, value):
    schema.check_values(changed(key, value))


def test_every_range_is_of_a_key():
    assert schema.KEYS.keys() <= flatten_config(schema.get_config()).keys()

"""Configurations: every key known, every key read, every file loads."""

import importlib
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from dualpath_jax.config import schema
from dualpath_jax.models.abstract import abstract_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base", "recipes")
)


def keys(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_only_overrides(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(keys(config)) == set(keys(schema.get_config()))
    abstract_model(config, num_classes=3)


def unread(all_keys, source):
    return [key for key in all_keys if not re.search(rf"[.\"]{key.split('.')[-1]}\b", source)]


def test_every_key_is_read():
    source = "".join(p.read_text() for p in sorted((ROOT / "dualpath_jax").rglob("*.py")))
    assert unread(keys(schema.get_config()), source) == []
    assert unread(["data.never_read_anywhere"], source) == ["data.never_read_anywhere"]


def test_every_key_has_a_comment():
    lines = (ROOT / "configs" / "base.py").read_text().splitlines()
    bare = [x for x in lines if re.match(r"\s+config\.[\w.]+ = ", x) and "ConfigDict()" not in x]
    assert [line for line in bare if "  # " not in line] == []


def test_ssv2_recipe():
    """Table A1."""
    config = importlib.import_module("configs.ssv2_vitb").get_config("48")
    assert config.data.num_frames == 48
    assert config.data.num_spatial_frames == 8
    assert config.data.sampling == "segments"
    assert config.data.batch_size == 128
    assert config.optimizer.learning_rate == 5e-4
    assert config.optimizer.weight_decay == 5e-2
    assert (config.eval.temporal_views, config.eval.spatial_crops) == (1, 3)
    assert config.model.pre_attention_adapter

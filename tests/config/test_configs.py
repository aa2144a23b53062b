"""Checks the config files: each loads, overrides known keys only, and every key is read."""

import importlib
import pathlib
import re

import pytest

from dualpath_jax.config import schema
from dualpath_jax.config.values import flatten_config
from dualpath_jax.models.abstract import abstract_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base", "recipes")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file_only_overrides_known_keys(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert flatten_config(config).keys() == {key.name for key in schema.KEYS}
    schema.check_values(config)
    abstract_model(config, num_classes=3)


def find_unread(keys, source):
    """Return the keys whose last component does not occur in `source`."""
    return [key for key in keys if not re.search(rf"[.\"]{key.split('.')[-1]}\b", source)]


def test_every_key_is_read():
    schema_file = ROOT / "dualpath_jax" / "config" / "schema.py"
    files = sorted((ROOT / "dualpath_jax").rglob("*.py"))
    source = "".join(path.read_text() for path in files if path != schema_file)
    assert find_unread([key.name for key in schema.KEYS], source) == []
    assert find_unread(["data.never_read"], source) == ["data.never_read"]


def test_base_is_the_schema():
    """Check that config files which begin with `from configs import base` still work."""
    from configs import base

    assert base.get_config().to_dict() == schema.get_config().to_dict()


def test_ssv2_recipe():
    """Compare the recipe of Something-Something-v2 with Table A1."""
    config = importlib.import_module("configs.ssv2_vitb").get_config("48")
    assert config.data.num_frames == 48
    assert config.data.num_spatial_frames == 8
    assert config.data.sampling == "segments"
    assert config.data.batch_size == 128
    assert config.optimizer.learning_rate == 5e-4
    assert config.optimizer.weight_decay == 5e-2
    assert (config.eval.temporal_views, config.eval.spatial_crops) == (1, 3)
    assert config.model.pre_attention_adapter

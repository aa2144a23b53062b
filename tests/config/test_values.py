"""Checks values of configurations, also of those that older versions saved."""

import json

import pytest

from configs import demo
from dualpath_jax.config import schema
from dualpath_jax.config.values import (
    apply_renames,
    config_changes,
    flatten_config,
    format_views,
    restore_config,
)


def save_config(config):
    """Return a configuration as its JSON file has it, without tuples."""
    return json.loads(config.to_json_best_effort())


def test_flatten_config():
    values = flatten_config({"seed": 1, "data": {"grid": [4, 4], "more": {"x": None}}})
    assert values == {"seed": 1, "data.grid": [4, 4], "data.more.x": None}
    assert flatten_config(schema.get_config())["data.grid"] == (4, 4)


def test_format_views():
    assert format_views(schema.get_config()) == "32x3x1"


def test_missing_keys_have_their_defaults():
    saved = save_config(demo.get_config())
    assert restore_config(saved).to_dict() == saved
    del saved["mesh"], saved["model"]["remat"]
    saved["optimizer"]["clip_norm"], saved["gone"] = None, 3
    config = restore_config(saved)
    assert config.mesh.fsdp == schema.get_config().mesh.fsdp
    assert config.model.remat == schema.get_config().model.remat
    assert config.data.source == "demo"
    assert config.optimizer.clip_norm is None
    assert config.gone == 3  # a key of an older version stays


@pytest.mark.parametrize("saved", [{"a.b": 1}, 3, ["seed"]])
def test_what_is_not_a_configuration_is_refused(saved):
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        restore_config(saved)


def make_old_config():
    """Return a saved configuration with the keys and values of version 0.1.0."""
    saved = save_config(schema.get_config())
    del saved["model"]["cls_token_only"]
    saved["model"] |= {"class_only": False, "remat": "cheap"}
    return saved


def test_old_names_are_replaced():
    saved = make_old_config()
    assert apply_renames(saved) == [
        "config.model.class_only is now called config.model.cls_token_only",
        "config.model.remat=cheap is now called config.model.remat=save_matmuls",
    ]
    assert "class_only" not in saved["model"]
    assert saved["model"]["cls_token_only"] is False
    assert saved["model"]["remat"] == "save_matmuls"
    assert apply_renames(saved) == []
    assert apply_renames({"model": {"remat": "full"}}) == []
    assert apply_renames({"model": 3}) == []


def test_old_config_is_restored():
    saved = make_old_config()
    config = restore_config(saved)
    assert config.model.cls_token_only is False
    assert config.model.remat == "save_matmuls"
    assert flatten_config(config).keys() == {key.name for key in schema.KEYS}
    assert saved == make_old_config()  # unchanged
    assert config_changes(saved, save_config(schema.get_config())) == {}


def test_config_changes():
    before = save_config(schema.get_config())

    def find_changes(**values):
        after = schema.get_config()
        after.update_from_flattened_dict({key.replace("__", "."): v for key, v in values.items()})
        return config_changes(before, save_config(after))

    assert find_changes() == {}
    assert find_changes(log_every_steps=7, eval__batch_size=3, checkpoint__keep=9) == {}
    assert find_changes(optimizer__accumulation_steps=2, model__scan_blocks=False) == {}
    assert find_changes(seed=1, data__num_frames=16, log_every_steps=7) == {
        "data.num_frames": (32, 16),
        "seed": (0, 1),
    }
    # A key added after the checkpoint was saved counts as its default.
    del before["mesh"]
    assert find_changes() == {}
    assert find_changes(mesh__fsdp=2) == {"mesh.fsdp": (1, 2)}

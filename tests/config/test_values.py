"""Values of configurations, and those that older versions wrote."""

import json

import pytest

from configs import demo
from dualpath_jax.config import schema
from dualpath_jax.config.values import flatten_config, restore_config


def test_flat():
    values = flatten_config({"seed": 1, "data": {"grid": [4, 4], "more": {"x": None}}})
    assert values == {"seed": 1, "data.grid": [4, 4], "data.more.x": None}
    assert flatten_config(schema.get_config())["data.grid"] == (4, 4)


def test_what_is_lacking_is_as_by_default():
    saved = json.loads(demo.get_config().to_json_best_effort())
    assert restore_config(saved).to_dict() == saved
    del saved["mesh"], saved["model"]["remat"]
    saved["optimizer"]["clip_norm"], saved["gone"] = None, 3
    config = restore_config(saved)
    assert config.mesh.fsdp == schema.get_config().mesh.fsdp
    assert config.model.remat == schema.get_config().model.remat
    assert config.data.source == "demo"
    assert config.optimizer.clip_norm is None
    assert config.gone == 3  # no longer a key: kept


@pytest.mark.parametrize("saved", [{"a.b": 1}, 3, ["seed"]])
def test_no_configuration(saved):
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        restore_config(saved)

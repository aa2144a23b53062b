"""Values of configurations, of those too that older versions of this package wrote.

Public: `flatten_config`, `format_views`, `restore_config`, `INVALID_CONFIG_ERRORS`.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dualpath_jax.config import schema

# What is raised where a stranger's values are taken for a configuration, and are none.
INVALID_CONFIG_ERRORS = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    values: dict[str, Any] = {}
    for name in config:
        value = config[name]
        if isinstance(value, Mapping | ConfigDict):
            values |= flatten_config(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def format_views(config: Any) -> str:
    """Frames x clips x crops, as the paper counts."""
    views = (config.data.num_frames, config.eval.temporal_views, config.eval.spatial_crops)
    return "x".join(map(str, views))


def restore_config(saved: Mapping[str, Any]) -> ConfigDict:
    """The configuration that a run saved; a key that it lacks is younger, and as by default.

    Args:
      saved: nested, of the values that JSON has, as in config.json and in checkpoints.

    Returns:
      All keys of dualpath_jax/config/schema.py and those of `saved`; lists where JSON has no tuples.

    Raises:
      NO_CONFIG: `saved` is no configuration.
    """
    config = ConfigDict(json.loads(schema.get_config().to_json_best_effort()))
    with config.ignore_type():
        config.update(saved)
    return config

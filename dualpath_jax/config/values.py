"""Values of configurations, of those too that older versions of this package wrote.

Public: `flat`, `views_of`, `with_defaults`, `NO_CONFIG`.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dualpath_jax.config import schema

# What is raised where a stranger's values are taken for a configuration, and are none.
NO_CONFIG = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    values: dict[str, Any] = {}
    for name in config:
        value = config[name]
        if isinstance(value, Mapping | ConfigDict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def views_of(config: Any) -> str:
    """Frames x clips x crops, as the paper counts."""
    views = (config.data.num_frames, config.eval.temporal_views, config.eval.spatial_crops)
    return "x".join(map(str, views))


def with_defaults(saved: Mapping[str, Any]) -> ConfigDict:
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

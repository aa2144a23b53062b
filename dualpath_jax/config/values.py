"""Reads and compares configurations, also those that older versions of this package saved."""

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

from ml_collections import ConfigDict

from dualpath_jax.config import schema

# Errors that are raised if values from an untrusted file are not a configuration.
INVALID_CONFIG_ERRORS = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)

# Keys that may differ from those of a checkpoint, since they do not change what is learned.
SAFE_CHANGES = (
    "backbone.checkpoint",  # its hash is compared instead
    "checkpoint.",
    "data.dir",
    "data.max_broken_videos",
    "data.prefetch",
    "early_stopping_evaluations",
    "eval.",
    "init_from",
    "log_every_steps",
    "model.cls_token_only",
    "model.remat",
    "model.scan_blocks",
    "optimizer.accumulation_steps",
    "optimizer.max_skipped_steps",
    "profile.",
    "resume_changed",
)


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested configuration by dotted key."""
    values: dict[str, Any] = {}
    for name in config:
        value = config[name]
        if isinstance(value, Mapping | ConfigDict):
            values |= flatten_config(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def format_views(config: Any) -> str:
    """Return the views of an evaluation as the paper writes them, frames x clips x crops."""
    views = (config.data.num_frames, config.eval.temporal_views, config.eval.spatial_crops)
    return "x".join(map(str, views))


def score_origin(config: Any) -> dict[str, str]:
    """Return what scores depend on besides the state, and the name of the one that decides."""
    views, criterion = format_views(config), config.eval.criterion
    return {"split": config.eval.split, "views": views, "criterion": criterion}


def apply_renames(config: MutableMapping[str, Any]) -> list[str]:
    """Replace keys and values of older versions in a nested configuration, in place.

    Returns:
      A line for each replacement that names the new key or value.
    """
    lines = []
    for old, new in schema.RENAMED_KEYS.items():
        *groups, name = old.split(".")
        group = _find_group(config, groups)
        if group is not None and name in group:
            _find_group(config, new.split(".")[:-1])[new.split(".")[-1]] = group[name]
            del group[name]
            lines.append(f"config.{old} is now called config.{new}")
    for (key, old), new in schema.RENAMED_VALUES.items():
        *groups, name = key.split(".")
        group = _find_group(config, groups)
        if group is not None and name in group and group[name] == old:
            group[name] = new
            lines.append(f"config.{key}={old} is now called config.{key}={new}")
    return lines


def _find_group(config: Any, groups: list[str]) -> Any:
    """Return the nested group of a configuration, None if there is no such group."""
    for name in groups:
        if not isinstance(config, Mapping | ConfigDict) or name not in config:
            return None
        config = config[name]
    return config if isinstance(config, Mapping | ConfigDict) else None


def restore_config(saved: Mapping[str, Any]) -> ConfigDict:
    """Restore a saved configuration and fill keys added since then with their defaults.

    Args:
      saved: nested dict of JSON values, as in config.json and in checkpoints.

    Returns:
      All keys of `schema.KEYS` and those of `saved`; lists where JSON has no tuples.

    Raises:
      INVALID_CONFIG_ERRORS: `saved` is not a configuration.
    """
    saved = json.loads(json.dumps(saved))
    apply_renames(saved)
    config = ConfigDict(json.loads(schema.get_config().to_json_best_effort()))
    with config.ignore_type():
        config.update(saved)
    return config


def config_changes(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Compare two configurations, leaving out the keys of `SAFE_CHANGES`.

    Args:
      saved: nested dict, as `Experiment.metadata()["config"]`.
      current: as `saved`.

    Returns:
      (saved, current) values by dotted key, where they differ.
    """
    old, new = (flatten_config(restore_config(config)) for config in (saved, current))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return {
        key: (old.get(key), new.get(key)) for key in differing if not key.startswith(SAFE_CHANGES)
    }

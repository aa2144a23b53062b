"""Finds keys that a configuration sets and that have no effect: those that nothing reads."""

from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from dualpath_jax.config import schema
from dualpath_jax.config.values import flatten_config

# Keys that decide which other keys have an effect.
_SWITCHES = ("model.method", "model.spatial_path", "model.temporal_path", "model.merged")
# Keys that describe a clip and are read when its format is built.
_CLIP_KEYS = (
    *("data.num_spatial_frames", "data.grid", "data.frame_scale", "data.frameset_input"),
    "data.sampling_interval",
)


class RecordedReads:
    """Wraps a ConfigDict and records which keys are read.

    Attributes, items and iteration over names work as those of the ConfigDict.

    Attributes:
      seen: dotted keys that were read, "data.grid", "seed", ...
    """

    def __init__(self, config: ConfigDict, seen: set[str] | None = None, prefix: str = ""):
        self._config, self._prefix = config, prefix
        self.seen = set() if seen is None else seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        path = self._prefix + name
        if isinstance(value, ConfigDict):
            return RecordedReads(value, self.seen, path + ".")
        self.seen.add(path)
        return value

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)


def check_unread_keys(
    config: ConfigDict, seen: Collection[str], overrides: Collection[str] = ()
) -> None:
    """Check that each key that differs from its default has been read.

    Args:
      config: the whole configuration.
      seen: dotted keys that were read.
      overrides: dotted keys that the command line set. If a key of `_SWITCHES` is one of them, keys
        of the config file for its own method or path lose their effect, which is only a warning.

    Raises:
      ValueError: a key is set and has no effect.
    """
    unread = _find_unread_keys(config, seen)
    switched = any(key in overrides for key in _SWITCHES)
    ignored = {key: unread[key] for key in unread if switched and key not in overrides}
    where = _describe_method(config, seen)
    if ignored:
        print(f"warning: the config file sets keys without effect {where}: {_format(ignored)}")
    if wrong := {key: unread[key] for key in unread if key not in ignored}:
        raise ValueError(f"set, but without effect {where}: {_format(wrong)}")


def describe_unread_model_keys(config: ConfigDict, seen: Collection[str]) -> str:
    """Return a warning of keys of the model and its inputs that are set and not read, or "".

    Args:
      config: the whole configuration.
      seen: dotted keys that were read to build the model.
    """
    unread = _find_unread_keys(config, seen)
    unread = {k: v for k, v in unread.items() if k.startswith("model.") or k in _CLIP_KEYS}
    if not unread:
        return ""
    return f"warning: set, but without effect {_describe_method(config, seen)}: {_format(unread)}"


def _find_unread_keys(config: ConfigDict, seen: Collection[str]) -> dict[str, Any]:
    """Return the values of the keys that differ from their defaults and were not read."""
    defaults, values = flatten_config(schema.get_config()), flatten_config(config)
    return {k: v for k, v in values.items() if k not in seen and v != defaults.get(k)}


def _describe_method(config: ConfigDict, seen: Collection[str]) -> str:
    """Return a description of the method, and of its paths that are off, for messages."""
    values, defaults = flatten_config(config), flatten_config(schema.get_config())
    paths = [k for k in _SWITCHES[1:] if k in seen and values[k] != defaults[k]]
    off = "".join(f", {key}={values[key]}" for key in paths)
    return f"for model.method={config.model.method!r}{off} and the rest of this configuration"


def _format(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())

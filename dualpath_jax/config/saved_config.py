"""Loads a saved configuration, such as the config.json of a workdir, as a config file.

`--config=FILE.json` means this module with FILE.json as its argument, see
`loading.find_config_file`.
"""

from typing import Any

from ml_collections import ConfigDict

from dualpath_jax.config import loading, schema
from dualpath_jax.config.values import INVALID_CONFIG_ERRORS, flatten_config, restore_config
from dualpath_jax.runtime.safe_read import read_json


def get_config(path: str) -> ConfigDict:
    """Load the configuration in a JSON file; keys that it lacks have their defaults.

    Args:
      path: of the file, local or gs://.

    Raises:
      OSError: there is no such file.
      ValueError: it is not a configuration of this package.
    """
    saved = read_json(path, dict)
    config = schema.get_config()
    try:
        restored = restore_config(saved)
        loading.check_known_keys(restored)
        values = flatten_config(restored)
        for name, value in values.items():
            _set_value(config, name, value)
        schema.check_values(config)
    except INVALID_CONFIG_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a configuration of this package: {reason}") from None
    return config


def _set_value(config: ConfigDict, name: str, value: Any) -> None:
    """Set a key to a value of JSON, which has lists in place of tuples."""
    *groups, last = name.split(".")
    for group in groups:
        config = config[group]
    config[last] = tuple(value) if isinstance(value, list) else value

"""Provides all keys with their defaults, for config files that use `from configs import base`.

The keys are in dualpath_jax/config/schema.py; a config file of your own only overrides them.
"""

from dualpath_jax.config.schema import get_config

__all__ = ["get_config"]

"""The version of this package, apart from `__init__` so that it imports nothing."""

__version__ = "0.1.0"

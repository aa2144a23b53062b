"""Makes the environment of the processes that tests start."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_xla_flags(devices=1):
    """Return the tests' XLA flags with fewer devices, because runs on eight are slower."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def make_environment(devices=1):
    """Return the tests' environment with `devices` devices and the repository in PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": make_xla_flags(devices)}

"""What processes that tests start are started with."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def xla_flags(devices=1):
    """The tests' own, for so many devices: with eight instead of one a run takes a fifth longer."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def environment(devices=1):
    """The tests' own, with `xla_flags`, for a process that finds the repository from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices)}

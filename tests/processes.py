"""What processes that tests start are started with."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def environment(devices=1):
    """The tests' own, for so many devices: with eight instead of one a run takes a fifth longer."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": flags}

"""Defines targets for tests of the fuzz harness, which do what a reader must not do.

They are not in the test module, so that the processes that import them start quickly.
"""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from tests.fuzz.sandbox import Case, Target

ELSEWHERE = "/tmp/fuzz_evil"


def _perform(action: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Perform the action of this name."""
    actions = {
        "good": lambda: (out / "result").write_text("fine"),
        "refuse": lambda: int("refuse"),
        "key": lambda: {}["key"],
        "unicode": lambda: b"\xff".decode(),
        "exit": lambda: sys.exit(0),
        "memory": lambda: bytearray(2**30),
        "crash": os.abort,
        "hang": lambda: time.sleep(60),
        "outside": lambda: (out / "../../evil").write_text("evil"),
        "input": lambda: (folder / "file").write_text("other"),
        "native": lambda: np.zeros(3).tofile(str(out / "../evil")),
        "elsewhere": lambda: pathlib.Path(ELSEWHERE).write_text("evil"),
        "run": lambda: subprocess.run(["true"], check=True),
    }
    actions[action]()


class Broken(Target):
    """Performs the action that its file names: "good" in a seed, `action` in a damaged copy."""

    seconds = 3.0
    memory_mb = 512
    action = "good"

    def __init__(self, folder):
        del folder

    def seeds(self):
        return [Case("broken", {"file": b"good"})]

    def mutate(self, rng, seed):
        del rng
        return Case(seed.kind, {"file": self.action.encode()})

    def read(self, kind, folder, out):
        _perform((folder / "file").read_text(), folder, out)


class Unread(Broken):
    """Refuses its own valid files."""

    def seeds(self):
        return [Case("broken", {"file": b"key"})]


def _make_target(action: str) -> type[Broken]:
    """Return a class that other processes can import by its name."""
    name = f"Broken_{action}"
    globals()[name] = type(name, (Broken,), {"action": action, "__module__": __name__})
    return globals()[name]


_ACTIONS = (
    *("good", "refuse", "key", "unicode", "exit", "memory", "crash", "hang", "outside"),
    *("input", "native", "elsewhere", "run"),
)
TARGETS = {action: _make_target(action) for action in _ACTIONS}

"""Targets for the fuzz harness that do what a reader must not: `TARGETS` by what, `Unread`.

They live apart from the tests, so that the processes which import them start quickly.
"""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from tests.fuzz.sandbox import Case, Target

ELSEWHERE = "/tmp/fuzz_evil"


def _act(word: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    actions = {
        "good": lambda: (out / "result").write_text("fine"),
        "refuse": lambda: int("refuse"),
        "key": lambda: {}["key"],
        "unicode": lambda: b"\xff".decode(),
        "exit": lambda: sys.exit(0),
        "memory": lambda: bytearray(2**30),
        "crash": os.abort,
        "hang": lambda: time.sleep(60),
        "beside": lambda: (out / "../../evil").write_text("evil"),
        "input": lambda: (folder / "file").write_text("other"),
        "native": lambda: np.zeros(3).tofile(str(out / "../evil")),
        "elsewhere": lambda: pathlib.Path(ELSEWHERE).write_text("evil"),
        "run": lambda: subprocess.run(["true"], check=True),
    }
    actions[word]()


class Broken(Target):
    """Does what its file says: "good" as a seed, then `word`."""

    seconds = 3.0
    memory_mb = 512
    word = "good"

    def __init__(self, folder):
        del folder

    def seeds(self):
        return [Case("broken", {"file": b"good"})]

    def mutate(self, rng, seed):
        del rng
        return Case(seed.kind, {"file": self.word.encode()})

    def read(self, kind, folder, out):
        _act((folder / "file").read_text(), folder, out)


class Unread(Broken):
    """Does not even read its own valid files."""

    def seeds(self):
        return [Case("broken", {"file": b"key"})]


def _target(word: str) -> type[Broken]:
    """A class that other processes can import by its name."""
    name = f"Broken_{word}"
    globals()[name] = type(name, (Broken,), {"word": word, "__module__": __name__})
    return globals()[name]


_WORDS = ("good", "refuse", "key", "unicode", "exit", "memory", "crash", "hang", "beside")
TARGETS = {word: _target(word) for word in (*_WORDS, "input", "native", "elsewhere", "run")}

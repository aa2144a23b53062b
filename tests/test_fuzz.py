"""The fuzz harness: its targets in short, and that nothing bad escapes it."""

import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from dualpath_jax.fuzz import harness, mutate, sandbox
from dualpath_jax.fuzz.sandbox import Case, Target
from dualpath_jax.fuzz.targets import SHARES, TARGETS

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUMBER = {"annotations": 200, "videos": 25}  # inputs of the short form; of the others 60


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TARGETS))
def test_short(name, tmp_path, monkeypatch):
    if name == "torch":
        pytest.importorskip("torch")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # it lies outside
    count = NUMBER.get(name, 60)
    row = harness.fuzz_target(name, TARGETS[name], 0, count, 1, tmp_path)
    assert row.findings == {}
    assert row.inputs == count == row.accepted + row.refused
    assert min(row.accepted, row.refused) >= 4  # damages are neither too weak nor too strong


# ---------------------------------------------------------------- what must be reported


class Broken(Target):
    """Does what a reader must not, by the first letter of the file."""

    seconds = 5.0
    memory_mb = 512

    def __init__(self, folder):
        del folder

    def seeds(self):
        return [Case("broken", {"file": b"good"})]

    def mutate(self, rng, seed):
        rng.random()
        return Case(seed.kind, {"file": self.content})

    content = b""

    def read(self, kind, folder, out):
        word = (folder / "file").read_text()
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
            "temporary": lambda: pathlib.Path("/tmp/fuzz_evil").write_text("evil"),
            "run": lambda: subprocess.run(["true"], check=True),
        }
        actions[word]()


def _broken(word):
    """A target that can be imported by its name in another process."""
    return globals()[f"Broken_{word}"]


WORDS = "good refuse key unicode exit memory crash hang beside input native temporary run".split()
for _word in WORDS:
    globals()[f"Broken_{_word}"] = type(
        f"Broken_{_word}", (Broken,), {"content": _word.encode(), "__module__": __name__}
    )


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("key", "KeyError: 'key'"),
        ("unicode", "UnicodeDecodeError"),
        ("exit", "SystemExit"),
        ("memory", "MemoryError"),
        ("crash", "the reading process died"),
        ("hang", "hangs: no answer within 5 s"),
        ("beside", "evil"),
        ("input", "changed outside the output folder"),
        ("native", "evil"),
        ("temporary", "opened for writing: '/tmp/fuzz_evil'"),
        ("run", "subprocess.Popen"),
    ],
)
def test_what_ends_badly_is_reported(word, text, tmp_path):
    row = harness.fuzz_target(word, _broken(word), 0, 1, 0, tmp_path)
    pathlib.Path("/tmp/fuzz_evil").unlink(missing_ok=True)
    assert (row.inputs, row.accepted, row.refused) == (1, 0, 0)
    assert text in row.findings[0]
    kept = tmp_path / f"{word}-0-0"
    assert (kept / "files/file").read_bytes() == word.encode()
    report = (kept / "finding.txt").read_text()
    assert report.startswith(f"python scripts/fuzz.py --targets {word} --seed=0 --only=0\n")
    assert text in report


def test_reading_goes_on_after_a_crash(tmp_path):
    row = harness.fuzz_target("crash", _broken("crash"), 0, 3, 0, tmp_path)
    assert list(row.findings) == [0, 1, 2]


@pytest.mark.parametrize(("word", "accepted", "refused"), [("good", 3, 0), ("refuse", 0, 3)])
def test_good_ends_are_no_findings(word, accepted, refused, tmp_path):
    row = harness.fuzz_target(word, _broken(word), 0, 3, 0, tmp_path)
    assert (row.accepted, row.refused, row.findings) == (accepted, refused, {})
    assert os.listdir(tmp_path) == []


class Unread(Broken):
    def seeds(self):
        return [Case("broken", {"file": b"key"})]


def test_seeds_must_be_read(tmp_path):
    with pytest.raises(ValueError, match="Unread does not read its own seeds(.|\n)*KeyError"):
        harness.fuzz_target("unread", Unread, 0, 1, 0, tmp_path)


# ---------------------------------------------------------------- damages, counting


def test_damages_follow_from_the_seed(tmp_path):
    target = TARGETS["annotations"](tmp_path)
    cases = [sandbox.case_of(target, 0, i) for i in range(200)]
    assert cases == [sandbox.case_of(target, 0, i) for i in range(200)]
    assert cases != [sandbox.case_of(target, 1, i) for i in range(200)]
    assert sum(case not in target.seeds() for case in cases) > 190


def test_mutations_are_bounded():
    rng, data = random.Random(0), bytes(range(256))
    sizes = [len(mutate.mutate_bytes(rng, data)) for _ in range(2000)]
    assert min(sizes) == 0
    assert max(sizes) < 5_000_000
    assert mutate.mutate_bytes(rng, b"") is not None


def test_shares():
    assert sum(SHARES.values()) == pytest.approx(1)
    counts = harness.divide(20_000, SHARES)
    assert sum(counts.values()) == 20_000
    assert counts["videos"] == 1500


def test_table():
    row = harness.Row("a", 1200, 1000, 199, {7: "bad"}, 12.4)
    assert harness.table([row, harness.Row("b", 1, 1)]).splitlines()[2:] == [
        "| a | 1,200 | 1,000 | 199 | 1 | 12 |",
        "| b | 1 | 1 | 0 | 0 | 0 |",
        "| total | 1,201 | 1,001 | 199 | 1 | 12 |",
    ]


def test_script(tmp_path):
    command = [sys.executable, ROOT / "scripts/fuzz.py", f"--findings={tmp_path}"]
    options = ["--targets", "annotations", "--inputs=40"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| target | inputs | accepted | refused with a named error |")
    done = subprocess.run([*command, "--targets", "x"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.startswith("error: unknown target 'x'")) == (2, True)

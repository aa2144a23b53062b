"""Tests short runs of the fuzzing targets, and that the harness finds every misbehavior."""

import os
import pathlib
import random
import runpy
import subprocess
import sys
import types

import pytest

from tests.fuzz import broken_targets, guided, harness, mutate, sandbox
from tests.fuzz.targets import SHARES, TARGETS

ROOT = pathlib.Path(__file__).resolve().parents[2]
INPUTS = {
    "annotations": 200,
    "backbones": 60,
    "torch": 40,
    "records": 40,
    "videos": 25,
    "workdirs": 60,
}


def _make_target(name, folder):
    folder.mkdir()
    return TARGETS[name](folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(INPUTS))
def test_short(name, tmp_path, monkeypatch):
    if name == "torch":
        pytest.importorskip("torch")
    monkeypatch.delenv(
        "JAX_COMPILATION_CACHE_DIR", raising=False
    )  # it is outside of the test's folder
    count, (one, other) = INPUTS[name], (tmp_path / "one", tmp_path / "other")
    findings_dir = tmp_path / "findings"
    cases = [
        [sandbox.make_case(target, 0, i) for i in range(20)]
        for target in (_make_target(name, one), _make_target(name, other))
    ]
    if name != "workdirs":  # orbax chooses names anew
        assert cases[0] == cases[1]  # independent of the target's instance
    report = harness.fuzz_target(name, TARGETS[name], 0, count, 1, findings_dir)
    assert report.findings == {}
    assert report.inputs == count == report.accepted + report.refused
    assert min(report.accepted, report.refused) >= 4  # damages are neither too weak nor too strong


# ---------------------------------------------------------------- findings


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("key", "KeyError: 'key'"),
        ("unicode", "UnicodeDecodeError"),
        ("exit", "SystemExit"),
        ("memory", "MemoryError"),
        ("crash", "the reading process died"),
        ("hang", "hangs: no answer within 3 s"),
        ("outside", "evil"),
        ("input", "changed outside the output folder"),
        ("native", "evil"),
        ("elsewhere", f"opened for writing: '{broken_targets.ELSEWHERE}'"),
        ("run", "subprocess.Popen"),
    ],
)
def test_forbidden_actions_are_findings(action, text, tmp_path):
    report = harness.fuzz_target(action, broken_targets.TARGETS[action], 0, 1, 0, tmp_path)
    pathlib.Path(broken_targets.ELSEWHERE).unlink(missing_ok=True)
    assert (report.inputs, report.accepted, report.refused) == (1, 0, 0)
    assert text in report.findings[0]
    folder = tmp_path / f"{action}-0-0"
    assert (folder / "files/file").read_bytes() == action.encode()
    description = (folder / "finding.txt").read_text()
    assert description.startswith(f"python scripts/fuzz.py --targets {action} --seed=0 --only=0\n")
    assert text in description


def test_reading_continues_after_a_crash(tmp_path):
    report = harness.fuzz_target("crash", broken_targets.TARGETS["crash"], 0, 3, 0, tmp_path)
    assert list(report.findings) == [0, 1, 2]


@pytest.mark.parametrize(("action", "accepted", "refused"), [("good", 3, 0), ("refuse", 0, 3)])
def test_allowed_outcomes_are_not_findings(action, accepted, refused, tmp_path):
    report = harness.fuzz_target(action, broken_targets.TARGETS[action], 0, 3, 0, tmp_path)
    assert (report.accepted, report.refused, report.findings) == (accepted, refused, {})
    assert os.listdir(tmp_path) == []


def test_a_run_ends_after_its_time(tmp_path):
    report = harness.fuzz_target("good", broken_targets.TARGETS["good"], 0, 10**9, 0, tmp_path, 0.0)
    assert (report.inputs, report.accepted) == (1, 1)


def test_seeds_must_be_read(tmp_path):
    with pytest.raises(ValueError, match="Unread does not read its own seeds(.|\n)*KeyError"):
        harness.fuzz_target("unread", broken_targets.Unread, 0, 1, 0, tmp_path)


# ---------------------------------------------------------------- guided by reached code


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("key", "KeyError: 'key'"),
        ("crash", "the reading process ended: crash"),
    ],
)
def test_guided_findings_are_repeated_by_their_genome(action, text, tmp_path):
    pytest.importorskip("atheris")
    target = broken_targets.TARGETS[action]
    report = guided.explore_target(action, target, 60, 0, tmp_path, 8.0)
    assert report.inputs >= report.accepted >= 1  # a genome without damages is a valid file
    genome, found = next(iter(report.findings.items()))
    assert text in found
    folder = tmp_path / f"{action}-0-{genome}"
    assert (folder / "files/file").read_bytes() == action.encode()
    command = f"python scripts/fuzz.py --targets {action} --genome={genome}\n"
    assert (folder / "finding.txt").read_text().startswith(command)
    again = harness.read_genome(action, target, bytes.fromhex(genome))
    assert list(again.findings) == [genome]


def test_guided_reading_ends_after_its_inputs(tmp_path):
    pytest.importorskip("atheris")
    report = guided.explore_target("good", broken_targets.TARGETS["good"], 40, 0, tmp_path, 60.0)
    assert (report.findings, report.refused) == ({}, 0)
    assert 40 <= report.inputs == report.accepted < 60


def test_genomes_choose_a_seed_and_its_damages(tmp_path):
    target = TARGETS["annotations"](tmp_path)
    assert sandbox.make_case_of_genome(target, b"") == target.seeds()[0]
    assert sandbox.make_case_of_genome(target, b"\2\0") == target.seeds()[2]
    once = target.mutate(random.Random(513), target.seeds()[2])
    assert sandbox.make_case_of_genome(target, b"\2\0\1\2") == once != target.seeds()[2]
    for number in range(300):  # damages of a file that lost its format
        genome = random.Random(number).randbytes(16)
        case = sandbox.make_case_of_genome(target, genome)
        assert case == sandbox.make_case_of_genome(target, genome)


# ---------------------------------------------------------------- damages, counting


def test_damages_follow_from_the_seed(tmp_path):
    target = TARGETS["annotations"](tmp_path)
    cases = [sandbox.make_case(target, 0, i) for i in range(200)]
    assert cases == [sandbox.make_case(target, 0, i) for i in range(200)]
    assert cases != [sandbox.make_case(target, 1, i) for i in range(200)]
    assert sum(case not in target.seeds() for case in cases) > 180


def test_mutations_are_bounded():
    rng, data = random.Random(0), bytes(range(256))
    sizes = [len(mutate.mutate_bytes(rng, data)) for _ in range(2000)]
    assert min(sizes) == 0
    assert max(sizes) < 5_000_000
    assert mutate.mutate_bytes(rng, b"") is not None


def test_shares():
    assert sum(SHARES.values()) == pytest.approx(1)
    counts = harness.share_inputs(20_000, SHARES)
    assert sum(counts.values()) == 20_000
    assert counts["videos"] == 1500
    assert counts["workdirs"] == 2000


def test_table():
    report = harness.TargetReport("a", 1200, 1000, 199, {7: "bad"}, 12.4)
    assert harness.format_table([report, harness.TargetReport("b", 1, 1)]).splitlines()[2:] == [
        "| a | 1,200 | 1,000 | 199 | 1 | 12 |",
        "| b | 1 | 1 | 0 | 0 | 0 |",
        "| total | 1,201 | 1,001 | 199 | 1 | 12 |",
    ]


@pytest.mark.slow
def test_script(tmp_path):
    script = ROOT / "scripts/fuzz.py"
    options = ["--targets", "checkpoints", "adapters", "--inputs=70", f"--findings={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, script, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| target | inputs | accepted | refused with a named error |")
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" checkpoints ", " 40 "],
        [" adapters ", " 30 "],
        [" total ", " 70 "],
    ]


def test_script_refuses_unknown_targets():
    fuzz = runpy.run_path(str(ROOT / "scripts/fuzz.py"))["fuzz"]
    with pytest.raises(ValueError, match="unknown target 'x': known are annotations, backbones"):
        fuzz(types.SimpleNamespace(targets=["x"]))
    with pytest.raises(ValueError, match="--only and --genome need one target"):
        fuzz(types.SimpleNamespace(targets=None, only=3))

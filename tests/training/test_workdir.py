"""The workdir: one program at a time, one that cannot be written, entries on a full disk."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import pytest
from etils import epath

from dualpath_jax.runtime import file_lock, files
from dualpath_jax.training import metrics_logger
from dualpath_jax.training.inputs import check_workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOLDING = """
import subprocess, sys, time
from dualpath_jax.runtime import file_lock
with file_lock.exclusive_lock(sys.argv[1], "--workdir"):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_dead_owner_holds_nothing(tmp_path):
    """Refused while the owner lives; not after kill -9, though a child of its own lives on."""
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(owner.stdout.readline())
    try:
        with (
            pytest.raises(ValueError, match=f"is in use by process {owner.pid} on "),
            file_lock.exclusive_lock(str(tmp_path), "--workdir"),
        ):
            pass
        owner.kill()
        assert owner.wait() == -signal.SIGKILL
        os.kill(child, 0)  # is there
        with file_lock.exclusive_lock(str(tmp_path), "--workdir"):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)


def test_read_only_workdir(tmp_path):
    """Root may write anywhere but on what is mounted read-only."""
    workdir = tmp_path / "workdir"
    workdir.mkdir(0o555)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(workdir)]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if os.access(workdir, os.W_OK):
            pytest.skip("root without the right to mount writes everywhere")
        with pytest.raises(OSError, match=f"cannot write to --workdir={workdir}.*another folder"):
            check_workdir(str(workdir))
    finally:
        if mounted:
            subprocess.run(["umount", str(workdir)], check=True)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = epath.Path(tmp_path / "config.json")
    files.write_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=rf"cannot write {path}.*make room there"):
            files.write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"


def test_entries_wait_for_room(tmp_path):
    """What was half written is taken back, and written whole when there is room."""
    reporter = metrics_logger.MetricsLogger(str(tmp_path), num_train_steps=9, batch_size=1)
    path = tmp_path / "metrics.jsonl"
    values = {"loss": 0.5, "learning_rate": 0.1}
    reporter.start(0)
    reporter.log_step(1, values)
    assert reporter.flush()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        for step in (2, 3):
            reporter.log_step(step, values)
            assert not reporter.flush()
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reporter.flush()
    reporter.log_step(4, values)
    reporter.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_first_step_is_not_timed(tmp_path, capsys):
    """It has its own line; twin: the next one is."""
    reporter = metrics_logger.MetricsLogger(str(tmp_path), num_train_steps=9, batch_size=1)
    values = {"loss": 0.5, "learning_rate": 0.1}
    reporter.start(0)
    reporter.log_first_step(1, values)
    reporter.log_step(1, values)
    reporter.log_step(2, values)
    reporter.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[0] == "step 1/9  loss 0.500  lr 1.00e-01"
    assert "clips/s" in lines[1]
    entries = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert ["clips_per_second" in entry for entry in entries] == [False, True]


def test_an_evaluation_of_the_split_that_is_trained_on_is_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [
        {"step": 3, "split": "train", "loss": 0.5},
        {"step": 3, "split": "train", "top1": 0.5},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    reporter = metrics_logger.MetricsLogger(str(tmp_path), num_train_steps=9, batch_size=1)
    reporter.resume(3, evaluated=True)
    assert len(path.read_text().splitlines()) == 2
    reporter.resume(3, evaluated=False)
    assert list(map(json.loads, path.read_text().splitlines())) == entries[:1]


def test_nothing_is_timed_by_a_clock_that_can_be_set():
    looks = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\b")
    for folder in ("dualpath_jax", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not looks.search(path.read_text()), path
    assert looks.search("start = time.time()")

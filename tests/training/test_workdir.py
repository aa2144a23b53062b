"""Checks the lock of a workdir, workdirs that cannot be written, and entries on a full disk."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath

from dualpath_jax import launch
from dualpath_jax.runtime import file_lock, files
from dualpath_jax.training import metrics_logger
from dualpath_jax.training.inputs import check_workdir, report_untrained_classes

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOLD_LOCK = """
import subprocess, sys, time
from dualpath_jax.runtime import file_lock
with file_lock.exclusive_lock(sys.argv[1], "--workdir"):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_lock_ends_with_its_owner(tmp_path):
    """Check that kill -9 of the owner releases the lock, although a child process stays alive."""
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path)]
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
        os.kill(child, 0)  # raises if the child is gone
        with file_lock.exclusive_lock(str(tmp_path), "--workdir"):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)


def test_each_split_is_claimed(config, tmp_path, monkeypatch):
    """Check that a run of all splits does not train where another program is at work."""
    folders = []

    def run_split(config, folder, *_):
        folders.append(folder)
        scores = dict.fromkeys(("top1", "top5", "mean_class_accuracy"), 0.5)
        return scores | {"split": folder, "num_videos": 4}

    monkeypatch.setattr(launch, "_run_split", run_split)
    config.data.split = "all"
    workdir, other = str(tmp_path), tmp_path / "split2"
    other.mkdir()
    with file_lock.exclusive_lock(str(other), "--workdir"):
        with pytest.raises(ValueError, match=f"--workdir={other} is in use by process"):
            launch.train_and_evaluate(config, workdir, training=True)
        assert folders == [f"{workdir}/split1"]
    launch.train_and_evaluate(config, workdir, training=True)
    assert folders[1:] == [f"{workdir}/split{number}" for number in (1, 2, 3)]


def test_classes_without_training_videos_are_named(capsys):
    names = ["hop", "jump", "run", "sit", "walk", "wave", "whirl"]
    everything = types.SimpleNamespace(labels=np.arange(7), class_names=names)
    report_untrained_classes(everything)
    assert capsys.readouterr().out == ""
    report_untrained_classes(types.SimpleNamespace(labels=np.array([2, 2]), class_names=names))
    line = "6 of 7 classes have no training video and cannot be learned: 'hop', 'jump', 'sit', "
    assert capsys.readouterr().out == line + "'walk', 'wave', ...\n"


def test_read_only_workdir(tmp_path):
    """Check the error; root can write everywhere except on a read-only mount."""
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


def test_a_failed_write_leaves_the_old_file(tmp_path):
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
    """Check that a partly written line is removed, and written again when there is room."""
    logger = metrics_logger.MetricsLogger(str(tmp_path), num_train_steps=9, batch_size=1)
    path = tmp_path / "metrics.jsonl"
    values = {"loss": 0.5, "learning_rate": 0.1}
    logger.start(0)
    logger.log_step(1, values)
    assert logger.flush()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        for step in (2, 3):
            logger.log_step(step, values)
            assert not logger.flush()
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert logger.flush()
    logger.log_step(4, values)
    logger.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_first_step_is_not_timed(tmp_path, capsys):
    """Check that its line and entry have no speed; twin: those of the second step have one."""
    logger = metrics_logger.MetricsLogger(str(tmp_path), num_train_steps=9, batch_size=1)
    values = {"loss": 0.5, "learning_rate": 0.1}
    logger.start(0)
    logger.log_first_step(1, values)
    logger.log_step(1, values)
    logger.log_step(2, values)
    logger.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[0] == "step 1/9  loss 0.500  lr 1.00e-01"
    assert "clips/s" in lines[1]
    entries = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert ["clips_per_second" in entry for entry in entries] == [False, True]


def test_evaluation_of_the_training_split_is_recognized(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [
        {"step": 3, "split": "train", "loss": 0.5},
        {"step": 3, "split": "train", "top1": 0.5},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    logger = metrics_logger.MetricsLogger(str(tmp_path), num_train_steps=9, batch_size=1)
    logger.resume(3, evaluated=True)
    assert len(path.read_text().splitlines()) == 2
    logger.resume(3, evaluated=False)
    assert list(map(json.loads, path.read_text().splitlines())) == entries[:1]


def reads_wall_clock(code):
    """Return whether code reads a clock that can be set, other than today's date."""
    code = code.replace("datetime.datetime.now(datetime.UTC).date()", "")
    return re.search(r"\btime\.time(_ns)?\(|\bdatetime\.|\bfrom datetime\b", code) is not None


def test_nothing_is_timed_by_the_wall_clock():
    for folder in ("dualpath_jax", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not reads_wall_clock(path.read_text()), path
    assert reads_wall_clock("start = time.time()")
    assert reads_wall_clock("start = datetime.datetime.now(datetime.UTC)")


def test_damaged_entries_of_metrics_are_left_out(tmp_path):
    good = json.dumps({"step": 5, "split": "train", "loss": 1.0}) + "\n"
    path = tmp_path / "metrics.jsonl"
    bad = b'[1]\n{"step": "5", "split": "a"}\n\xff\xfe\n{"step": 5\n' + b"[" * 100_000 + b"\n"
    path.write_bytes(bad + good.encode())
    metrics_logger.MetricsLogger(str(tmp_path), 5, 1).resume(5, evaluated=True)
    assert path.read_text() == good
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        metrics_logger.MetricsLogger(str(tmp_path), 5, 1).resume(5, evaluated=True)

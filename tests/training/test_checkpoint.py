"""Checks which checkpoints are kept, and what damage and a full disk do."""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from orbax.checkpoint._src.path.deleter import StandardCheckpointDeleter

from dualpath_jax.runtime import files
from dualpath_jax.training import checkpoint
from dualpath_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    UnreadableCheckpoint,
)
from tests.chaos import full_disk

METADATA = {
    "method": "dualpath",
    "backbone_name": "tiny",
    "backbone_sha256": "0" * 64,
    "class_names": ["a", "b"],
    "config": {"seed": 0},
}


def make_state(step):
    """Return a state that has a different value in every leaf at every step."""
    noise = jax.random.normal(jax.random.key(step), (64, 64))
    return {"step": jnp.asarray(step, jnp.int32), "trainable": {"kernel": noise}}


def save(checkpoints, step, top1=None):
    """Save the state of `step`, with scores if `top1` is given."""
    checkpoints.save(step, make_state(step), METADATA)
    if top1 is not None:
        checkpoints.add_scores(step, {"top1": top1})


def restore(workdir):
    """Return (step, state) of the newest checkpoint, or None."""
    checkpoints = Checkpoints(str(workdir))
    result = checkpoints.restore_newest(make_state(0), METADATA)
    checkpoints.close()
    return result


def is_state_of(state, step):
    """Return whether a state is that of `step`."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return a workdir with the checkpoints of steps 4 and 5."""
    workdir = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(str(workdir))
    save(checkpoints, 4)
    save(checkpoints, 5)
    checkpoints.close()
    return workdir


def test_newest_and_best_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    for step, top1 in ((1, 0.5), (2, None), (3, 0.2), (4, None), (5, None)):
        save(checkpoints, step, top1)
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [1, 4, 5]
    again = Checkpoints(str(tmp_path), keep=2)
    assert (again.best_step(), again.latest_step()) == (1, 5)
    save(again, 6, 0.6)
    save(again, 7)  # this deletes the checkpoint that was the best before
    again.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [6, 7]


def test_best_is_among_checkpoints_that_were_evaluated_like_the_newest(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=9)
    best = []
    for step, top1, split, views in (
        (1, 0.9, "validation", "16x1x1"),
        (2, 0.5, "validation", "16x1x1"),
        (3, 0.4, "test", "16x1x1"),
        (4, 0.6, "test", "16x3x1"),
        (5, 0.5, "test", "16x3x1"),
        (6, 0.7, "validation", "16x1x1"),
    ):
        save(checkpoints, step)
        checkpoints.add_scores(step, {"top1": top1, "split": split, "views": views})
        best.append(checkpoints.best_step())
    checkpoints.close()
    assert best == [1, 1, 3, 4, 4, 1]
    assert Checkpoints(str(tmp_path), read_only=True).best_step() == 1


def test_scores_of_an_older_version_belong_to_the_split_of_its_config(tmp_path):
    """Check scores without split and views, which that version did not save."""
    checkpoints = Checkpoints(str(tmp_path), keep=9)
    for step, top1 in ((1, 0.9), (2, 0.5)):
        save(checkpoints, step, top1)
    checkpoints.close()
    again = Checkpoints(str(tmp_path), keep=9)
    save(again, 3)
    origin = {"split": "validation", "views": "32x3x1"}  # the defaults
    again.add_scores(3, {"top1": 0.7} | origin)
    assert again.best_step() == 1
    save(again, 4)
    again.add_scores(4, {"top1": 0.6} | origin | {"split": "test"})
    assert again.best_step() == 4
    again.close()


def raise_full(*_, **__):
    """Raise the error of a full disk."""
    raise OSError(28, "No space left on device")


def test_scores_are_added_to_a_checkpoint(two, tmp_path, monkeypatch, caplog):
    """Check that the first scores stay, and that a full disk only costs the scores."""
    logging.use_absl_handler()
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.add_scores(7, {"top1": 0.9})  # there is no such checkpoint
    checkpoints.add_scores(4, {"top1": 0.5})
    checkpoints.add_scores(4, {"top1": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", raise_full)
        checkpoints.add_scores(5, {"top1": 0.9})
    assert "the scores of step 5 could not be saved: OSError: [Errno 28]" in caplog.text
    checkpoints.close()
    again = Checkpoints(str(tmp_path), read_only=True)
    assert [again.has_scores(step) for step in (4, 5, 7)] == [True, False, False]
    assert again.read_metadata(4)["scores"] == {"top1": 0.5}
    assert is_state_of(restore(tmp_path)[1], 5)


def test_a_step_is_saved_once(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(5, make_state(9), METADATA)
    checkpoints.close()
    assert is_state_of(restore(tmp_path)[1], 5)


def test_checkpoints_are_read(two):
    step, state = restore(two)
    assert step == 5
    assert is_state_of(state, 5)
    assert not is_state_of(state, 4)  # twin: another step
    leaves, metadata = Checkpoints(str(two), read_only=True).read(4)
    assert np.array_equal(leaves["trainable/kernel"], make_state(4)["trainable"]["kernel"])
    assert metadata["class_names"] == ["a", "b"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_checkpoint_is_never_restored(two, tmp_path, damage):
    """Check that damage to any file leads to step 5 as it was saved, or to step 4.

    In the second case the checkpoint of step 5 is moved.
    """
    rng = np.random.default_rng(0)
    names = sorted(p.relative_to(two) for p in (two / "checkpoints/5").rglob("*") if p.is_file())
    # Two files are always read: the metadata, and the file of the arrays.
    needed = {max(names, key=lambda name: (two / name).stat().st_size)}
    needed.add(pathlib.Path("checkpoints/5/metadata/metadata"))
    for number, name in enumerate(names):
        workdir = tmp_path / str(number)
        shutil.copytree(two, workdir)
        content = bytearray((workdir / name).read_bytes())
        if damage == "flip":
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (workdir / name).write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        if damage == "remove":
            (workdir / name).unlink()
        step, state = restore(workdir)
        assert is_state_of(state, step), name
        assert step == 4 if name in needed else step in (4, 5)
        assert (workdir / "damaged_checkpoints" / "5-0").exists() == (step == 4)
        assert (workdir / "checkpoints" / "5").exists() == (step == 5)
    assert needed <= set(names)


def test_an_old_checkpoint_that_cannot_be_deleted(tmp_path, monkeypatch, caplog):
    """Check that the new one is not lost, and that a warning is logged."""
    logging.use_absl_handler()
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    save(checkpoints, 1)
    checkpoints.wait()

    def raise_busy(*_):
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(StandardCheckpointDeleter, "delete_steps", raise_busy)
        save(checkpoints, 2)
        checkpoints.wait()
    assert "an old checkpoint could not be deleted: OSError: busy" in caplog.text
    assert "could not be written" not in caplog.text
    save(checkpoints, 3)
    checkpoints.close()
    step, state = restore(tmp_path)
    assert step == 3
    assert is_state_of(state, 3)


def test_damaged_values_are_noticed(two, tmp_path, monkeypatch):
    """Check the digests, which find damage that the storage format does not notice."""
    checkpoints = Checkpoints(str(two), read_only=True)
    saved = checkpoints.read_metadata(5)
    saved["leaves"]["trainable/kernel"]["sha256"] = "0" * 64
    monkeypatch.setattr(checkpoints, "read_metadata", lambda step: saved)
    with pytest.raises(DamagedCheckpoint, match="1 arrays differ, first trainable/kernel"):
        checkpoints.restore(5, make_state(0), METADATA)


def test_all_damaged(two, tmp_path, capsys):
    """Check that step 0 comes only on request, also when the command is repeated."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in (4, 5):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "metadata")
    for _ in range(2):
        with pytest.raises(ValueError, match="all checkpoints of .* are damaged.*--start_over"):
            restore(tmp_path)
        names = sorted(p.name for p in (tmp_path / "damaged_checkpoints").iterdir())
        assert names == ["4-0", "5-0"]
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.start_over()
    assert checkpoints.restore_newest(make_state(0), METADATA) is None
    old = tmp_path / "old_checkpoints" / "damaged_checkpoints-0"
    assert sorted(p.name for p in old.iterdir()) == ["4-0", "5-0"]
    save(checkpoints, 1)
    checkpoints.close()
    assert restore(tmp_path)[0] == 1
    checkpoints = Checkpoints(str(tmp_path))
    capsys.readouterr()
    checkpoints.start_over()
    assert capsys.readouterr().out.endswith("old_checkpoints/checkpoints-0\n")
    assert checkpoints.latest_step() is None
    assert (tmp_path / "old_checkpoints" / "checkpoints-0" / "1").exists()
    checkpoints.close()


UNREADABLE = {
    "permission": PermissionError(13, "Permission denied"),
    "a failing disk": OSError(5, "Input/output error"),
    "open files": ValueError("NOT_FOUND: opening x [OS error 24: EMFILE Too many open files]"),
    "memory": MemoryError(),
}


@pytest.mark.parametrize("error", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("part", ["StandardCheckpointHandler", "JsonCheckpointHandler"])
def test_unreadable_is_not_damaged(two, tmp_path, monkeypatch, error, part):
    """Check that no checkpoint is moved, and that the next command resumes from the newest."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(str(tmp_path))

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint.ocp, part), "restore", fail)
        with pytest.raises(UnreadableCheckpoint, match="checkpoints/5 cannot be read at present"):
            checkpoints.restore_newest(make_state(0), METADATA)
    checkpoints.close()
    assert not (tmp_path / "damaged_checkpoints").exists()
    assert restore(tmp_path)[0] == 5


def test_an_error_of_unknown_kind_is_judged_by_reading_the_files(two, tmp_path, monkeypatch):
    """Check both outcomes: a file that cannot be read is not damage, readable files are."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(str(tmp_path))

    def fail(*_, **__):
        raise RuntimeError("something")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", fail)
    with monkeypatch.context() as patch:
        patch.setattr(files, "check_readable", raise_full)
        with pytest.raises(UnreadableCheckpoint, match="OSError: .Errno 28"):
            checkpoints.restore(5, make_state(0), METADATA)
    with pytest.raises(DamagedCheckpoint, match="cannot be read: RuntimeError: something"):
        checkpoints.restore(5, make_state(0), METADATA)


def test_no_file_can_be_opened(two):
    """Reach the system's limit of open files; the twin reads the same checkpoint."""
    checkpoints = Checkpoints(str(two), read_only=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        with pytest.raises(UnreadableCheckpoint, match="Too many open files"):
            checkpoints.restore_newest(make_state(0), METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert checkpoints.restore_newest(make_state(0), METADATA)[0] == 5


def test_a_renamed_checkpoint_is_refused(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "5").rename(tmp_path / "checkpoints" / "9")
    with pytest.raises(DamagedCheckpoint, match="checkpoints/9 holds step 5: it was renamed"):
        Checkpoints(str(tmp_path), read_only=True).read_metadata(9)
    assert restore(tmp_path)[0] == 4


def test_a_save_that_is_skipped_is_reported(two, tmp_path, caplog):
    logging.use_absl_handler()
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(str(tmp_path))
    save(checkpoints, 3)
    with pytest.raises(OSError, match="the last checkpoint, of step 3, could not be written"):
        checkpoints.close()
    assert "step 3 could not be written: OSError: orbax did not save it" in caplog.text


def test_leftovers_of_a_killed_save_are_not_read(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    half = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "5" / "state", half / "state")
    assert restore(tmp_path)[0] == 5


def test_full_disk_costs_one_checkpoint(two, tmp_path, monkeypatch, caplog):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(str(tmp_path))
    logging.use_absl_handler()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", raise_full)
        save(checkpoints, 6)  # training continues
    assert "step 6 could not be written: OSError: [Errno 28]" in caplog.text
    assert f"the last good one is {tmp_path}/checkpoints/5" in caplog.text
    save(checkpoints, 7)
    checkpoints.close()
    assert restore(tmp_path)[0] == 7
    # Twin: at the end of a run it is an error, because no checkpoint follows.
    checkpoints = Checkpoints(str(tmp_path))
    monkeypatch.setattr(checkpoints._manager, "save", raise_full)
    save(checkpoints, 8)
    with pytest.raises(OSError, match=r"of step 8, could not be written.*checkpoints/7"):
        checkpoints.close()


@pytest.mark.parametrize("mount", [True, False])
def test_real_full_disk(tmp_path, mount, caplog):
    """Check that the kept checkpoint stays, and that failed saves leave no files."""
    logging.use_absl_handler()
    large = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)

    def make_large_state(step):
        return {"step": jnp.asarray(step, jnp.int32), "kernel": jnp.asarray(large * step)}

    def folders():
        return sorted(path.name for path in (disk.folder / "checkpoints").iterdir())

    with full_disk.LimitedDisk(tmp_path / "disk", mount) as disk:
        if mount and not disk.mounted:
            pytest.skip("no right to mount")
        checkpoints = Checkpoints(str(disk.folder), keep=1)
        checkpoints.save(1, make_large_state(1), METADATA)
        checkpoints.add_scores(1, {"top1": 0.5})
        with disk.full(os.getpid()):
            for step in (2, 3):
                checkpoints.save(step, make_large_state(step), METADATA)
                checkpoints.add_scores(step, {"top1": 0.9})
                assert (checkpoints.latest_step(), checkpoints.best_step()) == (1, 1)
                assert "1" in folders()
        assert "step 2 could not be written" in caplog.text
        assert f"the last good one is {disk.folder}/checkpoints/1" in caplog.text
        assert "Traceback" not in caplog.text
        checkpoints.save(4, make_large_state(4), METADATA)
        checkpoints.close()
        assert folders() == ["1", "4"]  # 1 as the best
        step, state = Checkpoints(str(disk.folder)).restore_newest(make_large_state(0), METADATA)
        assert step == 4
        assert np.array_equal(state["kernel"], make_large_state(4)["kernel"])


def test_jumping_clock_costs_only_the_checkpoints_of_that_time(tmp_path, monkeypatch):
    """Check that a clock that jumps by years at every reading ends neither run nor later saves.

    Orbax measures its time-outs by the wall clock and may give up a save then.
    """
    now, jump, start = time.time, np.random.default_rng(0), threading.Thread.start

    def start_daemon(thread):
        # Orbax's threads of a save that it gave up wait for years: the process must not join them.
        thread.daemon = True
        start(thread)

    checkpoints = Checkpoints(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + jump.uniform(-3e8, 3e8))
        patch.setattr(threading.Thread, "start", start_daemon)
        for step in (1, 2, 3):
            save(checkpoints, step)
        checkpoints.wait()
    save(checkpoints, 4)
    checkpoints.close()
    assert Checkpoints(str(tmp_path)).latest_step() == 4
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


SAVING = """
import sys
from tests.training.test_checkpoint import Checkpoints, METADATA, make_state
checkpoints, step = Checkpoints(sys.argv[1], keep=2), int(sys.argv[2])
while True:
    step += 1
    checkpoints.save(step, make_state(step), METADATA)
"""


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path):
    """Kill a real process (kill -9) several times while a half-written checkpoint is there."""
    step, num_incomplete = 0, 0
    for attempt in range(4):
        program = [sys.executable, "-c", SAVING, str(tmp_path), str(step)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(program, env=environment)
        folder, end = tmp_path / "checkpoints", time.monotonic() + 120

        def list_steps(folder=folder):
            return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]

        while max(list_steps(), default=0) < step + 2 or not list(folder.glob("*-tmp")):
            assert process.poll() is None
            assert time.monotonic() < end
        time.sleep(0.01 * attempt)  # at different stages of the save
        process.kill()
        assert process.wait() == -signal.SIGKILL
        num_incomplete += bool(list(folder.glob("*-tmp")))
        newest = max(list_steps())
        restored_step, state = restore(tmp_path)
        assert restored_step == newest > step
        assert is_state_of(state, restored_step)
        assert not list(folder.glob("*-tmp"))
        assert not (tmp_path / "damaged_checkpoints").exists()
        step = restored_step
    assert num_incomplete >= 1

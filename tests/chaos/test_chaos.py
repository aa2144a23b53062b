"""Tests the plan of faults, the simulated full disk, and the comparison of two runs.

CI runs scripts/chaos.py itself, as docs/interruptions.md shows it.
"""

import collections
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from dualpath_jax.data.video_dataset import UnreadableVideo, VideoDataset
from dualpath_jax.training.checkpoint import Checkpoints
from tests.chaos import chaos, same_run, training_fixture
from tests.chaos.full_disk import LARGEST_FILE, LimitedDisk
from tests.training.test_checkpoint import METADATA


def test_plan():
    plan = chaos.plan_faults(seed=0, count=23)
    assert plan == chaos.plan_faults(seed=0, count=23)
    assert plan != chaos.plan_faults(seed=1, count=23)
    counts = collections.Counter(kind for kind, _ in plan)
    assert set(counts) == set(chaos.FAULTS)
    assert set(counts.values()) == {1, 2}
    assert len(counts) == 16
    steps = [step for _, step in plan]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[-1] < chaos.num_steps(23) - 4 * chaos.STEPS_PER_FAULT


def write_finished_run(workdir: pathlib.Path, kernel: np.ndarray) -> None:
    """Write the workdir of a run that ended at step 2."""
    workdir.mkdir()
    checkpoints = Checkpoints(str(workdir))
    checkpoints.save(1, {"kernel": np.zeros_like(kernel)}, METADATA)
    checkpoints.save(2, {"kernel": kernel}, METADATA)
    checkpoints.close()
    lines = [{"step": i, "loss": 0.1 * i, "clips_per_second": 3.0} for i in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "results.json").write_text('{"top1": 0.5}')


def replace(path: pathlib.Path, old: str, new: str) -> None:
    """Replace `old`, which must be in the file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_every_difference_is_found(tmp_path):
    kernel = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    write_finished_run(tmp_path / "a", kernel)
    write_finished_run(tmp_path / "b", kernel)
    assert same_run.find_run_differences(tmp_path / "a", tmp_path / "b") == []

    def differences_after(change):
        shutil.copytree(tmp_path / "b", tmp_path / "c")
        change(tmp_path / "c")
        differences = same_run.find_run_differences(tmp_path / "a", tmp_path / "c")
        shutil.rmtree(tmp_path / "c")
        return differences

    metrics = "metrics.jsonl"
    assert differences_after(lambda w: replace(w / metrics, "3.0", "4.0")) == []  # only speed
    last_bit = json.dumps(np.nextafter(0.2, 1))
    for change, expected in (
        (lambda w: replace(w / metrics, "0.2", last_bit), ["entry of metrics.jsonl: 1"]),
        (lambda w: replace(w / metrics, "0.1", "NaN"), ["entry of metrics.jsonl: 0"]),
        (lambda w: (w / metrics).open("a").write('{"step": 3}\n'), ["entry of metrics.jsonl: 2"]),
        (lambda w: replace(w / "results.json", "0.5", "0.25"), ["results.json: top1"]),
        (lambda w: shutil.rmtree(w / "checkpoints" / "2"), ["checkpoint: kernel"]),
    ):
        assert differences_after(change) == expected
    # One changed parameter; another sign of zero; another type.
    kernel[0, 0] = 0.0
    write_finished_run(tmp_path / "d", kernel)
    assert same_run.find_run_differences(tmp_path / "a", tmp_path / "d") == ["checkpoint: kernel"]
    kernel[0, 0] = -0.0
    write_finished_run(tmp_path / "e", kernel)
    assert same_run.find_run_differences(tmp_path / "d", tmp_path / "e") == ["checkpoint: kernel"]
    write_finished_run(tmp_path / "f", kernel.astype(np.float16))
    assert same_run.find_run_differences(tmp_path / "e", tmp_path / "f") == ["checkpoint: kernel"]
    with pytest.raises(ValueError, match="no checkpoints in"):
        same_run.find_run_differences(tmp_path / "a", tmp_path / "nothing")


@pytest.mark.parametrize("mount", [True, False])
def test_full_disk(tmp_path, mount):
    with LimitedDisk(tmp_path / "disk", mount) as disk:
        if mount and not disk.mounted:
            pytest.skip("no privilege to mount")
        path = disk.folder / "file"
        with disk.full(os.getpid()), pytest.raises(OSError, match=r"No space|too large"):
            path.write_bytes(bytes(2 * LARGEST_FILE))
        path.write_bytes(bytes(2 * LARGEST_FILE))
    assert path.stat().st_size == 2 * LARGEST_FILE  # the file is still there
    assert [p.name for p in tmp_path.iterdir()] == ["disk"]


def test_damaged_videos(demo_data, tmp_path):
    shutil.copytree(demo_data, tmp_path / "data")
    training_fixture.TrainingFixture(tmp_path, 10).damage_videos((3, 8))
    dataset = VideoDataset(str(tmp_path / "data"), "train")
    unreadable = []
    for video in range(len(dataset)):
        try:
            dataset.read_frames(video, range(16))
        except UnreadableVideo:
            unreadable.append(video)
    assert unreadable == [3, 8]


def test_a_program_that_hangs_or_ends_is_detected(tmp_path, monkeypatch):
    def start(program):
        return training_fixture.TrainingProcess(
            [sys.executable, "-c", program], dict(os.environ), tmp_path / "log"
        )

    ended = start("print('step 7/9  loss 1'); raise SystemExit(3)")
    assert not ended.wait_for_first_step()
    assert (ended.last_step(), ended.wait_for_exit()) == (7, 3)
    monkeypatch.setattr(training_fixture, "PATIENCE", 1.0)
    hanging = start("import time; print('last words', flush=True); time.sleep(60)")
    with pytest.raises(
        training_fixture.ChaosError, match=r"(?s)has been hanging for 1 s.*last words"
    ):
        hanging.wait_for_first_step()
    hanging.kill()
    assert hanging.wait_for_exit() == -9

"""Loads, evaluates and resumes the files of version 0.1.0, see tests/data/version_0.1.0."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import dualpath_jax
from dualpath_jax import launch
from dualpath_jax.config.values import restore_config
from dualpath_jax.data import clip_assembly, frame_ops, randaugment

FILES = Path(__file__).parent / "data" / "version_0.1.0"
TOLERANCE = 1e-5  # between kinds of CPUs; on the same one the results are equal


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Copy the files to the current folder, because their configs name relative paths."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def read_config():
    """Return the configuration that the old run saved; JSON made lists of its tuples."""
    return restore_config(json.loads(Path("run/config.json").read_text()))


@pytest.mark.parametrize("path", ["run", "adapter.safetensors"])
def test_logits(files, path):
    del files
    model = dualpath_jax.load(path)
    assert model.step == 4
    with np.load("batch.npz") as arrays:
        batch = dict(arrays)
    expected = np.load("logits.npy")
    for video in range(4):
        clips = {key: batch[key][video : video + 1] for key in ("spatial", "temporal")}
        assert np.abs(model.logits(clips) - expected[video]).max() <= TOLERANCE
        assert np.abs(model.logits(clips) - expected[video - 1]).max() > TOLERANCE  # another video


@pytest.fixture
def old_cells(monkeypatch):
    """Make framesets as version 0.1.0 did: warped spatial frames were scaled to be their cells."""
    warp, spatial = randaugment.warp_frames, []

    def warp_frames(frames, matrix, fill):
        warped = warp(frames, matrix, fill)
        if frames.shape[0] == 2:  # the spatial frames, which come first
            spatial.append(warped)
            return warped
        small = frame_ops.resize(spatial.pop(), frames.shape[1])
        return tf.tensor_scatter_nd_update(warped, [[4], [12]], small)

    monkeypatch.setattr(randaugment, "warp_frames", warp_frames)
    monkeypatch.setattr(clip_assembly, "_traced", clip_assembly._traced.__wrapped__)


@pytest.mark.usefixtures("old_cells")
def test_old_run_is_evaluated_and_resumed(files):
    """Check the scores of step 4, and that training from the checkpoint of step 2 leads to it."""
    old = json.loads(Path("run/results.json").read_text())
    expected = dualpath_jax.load("run")
    config = read_config()
    launch.train_and_evaluate(config, "run", False)
    found = json.loads(Path("run/results.json").read_text())
    assert {key: found[key] for key in old} == old
    assert set(found) - set(old) == {"top1_interval"}

    shutil.rmtree("run/checkpoints/4")
    launch.train_and_evaluate(config, "run", True)
    steps = [
        json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 4]  # the last entry is the final score
    resumed = dualpath_jax.load("run")
    assert resumed.step == 4
    assert max_difference(resumed.params, expected.params) <= TOLERANCE
    shutil.copytree(files / "run", files / "longer")
    config.num_train_steps = 6
    config.resume_changed = True
    launch.train_and_evaluate(config, "longer", True)
    assert max_difference(dualpath_jax.load("longer").params, expected.params) > TOLERANCE


def max_difference(left, right):
    """Return the largest absolute difference between two parameter trees."""
    import jax

    differences = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), left, right
    )
    return max(jax.tree.leaves(differences))

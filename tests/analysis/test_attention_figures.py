"""Tests loading a trained model from its workdir, and the pictures of its attention."""

import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dualpath_jax.analysis import attention_figures, image_grid
from dualpath_jax.data import pipeline
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.inference import trained_model
from dualpath_jax.models import param_tree, preprocess
from dualpath_jax.training.checkpoint import Checkpoints
from tests.helpers.runs import build_run

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "visualize_attention.py"


@pytest.fixture
def run(config, tmp_path):
    """Return a run with one checkpoint, in which every trained parameter has changed."""
    dataset = VideoDataset(config.data.dir, "test")
    run = build_run(config, str(tmp_path / "run"), dataset)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + np.float32(0.1) * rng.normal(size=x.shape).astype(np.float32),
        run.state.trainable,
    )
    run.state = run.state.replace(trainable=moved)
    checkpoints = Checkpoints(run.workdir)
    checkpoints.save(3, run.state, run.metadata())
    checkpoints.close()
    return run


def test_loaded_model_and_clips_are_those_of_evaluation(run, config, demo_data):
    dataset = VideoDataset(demo_data, "test")
    video = demo_data.parent / "raw" / "videos" / f"{dataset.ids[0]}.mp4"
    model = trained_model.load(run.workdir)
    assert (model.step, model.class_names) == (3, dataset.class_names)
    clips = model.clips(video)
    expected = next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 1))
    for path in ("spatial", "temporal"):
        assert np.array_equal(clips[path], expected[path])
    flat = {key: clips[key][:, 0] for key in ("spatial", "temporal")}
    inputs = preprocess.model_inputs(flat, config.data, np.float32)
    apply = jax.jit(run.model.apply)
    trained_params = jax.device_get(param_tree.merge(run.state.trainable, run.frozen))
    untrained = trained_params | {"spatial": dict(trained_params["spatial"])}
    untrained["spatial"]["adapters"] = jax.tree.map(
        lambda x: 0 * x, trained_params["spatial"]["adapters"]
    )
    own = apply({"params": model.params}, *inputs)
    np.testing.assert_allclose(own, apply({"params": trained_params}, *inputs), atol=1e-5)
    assert np.abs(own - apply({"params": untrained}, *inputs)).max() > 1e-3


def test_errors_name_missing_files(run, tmp_path):
    with pytest.raises(ValueError, match="no checkpoints in .*nowhere: pass the --workdir"):
        trained_model.load(str(tmp_path / "nowhere"))
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no checkpoint yet in .*begun"):
        trained_model.load(str(tmp_path / "begun"))
    with pytest.raises(FileNotFoundError, match="other.safetensors"):
        trained_model.load(run.workdir, backbone=str(tmp_path / "other.safetensors"))


def test_overlay_heatmap():
    """Check that the image is gray without attention and has one red where it is hottest."""
    image = np.full((8, 8, 3), (200, 100, 0), np.uint8)
    cold = image_grid.overlay_heatmap(image, np.zeros((2, 2)), 1.0)
    assert np.array_equal(cold, np.full((8, 8, 3), 100))
    attention = np.zeros((8, 8))
    attention[4:, 4:] = 0.5
    hot = image_grid.overlay_heatmap(image, attention, 0.5)
    assert np.array_equal(hot[:4], cold[:4])
    assert np.array_equal(np.unique(hot[4:, 4:].reshape(-1, 3), axis=0), [(216, 25, 25)])


def test_maps_are_smooth_within_frames_and_never_reach_the_next_one():
    patch = np.zeros((1, 16, 16))
    patch[0, 4:8, 4:8] = 1 / 16  # the last patch of the upper left frame
    view = attention_figures.ClipAttention(
        {"temporal": np.zeros((1, 16, 16, 3), np.uint8)},
        {"with adaptation": {"temporal": patch}},
        (2, 2),
        4,
        4,
    )
    frameset = view.draw_overlays("temporal", "with adaptation", (16, 16))[0]
    assert not frameset[8:].any()  # the lower frames are as they were
    assert not frameset[:, 8:].any()
    steps = np.abs(np.diff(frameset[:8, :8].astype(int), axis=0)).max()
    assert frameset[7, 7].tolist() == [191, 0, 0]
    assert 0 < steps < 120  # patches without smoothing have a step of 191
    assert view.split_framesets().grid == (1, 1)


def test_script_draws_each_video_and_names_bad_ones(run, demo_data, tmp_path, monkeypatch, capsys):
    video = str(demo_data.parent / "raw" / "videos" / "48.mp4")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    out = tmp_path / "out"
    arguments = ["x", f"--workdir={run.workdir}", f"--out={out}", video, str(bad), video]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 1
    assert f"error: {bad}: cannot be opened as a video" in capsys.readouterr().err
    names = ["48-2.gif", "48-2.png", "48.gif", "48.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with Image.open(out / "48.gif") as animation:
        assert animation.n_frames == 16


def test_split_framesets_has_every_frame_without_and_with_adaptation(run, demo_data):
    model = trained_model.load(run.workdir)
    clips = model.clips(demo_data.parent / "raw" / "videos" / "48.mp4")
    view = attention_figures.analyze_clip(
        model, {k: clips[k][:, 0] for k in ("spatial", "temporal")}
    )
    split = view.split_framesets()
    assert split.images["temporal"].shape == (16, 8, 8, 3)
    for kind in ("without adaptation", "with adaptation"):
        assert split.maps[kind]["temporal"].shape == (16, 8, 8)
        np.testing.assert_allclose(split.maps[kind]["temporal"].sum(), 1, atol=1e-5)
        np.testing.assert_allclose(view.maps[kind]["spatial"].sum((-2, -1)), 1, atol=1e-5)
    without, adapted = (maps["temporal"] for maps in view.maps.values())
    assert np.abs(without - adapted).max() > 1e-4

"""A trained model on files: as evaluation sees them, in windows, bad ones among good ones."""

import json
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest
from video_files import write_video

import dualpath_jax as dp
from dualpath_jax import evaluate, predict, windows
from dualpath_jax import params as params_lib
from dualpath_jax import run as run_lib
from dualpath_jax.checkpoint import Checkpoints
from dualpath_jax.data import decode, pipeline
from dualpath_jax.data.records import VideoDataset
from scripts import export_adapter

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "predict.py"


@pytest.fixture
def run(config, tmp_path):
    """A run with one checkpoint, whose trained parameters are nowhere those of the start."""
    config.model.scan_blocks = False
    config.eval.temporal_views = 2
    dataset = VideoDataset(config.data.dir, "test")
    run = run_lib.build_run(config, str(tmp_path / "run"), dataset)
    moved = jax.tree.map(lambda x: x + 0.05, run.state.trainable)
    run.state = run.state.replace(trainable=moved)
    checkpoints = Checkpoints(run.workdir)
    checkpoints.save(3, run.state, run.metadata())
    checkpoints.close()
    return run


@pytest.fixture
def video(demo_data):
    """The second test video, as a file."""
    dataset = VideoDataset(demo_data, "test")
    return demo_data.parent / "raw" / "videos" / f"{dataset.ids[1]}.mp4"


def command(monkeypatch, capsys, *arguments):
    """(status, lines printed, errors) of the script."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    return end.value.code, out.splitlines(), err


def test_as_in_evaluation(run, config, video, tmp_path):
    dataset = VideoDataset(config.data.dir, "test")
    batches = pipeline.eval_batches(dataset, config.data, 2, 1, batch_size=1)
    next(batches)
    params = jax.device_get(params_lib.merge(run.state.trainable, run.frozen))
    batch = next(batches)
    step = jax.jit(lambda params, batch: evaluate.view_logits(run.model, config, params, batch))
    want = step(params, {key: batch[key] for key in ("spatial", "temporal")})
    sums = evaluate.eval_step_sums(want, batch["label"], batch["mask"])
    model = dp.load(run.workdir)
    found = model.predict(video)
    logits = model.logits(model.clips(video))
    assert logits.shape == (2, 8)
    np.testing.assert_allclose(logits, want[0], rtol=0, atol=1e-5)
    hit = found.class_names[0] == dataset.class_names[dataset.labels[1]]
    assert int(sums["top1"]) == int(hit)
    probabilities = np.asarray(jax.nn.softmax(want[0])).mean(axis=0)
    np.testing.assert_allclose(found.probabilities, -np.sort(-probabilities)[:5], atol=1e-6)
    assert np.abs(model.logits(next(batches))[0] - logits[0]).max() > 1e-3  # another video
    # An adapter file gives the same; without its backbone an error that names it.
    file = str(tmp_path / "mine.safetensors")
    export_adapter.export(run.workdir, file, "latest")
    assert dp.load(file, backbone=config.backbone.checkpoint).predict(video) == found
    with pytest.raises(ValueError, match="no checkpoint evaluated during training"):
        dp.load(run.workdir, checkpoint="best")
    with pytest.raises(ValueError, match="no checkpoints in nowhere"):
        dp.load("nowhere")
    with pytest.raises(AttributeError, match="no attribute 'save'"):
        _ = dp.save


def test_command(run, video, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(video.read_bytes())
    (folder / "b.mp4").write_bytes(b"not a video")
    (folder / "notes.txt").write_text("no video")
    out = tmp_path / "features.npz"
    arguments = ("--workdir", run.workdir, folder, "--top_k=2", "--json", "--features", out)
    status, lines, _ = command(monkeypatch, capsys, *arguments)
    good, bad = map(json.loads, lines)
    assert status == 1
    assert (len(good["class_names"]), good["note"]) == (2, "")
    assert good["probabilities"] == sorted(good["probabilities"], reverse=True)
    assert (bad["class_names"], bad["video"]) == ([], str(folder / "b.mp4"))
    assert "not a video" in bad["note"] or bad["note"]
    saved = np.load(out)
    assert saved["video"].tolist() == [str(folder / "a.mp4")]
    assert {k: saved[k].shape for k in ("y_SP", "y_TP", "logits")} == {
        "y_SP": (1, 2, 64),
        "y_TP": (1, 2, 64),
        "logits": (1, 2, 8),
    }
    model = dp.load(run.workdir)
    clips = model.clips(folder / "a.mp4")
    joined = np.concatenate([saved["y_SP"][0], saved["y_TP"][0]], axis=-1)
    head = model.module.apply({"params": model.params}, joined, method=lambda m, y: m.classifier(y))
    np.testing.assert_allclose(head, model.logits(clips), rtol=0, atol=1e-5)
    status, lines, _ = command(monkeypatch, capsys, "--workdir", run.workdir, folder / "a.mp4")
    assert (status, len(lines)) == (0, 1)
    assert f"{good['probabilities'][0]:.3f} {good['class_names'][0]}" in lines[0]
    for extra, message in (
        (["nowhere.mp4"], "no video or folder 'nowhere.mp4'"),
        ([folder, "--top_k=0"], "--top_k=0 must be at least 1"),
        ([folder, "--stride=1"], "--stride=1 needs --window"),
        ([folder, "--features=x.txt"], "--features='x.txt' must end with .npz"),
    ):
        status, _, err = command(monkeypatch, capsys, "--workdir", run.workdir, *extra)
        assert status == 2
        assert f"error: {message}" in err


def test_windows_of_a_long_video(tmp_path):
    path = str(tmp_path / "long.mp4")
    frames = [np.full((32, 48, 3), 5 * i, np.uint8) for i in range(45)]
    write_video(path, frames, rate=10)
    found = list(windows.windows(path, 2.0, 1.0, 256, 90))
    assert [(w.start, w.end) for w in found] == [(0, 2), (1, 3), (2, 4), (2.5, 4.5)]
    assert [len(w.jpegs) for w in found] == [20] * 4
    whole, _ = decode.video_to_jpegs(path, 256, 90, decode.DecodeLimits())
    assert [w.jpegs for w in found] == [whole[s : s + 20] for s in (0, 10, 20, 25)]
    assert found[0].jpegs != found[1].jpegs
    assert [(w.start, w.end) for w in windows.windows(path, 9, 4, 256, 90)] == [(0, 4.5)]
    gaps = [(w.start, w.end) for w in windows.windows(path, 1, 2, 256, 90)]
    assert gaps == [(0, 1), (2, 3), (3.5, 4.5)]
    with pytest.raises(ValueError, match="--window=0 and --stride=1 must be above 0"):
        list(windows.windows(path, 0, 1, 256, 90))


def test_windows_command(run, video, monkeypatch, capsys):
    arguments = ("--workdir", run.workdir, video, "--window=1", "--json")
    status, lines, _ = command(monkeypatch, capsys, *arguments)
    found = [json.loads(text) for text in lines]
    assert status == 0
    assert found[0]["start"] == 0
    assert found[0]["end"] == 1
    assert all(one["class_names"] for one in found)


def test_find_videos(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.MP4", "a.avi", "sub/c.webm", "x.jpg"):
        (tmp_path / name).write_text("")
    found = [pathlib.Path(p).name for p in predict.find_videos([str(tmp_path)])]
    assert sorted(found) == ["a.avi", "b.MP4", "c.webm"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no videos in .*empty"):
        predict.find_videos([str(tmp_path / "empty")])

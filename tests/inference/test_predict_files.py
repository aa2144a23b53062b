"""Tests predictions on video files: as in evaluation, in windows, and with bad files."""

import copy
import dataclasses
import errno
import fractions
import io
import json
import os
import pathlib
import runpy
import sys

import av
import jax
import numpy as np
import pytest
from PIL import Image

import dualpath_jax as dp
from dualpath_jax import cli, evaluate
from dualpath_jax.analysis import image_grid, prediction_figures
from dualpath_jax.commands import export_adapter
from dualpath_jax.data import pipeline
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.data.preparation import video_decoder
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.data.video_source import FrameFormat
from dualpath_jax.inference import predict_files, sliding_windows, trained_model
from dualpath_jax.models import param_tree
from dualpath_jax.models.forward import view_logits
from dualpath_jax.runtime import files
from dualpath_jax.training import adapter_file
from dualpath_jax.training.checkpoint import Checkpoints
from tests.helpers.runs import build_run
from tests.helpers.video_files import decode_windows_then_fail, noise_frames, write_video

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "predict.py"
FORMAT = FrameFormat()


@pytest.fixture
def run(config, tmp_path):
    """Return a run with one checkpoint, whose trained parameters all differ from the start."""
    config.model.scan_blocks = False
    config.eval.temporal_views = 2
    dataset = VideoDataset(config.data.dir, "test")
    run = build_run(config, str(tmp_path / "run"), dataset)
    moved = jax.tree.map(lambda x: x + 0.05, run.state.trainable)
    run.state = run.state.replace(trainable=moved)
    checkpoints = Checkpoints(run.workdir)
    checkpoints.save(3, run.state, run.metadata())
    checkpoints.close()
    return run


@pytest.fixture
def video(demo_data):
    """Return the file of the second test video."""
    dataset = VideoDataset(demo_data, "test")
    return demo_data.parent / "raw" / "videos" / f"{dataset.ids[1]}.mp4"


def run_script(monkeypatch, capsys, *arguments):
    """Run scripts/predict.py; return (exit status, lines of output, errors)."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    return end.value.code, out.splitlines(), err


def test_predictions_match_evaluation(run, config, video, tmp_path):
    """Check clips, logits and probabilities against the pipeline and step of evaluation."""
    dataset = VideoDataset(config.data.dir, "test")
    batches = pipeline.eval_batches(dataset, config.data, Views(2, 1), batch_size=1)
    next(batches)
    params = jax.device_get(param_tree.merge(run.state.trainable, run.frozen))
    batch = next(batches)
    step = jax.jit(lambda params, batch: view_logits(run.model, config, params, batch))
    want = step(params, {key: batch[key] for key in ("spatial", "temporal")})
    sums = evaluate.eval_step_sums(want, batch["label"], batch["mask"])
    model = dp.load(run.workdir)
    prediction = model.predict(video)
    clips = model.clips(video)
    logits = model.logits(clips)
    for path in ("spatial", "temporal"):
        assert np.array_equal(clips[path], batch[path])
    assert logits.shape == (2, 8)
    np.testing.assert_allclose(logits, want[0], rtol=0, atol=1e-5)
    correct = prediction.class_names[0] == dataset.class_names[dataset.labels[1]]
    assert int(sums["top1"]) == int(correct)
    probabilities = np.asarray(jax.nn.softmax(want[0])).mean(axis=0)
    np.testing.assert_allclose(prediction.probabilities, -np.sort(-probabilities)[:5], atol=1e-6)
    other = next(batches)  # another video
    assert np.abs(model.logits(other)[0] - logits[0]).max() > 1e-3
    assert not np.array_equal(clips["spatial"], other["spatial"])
    # An adapter file gives the same prediction.
    file = str(tmp_path / "mine.safetensors")
    export_adapter.export(run.workdir, file, "latest")
    assert dp.load(file, backbone=config.backbone.checkpoint).predict(video) == prediction
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(video_decoder.VideoError, match="bad.mp4: cannot be opened as a video"):
        model.predict(tmp_path / "bad.mp4")
    assert model.predict(video) == prediction  # a bad file changes nothing
    # A folder with the frames of the video is the same video.
    frames = video_decoder.decode_frames(str(video), video_decoder.DecodeLimits())
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"img_{number}.png")
    assert model.predict(tmp_path / "frames") == prediction
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
    status, lines, _ = run_script(monkeypatch, capsys, *arguments)
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
    status, lines, _ = run_script(monkeypatch, capsys, "--workdir", run.workdir, folder / "a.mp4")
    assert (status, len(lines)) == (0, 1)
    assert f"{good['probabilities'][0]:.3f} {good['class_names'][0]}" in lines[0]
    for extra, message in (
        (["nowhere.mp4"], "there is no video or folder 'nowhere.mp4'"),
        ([folder, "--top_k=0"], "--top_k=0 must be at least 1"),
        ([folder, "--stride=1"], "--stride=1 needs --window"),
        ([folder, "--features=no/x.npz"], "--features=no/x.npz: there is no folder no; make it"),
        ([folder, "--features=x.txt"], "--features='x.txt' must end with .npz"),
        ([folder, "--window=nan"], "--window=nan must be a number of seconds above 0"),
        ([folder, "--window=0"], "--window=0 must be a number of seconds above 0"),
        ([folder, "--window=1", "--stride=-1"], "--stride=-1 must be a number of seconds above 0"),
    ):
        status, _, err = run_script(monkeypatch, capsys, "--workdir", run.workdir, *extra)
        assert status == 2
        assert f"error: {message}" in err


@pytest.mark.parametrize("json_", [True, False])
def test_a_file_name_that_is_not_utf8_is_printed(json_, monkeypatch):
    def predict_two_videos(model, videos, show, **_):
        for name in ("a_Turn\udce9.mp4", "b.mp4"):
            show(predict_files.VideoResult(name, ["run"], [0.5]))
        return 0

    monkeypatch.setattr(predict_files, "predict_videos", predict_two_videos)
    monkeypatch.setattr(predict_files, "find_videos", list)
    monkeypatch.setattr(cli, "load_model", lambda arguments: None)
    monkeypatch.setattr(sys, "argv", ["predict.py", "--workdir=x", "y", *(["--json"] * json_)])
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", errors="strict"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    lines = printed.getvalue().splitlines()
    assert (b"\\udce9" if json_ else b"a_Turn\xe9.mp4") in lines[0]
    assert b"b.mp4" in lines[1]


def test_windows_of_a_long_video(tmp_path):
    path = str(tmp_path / "long.mp4")
    frames = [np.full((32, 48, 3), 5 * i, np.uint8) for i in range(45)]
    write_video(path, frames, rate=10)
    found = list(sliding_windows.decode_windows(path, 2.0, 1.0, FORMAT))
    assert [(w.start, w.end) for w in found] == [(0, 2), (1, 3), (2, 4), (3, 4.5)]
    assert [len(w.jpegs) for w in found] == [20, 20, 20, 15]
    whole, _ = video_decoder.video_to_jpegs(path, 256, 90, video_decoder.DecodeLimits())
    assert [w.jpegs for w in found] == [whole[s : s + 20] for s in (0, 10, 20, 30)]
    assert found[0].jpegs != found[1].jpegs
    assert [(w.start, w.end) for w in sliding_windows.decode_windows(path, 9, 4, FORMAT)] == [
        (0, 4.5)
    ]
    gaps = [(w.start, w.end) for w in sliding_windows.decode_windows(path, 1, 2, FORMAT)]
    assert gaps == [(0, 1), (2, 3), (4, 4.5)]
    # Too little is left for a window of its own: the last one begins earlier.
    late = list(sliding_windows.decode_windows(path, 2.0, 2.2, FORMAT))
    assert [(w.start, w.end) for w in late] == [(0, 2), (2.2, 4.2), (2.5, 4.5)]
    assert late[-1].jpegs == whole[25:]
    single = list(sliding_windows.decode_windows(path, 0.001, 0.001, FORMAT))  # one frame each
    assert [len(w.jpegs) for w in single] == [1] * 45
    assert [w.jpegs[0] for w in single] == whole
    for seconds, stride, message in (
        (0, 1, "--window=0 must be a number of seconds above 0"),
        (1, -1, "--stride=-1 must be"),
        (float("nan"), 1, "--window=nan must be"),
        (float("inf"), 1, "--window=inf must be"),
    ):
        with pytest.raises(ValueError, match=message):
            list(sliding_windows.decode_windows(path, seconds, stride, FORMAT))


def test_windows_of_a_video_whose_rate_changes(tmp_path):
    """Check windows by time stamps: 10 frames a second, then 2, then none for 5 seconds."""
    path = str(tmp_path / "phone.mkv")
    times = [*(0.1 * i for i in range(20)), *(2 + 0.5 * i for i in range(8)), 11.0, 11.5]
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 8 * i, np.uint8))
            frame.pts, frame.time_base = round(1000 * time), fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = list(sliding_windows.decode_windows(path, 2.0, 2.0, FORMAT))
    assert [(w.start, len(w.jpegs)) for w in found] == [(0, 20), (2, 4), (4, 4), (10, 2)]
    assert found[-1].end == pytest.approx(11.6, abs=0.45)
    whole, _ = video_decoder.video_to_jpegs(path, 256, 90, video_decoder.DecodeLimits())
    assert [jpeg for window in found for jpeg in window.jpegs] == whole


def test_frames_have_the_format_of_the_training_data(run, config, tmp_path):
    """Check a model of data prepared with `--fps` and `--short_side`, and its adapter file."""
    path = str(tmp_path / "fast.mp4")
    write_video(path, [np.full((64, 96, 3), 3 * i, np.uint8) for i in range(60)], rate=30)
    frame_format = FrameFormat(48, 70, 10.0)
    run.experiment = dataclasses.replace(run.experiment, frame_format=frame_format)
    assert run.metadata()["frame_format"] == {"short_side": 48, "quality": 70, "fps": 10.0}
    checkpoints = Checkpoints(run.workdir)
    checkpoints.save(4, run.state, run.metadata())
    checkpoints.close()
    file = str(tmp_path / "a.safetensors")
    export_adapter.export(run.workdir, file, "latest")
    jpegs, info = video_decoder.video_to_jpegs(path, 48, 70, video_decoder.DecodeLimits(), 10.0)
    assert (len(jpegs), info.height) == (20, 48)
    backbone = config.backbone.checkpoint
    for model in (dp.load(run.workdir), dp.load(file, backbone=backbone)):
        assert model.frame_format == run.frame_format
        frames = trained_model.SingleVideo(jpegs, info.height, info.width, "x", model.class_names)
        want, clips = model.clips_from_frames(frames), model.clips(path)
        np.testing.assert_array_equal(clips["spatial"], want["spatial"])
        usual = dataclasses.replace(model, frame_format=FORMAT).clips(path)
        assert not np.array_equal(usual["spatial"], want["spatial"])
        for window in (None, 2.0):
            results = []
            predict_files.predict_videos(model, [path], results.append, window=window)
            expected = trained_model.Prediction.from_logits(
                model.logits(want), model.class_names, 5
            )
            assert [result.probabilities for result in results] == [expected.probabilities]
    (window,) = sliding_windows.decode_windows(path, 2.0, 1.0, run.frame_format)
    assert window.jpegs == jpegs


def test_windows_of_a_cut_video(tmp_path):
    """Check that the last window notes what is missing and ends where the video ends."""
    path = tmp_path / "cut.mp4"
    options = {"movflags": "frag_keyframe+empty_moov"}
    write_video(path, noise_frames(40), rate=10, options=options, gop=5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = list(sliding_windows.decode_windows(str(path), 1, 1, FORMAT))
    whole, info = video_decoder.video_to_jpegs(str(path), 256, 90, video_decoder.DecodeLimits())
    assert 20 <= len(whole) < 40
    assert info.truncated
    assert [w.note for w in found] == [""] * (len(found) - 1) + [info.truncated]
    assert [jpeg for window in found for jpeg in window.jpegs] == whole
    assert 0 < len(found[-1].jpegs) <= 10


def test_windows_command(run, video, tmp_path, monkeypatch, capsys):
    arguments = ("--workdir", run.workdir, video, "--window=1", "--json")
    arguments += (f"--pictures={tmp_path / 'pictures'}",)
    status, lines, _ = run_script(monkeypatch, capsys, *arguments)
    results = [json.loads(text) for text in lines]
    assert status == 0
    assert results[0]["start"] == 0
    assert results[0]["end"] == 1
    assert all(result["class_names"] for result in results)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [f"{video.stem}.png"]
    # A single window gives the same result, although clips are made ahead of the model.
    model = dp.load(run.workdir)
    for result, window in zip(
        results, sliding_windows.decode_windows(str(video), 1, 0.5, FORMAT), strict=True
    ):
        frames = trained_model.SingleVideo(
            window.jpegs, window.height, window.width, "x", model.class_names
        )
        logits = model.logits(model.clips_from_frames(frames))
        expected = trained_model.Prediction.from_logits(logits, model.class_names, 5)
        assert result["class_names"] == expected.class_names
        assert result["probabilities"] == expected.probabilities


def test_windows_that_hang_or_crash_the_decoder(run, tmp_path, monkeypatch):
    """Check that earlier windows are kept and that the next video is predicted."""
    names = ("crash.mp4", "hang.mp4", "good.mp4")
    videos = [write_video(tmp_path / name, 40) for name in names]
    monkeypatch.setattr(predict_files.sliding_windows, "decode_windows", decode_windows_then_fail)
    shown, limits = [], video_decoder.DecodeLimits(seconds=2)
    model = dp.load(run.workdir)
    assert predict_files.predict_videos(model, videos, shown.append, window=1, limits=limits) == 2
    summary = [(pathlib.Path(r.video).name, r.start, bool(r.class_names), r.note) for r in shown]
    assert summary == [
        *[("crash.mp4", start, True, "") for start in (0, 0.5)],
        ("crash.mp4", None, False, "the decoding process crashed (signal 11)"),
        *[("hang.mp4", start, True, "") for start in (0, 0.5)],
        ("hang.mp4", None, False, "took longer than 2 s"),
        *[("good.mp4", start / 2, True, "") for start in range(7)],
    ]


def changed_adapters(leaves, metadata):
    """Return adapter files that do not fit: case -> (leaves, metadata, message)."""
    name = "spatial/class_token"
    other = copy.deepcopy(metadata)
    other["config"]["model"]["method"] = "linear"
    nothing = copy.deepcopy(metadata)
    nothing["config"]["backbone"]["name"] = "resnet"
    cases = {
        "lacks": (
            {k: v for k, v in leaves.items() if k != name},
            metadata,
            f"has no {name}, its config builds {name} of shape",
        ),
        "shape": (leaves | {name: leaves[name][..., :3]}, metadata, f"has {name} of shape"),
        "values": (leaves | {name: leaves[name] * np.nan}, metadata, f"damaged: {name} has values"),
        "more": (leaves | {"x/y": leaves[name]}, metadata, "its config builds no x/y"),
        "method": (leaves, other, "its config builds no classifier/hidden/bias"),
        "config": (leaves, nothing, "its config builds no model (.*resnet"),
    }
    for number, (key, value, message) in enumerate(
        (
            ("data.num_frames", 2**24, "num_frames=16777216 must be in"),
            ("data.num_frames", 4096, "its clips have .* numbers of positions"),
            ("backbone.depth", 4000, "depth=4000 must be in"),
            ("backbone.heads", 0, "heads=0 must be in"),
            ("data.frame_scale", 0, "frame_scale=0 must be in"),
            ("data.frame_scale", "many", "not supported between"),
            ("backbone.checkpoint", ["x"], "is not a path"),
            ("data", 3, "its config builds no model"),
        )
    ):
        hostile = copy.deepcopy(metadata)
        *section, name_ = key.split(".")
        (hostile["config"][section[0]] if section else hostile["config"])[name_] = value
        if message.startswith("its clips"):
            hostile["config"]["backbone"]["width"] = 2**14
        cases[f"hostile{number}"] = (leaves, hostile, message)
    return cases


def test_adapter_files_that_do_not_fit(run, tmp_path, monkeypatch, capsys):
    """Check that damaged, hostile and foreign adapter files are refused with a remedy."""
    good = str(tmp_path / "good.safetensors")
    export_adapter.export(run.workdir, good, "latest")
    leaves, metadata = adapter_file.read_adapter(good)
    cases = changed_adapters(leaves, metadata)
    for case, (changed, described, message) in cases.items():
        file = str(tmp_path / f"{case}.safetensors")
        adapter_file.write_adapter(file, changed, described)
        with pytest.raises(ValueError, match=message.replace("(", r"\(", 1)) as error:
            dp.load(file)
        assert str(error.value).startswith(file)
        assert "scripts/export_adapter.py" in str(error.value)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(pathlib.Path(good).read_bytes()[:-100])
    foreign = run.config.backbone.checkpoint
    for file, message in (
        (cut, f"'{cut}' is not a readable safetensors file"),
        (foreign, f"'{foreign}' is not an adapter file of this package"),
        (run.workdir, f"--adapter='{run.workdir}' is not a .safetensors file"),
        (tmp_path / "no.safetensors", f"no adapter file '{tmp_path / 'no.safetensors'}'"),
    ):
        status, _, err = run_script(monkeypatch, capsys, "--adapter", file, cut)
        assert status == 2
        assert f"error: {message}" in err
        assert "scripts/export_adapter.py" in err or "no adapter file" in err
    # A key that a config lacks has its default.
    del metadata["config"]["data"]["max_broken_videos"]
    adapter_file.write_adapter(good, leaves, metadata)
    assert dp.load(good).step == 3


def test_pictures(tmp_path):
    """Check the image of each video; a timeline uses a bounded number of windows."""
    jpegs = [video_decoder.to_jpeg(np.full((48, 64, 3), 8 * i, np.uint8), 90) for i in range(9)]
    frames = trained_model.SingleVideo(jpegs, 48, 64, "x", ["a", "$b", "c"])
    drawn = prediction_figures.PredictionFigures(str(tmp_path), frames.class_names, top_k=2)
    result = predict_files.VideoResult("some/x.mp4", [], [], note="the rest of the file is missing")
    drawn.add(0, result, frames, np.array([0.2, 0.7, 0.1]))
    drawn.add(1, result, frames, np.array([0.2, 0.7, 0.1]))
    windows_seen = 5 * prediction_figures.MAX_POINTS
    for i in range(windows_seen):
        window = dataclasses.replace(result, start=float(i), end=i + 2.0)
        drawn.add(2, window, frames, np.array([0.3, 0.6, 0.1]) if i else np.array([0, 0.1, 0.9]))
    kept = [time for time, _ in drawn._points.items]
    assert prediction_figures.MAX_POINTS < len(kept) <= 2 * prediction_figures.MAX_POINTS
    assert set(np.diff(kept)) == {4.0}
    assert kept[0] == 1
    assert windows_seen - kept[-1] < 4
    assert len(drawn._frames.items) <= 8 * prediction_figures.MAX_FRAMES
    best = drawn._top_classes(np.array([row for _, row in drawn._points.items]).max(axis=0))
    assert best.tolist() == [2, 1]  # by the peak
    drawn.close()
    sizes = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    assert sizes == dict.fromkeys(("x.png", "x-2.png", "x-3.png"), (990, 528))


def test_find_videos(tmp_path):
    names = ("b.MP4", "a.avi", "sub/c.webm", "x.jpg", ".thumbs/1.jpg", "@eaDir/d.mp4/1.jpg")
    for name in (*names, "sub/@eaDir/e.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = [pathlib.Path(p).name for p in predict_files.find_videos([str(tmp_path)])]
    assert sorted(names) == ["a.avi", "b.MP4", "c.webm"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no videos in .*empty"):
        predict_files.find_videos([str(tmp_path / "empty")])


def test_skipped_files_are_named(tmp_path, capsys):
    names = ["a.TS", "b.gif", "c.mp4", "notes.txt", ".hidden", *(f"{i:02}.csv" for i in range(11))]
    for name in names:
        (tmp_path / name).touch()
    found = predict_files.find_videos([str(tmp_path)])
    assert [pathlib.Path(path).name for path in found] == ["a.TS", "b.gif", "c.mp4"]
    error = capsys.readouterr().err
    assert "are skipped: '00.csv', '01.csv', " in error
    assert error.endswith("'09.csv' and 2 more\n")
    assert ".hidden" not in error


def test_gif_and_ts_are_read(tmp_path):
    frames = noise_frames(6)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        stream = container.add_stream("mpeg2video", 25)
        stream.width, stream.height = images[0].size
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    for name in ("a.gif", "a.ts"):
        jpegs, info = video_decoder.video_to_jpegs(
            str(tmp_path / name), 32, 90, video_decoder.DecodeLimits()
        )
        assert (len(jpegs), info.truncated) == (6, ""), name


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("\udcff\udcfe" + "x", "__x"),  # bytes that are not UTF-8
        ("a\nb\x1b[31m", "a_b_[31m"),
        ("é" * 125 + "abcde", "é" * 100),  # 255 bytes
    ],
)
def test_pictures_of_odd_names(stem, expected, tmp_path):
    figures = prediction_figures.PredictionFigures(str(tmp_path), ["a", "b"], 2)
    frames = trained_model.SingleVideo(
        [video_decoder.to_jpeg(frame, 90) for frame in noise_frames(3)], 8, 8, "", ["a", "b"]
    )
    for number in range(2):  # two of one name, and each is drawn
        result = predict_files.VideoResult(f"/x/{stem}.mp4", ["a"], [1.0], note=f"bad {stem}")
        figures.add(number, result, frames, np.array([0.5, 0.5]))
    figures.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{expected}.png", f"{expected}-2.png"}


def test_files_on_a_full_disk_are_named_and_not_left_half_written(tmp_path, monkeypatch):
    """Check features, a figure and an adapter file; os.fsync stands for the disk."""

    def fsync(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    result = predict_files.VideoResult("a.mp4", ["a"], [1.0])
    metadata = {"method": "dualpath", "backbone_name": "x", "backbone_sha256": "", "version": "1"}
    metadata |= {"class_names": ["a"], "config": {}, "step": 1}
    writers = {
        "f.npz": lambda path: predict_files._write_features(path, [(result, {"x": np.ones(3)})]),
        "a.safetensors": lambda path: adapter_file.write_adapter(path, {"x": np.ones(3)}, metadata),
        "p.png": lambda path: image_grid.write_png(path, Image.new("RGB", (8, 8))),
        "g.gif": lambda path: image_grid.write_gif(path, [Image.new("RGB", (8, 8))]),
        "model_card.md": lambda path: files.write_text(path, "text"),
    }
    for name, write in writers.items():
        path = tmp_path / name
        with pytest.raises(OSError, match=f"cannot write {path}: .*No space left.*make room"):
            write(str(path))
    assert list(tmp_path.iterdir()) == []

"""Tests the benchmarks of the pipeline at a tiny size: same clips for all loaders, counts."""

import argparse
import importlib.util
import itertools
import sys

import numpy as np
import pytest
import tensorflow as tf

from dualpath_jax.data import pipeline
from dualpath_jax.data.clip_spec import Views, build_clip_format
from dualpath_jax.data.preparation.video_decoder import DecodeLimits, decode_frames
from dualpath_jax.runtime import cpu_count
from scripts.benchmarks import pipeline as pipeline_lib
from tests.helpers.video_files import write_video

MISSING = pipeline_lib.find_missing_readers()
LOADERS = [name for name in pipeline_lib.LOADERS if name not in MISSING]
MODES = ["training", "test"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write three videos of 18 gray ramps, each frame 8 brighter; every sixth is a key frame."""
    folder = tmp_path_factory.mktemp("videos")
    ramp = np.broadcast_to(np.linspace(0, 90, 64)[:, None], (48, 64, 3))
    frames = [(10 + 8 * i + ramp).astype(np.uint8) for i in range(18)]
    return [write_video(folder / f"{i}.mp4", frames, gop=6) for i in range(3)]


@pytest.fixture(scope="module")
def prepared(files, tmp_path_factory):
    return str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def dataset(files, prepared):
    return pipeline_lib.prepare_files(files, prepared)


@pytest.fixture
def scripts(monkeypatch):
    """Return a function that imports scripts by name."""
    monkeypatch.syspath_prepend("scripts")
    return importlib.import_module


@pytest.fixture
def data(scripts):
    return tiny(scripts("benchmark_pipeline").make_data_config(4, 2))


def tiny(data):
    """Change `config.data` to small images and framesets."""
    data.image_size, data.num_spatial_frames = 32, 2
    data.grid, data.frame_scale, data.sampling_interval = (2, 2), 2, 4
    return data


@pytest.mark.parametrize("frames", [[0, 4, 8, 12], [7, 8, 9, 17], [17, 0, 5, 5]])
@pytest.mark.parametrize("name", ["pyav", "decord", "torchcodec"])
def test_online_decoders_give_the_chosen_frames(files, frames, name):
    if name in MISSING and (name != "decord" or "decord2" in MISSING):
        pytest.skip(f"{name} {MISSING[name]}")
    got = getattr(pipeline_lib, f"decode_{name}")(files[0], np.array(frames))
    whole = np.stack(list(decode_frames(files[0], DecodeLimits())))
    assert got.dtype == np.uint8
    assert got.shape == (4, 48, 64, 3)
    difference = np.abs(got.astype(int) - whole[frames]).mean(axis=(1, 2, 3))
    assert difference.max() < 3
    # Twin: the next frames are 8 brighter.
    next_frames = whole[[(i + 1) % 18 for i in frames]]
    assert np.abs(got.astype(int) - next_frames).mean(axis=(1, 2, 3)).min() > 5


@pytest.mark.parametrize("mode", MODES)
def test_online_clips_equal_the_pipelines(dataset, data, mode):
    """Check that online decoding with the same draws gives the same inputs, except for JPEG."""
    data.randaugment_layers, data.erasing_probability = 4, 1.0
    videos = pipeline_lib.RepeatedVideos(dataset, 2)
    if mode == "training":
        batch = next(pipeline.train_batches(videos, data, 0, 0, 1))
    else:
        batch = next(pipeline.eval_batches(videos, data, Views(1, 1), 2))
    clips = pipeline_lib._record_clips(dataset, data, mode == "training", 2)
    place = [video for video, _, _ in clips].index(1)
    video, frames, sample = clips[place]
    assert "records" not in sample
    transform = pipeline_lib.make_transform(build_clip_format(data), data)

    def difference(chosen, **changed):
        decoded = pipeline_lib.decode_pyav(videos.ids[video], chosen)
        inputs = transform(decoded, sample | changed)
        assert inputs.keys() == batch.keys()
        pairs = [(batch[k][place].astype(int), inputs[k].numpy()) for k in ("spatial", "temporal")]
        pairs = [(a[0] if a.ndim > b.ndim else a, b) for a, b in pairs]  # one view
        assert all(ours.shape == online.shape for ours, online in pairs)
        return [np.abs(ours - online).mean() for ours, online in pairs]

    assert max(difference(frames)) < 3
    # Twins: other frames, and another place.
    assert min(difference((frames + 2) % 18)) > 5
    assert min(difference(frames, box=tf.constant([0, 0, 20, 20]))) > 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_makes_the_batches(dataset, data, name, mode):
    clips = pipeline_lib._record_clips(dataset, data, mode == "training", 6)
    assert len(clips) == 6
    assert {len(frames) for _, frames, _ in clips} == {4}
    videos = pipeline_lib.RepeatedVideos(dataset, 6)
    batch_sizes = list(pipeline_lib.LOADERS[name](videos, data, mode == "training", clips))
    assert batch_sizes == [2, 2, 2]


def test_repeated_videos_note_the_frames_read(dataset):
    videos = pipeline_lib.RepeatedVideos(dataset, 7)
    assert len(videos) == 7
    assert videos.ids[4] == dataset.ids[1]
    assert videos.num_frames.tolist() == [18] * 7
    assert videos.read_frames(5, np.array([3, 1])) == dataset.read_frames(2, [3, 1])
    assert videos.last_frames.tolist() == [3, 1]


def test_turns_alternate_and_ratios_are_paired(monkeypatch):
    order = []
    speeds = {"a": iter([10, 20, 60]), "b": iter([5, 20, 20])}
    runs = {name: lambda name=name: order.append(name) or name for name in speeds}
    monkeypatch.setattr(
        pipeline_lib, "_measure_speed", lambda name: (s := next(speeds[name]), 1e3 / s)
    )
    result = pipeline_lib._compare_speeds(runs, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert result["clips_per_second"] == {"a": 20, "b": 20}
    assert result["ratios"] == {"b": 2}  # median of 2, 1, 3; not 20 / 20
    assert result["cpu_ratios"]["b"] == pytest.approx(2)
    assert result["rounds"] == {"a": [10, 20, 60], "b": [5, 20, 20]}


def test_cut_videos(dataset, tmp_path):
    for length in (40, 5):
        cut = pipeline_lib._write_cut_videos(dataset, str(tmp_path / str(length)), length)
        assert cut.num_frames.tolist() == [length] * 3
        got = cut.read_frames(2, [0, length - 1])
        assert got == dataset.read_frames(2, [0, (length - 1) % 18])


def test_stages():
    names = {
        "Cast:Cast": "resize",
        "map/ResizeArea:ResizeArea#id=1#": "resize",
        "ExecuteAsyncOnStream": "warp",
        "MapDataset:MapDataset": None,
        "DecodeAndCropJpeg:DecodeAndCropJpeg": "decode, crop",
        "PyFunc:PyFunc": "read",
        "ReverseV2:ReverseV2": "flip, tile, erase",
        "IteratorGetNext:IteratorGetNext": None,
        "Iterator::Root::Prefetch": None,
    }
    assert {name: pipeline_lib._find_stage(name) for name in names} == names


@pytest.mark.slow
def test_stage_costs(dataset, prepared, data):
    costs = pipeline_lib.stage_costs(prepared, data, True, 3)
    assert list(costs) == list(pipeline_lib.STAGES)
    for stage in ("read", "decode, crop", "resize", "flip, tile, erase"):
        assert costs[stage] > 0


def test_the_limit_decodes_what_the_pipeline_decodes(dataset, data, monkeypatch):
    """Check that the limit decodes each of four frames once, and both spatial frames again."""
    decoded, decode = [], tf.io.decode_jpeg
    monkeypatch.setattr(tf.io, "decode_jpeg", lambda *a, **k: decoded.append(a) or decode(*a, **k))
    videos = pipeline_lib.RepeatedVideos(dataset, 2)
    clips = [(0, np.arange(4), None), (1, np.arange(4), None)]
    assert list(pipeline_lib.load_jpeg(videos, data, True, clips)) == [2]
    assert len(decoded) == 4 + 2


def test_script(files, prepared, scripts, monkeypatch, capsys):
    """Run the whole script: every loader twice, stages of each case, both video lengths."""
    stages = dict.fromkeys(pipeline_lib.STAGES, 1.5)
    monkeypatch.setattr(pipeline_lib, "stage_costs", lambda *args: stages)
    script = scripts("benchmark_pipeline")
    make_data_config = script.make_data_config
    monkeypatch.setattr(script, "make_data_config", lambda *args: tiny(make_data_config(*args)))
    monkeypatch.setattr(script, "VIDEO_LENGTHS", (30, 8))
    arguments = argparse.Namespace(
        videos=files, prepared=prepared, frames=[4], rounds=2, batches=2, batch_size=2
    )
    result = script.measure_pipeline(arguments, prepared)
    assert (result["videos"], result["cores"]) == (3, cpu_count.num_cores())
    assert [(case["frames"], case["mode"]) for case in result["cases"]] == [(4, m) for m in MODES]
    for case in result["cases"]:
        assert {name: len(speeds) for name, speeds in case["rounds"].items()} == dict.fromkeys(
            LOADERS, 2
        )
        assert list(case["ratios"]) == LOADERS[1:]
        assert case["stages"] == stages
    assert list(result["lengths"]["rounds"]) == ["30", "8"]
    lines = script.format_markdown(result).splitlines()
    assert sum(line.startswith("| 4, ") for line in lines) == 4
    assert sum(line.endswith("| 1.50 | 9.00 |") for line in lines) == 2
    assert lines[-1].startswith("Videos of 30 frames: ")
    missing = [f"{name} {problem}: it is left out" for name, problem in MISSING.items()]
    printed = capsys.readouterr().err
    assert all(text in printed for text in missing)


def test_files_that_are_not_there(scripts):
    with pytest.raises(ValueError, match="nowhere does not exist; check --videos"):
        scripts("benchmark_pipeline").find_video_files(["nowhere"])


@pytest.mark.parametrize("training", [True, False])
def test_memory_is_sampled(dataset, data, training):
    reported = []
    samples = pipeline_lib.sample_memory(
        dataset, data, training, minutes=0.01, interval=0.1, report=lambda *s: reported.append(s)
    )
    assert reported == samples
    assert len(samples) >= 1
    for (before, _, fewer), (after, mib, clips) in itertools.pairwise([(0, 0, 0), *samples]):
        assert after - before >= 0.1 / 60
        assert clips > fewer
        assert 50 < mib < 10_000


def test_memory_deviation():
    samples = [(1, 100.0, 1), (2, 200.0, 2), (3, 210.0, 3), (4, 205.0, 4)]
    assert pipeline_lib.memory_deviation(samples, 2) == (205.0, pytest.approx(5 / 205))
    assert pipeline_lib.memory_deviation(samples, 0)[1] == pytest.approx(1 - 100 / 202.5)
    with pytest.raises(ValueError, match="there is no sample later than 5 minutes"):
        pipeline_lib.memory_deviation(samples, 5)


@pytest.mark.parametrize(("last", "code"), [(104.0, 0), (111.0, 1)])
def test_memory_script_judges(prepared, dataset, scripts, monkeypatch, capsys, last, code):
    script = scripts("benchmark_memory")
    samples = [(3, 100.0, 1), (4, 100.0, 2), (5, last, 3)]
    monkeypatch.setattr(pipeline_lib, "sample_memory", lambda *args: samples)
    monkeypatch.setattr(sys, "argv", ["benchmark_memory.py", f"--prepared={prepared}"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == code
    verdict = "NOT FLAT" if code else "flat"
    assert f"median 100.0 MiB, largest deviation {last - 100:.1f}%" in capsys.readouterr().out
    assert verdict in ("flat", "NOT FLAT")

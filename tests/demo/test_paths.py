"""Tests the generated sets `paths`: classes, splits, files; one frame must not reveal the class."""

import pathlib

import numpy as np
import pytest

from configs import finetune
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.demo import paths, setup
from scripts import probe_pixels

SIZES = {"train": 10, "validation": 10, "test": 20}


def turning(track: np.ndarray) -> float:
    """Return by how many turns a track's direction turns, to either side."""
    steps = np.diff(track, axis=0)
    angles = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
    return abs(angles[-1] - angles[0]) / (2 * np.pi)


@pytest.mark.parametrize("name", paths.CLASSES)
def test_tracks_match_their_class(name):
    for seed in range(20):
        track = paths.draw_track(name, 32, np.random.default_rng(seed))
        (x, y), (last_x, last_y) = track[:3].mean(axis=0), track[-3:].mean(axis=0)
        matches = {
            "left": x - last_x > 0.3 and abs(y - last_y) < 0.2,
            "right": last_x - x > 0.3 and abs(y - last_y) < 0.2,
            "up": y - last_y > 0.3 and abs(x - last_x) < 0.2,
            "down": last_y - y > 0.3 and abs(x - last_x) < 0.2,
            "tick": last_x - x > 0.3 and track[:, 1].max() - last_y > 0.3,
            "caret": last_x - x > 0.2 and y - track[:, 1].min() > 0.3,
            "cross": abs(x - last_x) < 0.2 and last_y - y > 0.2 and np.ptp(track[:, 0]) > 0.3,
        }
        closed = np.hypot(x - last_x, y - last_y) < 0.15 and np.ptp(track, axis=0).min() > 0.3
        assert matches.get(name, closed), (name, seed)
        assert track.min() > -0.05
        assert track.max() < 1.05


def test_closed_paths_turn_both_ways():
    rngs = [np.random.default_rng(seed) for seed in range(20)]
    corners = {name: [paths.draw_outline(name, rng) for rng in rngs] for name in ("circle", "star")}
    for outlines in corners.values():
        steps = [np.diff(outline, axis=0)[:2] for outline in outlines]
        sides = [a[0] * b[1] - a[1] * b[0] > 0 for a, b in steps]
        assert 4 <= sum(sides) <= 16
    assert all(0.9 < turning(outline) < 1.1 for outline in corners["circle"])
    assert all(1.5 < turning(outline) < 2.1 for outline in corners["star"])


def test_splits_share_no_photograph():
    assert paths.PHOTOS.keys() == paths.SIZES.keys()
    names = [name for photos in paths.PHOTOS.values() for name in photos]
    assert len(set(names)) == len(names) == 15


def test_a_scene_depends_only_on_split_and_number():
    frames = paths.render_frames("train", 13)
    assert frames.shape == (32, 128, 128, 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, paths.render_frames("train", 13))
    others = [paths.render_frames("test", 13), paths.render_frames("train", 14)]
    assert all(np.abs(frames - other.astype(int)).mean() > 10 for other in others)


def test_files(tmp_path):
    paths.render_paths(tmp_path, SIZES, progress=False)
    listing = dataset_registry.list_videos("folder", str(tmp_path))
    assert tuple(listing.class_names) == paths.CLASSES
    assert {split: len(videos) for split, videos in listing.splits.items()} == SIZES
    first = next(v for v in listing.splits["test"] if v.path == "test/circle/00011.mp4")
    assert paths.CLASSES[first.label] == "circle"
    written = pathlib.Path(tmp_path, first.path).stat().st_mtime_ns
    missing = pathlib.Path(tmp_path, "train/up/00009.mp4")
    content = missing.read_bytes()
    missing.unlink()  # as a program leaves it that was killed
    paths.render_paths(tmp_path, SIZES, progress=False)
    assert missing.read_bytes() == content
    assert pathlib.Path(tmp_path, first.path).stat().st_mtime_ns == written


def test_probes_see_order_only_where_it_is():
    # Ten classes that differ only in the order of the same ten frames.
    frames = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3)).astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 20, (40, 10, 4, 4, 3))
    videos = np.stack([np.roll(frames, i % 10, axis=0) for i in range(40)]) + noise
    labels, targets = np.arange(40) % 10, np.eye(10)[np.arange(20) % 10] - 0.1
    scores = {}
    for features in (probe_pixels.average_features, probe_pixels.ordered_features):
        rows = features(videos)
        found = probe_pixels.predict(rows[:20], targets, rows[20:], 0.1)
        scores[features.__name__] = (found == labels[20:]).mean()
    assert scores["average_features"] <= 0.3
    assert scores["ordered_features"] == 1
    low, high = probe_pixels.confidence_interval(0.1, 100)
    assert (round(low, 3), round(high, 3)) == (0.055, 0.174)


def test_a_run_sets_up_what_it_takes_from_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(setup.GENERATED, "paths", lambda raw: setup._render_paths(raw, SIZES))
    config = finetune.get_config("demo")
    config.data.source, config.data.dir = "paths", "data/paths"
    setup.ensure_generated(config)
    assert len(VideoDataset("data/paths", "test")) == 20
    assert pathlib.Path(setup.CHECKPOINT).stat().st_size > 1e6
    written = pathlib.Path("data/paths/dataset_info.json").stat().st_mtime_ns
    setup.ensure_generated(config)
    assert pathlib.Path("data/paths/dataset_info.json").stat().st_mtime_ns == written
    config.data.source = "paths_large"
    with pytest.raises(ValueError, match="data/paths holds the videos of 'paths', not those of"):
        setup.ensure_generated(config)
    config.data.source = "paths"
    # A user's own weights that are missing are not replaced by the demo's.
    config.backbone.checkpoint = "weights/mine.safetensors"
    setup.ensure_generated(config)
    assert not pathlib.Path("weights").exists()
    config.data.dir = "gs://bucket/paths"
    monkeypatch.setattr(setup.epath, "Path", lambda path: pathlib.Path("nowhere"))
    with pytest.raises(ValueError, match="no prepared paths in config.data.dir=gs://bucket/paths"):
        setup.ensure_generated(config)

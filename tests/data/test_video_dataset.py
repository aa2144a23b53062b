"""Checks prepared data: TFDS reads it, and `VideoDataset` finds the right frames."""

import io
import json
import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from dualpath_jax.data import video_dataset
from dualpath_jax.data.dataset_metadata import Shard, digest_records
from dualpath_jax.data.preparation import shard_writer
from dualpath_jax.data.preparation.shard_writer import VideoRow
from dualpath_jax.data.video_dataset import FRAME_FEATURES, VideoDataset
from dualpath_jax.data.video_source import FrameFormat

NUM_FRAMES = [3, 1, 5, 2]  # per video; the shards hold videos 0 and 1, no video, videos 2 and 3
NAMES = ["Holding [something]", "pull-ups, 'fast'", "跳", "a"]
IDS = ["-x [1] .mp4", "ü/視 頻", "b", "c"]


def make_jpeg(video, frame):
    """Return the JPEG file of a frame, whose color is different for each frame."""
    image = Image.new("RGB", (16, 8), (20 * video + 5, 40 * frame + 5, 0))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def make_rows():
    """Return the rows of the table of videos."""
    first = np.cumsum([0] + NUM_FRAMES)
    return [
        VideoRow(IDS[v], 3 - v, int(first[v]), NUM_FRAMES[v], 12.5 * v, 8, 16, v == 2)
        for v in range(4)
    ]


def write_data(out, class_names=NAMES, table=None):
    """Write prepared data with four videos and return its folder."""
    os.makedirs(out / "frames")
    frames = []
    for shard, videos in [(0, [0, 1]), (2, [2, 3])]:
        writer = shard_writer.ShardWriter(
            video_dataset.frame_shard_path(str(out), "train", shard, 3)
        )
        for video in videos:
            for frame in range(NUM_FRAMES[video]):
                writer.write(shard_writer.encode_frame(make_jpeg(video, frame)))
        writer.commit()
        frames.append(writer.describe())
    empty = Shard(0, 0, digest_records([]), digest_records([]))
    table = {"train": make_rows() if table is None else table, "test": []}
    frames = {"train": [frames[0], empty, frames[1]], "test": [empty]}
    shard_writer.write_tables(str(out), class_names, table, frames, FrameFormat(fps=10.0))
    return str(out)


@pytest.fixture
def out(tmp_path):
    return write_data(tmp_path / "out")


def test_table(out):
    dataset = VideoDataset(out, "train")
    assert len(dataset) == 4
    assert dataset.ids == IDS
    assert dataset.class_names == NAMES
    assert dataset.frame_format == FrameFormat(256, 90, 10.0)
    for array, dtype, expected in [
        (dataset.labels, np.int32, [3, 2, 1, 0]),
        (dataset.first_frame, np.int64, [0, 3, 4, 9]),
        (dataset.num_frames, np.int64, [3, 1, 5, 2]),
        (dataset.fps, np.float32, [0.0, 12.5, 25.0, 37.5]),
    ]:
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"short_side": 0, "quality": 90, "fps": None}, "short_side is 0"),
        ({"short_side": True, "quality": 90, "fps": None}, "short_side is True"),
        ({"short_side": 9, "quality": 96, "fps": None}, "quality is 96"),
        ({"short_side": 9, "quality": 90, "fps": "5"}, "fps is '5'"),
        ({"short_side": 9, "quality": 90, "fps": float("inf")}, "fps is inf"),
        ({}, "quality is None"),
    ],
)
def test_impossible_frame_formats_are_refused(out, stored, message):
    with open(os.path.join(out, "frame_format.json"), "w") as file:
        json.dump(stored, file)
    with pytest.raises(ValueError, match=f"frame_format.json is damaged: {message}"):
        VideoDataset(out, "train")


def test_data_of_an_older_version_has_the_default_frame_format(out):
    os.remove(os.path.join(out, "frame_format.json"))
    assert VideoDataset(out, "train").frame_format == FrameFormat(256, 90, None)


def test_read_frames(out):
    dataset = VideoDataset(out, "train")
    for video, wanted in [(0, [0, 1, 2]), (2, [4, 0, 0, 2]), (3, [1]), (1, [0, 0, 0]), (0, [])]:
        records = dataset.read_frames(video, wanted)
        images = [tf.io.parse_single_example(r, FRAME_FEATURES)["image"].numpy() for r in records]
        assert images == [make_jpeg(video, frame) for frame in wanted]
    assert dataset.read_frames(2, np.array([1], np.int32)) == [
        shard_writer.encode_frame(make_jpeg(2, 1))
    ]
    for wanted in ([3], [-1], [0, 7]):
        with pytest.raises(IndexError, match=r"'-x \[1\] .mp4' has frames 0..2"):
            dataset.read_frames(0, wanted)


def test_tfds_reads_videos_and_frames(out):
    videos = tfds.builder_from_directory(out)
    assert list(videos.info.splits) == ["train"]
    assert videos.info.features["label"].names == NAMES
    source = videos.as_data_source("train")
    assert len(source) == 4
    row = source[2]
    assert row["id"].decode() == "b"
    assert (row["label"], row["first_frame"], row["num_frames"]) == (1, 4, 5)
    assert (row["height"], row["width"], row["fps"], row["truncated"]) == (8, 16, 25.0, True)
    assert not source[3]["truncated"]
    frames = tfds.builder_from_directory(os.path.join(out, "frames")).as_data_source("train")
    assert len(frames) == 11
    decoded = np.asarray(Image.open(io.BytesIO(make_jpeg(2, 3))))
    np.testing.assert_array_equal(frames[4 + 3]["image"], decoded)
    assert not np.array_equal(frames[4 + 2]["image"], decoded)


def test_examples_are_encoded_as_by_tfds():
    frames = tfds.features.FeaturesDict({"image": tfds.features.Image(encoding_format="jpeg")})
    content = make_jpeg(1, 1)
    assert shard_writer.encode_frame(content) == frames.serialize_example({"image": content})
    features = tfds.features.FeaturesDict(shard_writer.build_video_features(NAMES))
    row = make_rows()[1]
    expected = tf.train.Example.FromString(features.serialize_example(vars(row)))
    assert tf.train.Example.FromString(shard_writer.encode_row(row)) == expected


@pytest.mark.parametrize("names", [[" a ", "b"], ["a\nb", "c"], ["", "x"], ["a\rb", "\u2028"]])
def test_class_names_are_kept(tmp_path, names):
    """Check names that TFDS would lose, because it strips the lines of a text file."""
    table = [VideoRow("v", 1, 0, 3, 0.0, 8, 16, False)]
    out = write_data(tmp_path / "out", names, table)
    assert VideoDataset(out, "train").class_names == names
    label = tfds.builder_from_directory(out).info.features["label"]
    assert label.num_classes == 2


def test_id_may_hold_any_bytes(tmp_path):
    name = os.fsdecode(b"\xff.mp4")
    out = write_data(tmp_path / "out", table=[VideoRow(name, 1, 0, 3, 0.0, 8, 16, False)])
    assert VideoDataset(out, "train").ids == [name]


def test_missing_data_and_splits(out, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*python scripts/prepare_dataset.py"):
        VideoDataset(str(tmp_path / "nowhere"), "train")
    for split in ("validation", "test"):  # no such split; one with no stored videos
        with pytest.raises(ValueError, match=f"no videos of split '{split}' in .*: it has train"):
            VideoDataset(out, split)


def test_shard_has_its_name_only_when_committed(tmp_path):
    path = str(tmp_path / "shard")
    writer = shard_writer.ShardWriter(path)
    writer.write(b"x")
    assert not os.path.exists(path)
    writer.discard()
    assert os.listdir(tmp_path) == []
    writer = shard_writer.ShardWriter(path)
    writer.write(b"x")
    writer.commit()
    assert os.listdir(tmp_path) == ["shard"]

"""Tests damaged frames: training replaces their clips, and evaluation names the video."""

import pathlib
import shutil

import numpy as np
import pytest

from dualpath_jax.data import index_sampler, pipeline, video_dataset
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.data.preparation.shard_writer import ShardWriter, encode_frame
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.data.video_dataset import UnreadableVideo, VideoDataset, frame_shard_path


def flip(dataset, path, wanted):
    """Flip a bit of the records in a file for which wanted(video, frame) is True."""
    content, start = bytearray(pathlib.Path(path).read_bytes()), 0
    original = bytes(content)
    for video in range(len(dataset)):
        for frame in range(dataset.num_frames[video]):
            record = dataset.read_frames(video, [frame])[0]
            # Headers of the file format may be between two parts of a record.
            parts = (record[i : i + 40] for i in range(len(record) // 2, len(record) - 40, 40))
            end = start + 3 * len(record) + 1000
            place = next(p for part in parts if (p := original.find(part, start, end)) > 0)
            content[place] ^= wanted(video, frame)
            start = place + 40
    pathlib.Path(path).write_bytes(content)


def damaged(source, out, videos, how, split="train"):
    """Return a split of a copy of prepared data in which some videos cannot be read."""
    shutil.copytree(source, out)
    dataset = VideoDataset(str(out), split)
    path = frame_shard_path(str(out), split, 0, 1)
    if how == "flipped byte":  # a checksum fails when the record is read
        flip(dataset, path, lambda video, frame: video in videos)
    else:  # intact records without an image, which fail when they are decoded
        writer = ShardWriter(path)
        for video in range(len(dataset)):
            for record in dataset.read_frames(video, range(dataset.num_frames[video])):
                writer.write(encode_frame(b"no JPEG") if video in videos else record)
        writer.commit()
        (out / "identity.json").unlink()  # as if these records had been prepared
    return VideoDataset(str(out), split)


def batches(dataset, data, first=0, last=10, **options):
    return list(pipeline.train_batches(dataset, data, 0, first, last, **options))


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("how", ["flipped byte", "no image"])
def test_the_next_video_replaces_a_damaged_one(config, demo_data, tmp_path, how):
    """Check two epochs with 5, 6 and 39 (the last) damaged: 7 replaces 5 and 6, 0 replaces 39."""
    bad = (5, 6, 39)
    healthy = VideoDataset(config.data.dir, "train")
    dataset = damaged(demo_data, tmp_path / "data", bad, how)
    unreadable = UnreadableVideos(dataset.ids, 3)
    with_replacements = batches(dataset, config.data, unreadable=unreadable)
    assert set(unreadable.videos) == set(bad)
    replacement = {5: 7, 6: 7, 39: 0}
    clips = {}  # of the healthy data, by epoch and video
    for step, batch in enumerate(batches(healthy, config.data)):
        examples, epochs = index_sampler.train_indices(0, step, 8, 40)
        for row, (example, epoch) in enumerate(zip(examples, epochs, strict=True)):
            clips[epoch, example] = {key: value[row] for key, value in batch.items()}
    for step, batch in enumerate(with_replacements):
        examples, epochs = index_sampler.train_indices(0, step, 8, 40)
        expected = [replacement.get(int(i), int(i)) for i in examples]
        assert batch["example_id"].tolist() == expected
        for row, (example, epoch) in enumerate(zip(expected, epochs, strict=True)):
            clip = clips[epoch, example]
            assert all(np.array_equal(batch[key][row], clip[key]) for key in clip)
    # The batches do not depend on when the damage is noticed.
    assert same(batches(dataset, config.data, first=4), with_replacements[4:])
    # In healthy data nothing is replaced.
    unreadable = UnreadableVideos(healthy.ids, 0)
    assert not same(batches(healthy, config.data, unreadable=unreadable), with_replacements)
    assert unreadable.videos == {}


def test_a_clip_without_the_damaged_frame_is_kept(config, demo_data, tmp_path):
    """Check that a damaged frame removes only the clips that contain it."""
    dataset = damaged(demo_data, tmp_path / "data", (), "no image")
    path = frame_shard_path(str(tmp_path / "data"), "train", 0, 1)
    flip(dataset, path, lambda video, frame: (video, frame) == (3, 0))
    dataset = VideoDataset(str(tmp_path / "data"), "train")
    config.data.num_frames, config.data.grid = 4, (2, 2)
    config.data.frame_scale = 2
    seen = {}
    read = dataset.read_frames

    def read_and_record(example, frames):
        if example == 3:
            seen.setdefault(0 in frames, []).append(example)
        return read(example, frames)

    dataset.read_frames = read_and_record
    ids = np.concatenate([b["example_id"] for b in batches(dataset, config.data, last=60)])
    assert len(seen[True]) >= 1
    assert len(seen[False]) >= 1
    assert (ids == 3).sum() == len(seen[False])


@pytest.mark.parametrize("how", ["flipped byte", "no image"])
def test_too_many_unreadable_videos_stop_the_training(config, demo_data, tmp_path, how):
    dataset = damaged(demo_data, tmp_path / "data", (1, 2, 3), how)
    config.data.max_broken_videos = 2
    with pytest.raises(ValueError, match="3 training videos cannot be read, more than") as caught:
        batches(dataset, config.data)
    for video in (1, 2, 3):
        assert repr(dataset.ids[video]) in str(caught.value)
    assert "prepare the data set again" in str(caught.value)
    config.data.max_broken_videos = 3
    assert len(batches(dataset, config.data)) == 10


def test_nothing_can_be_read(config, demo_data, tmp_path):
    dataset = damaged(demo_data, tmp_path / "data", range(40), "no image")
    with pytest.raises(ValueError, match="no video of the split can be read"):
        batches(dataset, config.data)


def test_a_shard_that_cannot_be_opened_is_an_error(config, demo_data, tmp_path):
    """Check that the run ends at once and names the file, instead of replacing its videos."""
    shutil.copytree(demo_data, tmp_path / "data")
    dataset = VideoDataset(str(tmp_path / "data"), "train")
    for path in (tmp_path / "data" / "frames").glob("frames-train.array_record*"):
        path.unlink()
    with pytest.raises(OSError, match="frames-train.array_record.* is missing"):
        batches(dataset, config.data)


def test_the_limit_of_open_files_grows_with_the_shards(tmp_path, monkeypatch):
    limits = [(256, 100_000), (4096, 100_000), (256, 700)]
    wanted = []
    monkeypatch.setattr(video_dataset.resource, "setrlimit", lambda _, pair: wanted.append(pair))
    for pair in limits:
        monkeypatch.setattr(video_dataset.resource, "getrlimit", lambda _, pair=pair: pair)
        video_dataset._allow_open_files(1270)
    assert wanted == [(3052, 100_000), (700, 700)]


@pytest.mark.parametrize("how", ["flipped byte", "no image"])
def test_evaluation_names_the_video(config, demo_data, tmp_path, how):
    """Check that evaluation fails instead of leaving a video out."""
    dataset = damaged(demo_data, tmp_path / "data", (13,), how, "test")
    passes = pipeline.eval_batches(dataset, config.data, Views(1, 1), 8)
    assert next(passes)["mask"].sum() == 8  # the videos before it
    with pytest.raises(UnreadableVideo, match=f"video {dataset.ids[13]!r}"):
        next(passes)

"""Stored frames that are damaged: replaced in training by a fixed rule, named in evaluation."""

import pathlib
import shutil

import numpy as np
import pytest

from dualpath_jax.data import index_sampler, pipeline, video_dataset
from dualpath_jax.data.preparation.shard_writer import ShardWriter, encode_frame
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.data.video_dataset import UnreadableVideo, VideoDataset, frame_shard_path


def flip(dataset, path, wanted):
    """Change a bit of some records, where they lie in the file. wanted: (video, frame) -> bool."""
    content, start = bytearray(pathlib.Path(path).read_bytes()), 0
    whole = bytes(content)
    for video in range(len(dataset)):
        for frame in range(dataset.num_frames[video]):
            record = dataset.read_frames(video, [frame])[0]
            # The file's own headers may lie between two parts of a record.
            parts = (record[i : i + 40] for i in range(len(record) // 2, len(record) - 40, 40))
            end = start + 3 * len(record) + 1000
            place = next(p for part in parts if (p := whole.find(part, start, end)) > 0)
            content[place] ^= wanted(video, frame)
            start = place + 40
    pathlib.Path(path).write_bytes(content)


def damaged(source, out, videos, how, split="train"):
    """A copy of prepared data in which some videos cannot be read."""
    shutil.copytree(source, out)
    dataset = VideoDataset(str(out), split)
    path = frame_shard_path(str(out), split, 0, 1)
    if how == "flipped byte":  # noticed by checksums when it is read
        flip(dataset, path, lambda video, frame: video in videos)
    else:  # whole records that hold no image: noticed when they are decoded
        writer = ShardWriter(path)
        for video in range(len(dataset)):
            for record in dataset.read_frames(video, range(dataset.num_frames[video])):
                writer.write(encode_frame(b"no JPEG") if video in videos else record)
        writer.commit()
    return VideoDataset(str(out), split)


def batches(dataset, data, first=0, last=10, **options):
    return list(pipeline.train_batches(dataset, data, 0, first, last, **options))


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("how", ["flipped byte", "no image"])
def test_the_next_video_takes_the_place(config, demo_data, tmp_path, how):
    """Two epochs, with 5, 6 and the last one (39) damaged: 7 stands in for 5 and 6, 0 for 39."""
    bad = (5, 6, 39)
    healthy = VideoDataset(config.data.dir, "train")
    dataset = damaged(demo_data, tmp_path / "data", bad, how)
    broken = UnreadableVideos(dataset.ids, 3)
    found = batches(dataset, config.data, broken=broken)
    assert set(broken.videos) == set(bad)
    stand_in = {5: 7, 6: 7, 39: 0}
    clips = {}  # of the healthy data, by epoch and video
    for step, batch in enumerate(batches(healthy, config.data)):
        examples, epochs = index_sampler.train_indices(0, step, 8, 40)
        for row, (example, epoch) in enumerate(zip(examples, epochs, strict=True)):
            clips[epoch, example] = {key: value[row] for key, value in batch.items()}
    for step, batch in enumerate(found):
        examples, epochs = index_sampler.train_indices(0, step, 8, 40)
        expected = [stand_in.get(int(i), int(i)) for i in examples]
        assert batch["example_id"].tolist() == expected
        for row, (example, epoch) in enumerate(zip(expected, epochs, strict=True)):
            clip = clips[epoch, example]
            assert all(np.array_equal(batch[key][row], clip[key]) for key in clip)
    # Whenever the damage is found, the batches are the same.
    assert same(batches(dataset, config.data, first=4), found[4:])
    # Twin: nothing is replaced in healthy data.
    broken = UnreadableVideos(healthy.ids, 0)
    assert not same(batches(healthy, config.data, broken=broken), found)
    assert broken.videos == {}


def test_a_clip_without_the_damaged_frame_stays(config, demo_data, tmp_path):
    """A damaged frame costs the clips that hold it, not the video."""
    dataset = damaged(demo_data, tmp_path / "data", (), "no image")
    path = frame_shard_path(str(tmp_path / "data"), "train", 0, 1)
    flip(dataset, path, lambda video, frame: (video, frame) == (3, 0))
    dataset = VideoDataset(str(tmp_path / "data"), "train")
    config.data.num_frames, config.data.grid = 4, (2, 2)
    config.data.frame_scale = 2
    seen = {}
    read = dataset.read_frames

    def noting(example, frames):
        if example == 3:
            seen.setdefault(0 in frames, []).append(example)
        return read(example, frames)

    dataset.read_frames = noting
    ids = np.concatenate([b["example_id"] for b in batches(dataset, config.data, last=60)])
    assert len(seen[True]) >= 1
    assert len(seen[False]) >= 1
    assert (ids == 3).sum() == len(seen[False])


@pytest.mark.parametrize("how", ["flipped byte", "no image"])
def test_too_many_stop_the_training(config, demo_data, tmp_path, how):
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


def test_a_shard_that_cannot_be_opened_is_no_broken_video(config, demo_data, tmp_path):
    """The run ends at once, and says which file; none of its videos is left out."""
    shutil.copytree(demo_data, tmp_path / "data")
    dataset = VideoDataset(str(tmp_path / "data"), "train")
    for path in (tmp_path / "data" / "frames").glob("frames-train.array_record*"):
        path.unlink()
    with pytest.raises(OSError, match="cannot open .*frames-train.array_record.*open.. failed"):
        batches(dataset, config.data)


def test_as_many_files_may_be_open_as_there_are_shards(tmp_path, monkeypatch):
    limits = [(256, 100_000), (4096, 100_000), (256, 700)]
    wanted = []
    monkeypatch.setattr(video_dataset.resource, "setrlimit", lambda _, pair: wanted.append(pair))
    for pair in limits:
        monkeypatch.setattr(video_dataset.resource, "getrlimit", lambda _, pair=pair: pair)
        video_dataset._allow_open_files(1270)
    assert wanted == [(3052, 100_000), (700, 700)]


@pytest.mark.parametrize("how", ["flipped byte", "no image"])
def test_evaluation_names_the_video(config, demo_data, tmp_path, how):
    """No video is left out of a score."""
    dataset = damaged(demo_data, tmp_path / "data", (13,), how, "test")
    passes = pipeline.eval_batches(dataset, config.data, 1, 1, 8)
    assert next(passes)["mask"].sum() == 8  # those before it
    with pytest.raises(UnreadableVideo, match=f"video {dataset.ids[13]!r}"):
        next(passes)

"""Checks that prepared data that change under a reader are noticed."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from dualpath_jax.data import dataset_metadata, video_dataset
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation import prepare as prepare_lib
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset
from dualpath_jax.data.video_dataset import ChangedData, VideoDataset
from dualpath_jax.runtime import file_lock
from dualpath_jax.runtime.progress_bar import ProgressBar
from dualpath_jax.training import restore
from tests.helpers.video_files import write_video
from tests.test_train import build

OPTIONS = PrepareOptions(short_side=24, videos_per_shard=3, num_workers=1, progress=False)


def write_videos(folder, first_level=10):
    """Write two classes of four videos, whose brightness tells them apart."""
    for number in range(8):
        frames = [np.full((24, 32, 3), first_level + 20 * number, np.uint8)] * 3
        write_video(folder / f"{'ab'[number % 2]}" / f"{number}.mp4", frames)
    return str(folder)


def prepare(videos, out, **changes):
    listing = list_videos("folder", str(videos), None, 0.25)
    return prepare_dataset(listing, str(videos), str(out), dataclasses.replace(OPTIONS, **changes))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a folder with `videos` and the prepared `data`: 2 shards for training, 1 other."""
    folder = tmp_path_factory.mktemp("identity")
    write_videos(folder / "videos")
    prepare(folder / "videos", folder / "data")
    return folder


@pytest.fixture
def data(original, tmp_path):
    """Return a copy of the prepared data."""
    return shutil.copytree(original / "data", tmp_path / "data")


def shards(data, split="train"):
    return sorted((data / "frames").glob(f"frames-{split}.array_record*"))


def test_equal_videos_have_equal_identities(original, data, tmp_path):
    """Check it with data prepared twice; the twins have another label, and another frame."""
    first = VideoDataset(str(data), "train").identity
    prepare(original / "videos", tmp_path / "again")
    assert VideoDataset(str(tmp_path / "again"), "train").identity == first
    write_videos(tmp_path / "brighter", 14)
    prepare(tmp_path / "brighter", tmp_path / "other")
    other = VideoDataset(str(tmp_path / "other"), "train").identity
    assert other["videos"] == first["videos"]
    assert other["frames"] != first["frames"]
    (tmp_path / "brighter" / "b").rename(tmp_path / "brighter" / "c")
    prepare(tmp_path / "brighter", tmp_path / "renamed")
    assert VideoDataset(str(tmp_path / "renamed"), "train").identity["videos"] != first["videos"]


def test_identity_file(data):
    identity = dataset_metadata.read_identity(str(data))
    assert [shard.records for shard in identity.frames["train"]] == [9, 9]
    assert [shard.num_bytes for shard in identity.frames["train"]] == [
        path.stat().st_size for path in shards(data)
    ]
    for text in ("[]", "{}", '{"videos": {}, "frames": {"train": [{"records": 1}]}}'):
        (data / "identity.json").write_text(text)
        with pytest.raises(ValueError, match="identity.json"):
            VideoDataset(str(data), "train")


@pytest.mark.parametrize("how", ["replaced", "written", "removed"])
def test_a_shard_that_changes_before_it_is_opened(data, how):
    """Check that no frame is read from it; the twin has opened it before."""
    dataset, early = VideoDataset(str(data), "train"), VideoDataset(str(data), "train")
    record = early.read_frames(0, [0])
    path = shards(data)[0]
    content = path.read_bytes()
    if how == "replaced":
        (data / "new").write_bytes(content)
        (data / "new").rename(path)
    elif how == "written":
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    with pytest.raises(ChangedData, match=f"{path.name} (has changed|is missing)"):
        dataset.read_frames(0, [0])
    assert early.read_frames(0, [0]) == record


def test_a_shard_of_another_split_is_refused(data, capsys):
    """Check it by the number of frames, the size and the first frame."""
    first, second = shards(data)
    content = first.read_bytes()
    first.write_bytes(shards(data, "validation")[0].read_bytes())
    with pytest.raises(ChangedData, match="holds 6 frames instead of 9"):
        VideoDataset(str(data), "train").read_frames(0, [0])
    first.write_bytes(second.read_bytes())
    with pytest.raises(ChangedData, match="begins with another frame"):
        VideoDataset(str(data), "train").read_frames(0, [0])
    first.write_bytes(content + b"x")
    with pytest.raises(ChangedData, match="bytes, and was prepared with .*cut off or replaced"):
        VideoDataset(str(data), "train")
    first.write_bytes(content)  # twin
    VideoDataset(str(data), "train").read_frames(0, [0])
    # Without identity.json only the number of frames is known.
    assert capsys.readouterr().err == ""
    (data / "identity.json").unlink()
    first.write_bytes(shards(data, "validation")[0].read_bytes())
    dataset = VideoDataset(str(data), "train")
    VideoDataset(str(data), "validation")
    assert capsys.readouterr().err.count("has no identity.json") == 1
    with pytest.raises(ChangedData, match="holds 6 frames instead of 9"):
        dataset.read_frames(0, [0])


def test_another_table_is_refused(data):
    table = next(data.glob("videos-train.array_record*"))
    shutil.copy(next(data.glob("videos-validation.array_record*")), table)
    with pytest.raises(ValueError, match="is not the table that was written here"):
        VideoDataset(str(data), "train")


def test_readers_and_prepare_exclude_each_other(original, data):
    dataset = VideoDataset(str(data), "train")
    VideoDataset(str(data), "validation")  # readers share the lock
    prepare(original / "videos", data)  # finished: it only prints its summary
    (data / "dataset_info.json").rename(data / "info")
    message = f"{data} is being read by process {os.getpid()}; wait for it"
    with pytest.raises(ValueError, match=message):
        prepare(original / "videos", data)
    dataset.itself = dataset  # garbage that only the collector finds
    del dataset
    prepare(original / "videos", data)
    (data / "info").unlink()
    message = f"is being prepared by process {os.getpid()}"
    with file_lock.lock_against_readers(str(data)), pytest.raises(ValueError, match=message):
        VideoDataset(str(data), "train")
    VideoDataset(str(data), "train")


def test_prepare_adds_a_missing_identity(original, data, capsys, monkeypatch):
    """Check data of version 0.1.0, which has digests neither in OUT nor in the sidecars.

    The bar counts each frame once.
    """
    path = data / "identity.json"
    wanted = path.read_text()
    path.unlink()
    for sidecar in (data / "prepare").glob("*-of-*.json"):
        content = json.loads(sidecar.read_text())
        del content["frames"]
        sidecar.write_text(json.dumps(content))
    bars = []

    class RecordedBar(ProgressBar):
        def __init__(self, total, *names, **options):
            super().__init__(total, *names, **options)
            bars.append((names, total, self))

    monkeypatch.setattr(prepare_lib, "ProgressBar", RecordedBar)
    prepare(original / "videos", data)
    count = sum(entry["records"] for s in json.loads(wanted)["frames"].values() for entry in s)
    assert f"note: reading {count} frames for identity.json" in capsys.readouterr().err
    assert [(names, n, bar.done) for names, n, bar in bars if "frames" in names] == [
        (("identity", "frames"), count, count)
    ]
    assert json.loads(path.read_text()) == json.loads(wanted)
    prepare(original / "videos", data)
    assert capsys.readouterr().err == ""


def test_other_data_are_not_resumed(config, tmp_path, capsys):
    """Check moved labels; resume_changed continues, and a checkpoint without digests is named."""
    run, _ = build(config, tmp_path)
    experiment = run.experiment
    saved = experiment.metadata()
    changed = dataclasses.replace(experiment, data_identity={"videos": "1" * 64, "frames": ""})
    differing = restore._identity_changes(changed, saved, "checkpoints/5")
    old = experiment.data_identity["videos"][:12]
    assert differing == {"digest of the ids and labels of the training videos": (old, "1" * 12)}
    with pytest.raises(
        ValueError, match="other settings:\n  digest of the ids and labels of .*-> 1"
    ):
        restore._report_changes(changed, differing, "checkpoints/5", "resumed from")
    assert restore._identity_changes(experiment, saved, "checkpoints/5") == {}
    del saved["data_identity"]
    assert restore._identity_changes(changed, saved, "checkpoints/5") == {}
    line = "checkpoints/5 does not say which videos it was trained on; the next checkpoint will\n"
    assert capsys.readouterr().out.endswith(line)


def test_another_machine_is_named(config, tmp_path, capsys):
    """Check the line for another number of cores; the twin resumes on the same machine."""
    run, _ = build(config, tmp_path)
    now = run.experiment.metadata()
    capsys.readouterr()
    restore._report_machine(now, now, "checkpoints/5")
    restore._report_machine({}, now, "checkpoints/5")  # of version 0.1.0
    assert capsys.readouterr().out == ""
    old = now["machine"] | {"devices": {"cpu": 1}, "cpu_cores": 96, "processes": 2}
    restore._report_machine({"machine": old}, now, "checkpoints/5")
    line = "checkpoints/5 was saved on 1 cpu with 96 cores in 2 processes, and this is "
    assert capsys.readouterr().out.startswith(line)


def test_many_shards_need_few_files(original, data):
    """Check that 40 open files are enough for two data sets of two shards each."""
    before = len(os.listdir("/proc/self/fd"))
    readers = [VideoDataset(str(data), split) for split in ("train", "validation")]
    for reader in readers:
        for video in range(len(reader)):
            reader.read_frames(video, [0])
    assert len(os.listdir("/proc/self/fd")) - before <= 2 + 3
    del reader, readers
    assert len(os.listdir("/proc/self/fd")) == before


def test_gs_has_no_states(monkeypatch):
    """Check that shards in Cloud Storage are not asked for one by one."""
    monkeypatch.setattr(video_dataset.os, "stat", None)
    dataset = object.__new__(VideoDataset)
    dataset._shard_paths, dataset._shard_lengths = ["gs://bucket/a"], [3]
    assert dataset._check_shards(None) == [None]

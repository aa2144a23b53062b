"""Tests preparation: every listed video is stored or listed as bad, and stopped runs resume."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dualpath_jax.commands.prepare import parse_arguments
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation import prepare as prepare_module
from dualpath_jax.data.preparation import shard_writer
from dualpath_jax.data.preparation.dry_run import check_videos
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset
from dualpath_jax.data.preparation.summary import SplitCounts, format_bytes
from dualpath_jax.data.preparation.video_decoder import DecodeLimits
from dualpath_jax.data.video_dataset import FRAME_FEATURES, VideoDataset
from dualpath_jax.runtime import files
from tests.helpers.video_files import gray_frames, noise_frames, write_video

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = PrepareOptions(
    short_side=24, videos_per_shard=2, num_workers=2, max_missing=0.2, progress=False
)


@pytest.fixture
def videos(tmp_path):
    """Make five training videos of 3, 4, 5, 6, 7 frames and two validation videos, all listed.

    Training video 1 is broken, and training video 3 is missing.
    """
    folder = tmp_path / "videos"
    for i in range(5):
        write_video(folder / f"clip {i}.mp4", 3 + i)
    (folder / "clip 1.mp4").write_bytes(b"no video")
    (folder / "clip 3.mp4").unlink()
    write_video(folder / "-v.mkv", gray_frames(2, 64, 48))
    write_video(folder / "w.webm", 2, codec="libvpx")
    lists = tmp_path / "lists"
    lists.mkdir()
    lines = [f"clip {i}.mp4,{'up' if i % 2 else 'down, slowly'}\n" for i in range(5)]
    lines = [line.replace("down, slowly", '"down, slowly"') for line in lines]
    (lists / "train.csv").write_text("".join(lines))
    (lists / "validation.csv").write_text('-v.mkv,up\nw.webm,"down, slowly"\n')
    return folder


def read_index(videos):
    return list_videos("csv", str(videos), str(videos.parent / "lists"))


def run(videos, out, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return prepare_dataset(read_index(videos), str(videos), str(out), options)


def brightness(dataset, video):
    records = dataset.read_frames(video, range(dataset.num_frames[video]))
    jpegs = [tf.io.parse_single_example(r, FRAME_FEATURES)["image"].numpy() for r in records]
    return [round(float(np.asarray(Image.open(io.BytesIO(jpeg))).mean())) for jpeg in jpegs]


def read_bad_entries(out):
    return [json.loads(line) for line in (out / "bad_videos.jsonl").read_text().splitlines()]


def read_files(out):
    """Return the bytes of every file except the lock, by relative path."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(pathlib.Path(out).rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_prepare(videos, tmp_path, capsys):
    out = tmp_path / "out"
    counts = run(videos, out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: listed 5, found 4, stored 3, bad 2 (")
    assert lines[1].startswith("validation: listed 2, found 2, stored 2, bad 0 (")
    assert lines[2].startswith("total: listed 7, found 6, stored 5, bad 2 (stored but truncated 0")
    assert list(counts) == ["train", "validation", "total"]
    total = counts["total"]
    assert (total.num_frames, total.truncated) == (3 + 5 + 7 + 2 + 2, 0)
    train = VideoDataset(str(out), "train")
    assert train.ids == ["clip 0.mp4", "clip 2.mp4", "clip 4.mp4"]
    assert train.class_names == ["down, slowly", "up"]
    np.testing.assert_array_equal(train.labels, [0, 0, 0])
    np.testing.assert_array_equal(train.num_frames, [3, 5, 7])
    np.testing.assert_array_equal(train.first_frame, [0, 3, 8])
    for video in range(3):
        expected = [10 + 12 * i for i in range(train.num_frames[video])]
        np.testing.assert_allclose(brightness(train, video), expected, atol=3)
    validation = VideoDataset(str(out), "validation")
    assert validation.ids == ["-v.mkv", "w.webm"]
    np.testing.assert_array_equal(validation.labels, [1, 0])
    source = tfds.builder_from_directory(str(out)).as_data_source("validation")
    assert [(row["height"], row["width"]) for row in source] == [(32, 24), (24, 32)]
    bad = read_bad_entries(out)
    assert [(entry["id"], entry["path"], entry["split"]) for entry in bad] == [
        ("clip 1.mp4", "clip 1.mp4", "train"),
        ("clip 3.mp4", "clip 3.mp4", "train"),
    ]
    assert bad[0]["reason"].startswith("cannot be opened as a video")
    assert bad[1]["reason"] == "file not found"


def test_rerun_changes_nothing(videos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    counts = run(videos, out)
    printed, before = capsys.readouterr().out, read_files(out)
    monkeypatch.setattr(prepare_module, "_store_shard", None)  # nothing may be stored again
    assert run(videos, out, num_workers=1) == counts
    assert capsys.readouterr().out == printed
    assert read_files(out) == before


def test_same_bytes_with_other_workers_and_after_an_error(videos, tmp_path, monkeypatch):
    run(videos, tmp_path / "whole", num_workers=1)
    out = tmp_path / "stopped"
    store, stored = prepare_module._store_shard, []

    def fail_in_second_shard(shard, outcomes, out_dir):
        if stored:
            outcomes = iter([next(outcomes)])  # ends in the middle of the shard
        stored.append(shard)
        store(shard, outcomes, out_dir)

    monkeypatch.setattr(prepare_module, "_store_shard", fail_in_second_shard)
    with pytest.raises(ValueError, match="shorter"):
        run(videos, out)
    assert sorted(os.listdir(out / "prepare")) == [
        "lock",
        "settings.json",
        "train-00000-of-00003.json",
    ]
    assert os.listdir(out / "frames") == ["frames-train.array_record-00000-of-00003"]
    with pytest.raises(FileNotFoundError, match="no prepared videos"):
        VideoDataset(str(out), "train")
    stored.clear()

    def count(shard, *rest):
        stored.append((shard.split, shard.index))
        store(shard, *rest)

    monkeypatch.setattr(prepare_module, "_store_shard", count)
    run(videos, out)
    assert stored == [("train", 1), ("train", 2), ("validation", 0)]
    assert read_files(out) == read_files(tmp_path / "whole")


def test_retry_bad(videos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, out)
    before = read_files(out)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_store_shard", None)
        run(videos, out, retry_bad=True)  # they are still bad
        assert read_files(out) == before
        for name in ("clip 1.mp4", "clip 3.mp4"):
            (videos / name).write_bytes((videos / "clip 4.mp4").read_bytes())
        run(videos, out)
        assert read_files(out) == before
    rewritten, decoded = [], []
    store, outcome = prepare_module._store_shard, prepare_module._make_outcome
    monkeypatch.setattr(
        prepare_module,
        "_store_shard",
        lambda s, *rest: (rewritten.append(s.index), store(s, *rest)),
    )
    monkeypatch.setattr(
        prepare_module,
        "_make_outcome",
        lambda v, result: (decoded.append(v.id), outcome(v, result))[1],
    )
    longer = DecodeLimits(seconds=50.0)
    with pytest.raises(ValueError, match=r"limits.seconds was 60.0, is 50.0"):
        run(videos, out, limits=longer)
    counts = run(videos, out, retry_bad=True, limits=longer)
    assert (counts["total"].stored, counts["total"].bad) == (7, 0)
    assert (rewritten, decoded) == ([0, 1], ["clip 1.mp4", "clip 3.mp4"])
    assert read_bad_entries(out) == []
    run(videos, tmp_path / "fresh", limits=longer)
    assert read_files(out) == read_files(tmp_path / "fresh")


def test_retry_bad_updates_the_reasons(videos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, out)
    assert "clip 3.mp4" in (out / "missing_videos.txt").read_text()
    (videos / "clip 3.mp4").write_bytes(b"no video")
    monkeypatch.setattr(prepare_module, "_store_shard", None)  # no frames are written
    assert run(videos, out, retry_bad=True)["total"].found == 7
    assert read_bad_entries(out)[1]["reason"].startswith("cannot be opened as a video")
    assert not (out / "missing_videos.txt").exists()
    monkeypatch.undo()
    run(videos, tmp_path / "fresh")
    assert read_files(out) == read_files(tmp_path / "fresh")


def test_copy_without_the_folder_prepare_is_refused(videos, tmp_path):
    """Check that a later run does not replace the frames of a copy and keep its tables."""
    out = tmp_path / "out"
    run(videos, out)
    for path in (out / "prepare").iterdir():
        path.unlink()
    before = read_files(out)
    with pytest.raises(ValueError, match="without the folder `prepare`.* Choose another --out"):
        run(videos, out, retry_bad=True)
    assert read_files(out) == before


def test_shard_that_is_stored_again_renews_the_tables(videos, tmp_path):
    out = tmp_path / "out"
    run(videos, out)
    (out / "prepare" / "train-00000-of-00003.json").unlink()
    (videos / "clip 1.mp4").write_bytes((videos / "clip 4.mp4").read_bytes())
    run(videos, out)
    assert VideoDataset(str(out), "train").ids == [f"clip {i}.mp4" for i in (0, 1, 2, 4)]
    run(videos, tmp_path / "fresh")
    assert read_files(out) == read_files(tmp_path / "fresh")


def test_interrupted_retry(videos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, out)
    (videos / "clip 1.mp4").write_bytes((videos / "clip 4.mp4").read_bytes())
    write = files.write_text

    def end_before_the_sidecar(path, text):
        if "-of-" in os.path.basename(path):
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", end_before_the_sidecar)
        with pytest.raises(KeyboardInterrupt):
            run(videos, out, retry_bad=True)
    with pytest.raises(FileNotFoundError, match="no prepared videos"):
        VideoDataset(str(out), "train")
    run(videos, out)
    run(videos, tmp_path / "fresh")
    assert read_files(out) == read_files(tmp_path / "fresh")


def test_moved_videos(videos, tmp_path):
    """Check that a run resumes with the same videos, by id and label, at other paths."""
    out = tmp_path / "out"
    run(videos, out)
    whole = read_files(out)
    os.remove(out / "dataset_info.json")
    os.remove(out / "prepare" / "validation-00000-of-00001.json")
    index = read_index(videos)
    for number, video in enumerate(index.splits["validation"]):
        (videos / f"of {number}").mkdir()
        (videos / video.path).rename(videos / f"of {number}" / video.path)
        video = dataclasses.replace(video, path=f"of {number}/{video.path}")
        index.splits["validation"][number] = video
    prepare_dataset(index, str(videos), str(out), OPTIONS)
    assert read_files(out) == whole


def test_other_settings_or_videos(videos, tmp_path):
    out = tmp_path / "out"
    run(videos, out)
    before = read_files(out)
    with pytest.raises(ValueError, match=r"other settings.*: quality was 90, is 80\. .*--out"):
        run(videos, out, quality=80)
    with pytest.raises(ValueError, match=r"limits.max_pixels was .* is 100\. Pass .*--retry_bad"):
        run(videos, out, limits=DecodeLimits(max_pixels=100))
    with open(videos.parent / "lists" / "train.csv", "a") as file:
        file.write("new.mp4,up\n")
    with pytest.raises(ValueError, match=r"train.videos was 5, is 6, train.list differs"):
        run(videos, out)
    assert read_files(out) == before


def test_wrong_folders(videos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to .*file.*check --out"):
        run(videos, tmp_path / "file")
    with pytest.raises(ValueError, match=r"copy it: gcloud storage rsync .* DIR gs://bucket/x$"):
        run(videos, "gs://bucket/x")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="none of the 7 listed videos is in .*empty.*--videos"):
        prepare_dataset(read_index(videos), str(empty), str(tmp_path / "out"), OPTIONS)
    out = tmp_path / "tiny"
    with pytest.raises(ValueError, match="none of the 7 videos could be stored"):
        run(videos, out, limits=DecodeLimits(max_pixels=10))
    reasons = [entry["reason"] for entry in read_bad_entries(out)]
    assert len(reasons) == 7
    assert "64x48 pixels, more than the limit of 10" in reasons


def test_truncated_and_empty_split(videos, tmp_path):
    path = write_video(videos / "clip 0.mp4", 30, options={"movflags": "faststart"}, gop=1)
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: len(data) * 2 // 3])
    for name in ("-v.mkv", "w.webm"):
        (videos / name).write_bytes(b"")
    counts = run(videos, tmp_path / "out")
    assert counts["validation"] == SplitCounts(listed=2, found=2, bad=2)
    assert counts["train"].truncated == 1
    rows = tfds.builder_from_directory(str(tmp_path / "out")).as_data_source("train")
    assert [bool(row["truncated"]) for row in rows] == [True, False, False]
    with pytest.raises(ValueError, match="no videos of split 'validation'.*: it has train"):
        VideoDataset(str(tmp_path / "out"), "validation")


def test_fps(videos, tmp_path):
    """Check that fps=5 stores half the frames of videos with 10 frames per second."""
    out = tmp_path / "out"
    counts = run(videos, out, fps=5)
    assert counts["total"].num_frames == 2 + 3 + 4 + 1 + 1
    train = VideoDataset(str(out), "train")
    np.testing.assert_array_equal(train.fps, [5, 5, 5])
    assert train.frame_format.fps == 5
    np.testing.assert_array_equal(train.num_frames, [2, 3, 4])
    np.testing.assert_allclose(brightness(train, 2), [10 + 12 * i for i in (0, 2, 4, 6)], atol=3)
    with pytest.raises(ValueError, match="other settings.*: fps was 5.0, is None"):
        run(videos, out)
    with pytest.raises(ValueError, match="fps is -1; it must be above 0"):
        run(videos, out, fps=-1)
    with pytest.raises(ValueError, match=r"short_side is 100000; it must be in 1\.\.65,500"):
        run(videos, tmp_path / "out", short_side=100_000)
    with pytest.raises(ValueError, match=r"quality is 96; it must be in 1\.\.95"):
        run(videos, out, quality=96)


def test_output_of_older_versions_is_accepted(videos, tmp_path):
    """Check that settings without `fps` are accepted, as older versions wrote them."""
    out = tmp_path / "out"
    counts = run(videos, out)
    path = out / "prepare" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("fps") is None
    path.write_text(json.dumps(settings))
    assert run(videos, out) == counts


# ----- full disk


class FullWriter:
    """Imitates array_record's writer on a disk of `room` bytes; it fails only in `close`."""

    room = 0

    def __init__(self, path, options):
        self._path = path
        self._records = []
        open(path, "wb").close()

    def write(self, record):
        self._records.append(record)

    def close(self):
        size = sum(map(len, self._records))
        if size > FullWriter.room:
            raise RuntimeError(f"write() failed: No space left on device; writing {self._path}")
        FullWriter.room -= size
        writer = ArrayRecordWriter(self._path, "group_size:1,uncompressed")
        for record in self._records:
            writer.write(record)
        writer.close()


def test_files_of_a_killed_worker(videos, tmp_path, monkeypatch):
    """Check that they are gone at the end, as after a runner's repetition; others' files stay."""
    out, store = tmp_path / "out", prepare_module._store_shards

    def store_after_a_killed_worker(*args):
        for name in ("x.incomplete-0123456789abcdef", "x.incomplete-mine"):
            (out / "frames" / name).write_bytes(b"")
        store(*args)

    monkeypatch.setattr(prepare_module, "_store_shards", store_after_a_killed_worker)
    run(videos, out)
    left = [path.name for path in out.rglob("*incomplete*")]
    assert left == ["x.incomplete-mine"]


def test_full_disk(videos, tmp_path, monkeypatch):
    """Check that the first shard is kept, and nothing of the second, which does not fit."""
    out = tmp_path / "out"
    monkeypatch.setattr(shard_writer, "ArrayRecordWriter", FullWriter)
    FullWriter.room = 3000  # 3 frames of train's first shard, but not 5 more
    match = (
        r"cannot write to '.*out': No space left on device\. 2 of 7 videos are finished and take "
        r"131 kB; the rest takes about 328 kB, and .* are free\. The finished shards are kept: "
        r"make room and run the same command"
    )
    with pytest.raises(OSError, match=match):
        run(videos, out)
    assert os.listdir(out / "frames") == ["frames-train.array_record-00000-of-00003"]
    assert sorted(os.listdir(out / "prepare"))[-1] == "train-00000-of-00003.json"
    assert not list(out.rglob("*incomplete*"))
    with pytest.raises(FileNotFoundError, match="no prepared videos"):
        VideoDataset(str(out), "train")
    FullWriter.room = 10**9
    run(videos, out)
    monkeypatch.undo()
    run(videos, tmp_path / "whole")
    assert read_files(out) == read_files(tmp_path / "whole")


def test_silently_lost_record(tmp_path, monkeypatch):
    class LossyWriter(FullWriter):
        def close(self):
            self._records = self._records[:-1]
            super().close()

    FullWriter.room = 10**9
    monkeypatch.setattr(shard_writer, "ArrayRecordWriter", LossyWriter)
    writer = shard_writer.ShardWriter(str(tmp_path / "shard"))
    for _ in range(3):
        writer.write(b"x")
    with pytest.raises(OSError, match="2 of 3 records written.*shard"):
        writer.commit()
    assert os.listdir(tmp_path) == []


def test_disk_full_for_the_tables(videos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = files.write_text

    def full(path, text):
        if path.endswith("class_names.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        write(path, text)

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(OSError, match="No space left on device. 7 of 7 videos are finished"):
        run(videos, out)
    with pytest.raises(FileNotFoundError, match="no prepared videos"):
        VideoDataset(str(out), "train")
    monkeypatch.undo()
    monkeypatch.setattr(prepare_module, "_store_shard", None)  # nothing is decoded again
    run(videos, out)
    assert len(VideoDataset(str(out), "train")) == 3


def test_limited_file_size(tmp_path):
    """Check the message where the system refuses a file that is larger than allowed."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    write_video(videos / "a" / "x.mkv", noise_frames(40), gop=1)
    index = list_videos("folder", str(videos))
    options = PrepareOptions(num_workers=1, progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large. 0 of 1 .* an unknown amount"):
            prepare_dataset(index, str(videos), str(out), options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(out / "frames") == []
    counts = prepare_dataset(index, str(videos), str(out), options)
    assert counts["total"].num_bytes > 100_000


def test_warning_of_a_short_disk(videos, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    run(videos, tmp_path / "out")
    assert "note: the disk of '" in (error := capsys.readouterr().err)
    assert "will be full before the end: 2 of 7 videos are finished" in error
    monkeypatch.undo()
    run(videos, tmp_path / "other")
    assert "will be full" not in capsys.readouterr().err


# ----- checking without storing


def test_check(videos, tmp_path, capsys, monkeypatch):
    """Check that `check_videos` reports what `prepare_dataset` would, and writes no file."""
    path = write_video(videos / "clip 0.mp4", 30, options={"movflags": "faststart"}, gop=1)
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: len(data) * 2 // 3])
    before = read_files(tmp_path)
    names = ("short_side", "num_workers", "max_missing", "progress")
    options = {name: getattr(OPTIONS, name) for name in names}
    checked = check_videos(read_index(videos), str(videos), **options)
    assert read_files(tmp_path) == before
    printed, error = capsys.readouterr()
    assert "note: 1 of the 5 videos of split 'train' are not in" in error
    lines = printed.splitlines()
    out = tmp_path / "out"
    counts = run(videos, out)
    assert list(checked) == list(counts)
    for name, count in counts.items():
        assert dataclasses.replace(checked[name], num_bytes=count.num_bytes) == count
        assert checked[name].num_bytes == pytest.approx(count.num_bytes, rel=0.1)
    truncated = (out / "truncated_videos.jsonl").read_text().splitlines()
    assert sorted(lines[:3]) == sorted(
        truncated + (out / "bad_videos.jsonl").read_text().splitlines()
    )
    assert json.loads(truncated[0])["path"] == "clip 0.mp4"
    assert json.loads(truncated[0])["truncated"].startswith("after ")
    assert re.fullmatch(r"the frames would take about \d+ kB", lines[-1])
    assert lines[3].startswith("train: listed 5, found 4, stored 3, bad 2 (stored but truncated 1")
    path = str(tmp_path / "no folder" / "x")
    with pytest.raises(OSError, match="no folder"):
        check_videos(read_index(videos), str(videos), **options, bad_videos=path)
    path = str(tmp_path / "bad ü.jsonl")
    options["max_missing"] = 0
    check_videos(read_index(videos), str(videos), **options, bad_videos=path)
    assert pathlib.Path(path).read_text().splitlines() == lines[:3]
    printed, error = capsys.readouterr()
    assert "{" not in printed
    assert "more than --max_missing=0 allows; preparing will stop with this error" in error


def test_check_of_splits_that_share_videos(tmp_path, capsys):
    videos, lists = tmp_path / "videos", tmp_path / "lists"
    lists.mkdir()
    write_video(videos / "wave" / "a.avi", 2)
    write_video(videos / "wave" / "b.avi", 3)
    for division, roles in {1: "12", 2: "21", 3: "11"}.items():
        text = f"a.avi {roles[0]}\nb.avi {roles[1]}\n"
        (lists / f"wave_test_split{division}.txt").write_text(text)
    index = list_videos("hmdb51", str(videos), str(lists))
    counts = check_videos(index, str(videos), num_workers=1, progress=False)
    assert (counts["test1"].num_frames, counts["test2"].num_frames) == (3, 2)
    assert counts["total"].num_frames == 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 + 1  # there is no test3
    assert lines[-1].startswith("the frames would take about ")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (9_440, "9.4 kB"),
        (350_000, "350 kB"),
        (1_240_000_000, "1.2 GB"),
        (1_620_000_000_000, "1.6 TB"),
    ],
)
def test_format_counts(number, expected):
    assert format_bytes(number) == expected


def command(videos, out, *more):
    return [
        sys.executable,
        "scripts/prepare_dataset.py",
        f"--videos={videos}",
        f"--annotations={videos.parent / 'lists'}",
        f"--out={out}",
        "--num_workers=1",
        "--short_side=24",
        "--max_missing=0.2",
        *more,
    ]


def test_command_line(videos, tmp_path):
    out = tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*more):
        return subprocess.run(
            command(videos, out, *more),
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    checked = call("--dataset=csv", "--check")
    assert checked.returncode == 1, checked.stderr  # some are bad
    assert not out.exists()
    assert "total: listed 7, found 6, stored 5, bad 2 (" in checked.stdout
    assert sum(line.startswith("{") for line in checked.stdout.splitlines()) == 2
    done = call("--dataset=csv")
    assert done.returncode == 0, done.stderr
    assert "total: listed 7, found 6, stored 5, bad 2 (" in done.stdout
    assert "\r" not in done.stderr  # no bar without a terminal
    failed = call("--dataset=csv", "--quality=50")
    assert failed.returncode == 2
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "quality was 90, is 50" in line
    unknown = call("--dataset=ssv3")
    assert unknown.returncode == 2
    assert "ssv2" in unknown.stderr
    assert "Traceback" not in unknown.stderr + failed.stderr + checked.stderr
    (videos / "clip 1.mp4").write_bytes((videos / "clip 0.mp4").read_bytes())
    (videos / "clip 3.mp4").write_bytes((videos / "clip 0.mp4").read_bytes())
    assert call("--dataset=csv", "--check").returncode == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--out is missing"),
        (["--out=x", "--bad_videos=x"], "--bad_videos needs --check"),
        (["--check", "--retry_bad"], "--retry_bad excludes --check"),
        (["--out=x", "--fps=0"], "argument --fps: 0.0 is not positive"),
        (["--out=x", "--fps=nan"], "argument --fps: nan is not positive"),
        (["--out=x", "--quality=high"], "argument --quality: invalid whole number value: 'high'"),
    ],
)
def test_contradicting_options(monkeypatch, capsys, more, message):
    arguments = ["prepare_dataset.py", "--dataset=csv", "--videos=x", *more]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as info:
        parse_arguments()
    assert info.value.code == 2
    assert message in capsys.readouterr().err


def test_killed_run_resumes(tmp_path):
    """Check that after SIGKILL the same command finishes; no video is lost or stored twice."""
    videos = tmp_path / "videos"
    listed = [f"{i}.mp4" for i in range(24)]
    for name in listed:
        write_video(videos / name, 60)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.csv").write_text("".join(f"{name},a\n" for name in listed))
    out = tmp_path / "out"
    code = (
        "if __name__ == '__main__':\n"
        "  import sys\n"
        "  from dualpath_jax.data.datasets.registry import list_videos\n"
        "  from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset\n"
        "  videos, lists, out = sys.argv[1:]\n"
        "  options = PrepareOptions(videos_per_shard=2, num_workers=1, progress=False)\n"
        "  prepare_dataset(list_videos('csv', videos, lists), videos, out, options)\n"
    )
    (tmp_path / "job.py").write_text(code)
    job = [sys.executable, str(tmp_path / "job.py"), str(videos), str(tmp_path / "lists"), str(out)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen(job, env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(out.glob("prepare/train-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = len(list(out.glob("prepare/train-*.json")))
    assert 1 <= finished < 12
    assert not (out / "dataset_info.json").exists()
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=300)
    assert "total: listed 24, found 24, stored 24, bad 0 (" in done.stdout, done.stderr
    dataset = VideoDataset(str(out), "train")
    assert dataset.ids == listed
    np.testing.assert_array_equal(dataset.first_frame, np.arange(24) * 60)
    assert not list(out.rglob("*incomplete*"))


def test_missing_videos(videos, tmp_path, capsys):
    """Check that missing videos are refused before decoding; the error names the first five."""
    names = [f"gone ü {i}.mp4" for i in range(6)]
    with open(videos.parent / "lists" / "train.csv", "a") as file:
        file.writelines(f"{name},up\n" for name in names)
    out = tmp_path / "out"
    match = (
        r"7 of the 11 videos of split 'train' are not in .*videos': 'clip 3.mp4', 'gone ü 0.mp4', "
        r"'gone ü 1.mp4', 'gone ü 2.mp4', 'gone ü 3.mp4', ...; that is more than --max_missing=0.6 "
        r"allows \(all missing ones are in .*out/missing_videos.txt\)"
    )
    with pytest.raises(ValueError, match=match):
        run(videos, out, max_missing=0.6)
    assert (out / "missing_videos.txt").read_text().splitlines() == ["clip 3.mp4", *names]
    assert os.listdir(out / "prepare") == ["lock"]
    assert os.listdir(out / "frames") == []
    counts = run(videos, out, max_missing=0.7)
    assert "note: 7 of the 11 videos of split 'train'" in capsys.readouterr().err
    assert (counts["train"].listed, counts["train"].found) == (11, 4)
    # The limit holds for each split: all of validation is only 2 of 13 videos.
    for name in ("-v.mkv", "w.webm"):
        (videos / name).unlink()
    with pytest.raises(ValueError, match="2 of the 2 videos of split 'validation'"):
        run(videos, tmp_path / "other", max_missing=0.7)
    with pytest.raises(ValueError, match=r"max_missing is 10; .*in \[0, 1\]"):
        run(videos, out, max_missing=10)


def test_splits_that_share_videos(tmp_path, capsys):
    """Check that each video of HMDB51, in three divisions, is decoded and stored once."""
    videos, lists, out = tmp_path / "videos", tmp_path / "lists", tmp_path / "out"
    lists.mkdir()
    names = ["a [b] (c).d.avi", "x y.avi", "-z.avi", "broken.avi"]
    for label, name in enumerate(["sword", "sword_exercise"]):
        for i, file in enumerate(names[:3]):
            write_video(videos / name / file, 2 + i + 3 * label)
        (videos / name / names[3]).write_bytes(b"no video")
        for division, roles in {1: "1121", 2: "1212", 3: "2110"}.items():
            lines = [f"{file} {role} \n" for file, role in zip(names, roles, strict=True)]
            (lists / f"{name}_test_split{division}.txt").write_text("".join(lines))
    index = list_videos("hmdb51", str(videos), str(lists))
    counts = prepare_dataset(index, str(videos), str(out), OPTIONS)
    assert list(counts) == ["train1", "test1", "train2", "test2", "train3", "test3", "total"]
    assert (counts["train1"].listed, counts["train1"].stored) == (6, 4)
    assert (counts["test2"].listed, counts["test2"].stored) == (4, 2)
    assert (counts["total"].listed, counts["total"].stored) == (8, 6)
    assert counts["total"].num_frames == 2 + 3 + 4 + 5 + 6 + 7
    assert capsys.readouterr().out.splitlines()[6].startswith("total: listed 8, found 8, stored 6")
    frames = tfds.builder_from_directory(str(out / "frames"))
    assert {name: split.num_examples for name, split in frames.info.splits.items()} == {"all": 27}
    expected = {"train1": "01", "test1": "2", "train2": "02", "test2": "1", "train3": "12"}
    for split, numbers in expected.items():
        dataset = VideoDataset(str(out), split)
        wanted = {f"{c}/{names[int(i)]}" for c in ("sword", "sword_exercise") for i in numbers}
        assert set(dataset.ids) == wanted
        assert len(dataset) == len(wanted)
        for video, id_ in enumerate(dataset.ids):
            label = int(id_.startswith("sword_exercise/"))
            count = 2 + names.index(id_.split("/")[1]) + 3 * label
            assert (dataset.labels[video], dataset.num_frames[video]) == (label, count)
            levels = [10 + 12 * i for i in range(count)]
            np.testing.assert_allclose(brightness(dataset, video), levels, atol=3)
    source = tfds.builder_from_directory(str(out)).as_data_source("test3")
    assert [row["num_frames"] for row in source] == [2, 5]
    assert [entry["split"] for entry in read_bad_entries(out)] == ["all", "all"]
    with pytest.raises(ValueError, match="no videos of split 'train4' in .*: it has train1, test1"):
        VideoDataset(str(out), "train4")

"""Turns listed videos into prepared ones: `prepare_dataset`. See `records` for what it writes.
Work is cut into shards of consecutive videos. A shard is finished when its JSON sidecar is there;
it holds what was stored and what was bad. An interrupted run goes on after its last finished shard,
and a finished one only prints its summary again, unless bad videos are to be tried once more.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from array_record.python.array_record_module import ArrayRecordReader

from dualpath_jax.data import video_dataset
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import shard_writer, summary
from dualpath_jax.data.preparation.summary import SplitCounts
from dualpath_jax.data.preparation.video_decoder import DecodeLimits, FrameFormat, video_to_jpegs
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool
from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.runtime.progress_bar import ProgressBar

# What became of a video: the records of its frames and its entry in the sidecar, or why not.
_Outcome: TypeAlias = tuple[Iterable[bytes], dict] | Failure


@dataclasses.dataclass(frozen=True)
class _Shard:
    split: str
    index: int
    count: int  # of the split
    videos: list[Video]

    def sidecar(self, out_dir: str) -> str:
        name = f"{self.split}-{self.index:05d}-of-{self.count:05d}.json"
        return os.path.join(out_dir, "prepare", name)

    def frames(self, out_dir: str) -> str:
        return video_dataset.frame_shard_path(out_dir, self.split, self.index, self.count)


def prepare_dataset(
    listing: DatasetIndex,
    videos_dir: str,
    out_dir: str,
    *,
    short_side: int = 256,
    quality: int = 90,
    fps: float | None = None,
    videos_per_shard: int = 512,
    num_workers: int | None = None,
    limits: DecodeLimits | None = None,
    max_missing: float = 0.1,
    retry_bad: bool = False,
    progress: bool = True,
) -> dict[str, SplitCounts]:
    """Decodes every listed video once and stores it; goes on where an earlier run was stopped.

    Args:
      listing: from `datasets.list_videos`.
      videos_dir: where relative paths of the listing start.
      out_dir: OUT, a local folder.
      short_side: pixels of the shorter side of stored frames; smaller videos keep their size.
      quality: of the JPEG frames, 1..95.
      fps: frames per second to store of videos that have more; by default all frames.
      videos_per_shard: 512 Kinetics clips make shards of about 3 GB, of which 510 hold them all.
      num_workers: decoding processes, by default one per core.
      limits: what one video may cost.
      max_missing: part of a split's videos, 0..1, whose files may be missing.
      retry_bad: decode what was bad in an earlier run again, whose limits may have been others.
      progress: show how far it is, see `bar`.

    Returns:
      Counts of each split and "total", as printed. OUT/bad_videos.jsonl lists the bad videos,
      OUT/truncated_videos.jsonl those stored in part.

    Raises:
      ValueError: OUT cannot be written, holds something prepared otherwise, or is in use; too many
        videos are missing (before any is decoded; OUT/missing_videos.txt lists them); none could be
        stored.
      OSError: the disk is full; finished shards are kept.
    """
    summary.check_prepare_options(short_side, quality, fps, max_missing)
    limits = limits or DecodeLimits()
    settings = _settings(listing, short_side, quality, fps, videos_per_shard, limits)
    shards = _cut(listing, videos_per_shard)
    with _claimed(out_dir):
        _check_same(out_dir, settings, retry_bad)
        todo = []  # (shard, its videos that are to be decoded)
        for shard in shards:
            if not os.path.exists(shard.sidecar(out_dir)):
                todo.append((shard, shard.videos))
            elif retry_bad and (bad := _bad_videos(shard, out_dir)):
                todo.append((shard, bad))
        with _full_disk_explained(out_dir, shards):
            if todo:
                _refuse_missing(listing, videos_dir, out_dir, max_missing)
            shard_writer.write_atomically(_settings_path(out_dir), json.dumps(settings, indent=1))
            arguments = (
                (os.path.join(videos_dir, video.path), short_side, quality, limits, fps)
                for _, videos in todo
                for video in videos
            )
            total = sum(len(shard.videos) for shard in shards)
            done = total - sum(len(videos) for _, videos in todo)
            shown = ProgressBar(total, "prepare", "videos", done, progress)
            with shown, WorkerPool(num_workers or num_cores(), limits) as pool:
                results = _counted(pool.map(video_to_jpegs, arguments), shown)
                for i, (shard, videos) in enumerate(todo):
                    if not os.path.exists(shard.sidecar(out_dir)):
                        outcomes = _decoded(shard, results)
                    else:
                        outcomes = _retried(shard, videos, results, out_dir)
                    if outcomes:
                        _mark_unfinished(shard, out_dir)
                        _store_shard(shard, outcomes, out_dir)
                    if i == 0:
                        _note_short_disk(out_dir, shards)
            return _finish(listing, shards, out_dir, FrameFormat(short_side, quality, fps))


def _settings(
    listing: DatasetIndex,
    short_side: int,
    quality: int,
    fps: float | None,
    videos_per_shard: int,
    limits: DecodeLimits,
) -> dict:
    """What decides the content of OUT, as JSON."""
    settings = {
        "format": 2,
        "short_side": short_side,
        "quality": quality,
        "fps": fps and float(fps),
        "videos_per_shard": videos_per_shard,
        "classes": _digest(listing.class_names),
    }
    settings |= {f"limits.{name}": value for name, value in dataclasses.asdict(limits).items()}
    for split, videos in listing.splits.items():
        settings[f"{split}.videos"] = len(videos)
        # Not their paths: a folder may move, and a file come late.
        settings[f"{split}.list"] = _digest([(video.id, video.label) for video in videos])
    return settings


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _cut(listing: DatasetIndex, videos_per_shard: int) -> list[_Shard]:
    shards = []
    for split, videos in listing.videos_to_store().items():
        starts = range(0, len(videos), videos_per_shard)
        for i, start in enumerate(starts):
            shard = _Shard(split, i, len(starts), videos[start : start + videos_per_shard])
            shards.append(shard)
    return shards


@contextlib.contextmanager
def _claimed(out_dir: str) -> Iterator[None]:
    """OUT exists, is writable, and no other process works on it."""
    if "://" in out_dir:
        raise ValueError(
            f"--out={out_dir} is no local folder: prepare into one, --out=DIR, then copy it: "
            f"gcloud storage rsync --recursive --exclude='^prepare/' DIR {out_dir}"
        )
    state = os.path.join(out_dir, "prepare")
    try:
        os.makedirs(state, exist_ok=True)
        os.makedirs(os.path.join(out_dir, "frames"), exist_ok=True)
        lock = open(os.path.join(state, "lock"), "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ValueError(f"cannot write to {out_dir!r}: {error.strerror}; check --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is preparing videos in {out_dir!r}") from None
        yield


def _settings_path(out_dir: str) -> str:
    return os.path.join(out_dir, "prepare", "settings.json")


def _check_same(out_dir: str, new: dict, with_any_limits: bool) -> None:
    """ValueError that tells the changes if OUT was prepared with other settings."""
    if not os.path.exists(_settings_path(out_dir)):
        if os.path.exists(os.path.join(out_dir, "dataset_info.json")):
            raise ValueError(
                f"{out_dir!r} is a prepared data set, without the folder `prepare_dataset` by which it was "
                "made (a copy, perhaps): choose another --out, or delete this one"
            )
        return
    with open(_settings_path(out_dir), encoding="utf-8") as file:
        old = json.load(file)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if with_any_limits:
        names = [name for name in names if not name.startswith("limits.")]
    if names:
        changes = ", ".join(_change(name, old, new) for name in names)
        remedy = "Choose another --out, or delete this one"
        if all(name.startswith("limits.") for name in names):
            remedy = "Pass the limits that it has, or --retry_bad to try its bad videos with these"
        raise ValueError(
            f"{out_dir!r} was prepared with other settings or another list of videos: {changes}. "
            f"{remedy}"
        )


def _change(name: str, old: dict, new: dict) -> str:
    if name == "classes" or name.endswith(".list"):
        return f"{name} is another"  # of its values there are digests alone
    return f"{name} was {old.get(name)}, is {new.get(name)}"


def _refuse_missing(
    listing: DatasetIndex, videos_dir: str, out_dir: str, max_missing: float
) -> None:
    """Tells and lists which files are not there; ValueError if all, or too many of a split."""
    path = os.path.join(out_dir, "missing_videos.txt")
    missing = summary.find_missing_videos(listing, videos_dir)
    if not missing:
        _remove(path)  # of an earlier run
        return
    shard_writer.write_atomically(path, "".join(name + "\n" for name in sorted(missing)))
    for message, refused in summary.missing_in_splits(listing, videos_dir, missing, max_missing):
        message += f" (all missing ones are in {path})"
        if refused:
            raise ValueError(f"{message}. Check --videos, get the rest, or allow more")
        print(f"note: {message}", file=sys.stderr)


def _counted(results: Iterator, shown: ProgressBar) -> Iterator:
    for result in results:
        shown.update()
        yield result


def _bad_videos(shard: _Shard, out_dir: str) -> list[Video]:
    """Of a finished shard."""
    bad = {entry["id"] for entry in _read_sidecar(shard, out_dir)["bad"]}
    return [video for video in shard.videos if video.id in bad]


def _decoded(shard: _Shard, results: Iterator) -> Iterator[_Outcome]:
    """Of each video of a shard, from the results of `video_to_jpegs`."""
    # The videos first: when they are done, no result of the next shard is taken.
    return (_outcome(*pair) for pair in zip(shard.videos, results, strict=False))


def _outcome(video: Video, result: Any) -> _Outcome:
    if isinstance(result, Failure):
        return result
    jpegs, facts = result
    return map(shard_writer.encode_frame, jpegs), summary.stored_entry(video, facts)


def _retried(
    shard: _Shard, bad: list[Video], results: Iterator, out_dir: str
) -> Iterator[_Outcome] | None:
    """Of each video of a finished shard, the bad ones decoded again; None: they all still are."""
    failures = []
    for _ in bad:
        result = next(results)
        if not isinstance(result, Failure):
            return _joined(shard, itertools.chain(failures, [result], results), out_dir)
        failures.append(result)
    _note_reasons(shard, bad, failures, out_dir)
    return None


def _note_reasons(shard: _Shard, bad: list[Video], failures: list[Failure], out_dir: str) -> None:
    """Why the bad videos of a finished shard are bad now; its frames stay."""
    sidecar = _read_sidecar(shard, out_dir)
    pairs = zip(bad, failures, strict=True)
    entries = [summary.bad_entry(shard.split, *pair) for pair in pairs]
    if entries != sidecar["bad"]:
        _remove(os.path.join(out_dir, "dataset_info.json"))  # `_finish` writes the lists anew
        text = json.dumps(sidecar | {"bad": entries})
        shard_writer.write_atomically(shard.sidecar(out_dir), text)


def _joined(shard: _Shard, results: Iterator, out_dir: str) -> Iterator[_Outcome]:
    """As `_decoded`, but what the shard has stored is read from it."""
    entries = _read_sidecar(shard, out_dir)["stored"]
    reader = ArrayRecordReader(shard.frames(out_dir)) if entries else None
    pairs = zip(_rows(entries), entries, strict=True)
    stored = {row.id: (row, entry) for row, entry in pairs}

    def outcome(video):
        if video.id not in stored:
            return _outcome(video, next(results))
        row, entry = stored[video.id]
        return reader.read(list(range(row.first_frame, row.first_frame + row.num_frames))), entry

    return map(outcome, shard.videos)


def _mark_unfinished(shard: _Shard, out_dir: str) -> None:
    """Before its frames change: a run that ends meanwhile decodes the shard anew."""
    _remove(os.path.join(out_dir, "dataset_info.json"))
    _remove(shard.sidecar(out_dir))


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _store_shard(shard: _Shard, outcomes: Iterator[_Outcome], out_dir: str) -> None:
    """Writes the frames of a shard and then, as the mark that it is finished, its sidecar."""
    stored, bad, writer = [], [], None
    with contextlib.ExitStack() as stack:  # commits the frames, or discards them on an exception
        for video, outcome in zip(shard.videos, outcomes, strict=True):
            if isinstance(outcome, Failure):
                bad.append(summary.bad_entry(shard.split, video, outcome))
                continue
            frames, entry = outcome
            writer = writer or stack.enter_context(shard_writer.ShardWriter(shard.frames(out_dir)))
            for frame in frames:
                writer.write(frame)
            stored.append(entry)
    sidecar = json.dumps({"stored": stored, "bad": bad})
    shard_writer.write_atomically(shard.sidecar(out_dir), sidecar)


def _finish(
    listing: DatasetIndex, shards: list[_Shard], out_dir: str, frame_format: FrameFormat
) -> dict[str, SplitCounts]:
    """Writes tables and ledger from the sidecars, unless they are there; prints the summary."""
    stored = {name: [] for name in listing.videos_to_store()}
    frame_shards = {name: [] for name in listing.videos_to_store()}
    bad, truncated = [], []
    for shard in shards:
        sidecar = _read_sidecar(shard, out_dir)
        stored[shard.split] += sidecar["stored"]
        frame_shards[shard.split].append(sum(entry["num_frames"] for entry in sidecar["stored"]))
        bad += sidecar["bad"]
        paths = {video.id: video.path for video in shard.videos}
        truncated += [
            summary.truncated_entry(shard.split, paths[entry["id"]], entry)
            for entry in sidecar["stored"]
            if entry["truncated"]
        ]
    counts = summary.count_splits(listing, stored, bad)
    if not os.path.exists(os.path.join(out_dir, "dataset_info.json")):
        for name, entries in (("bad_videos", bad), ("truncated_videos", truncated)):
            path = os.path.join(out_dir, f"{name}.jsonl")
            shard_writer.write_atomically(path, "".join(map(summary.json_line, entries)))
        if counts["total"].stored:
            tables = {}
            for split, videos in listing.splits.items():
                ids = {video.id for video in videos}
                rows = _rows(stored[listing.storage_split(split)])
                tables[split] = [row for row in rows if row.id in ids]
            names = listing.class_names
            shard_writer.write_tables(out_dir, names, tables, frame_shards, frame_format)
    summary.print_counts(counts)
    if not counts["total"].stored:
        raise ValueError(
            f"none of the {len(bad)} videos could be stored; "
            f"the reasons are in {os.path.join(out_dir, 'bad_videos.jsonl')}"
        )
    return counts


def _read_sidecar(shard: _Shard, out_dir: str) -> dict:
    with open(shard.sidecar(out_dir), encoding="utf-8") as file:
        return json.load(file)


def _rows(stored: list[dict]) -> Iterator[shard_writer.VideoRow]:
    first_frame = 0
    for entry in stored:
        values = {name: value for name, value in entry.items() if name != "num_bytes"}
        values["truncated"] = bool(entry["truncated"])
        yield shard_writer.VideoRow(**values, first_frame=first_frame)
        first_frame += entry["num_frames"]


@contextlib.contextmanager
def _full_disk_explained(out_dir: str, shards: list[_Shard]) -> Iterator[None]:
    """Turns the error of a full disk into one that tells how matters stand."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        need, free, standing = _disk(out_dir, shards)
        raise OSError(
            f"cannot write to {out_dir!r}: {os.strerror(error.errno)}. {standing}; the rest takes "
            f"{'about ' + summary.format_counts(need) if need else 'an unknown amount'}, and "
            f"{summary.format_counts(free)} are free. The finished shards are kept: make room and run "
            "the same command again, or start anew with another --out and a smaller --short_side, "
            "--quality or --fps"
        ) from None


def _note_short_disk(out_dir: str, shards: list[_Shard]) -> None:
    """Says so if by the first shards the disk will not do."""
    need, free, standing = _disk(out_dir, shards)
    if need > free:
        print(
            f"note: the disk of {out_dir!r} will be full before the end: {standing}; the rest "
            f"takes about {summary.format_counts(need)}, and {summary.format_counts(free)} are free",
            file=sys.stderr,
        )


def _disk(out_dir: str, shards: list[_Shard]) -> tuple[float, int, str]:
    """Bytes that the rest will need (0 if unknown), bytes free, and a phrase on what is stored."""
    finished = [shard for shard in shards if os.path.exists(shard.sidecar(out_dir))]
    done = sum(len(shard.videos) for shard in finished)
    total = sum(len(shard.videos) for shard in shards)
    paths = [shard.frames(out_dir) for shard in finished]
    size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    need = size / done * (total - done) if done else 0.0
    standing = f"{done} of {total} videos are finished and take {summary.format_counts(size)}"
    return need, shutil.disk_usage(out_dir).free, standing

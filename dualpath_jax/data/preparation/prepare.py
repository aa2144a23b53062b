"""Decodes listed videos once and stores their frames: `prepare_dataset`.

`video_dataset` documents the files of a prepared data set. The work is divided into shards of
consecutive videos. A shard is finished when its JSON sidecar exists, which lists the stored and the
bad videos. An interrupted run resumes after its last finished shard. A run on a finished data set
only prints its summary again, unless bad videos are to be retried.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import pickle
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from array_record.python.array_record_module import ArrayRecordReader

from dualpath_jax.data import dataset_metadata, video_dataset
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import beam_runner, shard_writer, summary
from dualpath_jax.data.preparation.summary import SplitCounts
from dualpath_jax.data.preparation.video_decoder import DecodeLimits, video_to_jpegs
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool
from dualpath_jax.data.video_source import FrameFormat
from dualpath_jax.runtime import file_lock, files
from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.runtime.progress_bar import ProgressBar
from dualpath_jax.runtime.safe_read import read_json

# Files and folders that a preparation writes in OUT, as patterns of `fnmatch`.
_OUT_ENTRIES = (
    *("prepare", "frames", "class_names.json", "frame_format.json", "identity.json"),
    *("dataset_info.json", "features.json", "*.labels.txt", "missing_videos.txt"),
    *("bad_videos.jsonl", "truncated_videos.jsonl", "*videos-*.array_record-*"),
)
_NO_FRAMES = dataset_metadata.ShardDigest().describe(num_bytes=0)
# The result for one video: its frame records and its entry in the sidecar, or the failure.
_Outcome: TypeAlias = tuple[Iterable[bytes], dict] | Failure


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Holds the options of `prepare_dataset`.

    Attributes:
      short_side: pixels of the shorter side of stored frames, 1..65,500; smaller videos keep their
        size.
      quality: JPEG quality of the stored frames, 1..95.
      fps: frames per second to store of videos that have more, above 0; None stores all frames.
      frame_rate: frames per second of folders of images, above 0; None: unknown.
      videos_per_shard: videos in each shard, at least 1. 512 Kinetics clips make a shard of a few
        gigabytes.
      num_workers: number of decoding processes, at least 1; None starts one per core. With a runner
        on a cluster, it is the number for each shard, and None starts one.
      limits: limits on the cost of decoding one video.
      max_missing: fraction of the videos of a split, 0..1, whose files may be missing.
      retry_bad: decode the bad videos of an earlier run again; `limits` may then differ from those
        of that run.
      progress: show progress, see `ProgressBar`.
      runner: where shards are decoded and stored, one of `beam_runner.RUNNERS`. All workers must
        see the folders of videos and OUT under the same paths.
      beam_options: options of Beam and of the runner, as on a command line.
    """

    short_side: int = 256
    quality: int = 90
    fps: float | None = None
    frame_rate: float | None = None
    videos_per_shard: int = 512
    num_workers: int | None = None
    limits: DecodeLimits = DecodeLimits()
    max_missing: float = 0.1
    retry_bad: bool = False
    progress: bool = True
    runner: str = beam_runner.LOCAL
    beam_options: str = ""


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Describes shard `index` of the `count` shards of a split, and names its files."""

    split: str
    index: int
    count: int
    videos: list[Video]

    def sidecar_path(self, out_dir: str) -> str:
        name = f"{self.split}-{self.index:05d}-of-{self.count:05d}.json"
        return os.path.join(out_dir, "prepare", name)

    def frames_path(self, out_dir: str) -> str:
        return video_dataset.frame_shard_path(out_dir, self.split, self.index, self.count)

    def is_finished(self, out_dir: str) -> bool:
        return os.path.exists(self.sidecar_path(out_dir))


# Shards with work left, each with those of its videos that are to be decoded.
_Todo: TypeAlias = list[tuple[_Shard, list[Video]]]


def prepare_dataset(
    index: DatasetIndex,
    videos_dir: str,
    out_dir: str,
    options: PrepareOptions = PrepareOptions(),
) -> dict[str, SplitCounts]:
    """Decode every listed video once and store its frames; resume an interrupted run.

    Args:
      index: the listed videos, from `registry.list_videos`.
      videos_dir: the folder that relative paths of the index start from.
      out_dir: the local folder to write, called OUT below.
      options: format of the stored frames, limits and behavior.

    Returns:
      The printed counts: split name, or "total" -> its counts. OUT/bad_videos.jsonl lists the bad
      videos, OUT/truncated_videos.jsonl those stored in part.

    Raises:
      ValueError: an option is out of range; the runner is not installed; OUT cannot be written, was
        prepared with other settings, or is in use; too many videos are missing (checked before any
        is decoded; OUT/missing_videos.txt lists them); no video could be stored.
      OSError: the disk is full, or the runner failed; finished shards are kept.
    """
    # Check the options and divide the videos into shards.
    summary.check_prepare_options(
        options.short_side, options.quality, options.fps, options.max_missing
    )
    pipeline = beam_runner.new_pipeline(
        options.runner, options.beam_options, options.num_workers or num_cores()
    )
    settings = _build_settings(index, options)
    shards = _split_into_shards(index, options.videos_per_shard)
    with _lock_out_dir(out_dir):
        # Find the work that earlier runs have left.
        _check_same_settings(out_dir, settings, ignore_limits=options.retry_bad)
        todo = _find_unfinished(shards, out_dir, options.retry_bad)
        writes = todo or not _is_complete(out_dir)
        lock = file_lock.lock_against_readers(out_dir) if writes else contextlib.nullcontext()
        with lock, _explain_full_disk(out_dir, shards):
            # Refuse missing videos before the long work; record the settings.
            if todo:
                _check_missing_videos(index, videos_dir, out_dir, options.max_missing)
            files.write_text(_settings_path(out_dir), json.dumps(settings, indent=1))
            # Decode the videos and store their frames.
            if todo and pipeline:
                _store_on_beam(pipeline, todo, videos_dir, out_dir, options)
            else:
                _store_shards(todo, shards, videos_dir, out_dir, options)
            # Write the video tables and the lists of bad videos; print the counts.
            return _write_results(index, shards, out_dir, options)


def _is_complete(out_dir: str) -> bool:
    """Return whether tables, metadata and identity have been written."""
    info = os.path.join(out_dir, "dataset_info.json")
    return os.path.exists(info) and os.path.exists(dataset_metadata.identity_path(out_dir))


def _build_settings(index: DatasetIndex, options: PrepareOptions) -> dict:
    """Return the settings that decide the content of OUT, as JSON values."""
    settings = {
        "format": 2,
        "short_side": options.short_side,
        "quality": options.quality,
        "fps": options.fps and float(options.fps),
        "frame_rate": options.frame_rate and float(options.frame_rate),
        "videos_per_shard": options.videos_per_shard,
        "classes": _digest(index.class_names),
    }
    limits = dataclasses.asdict(options.limits)
    settings |= {f"limits.{name}": value for name, value in limits.items()}
    for split, videos in index.splits.items():
        settings[f"{split}.videos"] = len(videos)
        # Paths are left out: a folder may be moved, and a file may arrive late.
        settings[f"{split}.list"] = _digest([(video.id, video.label) for video in videos])
    return settings


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _split_into_shards(index: DatasetIndex, videos_per_shard: int) -> list[_Shard]:
    shards = []
    for split, videos in index.videos_to_store().items():
        starts = range(0, len(videos), videos_per_shard)
        for i, start in enumerate(starts):
            shard = _Shard(split, i, len(starts), videos[start : start + videos_per_shard])
            shards.append(shard)
    return shards


@contextlib.contextmanager
def _lock_out_dir(out_dir: str) -> Iterator[None]:
    """Create OUT and lock it against other processes; ValueError if that fails.

    What killed processes have not finished is removed at both ends: those of an earlier run, and
    those that a runner has started again.
    """
    if "://" in out_dir:
        raise ValueError(
            f"--out={out_dir} is not a local folder. Prepare into one, --out=DIR, then copy it: "
            f"gcloud storage rsync --recursive --exclude='^prepare/' DIR {out_dir}"
        )
    state_dir = os.path.join(out_dir, "prepare")
    files.check_no_links(out_dir, _OUT_ENTRIES)
    try:
        os.makedirs(state_dir, exist_ok=True)
        os.makedirs(os.path.join(out_dir, "frames"), exist_ok=True)
        lock = files.open_in_place(os.path.join(state_dir, "lock"), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ValueError(f"cannot write to {out_dir!r}: {error.strerror}; check --out") from None
    with open(lock, "r+"):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is preparing videos in {out_dir!r}") from None
        _remove_incomplete(out_dir)
        try:
            yield
        finally:
            _remove_incomplete(out_dir)


def _remove_incomplete(out_dir: str) -> None:
    for folder in (out_dir, os.path.join(out_dir, "prepare")):
        files.remove_incomplete(folder)


def _settings_path(out_dir: str) -> str:
    return os.path.join(out_dir, "prepare", "settings.json")


def _check_same_settings(out_dir: str, new: dict, ignore_limits: bool) -> None:
    """Raise a ValueError that lists the changes if OUT was prepared with other settings."""
    if not os.path.exists(_settings_path(out_dir)):
        if os.path.exists(os.path.join(out_dir, "dataset_info.json")):
            raise ValueError(
                f"{out_dir!r} holds a prepared data set without the folder `prepare`, which a "
                "later run needs (copies may lack it). Choose another --out, or delete this one"
            )
        return
    old = read_json(_settings_path(out_dir), dict)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if ignore_limits:
        names = [name for name in names if not name.startswith("limits.")]
    if names:
        changes = ", ".join(_describe_change(name, old, new) for name in names)
        remedy = "Choose another --out, or delete this one"
        if all(name.startswith("limits.") for name in names):
            remedy = (
                "Pass the limits of the earlier run, or pass --retry_bad to decode its bad videos "
                "again with the new limits"
            )
        raise ValueError(
            f"{out_dir!r} was prepared with other settings or another list of videos: {changes}. "
            f"{remedy}"
        )


def _describe_change(name: str, old: dict, new: dict) -> str:
    if name == "classes" or name.endswith(".list"):
        return f"{name} differs"  # the values are only digests
    return f"{name} was {old.get(name)}, is {new.get(name)}"


def _find_unfinished(shards: list[_Shard], out_dir: str, retry_bad: bool) -> _Todo:
    todo = []
    for shard in shards:
        if not shard.is_finished(out_dir):
            todo.append((shard, shard.videos))
        elif retry_bad and (bad := _read_bad_videos(shard, out_dir)):
            todo.append((shard, bad))
    return todo


def _read_bad_videos(shard: _Shard, out_dir: str) -> list[Video]:
    """Return the bad videos of a finished shard."""
    bad_ids = {entry["id"] for entry in _read_sidecar(shard, out_dir)["bad"]}
    return [video for video in shard.videos if video.id in bad_ids]


def _check_missing_videos(
    index: DatasetIndex, videos_dir: str, out_dir: str, max_missing: float
) -> None:
    """Print and list the missing files; ValueError if all are missing, or too many of a split."""
    path = os.path.join(out_dir, "missing_videos.txt")
    missing = summary.find_missing_videos(index, videos_dir)
    if not missing:
        _remove_if_there(path)  # the list of an earlier run
        return
    files.write_text(path, "".join(name + "\n" for name in sorted(missing)))
    for message, refused in summary.describe_missing_videos(
        index, videos_dir, missing, max_missing
    ):
        message += f" (all missing ones are in {path})"
        if refused:
            raise ValueError(f"{message}. Check --videos, get the missing files, or allow more")
        print(f"note: {message}", file=sys.stderr)


def _store_shards(
    todo: _Todo, shards: list[_Shard], videos_dir: str, out_dir: str, options: PrepareOptions
) -> None:
    """Decode the videos in `todo` and store their shards, in order."""
    arguments = (
        (
            os.path.join(videos_dir, video.path),
            options.short_side,
            options.quality,
            options.limits,
            options.fps,
            options.frame_rate,
        )
        for _, videos in todo
        for video in videos
    )
    total = sum(len(shard.videos) for shard in shards)
    done = total - sum(len(videos) for _, videos in todo)
    bar = ProgressBar(total, "prepare", "videos", done, options.progress)
    with bar, WorkerPool(options.num_workers or num_cores(), options.limits) as pool:
        results = _advance_bar(pool.map(video_to_jpegs, arguments), bar)
        for i, (shard, videos) in enumerate(todo):
            if not shard.is_finished(out_dir):
                outcomes = _decode_outcomes(shard, results)
            else:
                outcomes = _retry_bad_videos(shard, videos, results, out_dir)
            if outcomes:
                _mark_unfinished(shard, out_dir)
                _store_shard(shard, outcomes, out_dir)
            if i == 0:
                _warn_of_short_disk(out_dir, shards)


def _store_on_beam(
    pipeline: Any, todo: _Todo, videos_dir: str, out_dir: str, options: PrepareOptions
) -> None:
    """Decode the videos in `todo` and store their shards on the workers of a runner."""
    shards = [shard for shard, _ in todo]
    videos_dir, out_dir = os.path.abspath(videos_dir), os.path.abspath(out_dir)
    paths = (os.path.join(videos_dir, video.path) for shard in shards for video in shard.videos)
    known_path = next(filter(os.path.exists, paths), videos_dir)
    each = 1 if options.runner == "direct" else options.num_workers or 1
    options = dataclasses.replace(options, num_workers=each, progress=False)
    # The folder's lock removes this file if a killed run leaves it.
    path = os.path.join(out_dir, "prepare", f"shards.incomplete-{secrets.token_hex(8)}.pickle")
    with open(path, "xb") as file:
        pickle.dump((shards, known_path, videos_dir, out_dir, options), file)
    print(f"note: --runner={options.runner} stores {len(shards)} shards", file=sys.stderr)
    try:
        beam_runner.map_shards(pipeline, store_shard, path, len(shards))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise OSError(
            f"--runner={options.runner} failed: {error.strerror or error}. The finished shards are "
            "kept: run the same command again"
        ) from None
    if unfinished := [shard for shard in shards if not shard.is_finished(out_dir)]:
        raise OSError(
            f"--runner={options.runner} ended before {len(unfinished)} of {len(shards)} shards "
            "were stored: run the same command again"
        )


def store_shard(work: str, number: int) -> None:
    """Decode and store a shard, on a worker of a runner; do nothing if it is finished.

    Args:
      work: the file that `_store_on_beam` wrote.
      number: position of the shard in it.

    Raises:
      OSError: this worker does not see the folders of the program that started it.
    """
    try:
        with open(work, "rb") as file:
            shards, known_path, videos_dir, out_dir, options = pickle.load(file)
        os.stat(known_path)
    except OSError as error:
        raise OSError(
            f"the worker {socket.gethostname()} cannot read {error.filename} ({error.strerror}): "
            "--videos and --out must be folders that all workers see under the same paths"
        ) from None
    todo = _find_unfinished([shards[number]], out_dir, options.retry_bad)
    _store_shards(todo, [shards[number]], videos_dir, out_dir, options)


def _advance_bar(results: Iterator, bar: ProgressBar) -> Iterator:
    for result in results:
        bar.update()
        yield result


def _decode_outcomes(shard: _Shard, results: Iterator) -> Iterator[_Outcome]:
    """Yield the outcome of each video of a shard, from the results of `video_to_jpegs`."""
    # `zip` takes the videos first: after the last one it takes no result of the next shard.
    return (_make_outcome(*pair) for pair in zip(shard.videos, results, strict=False))


def _make_outcome(video: Video, result: Any) -> _Outcome:
    if isinstance(result, Failure):
        return result
    jpegs, info = result
    return map(shard_writer.encode_frame, jpegs), summary.build_stored_entry(video, info)


def _retry_bad_videos(
    shard: _Shard, bad: list[Video], results: Iterator, out_dir: str
) -> Iterator[_Outcome] | None:
    """Return the outcomes of all videos of a finished shard, whose bad ones are decoded again.

    If all of them are still bad, it updates their reasons and returns None: the frames stay.
    """
    failures = []
    for _ in bad:
        result = next(results)
        if not isinstance(result, Failure):
            return _merge_outcomes(shard, itertools.chain(failures, [result], results), out_dir)
        failures.append(result)
    _update_reasons(shard, bad, failures, out_dir)
    return None


def _update_reasons(shard: _Shard, bad: list[Video], failures: list[Failure], out_dir: str) -> None:
    """Replace the reasons of the bad videos in the sidecar of a finished shard."""
    sidecar = _read_sidecar(shard, out_dir)
    pairs = zip(bad, failures, strict=True)
    entries = [summary.build_bad_entry(shard.split, *pair) for pair in pairs]
    if entries != sidecar["bad"]:
        # Without this file `_write_results` writes the lists again.
        _remove_if_there(os.path.join(out_dir, "dataset_info.json"))
        text = json.dumps(sidecar | {"bad": entries})
        files.write_text(shard.sidecar_path(out_dir), text)


def _merge_outcomes(shard: _Shard, results: Iterator, out_dir: str) -> Iterator[_Outcome]:
    """Yield the outcomes of all videos of a shard: stored frames, or else the next result."""
    entries = _read_sidecar(shard, out_dir)["stored"]
    reader = ArrayRecordReader(shard.frames_path(out_dir)) if entries else None
    pairs = zip(_video_rows(entries), entries, strict=True)
    stored = {row.id: (row, entry) for row, entry in pairs}

    def find_outcome(video):
        if video.id not in stored:
            return _make_outcome(video, next(results))
        row, entry = stored[video.id]
        return reader.read(list(range(row.first_frame, row.first_frame + row.num_frames))), entry

    return map(find_outcome, shard.videos)


def _mark_unfinished(shard: _Shard, out_dir: str) -> None:
    """Remove the marks of finished work before the frames of a shard change.

    A run that is stopped in between then decodes the shard again.
    """
    _remove_if_there(os.path.join(out_dir, "dataset_info.json"))
    _remove_if_there(shard.sidecar_path(out_dir))


def _remove_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _store_shard(shard: _Shard, outcomes: Iterator[_Outcome], out_dir: str) -> None:
    """Write the frames of a shard and then its sidecar, which marks it as finished."""
    stored, bad, writer = [], [], None
    with contextlib.ExitStack() as stack:  # commits the frames, or discards them on an exception
        for video, outcome in zip(shard.videos, outcomes, strict=True):
            if isinstance(outcome, Failure):
                bad.append(summary.build_bad_entry(shard.split, video, outcome))
                continue
            frames, entry = outcome
            if not writer:
                path = shard.frames_path(out_dir)
                writer = stack.enter_context(shard_writer.ShardWriter(path))
            for frame in frames:
                writer.write(frame)
            stored.append(entry)
    frames = writer.describe() if writer else _NO_FRAMES
    sidecar = {"stored": stored, "bad": bad, "frames": dataclasses.asdict(frames)}
    files.write_text(shard.sidecar_path(out_dir), json.dumps(sidecar))


def _write_results(
    index: DatasetIndex, shards: list[_Shard], out_dir: str, options: PrepareOptions
) -> dict[str, SplitCounts]:
    """Write the tables and lists, unless they exist; print and return the counts."""
    # Collect the entries of all shards.
    stored = {name: [] for name in index.videos_to_store()}
    frame_shards = {name: [] for name in index.videos_to_store()}
    bad, truncated = [], []
    sidecars = [_read_sidecar(shard, out_dir) for shard in shards]
    descriptions = _describe_frames(shards, sidecars, out_dir, options.progress)
    for shard, sidecar, description in zip(shards, sidecars, descriptions, strict=True):
        stored[shard.split] += sidecar["stored"]
        frame_shards[shard.split].append(description)
        bad += sidecar["bad"]
        paths = {video.id: video.path for video in shard.videos}
        truncated += [
            summary.build_truncated_entry(shard.split, paths[entry["id"]], entry)
            for entry in sidecar["stored"]
            if entry["truncated"]
        ]
    counts = summary.count_splits(index, stored, bad)
    # Write the lists and the tables; dataset_info.json, written last, marks them as complete.
    if not _is_complete(out_dir):
        for name, entries in (("bad_videos", bad), ("truncated_videos", truncated)):
            path = os.path.join(out_dir, f"{name}.jsonl")
            files.write_text(path, "".join(map(summary.format_json_line, entries)))
        if counts["total"].stored:
            tables = _build_tables(index, stored)
            frame_format = FrameFormat(options.short_side, options.quality, options.fps)
            names = index.class_names
            shard_writer.write_tables(out_dir, names, tables, frame_shards, frame_format)
    # Report.
    summary.print_counts(counts)
    if not counts["total"].stored:
        raise ValueError(
            f"none of the {len(bad)} videos could be stored; "
            f"the reasons are in {os.path.join(out_dir, 'bad_videos.jsonl')}"
        )
    return counts


def _describe_frames(
    shards: list[_Shard], sidecars: list[dict], out_dir: str, progress: bool
) -> list[dataset_metadata.Shard]:
    """Return the description of each frame shard; reads the shards that version 0.1.0 wrote."""
    lacking = [content["stored"] for content in sidecars if "frames" not in content]
    count = sum(entry["num_frames"] for stored in lacking for entry in stored)
    if count:
        print(
            f"note: reading {count:,} frames for identity.json, which version 0.1.0 lacks; an "
            "interrupted run resumes after the last shard read",
            file=sys.stderr,
        )
    descriptions = []
    with ProgressBar(count, "identity", "frames", shown=progress and count > 0) as bar:
        for shard, content in zip(shards, sidecars, strict=True):
            if "frames" in content:
                descriptions.append(dataset_metadata.Shard(**content["frames"]))
            elif not content["stored"]:
                descriptions.append(_NO_FRAMES)
            else:
                descriptions.append(_digest_frames(shard, content, out_dir, bar))
    return descriptions


def _digest_frames(
    shard: _Shard, sidecar: dict, out_dir: str, bar: ProgressBar
) -> dataset_metadata.Shard:
    """Return the description of a frame shard, and write it into its sidecar."""
    path = shard.frames_path(out_dir)
    count = sum(entry["num_frames"] for entry in sidecar["stored"])
    digest = dataset_metadata.ShardDigest()
    try:
        reader = ArrayRecordReader(path)
        for position in range(count):
            digest.add(reader.read([position])[0])
            bar.update()
    except (RuntimeError, IndexError) as error:
        raise OSError(f"{path} cannot be read ({error}); prepare with another --out") from None
    if reader.num_records() != count:
        raise OSError(
            f"{path} holds {reader.num_records()} frames instead of {count}: it is not the file "
            "that was prepared; prepare with another --out"
        )
    frames = digest.describe(os.path.getsize(path))
    sidecar = sidecar | {"frames": dataclasses.asdict(frames)}
    files.write_text(shard.sidecar_path(out_dir), json.dumps(sidecar))
    return frames


def _build_tables(
    index: DatasetIndex, stored: dict[str, list[dict]]
) -> dict[str, list[shard_writer.VideoRow]]:
    """Return the rows of each split, from the entries of each storage split."""
    tables = {}
    for split, videos in index.splits.items():
        ids = {video.id for video in videos}
        rows = _video_rows(stored[index.storage_split(split)])
        tables[split] = [row for row in rows if row.id in ids]
    return tables


def _read_sidecar(shard: _Shard, out_dir: str) -> dict:
    return read_json(shard.sidecar_path(out_dir), dict)


def _video_rows(stored: list[dict]) -> Iterator[shard_writer.VideoRow]:
    """Yield the table rows of consecutive stored videos, the first of which begins at frame 0."""
    first_frame = 0
    for entry in stored:
        values = {name: value for name, value in entry.items() if name != "num_bytes"}
        values["truncated"] = bool(entry["truncated"])
        yield shard_writer.VideoRow(**values, first_frame=first_frame)
        first_frame += entry["num_frames"]


@contextlib.contextmanager
def _explain_full_disk(out_dir: str, shards: list[_Shard]) -> Iterator[None]:
    """Replace the error of a full disk by one that reports progress, needed space and remedies."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        need, free, progress = _measure_disk(out_dir, shards)
        rest = f"about {summary.format_bytes(need)}" if need else "an unknown amount"
        raise OSError(
            f"cannot write to {out_dir!r}: {os.strerror(error.errno)}. {progress}; the rest takes "
            f"{rest}, and {summary.format_bytes(free)} are free. The finished shards are kept: "
            "make room and run the same command again, or start over with another --out and a "
            "smaller --short_side, --quality or --fps"
        ) from None


def _warn_of_short_disk(out_dir: str, shards: list[_Shard]) -> None:
    """Print a note if the finished shards show that the disk is too small for the rest."""
    need, free, progress = _measure_disk(out_dir, shards)
    if need > free:
        print(
            f"note: the disk of {out_dir!r} will be full before the end: {progress}; the rest "
            f"takes about {summary.format_bytes(need)}, "
            f"and {summary.format_bytes(free)} are free",
            file=sys.stderr,
        )


def _measure_disk(out_dir: str, shards: list[_Shard]) -> tuple[float, int, str]:
    """Return the bytes that the rest needs (0 if unknown), the free bytes, and a progress text."""
    finished = [shard for shard in shards if shard.is_finished(out_dir)]
    done = sum(len(shard.videos) for shard in finished)
    total = sum(len(shard.videos) for shard in shards)
    paths = [shard.frames_path(out_dir) for shard in finished]
    size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    need = size / done * (total - done) if done else 0.0
    progress = f"{done} of {total} videos are finished and take {summary.format_bytes(size)}"
    return need, shutil.disk_usage(out_dir).free, progress

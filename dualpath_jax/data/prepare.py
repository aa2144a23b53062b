"""Turns listed videos into prepared ones: `prepare`. See `records` for what it writes.

Work is cut into shards of consecutive videos. A shard is finished when its JSON sidecar is there;
it holds what was stored and what was bad. An interrupted run goes on after its last finished shard,
and a finished one only prints its summary again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator

import tqdm

from dualpath_jax.data import records
from dualpath_jax.data.datasets import Listing, Video
from dualpath_jax.data.decode import NOT_FOUND, DecodeLimits, StoredVideo, video_to_jpegs
from dualpath_jax.data.workers import Failure, WorkerPool


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many videos; listed = stored + bad, and those found are listed and on disk.

    `truncated` are stored but end early; `num_frames` and `num_bytes` (JPEG) are of those stored.
    """

    listed: int = 0
    found: int = 0
    stored: int = 0
    bad: int = 0
    truncated: int = 0
    num_frames: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        mean = self.num_bytes / max(self.stored, 1)
        return (
            f"listed {self.listed}, found {self.found}, stored {self.stored}, bad {self.bad} "
            f"(stored but truncated {self.truncated}; {self.num_frames} frames, "
            f"{mean:,.0f} bytes per video)"
        )


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
        return records.frame_shard_path(out_dir, self.split, self.index, self.count)


def prepare(
    listing: Listing,
    videos_dir: str,
    out_dir: str,
    *,
    short_side: int = 256,
    quality: int = 90,
    videos_per_shard: int = 512,
    num_workers: int | None = None,
    limits: DecodeLimits | None = None,
    max_missing: float = 0.1,
    progress: bool = True,
) -> dict[str, Counts]:
    """Decodes every listed video once and stores it; goes on where an earlier run was stopped.

    Args:
      listing: from `datasets.list_videos`.
      videos_dir: where relative paths of the listing start.
      out_dir: OUT, a local folder.
      short_side: pixels of the shorter side of stored frames; smaller videos keep their size.
      quality: of the JPEG frames, 1..95.
      videos_per_shard: 512 Kinetics clips make shards of about 4 GB, of which 470 hold them all.
      num_workers: decoding processes, by default one per core.
      limits: what one video may cost.
      max_missing: part of a split's videos, 0..1, whose files may be missing.
      progress: show a progress bar.

    Returns:
      Counts of each split and "total", as printed. OUT/bad_videos.jsonl lists the bad videos.

    Raises:
      ValueError: OUT cannot be written, holds something prepared otherwise, or is in use; too many
        videos are missing (before any is decoded; OUT/missing_videos.txt lists them); none could be
        stored.
    """
    if not 0 <= max_missing <= 1:
        raise ValueError(f"max_missing is {max_missing}; it must be in [0, 1]")
    limits = limits or DecodeLimits()
    settings = _settings(listing, short_side, quality, videos_per_shard, limits)
    shards = _cut(listing, videos_per_shard)
    with _claimed(out_dir):
        _check_same(out_dir, settings)
        todo = [shard for shard in shards if not os.path.exists(shard.sidecar(out_dir))]
        if todo:
            _check_missing(listing, videos_dir, out_dir, max_missing)
        records.write_atomically(_settings_path(out_dir), json.dumps(settings, indent=1))
        arguments = (
            (os.path.join(videos_dir, video.path), short_side, quality, limits)
            for shard in todo
            for video in shard.videos
        )
        total = sum(len(shard.videos) for shard in shards)
        done = total - sum(len(shard.videos) for shard in todo)
        bar = tqdm.tqdm(total=total, initial=done, unit="video", disable=not progress)
        with bar, WorkerPool(num_workers or os.cpu_count() or 1, limits) as pool:
            results = pool.map(video_to_jpegs, arguments)
            for shard in todo:
                _store_shard(shard, results, out_dir, bar)
        return _finish(listing, shards, out_dir)


def _settings(
    listing: Listing, short_side: int, quality: int, videos_per_shard: int, limits: DecodeLimits
) -> dict:
    """What decides the content of OUT, as JSON."""
    settings = {
        "format": 1,
        "short_side": short_side,
        "quality": quality,
        "videos_per_shard": videos_per_shard,
        "classes": _digest(listing.class_names),
    }
    settings |= {f"limits.{name}": value for name, value in dataclasses.asdict(limits).items()}
    for split, videos in listing.splits.items():
        settings[f"{split}.videos"] = len(videos)
        settings[f"{split}.list"] = _digest([dataclasses.astuple(video) for video in videos])
    return settings


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _cut(listing: Listing, videos_per_shard: int) -> list[_Shard]:
    shards = []
    for split, videos in listing.stored().items():
        starts = range(0, len(videos), videos_per_shard)
        for i, start in enumerate(starts):
            shard = _Shard(split, i, len(starts), videos[start : start + videos_per_shard])
            shards.append(shard)
    return shards


@contextlib.contextmanager
def _claimed(out_dir: str) -> Iterator[None]:
    """OUT exists, is writable, and no other process works on it."""
    if "://" in out_dir:
        raise ValueError(f"--out is {out_dir!r}; write to a local folder and copy it afterwards")
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


def _check_same(out_dir: str, new: dict) -> None:
    """ValueError that tells the changes if OUT was prepared with other settings."""
    if not os.path.exists(_settings_path(out_dir)):
        return
    with open(_settings_path(out_dir), encoding="utf-8") as file:
        old = json.load(file)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if names:
        changes = ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)
        raise ValueError(
            f"{out_dir!r} was prepared with other settings or another list of videos: {changes}. "
            "Choose another --out, or delete this one"
        )


def _check_missing(listing: Listing, videos_dir: str, out_dir: str, max_missing: float) -> None:
    """Tells which files are not there; ValueError if all, or too many of a split, are not."""
    stored = listing.stored().values()
    paths = {video.path for videos in stored for video in videos}
    missing = {path for path in paths if not os.path.exists(os.path.join(videos_dir, path))}
    if not missing:
        return
    first = next(iter(listing.splits.values()))[0].path
    if len(missing) == len(paths):
        raise ValueError(
            f"none of the {len(paths)} listed videos is in {videos_dir!r} "
            f"(the first is {first!r}); check --videos"
        )
    path = os.path.join(out_dir, "missing_videos.txt")
    records.write_atomically(path, "".join(name + "\n" for name in sorted(missing)))
    for split, videos in listing.splits.items():
        here = [video.path for video in videos if video.path in missing]
        message = (
            f"{len(here)} of the {len(videos)} videos of split {split!r} are not in "
            f"{videos_dir!r}: {', '.join(map(repr, here[:5]))}{', ...' if here[5:] else ''} "
            f"(all missing ones are in {path})"
        )
        if len(here) > max_missing * len(videos):
            raise ValueError(
                f"{message}; that is more than --max_missing={max_missing} allows. Check --videos, "
                "get the rest, or allow more"
            )
        if here:
            print(f"note: {message}", file=sys.stderr)


def _store_shard(shard: _Shard, results: Iterator, out_dir: str, bar: tqdm.tqdm) -> None:
    """Writes the frames of a shard and then, as the mark that it is finished, its sidecar."""
    stored, bad, writer = [], [], None
    try:
        for video in shard.videos:
            result = next(results)
            if isinstance(result, Failure):
                entry = {"id": video.id, "path": video.path, "reason": result.reason}
                bad.append(entry | {"split": shard.split})
            else:
                writer = writer or records.ShardWriter(shard.frames(out_dir))
                for jpeg in result.jpegs:
                    writer.write(records.encode_frame(jpeg))
                stored.append(_stored_entry(video, result))
            bar.update()
    except BaseException:
        if writer:
            writer.discard()
        raise
    if writer:
        writer.commit()
    sidecar = json.dumps({"stored": stored, "bad": bad})
    records.write_atomically(shard.sidecar(out_dir), sidecar)


def _stored_entry(video: Video, result: StoredVideo) -> dict:
    return {
        "id": video.id,
        "label": video.label,
        "num_frames": len(result.jpegs),
        "fps": result.fps,
        "height": result.height,
        "width": result.width,
        "truncated": result.truncated,
        "num_bytes": sum(map(len, result.jpegs)),
    }


def _finish(listing: Listing, shards: list[_Shard], out_dir: str) -> dict[str, Counts]:
    """Writes tables and ledger from the sidecars, unless they are there; prints the summary."""
    stored = {name: [] for name in listing.stored()}
    frame_shards = {name: [] for name in listing.stored()}
    bad = []
    for shard in shards:
        with open(shard.sidecar(out_dir), encoding="utf-8") as file:
            sidecar = json.load(file)
        stored[shard.split] += sidecar["stored"]
        frame_shards[shard.split].append(sum(entry["num_frames"] for entry in sidecar["stored"]))
        bad += sidecar["bad"]
    counts, tables = {}, {}
    for split, videos in listing.splits.items():
        source, ids = listing.stored_in(split), {video.id for video in videos}
        tables[split] = [row for row in _rows(stored[source]) if row.id in ids]
        counts[split] = _count(
            [entry for entry in stored[source] if entry["id"] in ids],
            [entry for entry in bad if entry["split"] == source and entry["id"] in ids],
        )
    counts["total"] = _count([entry for entries in stored.values() for entry in entries], bad)
    if not os.path.exists(os.path.join(out_dir, "dataset_info.json")):
        ledger = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad)
        records.write_atomically(os.path.join(out_dir, "bad_videos.jsonl"), ledger)
        if counts["total"].stored:
            records.write_tables(out_dir, listing.class_names, tables, frame_shards)
    for name, count in counts.items():
        print(f"{name}: {count}")
    if not counts["total"].stored:
        raise ValueError(
            f"none of the {len(bad)} videos could be stored; "
            f"the reasons are in {os.path.join(out_dir, 'bad_videos.jsonl')}"
        )
    return counts


def _rows(stored: list[dict]) -> Iterator[records.VideoRow]:
    first_frame = 0
    for entry in stored:
        values = {name: value for name, value in entry.items() if name != "num_bytes"}
        values["truncated"] = bool(entry["truncated"])
        yield records.VideoRow(**values, first_frame=first_frame)
        first_frame += entry["num_frames"]


def _count(stored: list[dict], bad: list[dict]) -> Counts:
    missing = sum(entry["reason"] == NOT_FOUND for entry in bad)
    return Counts(
        listed=len(stored) + len(bad),
        found=len(stored) + len(bad) - missing,
        stored=len(stored),
        bad=len(bad),
        truncated=sum(bool(entry["truncated"]) for entry in stored),
        num_frames=sum(entry["num_frames"] for entry in stored),
        num_bytes=sum(entry["num_bytes"] for entry in stored),
    )

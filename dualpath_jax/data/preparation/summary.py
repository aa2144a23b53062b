"""Counts and describes the results of preparing or checking videos."""

import dataclasses
import json
import os
from collections.abc import Iterator

from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation.video_decoder import MAX_SIDE, NOT_FOUND, VideoInfo
from dualpath_jax.data.preparation.worker_pool import Failure
from dualpath_jax.runtime import terminal


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Holds the counts of a split, or of all videos.

    Attributes:
      listed: videos in the annotations; listed = stored + bad.
      found: listed videos whose files exist.
      stored: videos whose frames are stored.
      bad: videos that are missing or cannot be used.
      truncated: stored videos of which a part is missing.
      num_frames: frames of all stored videos.
      num_bytes: bytes of these frames as JPEG files.
    """

    listed: int = 0
    found: int = 0
    stored: int = 0
    bad: int = 0
    truncated: int = 0
    num_frames: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        per_video = self.num_bytes / max(self.stored, 1)
        per_frame = self.num_bytes / max(self.num_frames, 1)
        return (
            f"listed {self.listed}, found {self.found}, stored {self.stored}, bad {self.bad} "
            f"(stored but truncated {self.truncated}; {self.num_frames} frames, "
            f"{per_video:,.0f} bytes per video, {per_frame:,.0f} per frame)"
        )


def build_bad_entry(split: str, video: Video, failure: Failure) -> dict:
    """Return the JSON entry of a bad video; `split` is its storage split."""
    return {"id": video.id, "path": video.path, "reason": failure.reason, "split": split}


def build_stored_entry(video: Video, info: VideoInfo) -> dict:
    """Return the JSON entry of a stored video."""
    return {"id": video.id, "label": video.label} | dataclasses.asdict(info)


def build_truncated_entry(split: str, path: str, stored: dict) -> dict:
    """Return the JSON entry of a truncated video, from its entry as a stored one."""
    values = {name: stored[name] for name in ("truncated", "num_frames")}
    return {"id": stored["id"], "path": path, **values, "split": split}


def format_json_line(entry: dict) -> str:
    """Format an entry as a line of JSON."""
    return terminal.escape_name(json.dumps(entry, ensure_ascii=False)) + "\n"


def count_splits(
    index: DatasetIndex, stored: dict[str, list[dict]], bad: list[dict]
) -> dict[str, SplitCounts]:
    """Count the videos of each split and, as "total", of all.

    Args:
      index: the listed videos.
      stored: storage split -> entries of its stored videos.
      bad: entries of all bad videos.

    Returns:
      Split name, or "total" -> counts.
    """
    counts = {}
    for split, videos in index.splits.items():
        source, ids = index.storage_split(split), {video.id for video in videos}
        counts[split] = _count_entries(
            [entry for entry in stored[source] if entry["id"] in ids],
            [entry for entry in bad if entry["split"] == source and entry["id"] in ids],
        )
    all_stored = [entry for entries in stored.values() for entry in entries]
    counts["total"] = _count_entries(all_stored, bad)
    return counts


def _count_entries(stored: list[dict], bad: list[dict]) -> SplitCounts:
    missing = sum(entry["reason"] == NOT_FOUND for entry in bad)
    return SplitCounts(
        listed=len(stored) + len(bad),
        found=len(stored) + len(bad) - missing,
        stored=len(stored),
        bad=len(bad),
        truncated=sum(bool(entry["truncated"]) for entry in stored),
        num_frames=sum(entry["num_frames"] for entry in stored),
        num_bytes=sum(entry["num_bytes"] for entry in stored),
    )


def print_counts(counts: dict[str, SplitCounts]) -> None:
    """Print a line for each split."""
    for name, count in counts.items():
        print(f"{name}: {count}")


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes in powers of 1000: "1.6 TB", "12 GB", "350 kB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.{1 if num_bytes < 10 and unit != 'bytes' else 0}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def find_missing_videos(index: DatasetIndex, videos_dir: str) -> set[str]:
    """Return the listed paths whose files do not exist; ValueError if all are missing."""
    paths = {video.path for videos in index.videos_to_store().values() for video in videos}
    missing = {path for path in paths if not os.path.exists(os.path.join(videos_dir, path))}
    if len(missing) == len(paths):
        first = next(iter(index.splits.values()))[0].path
        raise ValueError(
            f"none of the {len(paths)} listed videos is in {videos_dir!r} "
            f"(the first is {first!r}); check --videos"
        )
    return missing


def describe_missing_videos(
    index: DatasetIndex, videos_dir: str, missing: set[str], max_missing: float
) -> Iterator[tuple[str, bool]]:
    """Yield a message for each split with missing videos, and True if they are too many.

    Args:
      index: the listed videos.
      videos_dir: the folder that relative paths of the index start from.
      missing: the missing paths, from `find_missing_videos`.
      max_missing: fraction of the videos of a split, 0..1, that may be missing.
    """
    for split, videos in index.splits.items():
        paths = [video.path for video in videos if video.path in missing]
        if not paths:
            continue
        message = (
            f"{len(paths)} of the {len(videos)} videos of split {split!r} are not in "
            f"{videos_dir!r}: {', '.join(map(repr, paths[:5]))}{', ...' if paths[5:] else ''}"
        )
        refused = len(paths) > max_missing * len(videos)
        if refused:
            message += f"; that is more than --max_missing={max_missing} allows"
        yield message, refused


def check_prepare_options(
    short_side: int, quality: int, fps: float | None, max_missing: float
) -> None:
    """Raise a ValueError if an option is out of range."""
    if not 1 <= short_side <= MAX_SIDE:
        raise ValueError(f"short_side is {short_side}; it must be in 1..{MAX_SIDE:,}, as in JPEG")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality is {quality}; it must be in 1..95")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    if not 0 <= max_missing <= 1:
        raise ValueError(f"max_missing is {max_missing}; it is a fraction of the videos, in [0, 1]")

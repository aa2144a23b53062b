"""What becomes of listed videos, as `prepare` and `check` tell it.

Public: `SplitCounts`, `count_splits`, `print_counts`; the entries `bad_entry`, `stored_entry`,
`truncated_entry`, `json_line`; `find_missing_videos`, `missing_in_splits`; `check_prepare_options`, `format_counts`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator

from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation.video_decoder import MAX_SIDE, NOT_FOUND, VideoFacts
from dualpath_jax.data.preparation.worker_pool import Failure


@dataclasses.dataclass(frozen=True)
class SplitCounts:
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
        per_video = self.num_bytes / max(self.stored, 1)
        per_frame = self.num_bytes / max(self.num_frames, 1)
        return (
            f"listed {self.listed}, found {self.found}, stored {self.stored}, bad {self.bad} "
            f"(stored but truncated {self.truncated}; {self.num_frames} frames, "
            f"{per_video:,.0f} bytes per video, {per_frame:,.0f} per frame)"
        )


def bad_entry(split: str, video: Video, failure: Failure) -> dict:
    return {"id": video.id, "path": video.path, "reason": failure.reason, "split": split}


def stored_entry(video: Video, facts: VideoFacts) -> dict:
    return {"id": video.id, "label": video.label} | dataclasses.asdict(facts)


def truncated_entry(split: str, path: str, stored: dict) -> dict:
    values = {name: stored[name] for name in ("truncated", "num_frames")}
    return {"id": stored["id"], "path": path, **values, "split": split}


def json_line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def count_splits(
    listing: DatasetIndex, stored: dict[str, list[dict]], bad: list[dict]
) -> dict[str, SplitCounts]:
    """Counts of each split and "total"; `stored` is by where the videos are stored."""
    counts = {}
    for split, videos in listing.splits.items():
        source, ids = listing.storage_split(split), {video.id for video in videos}
        counts[split] = _count(
            [entry for entry in stored[source] if entry["id"] in ids],
            [entry for entry in bad if entry["split"] == source and entry["id"] in ids],
        )
    counts["total"] = _count([entry for entries in stored.values() for entry in entries], bad)
    return counts


def _count(stored: list[dict], bad: list[dict]) -> SplitCounts:
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
    for name, count in counts.items():
        print(f"{name}: {count}")


def format_counts(num_bytes: float) -> str:
    """ "1.6 TB", "12 GB", "350 kB": two digits at least, powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.{1 if num_bytes < 10 and unit != 'bytes' else 0}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def find_missing_videos(listing: DatasetIndex, videos_dir: str) -> set[str]:
    """The paths of the listing that are not there; ValueError if none is."""
    paths = {video.path for videos in listing.videos_to_store().values() for video in videos}
    missing = {path for path in paths if not os.path.exists(os.path.join(videos_dir, path))}
    if len(missing) == len(paths):
        first = next(iter(listing.splits.values()))[0].path
        raise ValueError(
            f"none of the {len(paths)} listed videos is in {videos_dir!r} "
            f"(the first is {first!r}); check --videos"
        )
    return missing


def missing_in_splits(
    listing: DatasetIndex, videos_dir: str, missing: set[str], max_missing: float
) -> Iterator[tuple[str, bool]]:
    """For each split with missing videos: a sentence, and whether they are too many."""
    for split, videos in listing.splits.items():
        here = [video.path for video in videos if video.path in missing]
        if not here:
            continue
        message = (
            f"{len(here)} of the {len(videos)} videos of split {split!r} are not in "
            f"{videos_dir!r}: {', '.join(map(repr, here[:5]))}{', ...' if here[5:] else ''}"
        )
        refused = len(here) > max_missing * len(videos)
        if refused:
            message += f"; that is more than --max_missing={max_missing} allows"
        yield message, refused


def check_prepare_options(
    short_side: int, quality: int, fps: float | None, max_missing: float
) -> None:
    if not 1 <= short_side <= MAX_SIDE:
        raise ValueError(f"short_side is {short_side}; it must be in 1..{MAX_SIDE:,}, as in a JPEG")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality is {quality}; it must be in 1..95")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    if not 0 <= max_missing <= 1:
        raise ValueError(f"max_missing is {max_missing}; it is a part of the videos, in [0, 1]")

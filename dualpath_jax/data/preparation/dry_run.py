"""Looks at listed videos without storing them: `check_videos`."""

import contextlib
import os
import sys
from typing import TextIO

import tqdm

from dualpath_jax.data.datasets.annotations import DatasetIndex
from dualpath_jax.data.preparation import summary
from dualpath_jax.data.preparation.summary import SplitCounts
from dualpath_jax.data.preparation.video_decoder import DecodeLimits, check_video
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool
from dualpath_jax.runtime import progress_bar
from dualpath_jax.runtime.cpu_count import num_cores


def check_videos(
    listing: DatasetIndex,
    videos_dir: str,
    *,
    short_side: int = 256,
    quality: int = 90,
    fps: float | None = None,
    num_workers: int | None = None,
    limits: DecodeLimits | None = None,
    max_missing: float = 0.1,
    bad_videos: str | None = None,
    progress: bool = True,
) -> dict[str, SplitCounts]:
    """Decodes every listed video as `prepare` does and tells what would become of it.

    Nothing is stored. Args as for `prepare`, and:
      max_missing: more missing videos are not refused here, but it is said that `prepare` will.
      bad_videos: a file that gets one line of JSON for each video that is bad or truncated, as it
        is found; by default they are printed.

    Returns:
      Counts of each split and "total", as `prepare` would print them and as printed, with the bytes
      estimated from one frame in 16; a last line printed gives the disk that all frames would take.

    Raises:
      ValueError: none of the listed videos is there.
      OSError: `bad_videos` cannot be written.
    """
    summary.check_prepare_options(short_side, quality, fps, max_missing)
    limits = limits or DecodeLimits()
    missing = summary.find_missing_videos(listing, videos_dir)
    for message, refused in summary.missing_in_splits(listing, videos_dir, missing, max_missing):
        print(f"note: {message}{'; preparing refuses that' if refused else ''}", file=sys.stderr)
    videos = [
        (split, video) for split, found in listing.videos_to_store().items() for video in found
    ]
    arguments = (
        (os.path.join(videos_dir, video.path), short_side, quality, limits, fps)
        for _, video in videos
    )
    stored = {name: [] for name in listing.videos_to_store()}
    bad = []
    shown = progress_bar.ProgressBar(len(videos), "check", "videos", shown=progress)
    pool = WorkerPool(num_workers or num_cores(), limits)
    with _opened(bad_videos) as file, shown, pool:
        results = pool.map(check_video, arguments)
        for (split, video), result in zip(videos, results, strict=True):
            if isinstance(result, Failure):
                bad.append(summary.bad_entry(split, video, result))
                tqdm.tqdm.write(summary.json_line(bad[-1]), file=file, end="")
            else:
                stored[split].append(summary.stored_entry(video, result))
                if result.truncated:
                    entry = summary.truncated_entry(split, video.path, stored[split][-1])
                    tqdm.tqdm.write(summary.json_line(entry), file=file, end="")
            shown.update()
    counts = summary.count_splits(listing, stored, bad)
    summary.print_counts(counts)
    print(f"the frames would take about {summary.format_counts(counts['total'].num_bytes)}")
    return counts


def _opened(path: str | None) -> contextlib.AbstractContextManager[TextIO]:
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    return open(path, "w", encoding="utf-8", errors="surrogateescape", buffering=1)

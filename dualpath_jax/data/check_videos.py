"""Looks at listed videos without storing them: `check`."""

import contextlib
import os
import sys
from typing import TextIO

import tqdm

from dualpath_jax import bar
from dualpath_jax.cores import num_cores
from dualpath_jax.data import ledger
from dualpath_jax.data.annotations import Listing
from dualpath_jax.data.decode import DecodeLimits, check_video
from dualpath_jax.data.ledger import Counts
from dualpath_jax.data.workers import Failure, WorkerPool


def check(
    listing: Listing,
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
) -> dict[str, Counts]:
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
    ledger.check_options(short_side, quality, fps, max_missing)
    limits = limits or DecodeLimits()
    missing = ledger.find_missing(listing, videos_dir)
    for message, refused in ledger.missing_in_splits(listing, videos_dir, missing, max_missing):
        print(f"note: {message}{'; preparing refuses that' if refused else ''}", file=sys.stderr)
    videos = [(split, video) for split, found in listing.stored().items() for video in found]
    arguments = (
        (os.path.join(videos_dir, video.path), short_side, quality, limits, fps)
        for _, video in videos
    )
    stored = {name: [] for name in listing.stored()}
    bad = []
    shown = bar.Bar(len(videos), "check", "videos", shown=progress)
    pool = WorkerPool(num_workers or num_cores(), limits)
    with _opened(bad_videos) as file, shown, pool:
        results = pool.map(check_video, arguments)
        for (split, video), result in zip(videos, results, strict=True):
            if isinstance(result, Failure):
                bad.append(ledger.bad_entry(split, video, result))
                tqdm.tqdm.write(ledger.json_line(bad[-1]), file=file, end="")
            else:
                stored[split].append(ledger.stored_entry(video, result))
                if result.truncated:
                    entry = ledger.truncated_entry(split, video.path, stored[split][-1])
                    tqdm.tqdm.write(ledger.json_line(entry), file=file, end="")
            shown.update()
    counts = ledger.count_splits(listing, stored, bad)
    ledger.print_counts(counts)
    print(f"the frames would take about {ledger.in_words(counts['total'].num_bytes)}")
    return counts


def _opened(path: str | None) -> contextlib.AbstractContextManager[TextIO]:
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    return open(path, "w", encoding="utf-8", errors="surrogateescape", buffering=1)

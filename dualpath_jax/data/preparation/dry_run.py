"""Decodes listed videos without storing them: `check_videos`."""

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import TextIO

import tqdm

from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import summary
from dualpath_jax.data.preparation.summary import SplitCounts
from dualpath_jax.data.preparation.video_decoder import DecodeLimits, VideoInfo, check_video
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool
from dualpath_jax.runtime import files, progress_bar
from dualpath_jax.runtime.cpu_count import num_cores


def check_videos(
    index: DatasetIndex,
    videos_dir: str,
    *,
    short_side: int = 256,
    quality: int = 90,
    fps: float | None = None,
    frame_rate: float | None = None,
    num_workers: int | None = None,
    limits: DecodeLimits | None = None,
    max_missing: float = 0.1,
    bad_videos: str | None = None,
    progress: bool = True,
) -> dict[str, SplitCounts]:
    """Decode every listed video as `prepare_dataset` does, store nothing, and print the results.

    The options that are not listed here are those of `prepare.PrepareOptions`.

    Args:
      index: the listed videos, from `registry.list_videos`.
      videos_dir: the folder that relative paths of the index start from.
      max_missing: fraction of the videos of a split, 0..1, whose files may be missing. If more are
        missing, a note says that `prepare_dataset` will refuse them.
      bad_videos: a file to write, with one line of JSON for each bad or truncated video as soon as
        it is found; None prints the lines.

    Returns:
      The printed counts: split name, or "total" -> the counts that `prepare_dataset` would print.
      `num_bytes` is estimated from one frame in 16. The last line printed is the disk space that
      all frames would take.

    Raises:
      ValueError: an option is out of range, or none of the listed videos exists.
      OSError: `bad_videos` cannot be written.
    """
    summary.check_prepare_options(short_side, quality, fps, max_missing)
    _note_missing_videos(index, videos_dir, max_missing)
    with _open_output(bad_videos) as file:
        settings = (short_side, quality, limits or DecodeLimits(), fps, frame_rate)
        stored, bad = decode_videos(index, videos_dir, settings, num_workers, file, progress)
    counts = summary.count_splits(index, stored, bad)
    summary.print_counts(counts)
    print(f"the frames would take about {summary.format_bytes(counts['total'].num_bytes)}")
    return counts


def decode_videos(
    index: DatasetIndex,
    videos_dir: str,
    settings: tuple[int, int, DecodeLimits, float | None, float | None],
    num_workers: int | None = None,
    file: TextIO | None = None,
    progress: bool = True,
) -> tuple[dict[str, list[dict]], list[dict]]:
    """Decode every listed video and store nothing.

    Args:
      index, videos_dir: the listed videos and their folder.
      settings: short_side, quality, limits, fps and frame_rate, see `check_videos`.
      num_workers, progress: see `check_videos`.
      file: gets a line of JSON for each bad or truncated video as soon as it is found.

    Returns:
      Storage split -> entries of its good videos (`summary.build_stored_entry`); and the entries of
      bad videos (`summary.build_bad_entry`).
    """
    videos = [
        (split, video) for split, listed in index.videos_to_store().items() for video in listed
    ]
    arguments = ((os.path.join(videos_dir, video.path), *settings) for _, video in videos)
    bar = progress_bar.ProgressBar(len(videos), "check", "videos", shown=progress)
    with bar, WorkerPool(num_workers or num_cores(), settings[2]) as pool:
        results = zip(videos, pool.map(check_video, arguments), strict=True)
        return _collect_entries(index, results, file, bar)


def _note_missing_videos(index: DatasetIndex, videos_dir: str, max_missing: float) -> None:
    """Print a note on each split with missing videos; ValueError if all videos are missing."""
    missing = summary.find_missing_videos(index, videos_dir)
    for message, refused in summary.describe_missing_videos(
        index, videos_dir, missing, max_missing
    ):
        remark = "; preparing will stop with this error" if refused else ""
        print(f"note: {message}{remark}", file=sys.stderr)


def _collect_entries(
    index: DatasetIndex,
    results: Iterable[tuple[tuple[str, Video], VideoInfo | Failure]],
    file: TextIO | None,
    bar: progress_bar.ProgressBar,
) -> tuple[dict[str, list[dict]], list[dict]]:
    """Return the entries of good videos by storage split, and those of bad videos.

    Writes a line to `file`, if there is one, for each bad or truncated video.
    """

    def write(entry: dict) -> None:
        if file is not None:
            tqdm.tqdm.write(summary.format_json_line(entry), file=file, end="")

    stored = {split: [] for split in index.videos_to_store()}
    bad = []
    for (split, video), result in results:
        if isinstance(result, Failure):
            bad.append(summary.build_bad_entry(split, video, result))
            write(bad[-1])
        else:
            stored[split].append(summary.build_stored_entry(video, result))
            if result.truncated:
                write(summary.build_truncated_entry(split, video.path, stored[split][-1]))
        bar.update()
    return stored, bad


def _open_output(path: str | None) -> contextlib.AbstractContextManager[TextIO]:
    """Open a text file for writing, or return standard output if `path` is None."""
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    file = files.open_in_place(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    return open(file, "w", encoding="utf-8", errors="surrogateescape", buffering=1)

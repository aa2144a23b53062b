"""Looks at a user's videos before any work: what is there, and what would go wrong.

`list_own_videos` lists and splits them, `survey_videos` decodes them without storing anything, and
`describe_survey` says what was found.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Sequence

import numpy as np

from dualpath_jax.data.datasets import registry
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.datasets.validation_split import (
    GroupBy,
    find_segments,
    group_videos,
    split_by_hash,
)
from dualpath_jax.data.preparation import prepare
from dualpath_jax.data.preparation.dry_run import decode_videos
from dualpath_jax.runtime import terminal
from dualpath_jax.runtime.safe_read import truncated_repr

_SPLITS = ("train", "validation", "test")
_VALIDATION_FRACTION = 0.2
_NUM_SHOWN = 20  # classes, and a quarter of it problems


@dataclasses.dataclass(frozen=True)
class Survey:
    """Holds what decoding the listed videos has shown.

    Attributes:
      entries: of all good videos, see `summary.build_stored_entry`.
      bad: entries of all bad videos, see `summary.build_bad_entry`.
      seconds: that decoding took.
    """

    entries: list[dict]
    bad: list[dict]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Return the bytes that all frames would take."""
        return sum(entry["num_bytes"] for entry in self.entries)


def list_own_videos(
    videos: str, annotations: str | None = None, class_level: int = 1
) -> tuple[DatasetIndex, str, list[str]]:
    """List a folder of class folders or a CSV list; make a validation split if there is none.

    A fifth of each class becomes validation data. Videos whose names suggest segments of one
    recording stay together.

    Args:
      videos: folder of the videos, or a CSV file, whose paths are relative to its own folder.
      annotations: CSV file, or folder with train.csv; None: class folders, or `videos` is the list.
      class_level: see `class_folders.read_folder`.

    Returns:
      The splits, the folder that paths start from, and lines that say how the split was made.

    Raises:
      ValueError: the videos cannot be trained on; the message has the remedy.
    """
    if os.path.isfile(videos):
        if annotations:
            raise ValueError(
                f"{videos} is a file: name the folder of videos, or leave out the list"
            )
        videos, annotations = os.path.dirname(videos) or ".", videos
    index = registry.list_videos(
        "csv" if annotations else "folder",
        videos,
        annotations,
        validation_fraction=0,
        class_level=class_level,
    )
    lines = []
    if "train" not in index.splits:
        raise ValueError(
            f"there are no training videos in {annotations or videos}, only "
            f"{', '.join(index.splits)}: add them, or name a folder of class folders"
        )
    splits = {name: index.splits[name] for name in _SPLITS if name in index.splits}
    if "validation" not in splits:
        made, lines = _make_validation_split(splits["train"])
        splits = made | {name: splits[name] for name in splits if name != "train"}
    index = dataclasses.replace(index, splits=splits)
    _check_classes(index)
    return index, videos, lines


def _make_validation_split(videos: list[Video]) -> tuple[dict[str, list[Video]], list[str]]:
    """Split training videos into train and validation; return the splits and how it was done."""
    groups, lines = None, [f"validation: {_VALIDATION_FRACTION:.0%} of each class, chosen by us"]
    if found := find_segments(videos):
        pattern, first, second = found
        groups, _ = group_videos(videos, GroupBy("name", pattern))
        lines = [
            f"{lines[0]}; names such as {first!r} and {second!r} suggest segments of one "
            "recording, which stay together"
        ]
    splits = split_by_hash(videos, _VALIDATION_FRACTION, groups)
    if not splits["validation"]:
        what = "recording" if groups else "video"
        raise ValueError(
            f"no video is left for validation, because each class has one {what}: add videos, at "
            "least two of each class"
        )
    return splits, lines


def _check_classes(index: DatasetIndex) -> None:
    """Check that there is something to learn.

    Raises:
      ValueError: there is one class, or a class has no training video.
    """
    if len(index.class_names) < 2:
        raise ValueError(
            f"{index.class_names[0]!r} is the only class: there is nothing to tell apart; add a "
            "folder of videos of another class"
        )
    trained = {video.label for video in index.splits["train"]}
    for split, videos in index.splits.items():
        if untrained := sorted({video.label for video in videos} - trained):
            name = index.class_names[untrained[0]]
            raise ValueError(
                f"class {name!r} has videos in {split} only and cannot be learned: add training "
                "videos of it, or remove it"
            )


def survey_videos(index: DatasetIndex, videos_dir: str, options: prepare.PrepareOptions) -> Survey:
    """Decode all videos once, store nothing, and check that each class can be trained.

    Args:
      index, videos_dir: of `list_own_videos`.
      options: with which the videos will be prepared.

    Raises:
      ValueError: all training videos of a class are bad; the message names one and why.
    """
    start = time.monotonic()
    settings = (options.short_side, options.quality, options.limits, options.fps)
    settings = (*settings, options.frame_rate)
    stored, bad = decode_videos(index, videos_dir, settings, progress=options.progress)
    entries = [entry for split in stored.values() for entry in split]
    trained = {entry["label"] for entry in stored["train"]}
    for label, name in enumerate(index.class_names):
        listed = [video.id for video in index.splits["train"] if video.label == label]
        if listed and label not in trained:
            reason = next(entry for entry in bad if entry["id"] == listed[0])["reason"]
            raise ValueError(
                f"none of the {len(listed)} training videos of class {name!r} can be read, such as "
                f"{truncated_repr(listed[0])} ({reason}): replace them, or remove the class"
            )
    return Survey(entries, bad, time.monotonic() - start)


def describe_classes(index: DatasetIndex) -> list[str]:
    """Return lines with the number of videos of each class in each split."""
    splits = list(index.splits)
    counts = {s: collections.Counter(v.label for v in index.splits[s]) for s in splits}
    totals = ", ".join(f"{len(index.splits[split]):,} {split}" for split in splits)
    lines = [f"{len(index.class_names)} classes; videos: {totals}"]
    by_size = sorted(range(len(index.class_names)), key=lambda label: -counts["train"][label])
    width = max(len(terminal.escape_name(name)) for name in index.class_names)
    half = _NUM_SHOWN // 2
    for label in by_size if len(by_size) <= _NUM_SHOWN else by_size[:half] + by_size[-half:]:
        numbers = "  ".join(f"{counts[split][label]:>5,} {split}" for split in splits)
        lines.append(f"  {terminal.escape_name(index.class_names[label]):<{width}}  {numbers}")
    if len(by_size) > _NUM_SHOWN:
        lines.insert(1 + half, f"  ... {len(by_size) - _NUM_SHOWN} more classes")
    unseen = [index.class_names[label] for label in by_size if not counts["validation"].get(label)]
    if unseen:
        lines.append(f"without a validation video: {', '.join(map(truncated_repr, unseen[:5]))}")
    return lines


def class_ratio(index: DatasetIndex) -> float:
    """Return the training videos of the largest class per one of the smallest."""
    counts = collections.Counter(video.label for video in index.splits["train"]).values()
    return max(counts) / min(counts)


def describe_survey(survey: Survey) -> list[str]:
    """Return lines with lengths, sizes and problems of the decoded videos."""
    seconds = [entry["num_frames"] / entry["fps"] for entry in survey.entries if entry["fps"]]
    frames = [entry["num_frames"] for entry in survey.entries]
    lines = [f"lengths: {_format_range(seconds, 's')}, {_format_range(frames, 'frames')}"]
    sizes = collections.Counter((entry["width"], entry["height"]) for entry in survey.entries)
    shown = ", ".join(f"{w}x{h} ({count})" for (w, h), count in sizes.most_common(4))
    lines.append(f"stored frames, width x height: {shown}{', ...' if len(sizes) > 4 else ''}")
    if short := sum(count < 8 for count in frames):
        lines.append(f"with fewer than 8 frames, which are then repeated: {short} videos")
    truncated = [entry for entry in survey.entries if entry["truncated"]]
    for what, entries, reason in (
        ("unreadable, left out", survey.bad, "reason"),
        ("damaged, used in part", truncated, "truncated"),
    ):
        if entries:
            lines.append(
                f"{what}: {len(entries)} of {len(survey.entries) + len(survey.bad)} videos"
            )
            names = [f"{terminal.escape_name(e['id'])}: {e[reason]}" for e in entries]
            lines += [f"  {name}" for name in names[: _NUM_SHOWN // 4]]
            if len(names) > _NUM_SHOWN // 4:
                lines.append("  ...")
    return lines


def _format_range(values: Sequence[float], unit: str) -> str:
    """Format the smallest, median and largest value."""
    if not values:
        return f"unknown {unit}"
    low, middle, high = (f"{v:,.3g}" for v in (min(values), float(np.median(values)), max(values)))
    return f"{low} to {high} {unit} (median {middle})"

"""Who is in a data set: which videos, in which split, of which class.

Public: `list_videos`, `DATASETS`, `NUM_CLASSES`, `DatasetIndex`, `Video`.

To add a data set, write a reader `(videos_dir, annotations, validation_fraction) -> DatasetIndex` and
name it in `DATASETS`. A reader trusts its annotations and lists videos whether or not their files
are there; `list_videos` checks what is common to all. Splits are "train", "validation", "test",
with a number behind where a data set is divided in several ways ("train1").
"""

import collections
import dataclasses
import os
from collections.abc import Callable

from dualpath_jax.data.datasets import k400
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.datasets.class_folders import read_folder
from dualpath_jax.data.datasets.csv_list import read_csv
from dualpath_jax.data.datasets.diving48 import read_diving48
from dualpath_jax.data.datasets.hmdb51 import read_hmdb51
from dualpath_jax.data.datasets.ssv2 import read_ssv2
from dualpath_jax.runtime.safe_read import truncated_repr

# Of the published data sets and the demo; the others' are what their annotations say.
NUM_CLASSES = {"k400": k400.NUM_CLASSES, "ssv2": 174, "hmdb51": 51, "diving48": 48, "demo": 8}
UNKNOWN_CLASSES = 2  # taken for those in outlines; only the classifier depends on it

DATASETS: dict[str, Callable[[str, str | None, float], DatasetIndex]] = {
    "k400": k400.read_k400,
    "ssv2": read_ssv2,
    "hmdb51": read_hmdb51,
    "diving48": read_diving48,
    "folder": read_folder,
    "csv": read_csv,
}


def list_videos(
    dataset: str, videos_dir: str, annotations: str | None = None, validation_fraction: float = 0.2
) -> DatasetIndex:
    """Reads a data set's annotations; the splits returned are not empty.

    Args:
      dataset: a name in `DATASETS`.
      videos_dir: folder of the video files.
      annotations: folder or file with the annotations; not used by "folder".
      validation_fraction: part of each class, 0 <= fraction < 1, that becomes the validation split
        where the data set has no splits of its own.

    Raises:
      ValueError: unknown data set, missing folder, or annotations that contradict themselves or
        name files outside `videos_dir` (which a list may, "csv"); the message names the value and
        what to change.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: known are {', '.join(DATASETS)}")
    if not os.path.isdir(videos_dir):
        raise ValueError(f"there is no folder of videos {videos_dir!r}; check --videos")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be in [0, 1)")
    listing = DATASETS[dataset](videos_dir, annotations, validation_fraction)
    splits = {split: videos for split, videos in listing.splits.items() if videos}
    if not splits:
        raise ValueError(f"data set {dataset!r} has no videos in {annotations or videos_dir!r}")
    _check_text(listing.class_names)
    for split, videos in splits.items():
        _check_split(split, videos, len(listing.class_names))
        if dataset != "csv":  # a list may name files anywhere: who writes one means it
            _check_paths(split, videos)
    notices = listing.notices + _odd_classes(dataset, listing.class_names, splits)
    if list(splits) == ["train"] and validation_fraction:
        notices.append(
            "there is the split 'train' alone, and no other to evaluate on (--config.eval.split)"
        )
    if not listing.share_videos:
        notices += _shared_ids(splits)
    return dataclasses.replace(listing, splits=splits, notices=notices)


def _check_split(split: str, videos: list[Video], num_classes: int) -> None:
    seen = set()
    _check_text([video.id for video in videos])
    for video in videos:
        if video.id in seen:
            raise ValueError(
                f"video {truncated_repr(video.id)} is twice in split {split!r}; remove one of them"
            )
        seen.add(video.id)
        if not 0 <= video.label < num_classes:
            raise ValueError(
                f"video {truncated_repr(video.id)} of split {split!r} has label {truncated_repr(video.label)}; "
                f"there are {num_classes} classes"
            )


def _check_text(names: list[str]) -> None:
    """ValueError for what no file can hold; JSON may write half a character."""
    try:
        for name in names:
            name.encode("utf-8", "surrogateescape")  # as file names of any bytes are kept
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{truncated_repr(name)} in the annotations is no text: {error.reason}"
        ) from None


def _check_paths(split: str, videos: list[Video]) -> None:
    """ValueError for a file outside the folder of videos."""
    for video in videos:
        if os.path.isabs(video.path) or ".." in video.path.split("/"):
            raise ValueError(
                f"video {truncated_repr(video.id)} of split {split!r} is in {truncated_repr(video.path)}, outside "
                "the folder of videos; the annotations are damaged or not to be trusted"
            )


def _odd_classes(dataset: str, class_names: list[str], splits: dict[str, list[Video]]) -> list[str]:
    """Notices of classes without a video, and of a number of classes that is not the published."""
    notices = []
    used = {video.label for videos in splits.values() for video in videos}
    if empty := [name for label, name in enumerate(class_names) if label not in used]:
        notices.append(f"{len(empty)} classes have no video, such as {empty[0]!r}")
    if len(class_names) == 1:
        notices.append(f"there is one class alone, {class_names[0]!r}: nothing can be learnt of it")
    published = NUM_CLASSES.get(dataset, len(class_names))
    if len(class_names) != published:
        notices.append(
            f"the annotations have {len(class_names)} classes, {dataset} as published {published}"
        )
    return notices


def _shared_ids(splits: dict[str, list[Video]]) -> list[str]:
    """Notices of videos that stand in two splits."""
    count = collections.Counter(video.id for videos in splits.values() for video in videos)
    shared = [id_ for id_, n in count.items() if n > 1]
    return [f"{len(shared)} videos are in several splits, such as {shared[0]!r}"] if shared else []

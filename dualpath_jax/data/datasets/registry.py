"""Lists the videos of a data set: their splits, classes and files.

To add a data set, write a reader `(videos_dir, annotations) -> DatasetIndex` and name it in
`DATASETS`. A reader trusts its annotations and lists videos whether or not their files exist;
`list_videos` makes the checks that are common to all data sets, and the validation split of those
without splits. Splits are "train", "validation" and "test", with a number appended ("train1") if a
data set is divided in several ways.
"""

import collections
import dataclasses
import functools
import os
import unicodedata
from collections.abc import Callable

from dualpath_jax.data.datasets import k400
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.datasets.class_folders import read_folder
from dualpath_jax.data.datasets.csv_list import read_csv
from dualpath_jax.data.datasets.diving48 import read_diving48
from dualpath_jax.data.datasets.hmdb51 import read_hmdb51
from dualpath_jax.data.datasets.ssv2 import read_ssv2
from dualpath_jax.data.datasets.ucf101 import read_ucf101
from dualpath_jax.data.datasets.validation_split import (
    GroupBy,
    describe_segments,
    group_videos,
    split_by_hash,
)
from dualpath_jax.runtime.safe_read import truncated_repr

# Classes of the published data sets and of the generated ones. Other data sets have the classes of
# their annotations.
NUM_CLASSES = {
    "k400": k400.NUM_CLASSES,
    "ssv2": 174,
    "hmdb51": 51,
    "ucf101": 101,
    "diving48": 48,
    "demo": 8,
    "paths": 10,
    "paths_large": 10,
}
# Stands in for an unknown number of classes in abstract models; only the classifier depends on it.
PLACEHOLDER_NUM_CLASSES = 2

DATASETS: dict[str, Callable[[str, str | None], DatasetIndex]] = {
    "k400": k400.read_k400,
    "ssv2": read_ssv2,
    "hmdb51": read_hmdb51,
    "ucf101": read_ucf101,
    "diving48": read_diving48,
    "folder": read_folder,
    "csv": read_csv,
}


def list_videos(
    dataset: str,
    videos_dir: str,
    annotations: str | None = None,
    validation_fraction: float = 0.2,
    group_by: GroupBy | None = None,
    class_level: int = 1,
) -> DatasetIndex:
    """Read and check a data set's annotations.

    Args:
      dataset: a name in `DATASETS`.
      videos_dir: folder of the video files.
      annotations: folder or file with the annotations; not used by "folder".
      validation_fraction: fraction of each class, 0 <= fraction < 1, that becomes the validation
        split if the data set does not have splits of its own.
      group_by: which videos are of one recording and go into the same split; None: each video by
        itself.
      class_level: see `class_folders.read_folder`; only "folder" has other levels than 1.

    Returns:
      The classes and videos. Each split has at least one video.

    Raises:
      ValueError: the data set is unknown, the folder is missing, or the annotations contradict
        themselves or name files outside `videos_dir` (only "csv" may), or `group_by` has no effect.
        The message names the value and the remedy.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: known are {', '.join(DATASETS)}")
    if not os.path.isdir(videos_dir):
        raise ValueError(f"there is no folder of videos {videos_dir!r}; check --videos")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be in [0, 1)")
    reader = _choose_reader(dataset, group_by, class_level)
    listing = _split_videos(reader(videos_dir, annotations), validation_fraction, group_by)
    splits = {split: videos for split, videos in listing.splits.items() if videos}
    if not splits:
        raise ValueError(f"data set {dataset!r} has no videos in {annotations or videos_dir!r}")
    _check_encodable(listing.class_names)
    for split, videos in splits.items():
        _check_split(split, videos, len(listing.class_names))
        if dataset != "csv":  # users write such a list themselves; it may name files anywhere
            _check_paths(split, videos)
    notices = listing.notices + _find_class_anomalies(dataset, listing.class_names, splits)
    notices += _find_similar_names(listing.class_names)
    if list(splits) == ["train"] and validation_fraction:
        notices.append(
            "'train' is the only split; there is no other to evaluate on (--config.eval.split)"
        )
    if not listing.share_videos:
        notices += _find_shared_videos(splits)
    return dataclasses.replace(listing, splits=splits, notices=notices)


def _choose_reader(
    dataset: str, group_by: GroupBy | None, class_level: int
) -> Callable[[str, str | None], DatasetIndex]:
    """Return the reader of a data set with the options of `list_videos`.

    Raises:
      ValueError: an option has no effect on the data set.
    """
    reader = DATASETS[dataset]
    if class_level != 1:
        if dataset != "folder":
            raise ValueError(
                f"--class_level={class_level} has no effect on {dataset!r}, whose classes are not "
                "folders: leave it out"
            )
        reader = functools.partial(read_folder, class_level=class_level)
    if group_by and group_by.kind == "column":
        if dataset != "csv":
            raise ValueError(f"{group_by} needs --dataset=csv: {dataset!r} has no columns")
        reader = functools.partial(read_csv, group_column=group_by.value)
    return reader


def _split_videos(
    listing: DatasetIndex, validation_fraction: float, group_by: GroupBy | None
) -> DatasetIndex:
    """Make the validation split of a data set that has none.

    Raises:
      ValueError: `group_by` has no effect.
    """
    if group_by and listing.has_splits:
        raise ValueError(
            f"{group_by} has no effect, because the annotations divide the videos into "
            f"{', '.join(listing.splits)}: leave it out"
        )
    if group_by and not validation_fraction:
        raise ValueError(f"{group_by} has no effect with --validation_fraction=0: leave one out")
    videos = listing.splits["train"] if not listing.has_splits else []
    if not videos:
        return listing
    groups, notices = None, []
    if group_by:
        groups, notices = group_videos(videos, group_by)
    elif validation_fraction:
        notices = describe_segments(videos)
    splits = split_by_hash(videos, validation_fraction, groups)
    return dataclasses.replace(listing, splits=splits, notices=listing.notices + notices)


def _check_split(split: str, videos: list[Video], num_classes: int) -> None:
    """Raise ValueError for ids that occur twice and for labels outside 0..num_classes-1."""
    seen = set()
    _check_encodable([video.id for video in videos])
    for video in videos:
        if video.id in seen:
            raise ValueError(
                f"video {truncated_repr(video.id)} occurs twice in split {split!r}; remove one"
            )
        seen.add(video.id)
        if not 0 <= video.label < num_classes:
            raise ValueError(
                f"video {truncated_repr(video.id)} of split {split!r} has label "
                f"{truncated_repr(video.label)}; there are {num_classes} classes"
            )


def _find_similar_names(class_names: list[str]) -> list[str]:
    """Return notices of class names that differ only in case or in their Unicode form."""
    seen: dict[str, str] = {}
    pairs = []
    for name in class_names:
        form = unicodedata.normalize("NFC", name).lower()
        if (other := seen.setdefault(form, name)) != name:
            pairs.append((other, name))
    return [
        f"classes {truncated_repr(a)} and {truncated_repr(b)} differ only in case or in the "
        "Unicode form of a letter; if they are one class, give both the same name"
        for a, b in pairs[:5]
    ]


def _check_encodable(names: list[str]) -> None:
    """Raise ValueError for names that cannot be encoded, such as half a surrogate pair in JSON."""
    try:
        for name in names:
            name.encode("utf-8", "surrogateescape")  # file names may hold any bytes
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{truncated_repr(name)} in the annotations is not valid text: {error.reason}"
        ) from None


def _check_paths(split: str, videos: list[Video]) -> None:
    """Raise ValueError for a file outside the folder of videos."""
    for video in videos:
        if os.path.isabs(video.path) or ".." in video.path.split("/"):
            raise ValueError(
                f"video {truncated_repr(video.id)} of split {split!r} is in "
                f"{truncated_repr(video.path)}, outside the folder of videos; the annotations are "
                "damaged or not to be trusted"
            )


def _find_class_anomalies(
    dataset: str, class_names: list[str], splits: dict[str, list[Video]]
) -> list[str]:
    """Return notices of classes without videos and of a number of classes that looks wrong."""
    notices = []
    used = {video.label for videos in splits.values() for video in videos}
    if empty := [name for label, name in enumerate(class_names) if label not in used]:
        notices.append(f"{len(empty)} classes have no video, such as {empty[0]!r}")
    trained = {video.label for video in splits.get("train", [])}
    if "train" in splits and (unseen := sorted(used - trained)):
        names = ", ".join(repr(class_names[label]) for label in unseen[:5])
        dots = ", ..." if len(unseen) > 5 else ""
        notices.append(
            f"{len(unseen)} classes have no training video and cannot be learned: {names}{dots}"
        )
    if len(class_names) == 1:
        notices.append(f"{class_names[0]!r} is the only class; there is nothing to learn")
    published = NUM_CLASSES.get(dataset, len(class_names))
    if len(class_names) != published:
        notices.append(
            f"the annotations have {len(class_names)} classes, but {dataset} as published has "
            f"{published}"
        )
    return notices


def _find_shared_videos(splits: dict[str, list[Video]]) -> list[str]:
    """Return a notice if videos are in several splits, otherwise an empty list."""
    count = collections.Counter(video.id for videos in splits.values() for video in videos)
    shared = [id_ for id_, n in count.items() if n > 1]
    return [f"{len(shared)} videos are in several splits, such as {shared[0]!r}"] if shared else []

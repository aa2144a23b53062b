"""Defines `Video` and `DatasetIndex`, and the helpers that all annotation readers share."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from dualpath_jax.runtime.safe_read import open_text, truncated_repr

# Name under which frames are stored if the data set's splits share videos.
SHARED_SPLIT = "all"
# Divisions of HMDB51 and UCF101, which call them splits; each has a training and a test split here.
DIVISIONS = ("1", "2", "3")
# Spelling of a split in files and folders, in lower case -> name of the split.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "test": "test",
    "testing": "test",
}


@dataclasses.dataclass(frozen=True, slots=True)  # a list may have millions
class Video:
    """Describes one video of a data set.

    Attributes:
      id: name of the video in the data set, unique in a split.
      path: path of the video file or folder of images, absolute or relative to the videos folder.
      label: class index, from 0.
      group: name of its recording, from a column of the annotations; "" without such a column.
    """

    id: str
    path: str
    label: int
    group: str = ""


@dataclasses.dataclass(frozen=True)
class DatasetIndex:
    """Holds the classes and videos of a data set, as its annotations list them.

    Attributes:
      class_names: name of each class, by class index.
      splits: split name -> its videos, in the order of the annotations.
      notices: one sentence for each thing that was left out or looks wrong.
      share_videos: True if the splits divide the same videos in several ways (train1, test1,
        train2, ...). An id then means the same video in all splits, and its frames are stored once.
      has_splits: False if the annotations have no splits: all videos are in "train", and
        `registry.list_videos` makes the split "validation" of some.
    """

    class_names: list[str]
    splits: dict[str, list[Video]]
    notices: list[str] = dataclasses.field(default_factory=list)
    share_videos: bool = False
    has_splits: bool = True

    def storage_split(self, split: str) -> str:
        """Return the name under which the frames of a split are stored."""
        return SHARED_SPLIT if self.share_videos else split

    def videos_to_store(self) -> dict[str, list[Video]]:
        """Return the videos to decode, each once, by the name of their storage split."""
        if not self.share_videos:
            return self.splits
        videos = {video.id: video for split in self.splits.values() for video in split}
        return {SHARED_SPLIT: list(videos.values())}

    def file_paths(self, videos_dir: str) -> Iterator[str]:
        """Yield the path of each video to store, from the folder of videos on."""
        for videos in self.videos_to_store().values():
            for video in videos:
                yield os.path.join(videos_dir, video.path)


def require_file(annotations: str | None, exists: Callable[[str], bool], expected: str) -> str:
    """Return the path `annotations` if it exists.

    Args:
      annotations: path of a file or folder, or None.
      exists: checks the path, for example `os.path.isdir`.
      expected: description of the right path, for the error message.

    Raises:
      ValueError: the path is missing or does not exist.
    """
    if not annotations:
        raise ValueError(f"--annotations is missing; it is {expected}")
    if not exists(annotations):
        raise ValueError(f"there are no annotations {annotations!r}; --annotations is {expected}")
    return annotations


def read_field(entry: Any, name: str, path: str, dataset: str) -> str:
    """Return field `name` of an entry of a JSON file, as text.

    Args:
      entry: a value from the JSON file, expected to be a dict.
      name: key of the field.
      path: path of the JSON file, for the error message.
      dataset: name of the data set that is being read, see `format_dataset_hint`.

    Raises:
      ValueError: the entry does not have the field.
    """
    if not isinstance(entry, dict) or entry.get(name) is None:
        raise ValueError(
            f"an entry of {path} has no {name!r}: {truncated_repr(entry)}"
            f"{format_dataset_hint(path, dataset)}"
        )
    return str(entry[name])


# Signs of known annotations in a file's name and in its first lines: regular expression ->
# description. The most reliable signs come first.
_FILE_NAME_PATTERNS = {
    r".+_test_split[123]\.txt": "HMDB51, --dataset=hmdb51",
    r"Diving48_V2_(train|test)\.json|Diving48_vocab\.json": "Diving48, --dataset=diving48",
    r"Diving48_(train|test)\.json": "Diving48 V1, which V2 replaces",
    r"something-something-v2-.+|labels\.json": "Something-Something-v2, --dataset=ssv2",
    r"something-something-v1-.+": "Something-Something-v1, which has no reader; list it as CSV",
    r"classInd\.txt|trainlist0\d\.txt": "UCF101, --dataset=ucf101",
}
_CONTENT_PATTERNS = {
    r'"vid_name"': "Diving48, --dataset=diving48",
    r'"template"': "Something-Something-v2, --dataset=ssv2",
    r"youtube_id": "Kinetics, --dataset=k400",
    r"\A[^{\[<]+[, ]\S+\s*\n": "a list of `path,label`, --dataset=csv",
}


def format_dataset_hint(path: str, dataset: str) -> str:
    """Return "; it looks like ..." if annotations belong to another data set, otherwise "".

    Args:
      path: an annotation file, or a folder of them.
      dataset: name of the data set that is being read.
    """
    files = [path]
    if os.path.isdir(path):
        files = [entry.path for entry in sorted(os.scandir(path), key=lambda e: e.name)]
    names = [os.path.basename(file) for file in files]
    candidates = [
        description
        for pattern, description in _FILE_NAME_PATTERNS.items()
        if any(re.fullmatch(pattern, name) for name in names)
    ]
    texts = [file for file in files if file.endswith((".csv", ".json")) and os.path.isfile(file)]
    starts = [_read_start(file) for file in texts]
    candidates += [
        description
        for pattern, description in _CONTENT_PATTERNS.items()
        if any(re.search(pattern, start) for start in starts)
    ]
    others = [name for name in candidates if not name.endswith(f"--dataset={dataset}")]
    return f"; it looks like {others[0]}" if others else ""


def _read_start(path: str) -> str:
    """Return the first 2000 characters of a file."""
    with open_text(path, errors="replace") as file:
        return file.read(2000)

"""What the readers of annotations share: `Video`, `DatasetIndex`, fields, naming a wrong file.

Public: `Video`, `DatasetIndex`, `SHARED`, `SPLIT_NAMES`, `split_by_hash`, `require_file`, `read_field`,
`looks_like`.
"""

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from dualpath_jax.runtime.safe_read import truncated_repr

SHARED = "all"  # where the frames of a set lie whose splits share videos
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "validate": "validation",
    "test": "test",
}


@dataclasses.dataclass(frozen=True)
class Video:
    """One listed video.

    Attributes:
      id: its name in the data set, unique in a split.
      path: its file, absolute or relative to the videos folder.
      label: class index.
    """

    id: str
    path: str
    label: int


@dataclasses.dataclass(frozen=True)
class DatasetIndex:
    """A data set as its annotations tell it.

    Attributes:
      class_names: the name of each class index.
      splits: split name -> its videos in the order of the annotations.
      notices: what was left out or looks odd, one sentence each.
      share_videos: the splits divide the same videos in several ways (train1, test1, train2, ...);
        an id means the same video in all of them, and its frames are stored once.
    """

    class_names: list[str]
    splits: dict[str, list[Video]]
    notices: list[str] = dataclasses.field(default_factory=list)
    share_videos: bool = False

    def storage_split(self, split: str) -> str:
        """Under which name the frames of a split are stored."""
        return SHARED if self.share_videos else split

    def videos_to_store(self) -> dict[str, list[Video]]:
        """The videos to decode by where they are stored, each once."""
        if not self.share_videos:
            return self.splits
        videos = {video.id: video for found in self.splits.values() for video in found}
        return {SHARED: list(videos.values())}


def split_by_hash(videos: Iterable[Video], validation_fraction: float) -> dict[str, list[Video]]:
    """Splits each class into train and validation by a hash of the ids, the same on every machine.

    A class of two or more videos has at least one in each (if the fraction is not 0), a class of
    one has it in train. Order is kept.
    """
    classes = collections.defaultdict(list)
    for video in videos:
        classes[video.label].append(video.id)
    chosen = set()
    for ids in classes.values():
        count = round(validation_fraction * len(ids))
        if validation_fraction and len(ids) > 1:
            count = min(max(count, 1), len(ids) - 1)
        ids.sort(key=lambda id_: hashlib.sha256(id_.encode("utf-8", "surrogateescape")).digest())
        chosen.update(ids[:count] if len(ids) > 1 else [])
    return {
        "train": [video for video in videos if video.id not in chosen],
        "validation": [video for video in videos if video.id in chosen],
    }


def require_file(annotations: str | None, exists: Callable[[str], bool], what: str) -> str:
    """`annotations`, if they are there; otherwise a ValueError that says what they should be."""
    if not annotations:
        raise ValueError(f"--annotations is missing; it is {what}")
    if not exists(annotations):
        raise ValueError(f"there are no annotations {annotations!r}; --annotations is {what}")
    return annotations


def read_field(entry: Any, name: str, path: str, dataset: str) -> str:
    """The text of a field of a JSON file's entry; ValueError if it has none."""
    if not isinstance(entry, dict) or entry.get(name) is None:
        raise ValueError(
            f"an entry of {path} has no {name!r}: {truncated_repr(entry)}{looks_like(path, dataset)}"
        )
    return str(entry[name])


# What gives annotations away, by a file's name and by its first lines: regular expression -> what
# it is, in the order of trust.
_NAMES = {
    r".+_test_split[123]\.txt": "HMDB51, --dataset=hmdb51",
    r"Diving48_V2_(train|test)\.json|Diving48_vocab\.json": "Diving48, --dataset=diving48",
    r"Diving48_(train|test)\.json": "Diving48 V1, which is replaced by V2",
    r"something-something-v2-.+|labels\.json": "Something-Something-v2, --dataset=ssv2",
    r"something-something-v1-.+": "Something-Something-v1, which is not read; list it as CSV",
    r"classInd\.txt|trainlist0\d\.txt": "UCF101, which is not read; list it as CSV",
}
_CONTENTS = {
    r'"vid_name"': "Diving48, --dataset=diving48",
    r'"template"': "Something-Something-v2, --dataset=ssv2",
    r"youtube_id": "Kinetics, --dataset=k400",
    r"\A[^{\[<]+[, ]\S+\s*\n": "a list of `path,label`, --dataset=csv",
}


def looks_like(path: str, dataset: str) -> str:
    """ "; it looks like ..." if a file, or those in a folder, are of another set than `dataset`."""
    files = [path]
    if os.path.isdir(path):
        files = [entry.path for entry in sorted(os.scandir(path), key=lambda e: e.name)]
    names = [os.path.basename(file) for file in files]
    found = [
        what for sign, what in _NAMES.items() if any(re.fullmatch(sign, name) for name in names)
    ]
    texts = [file for file in files if file.endswith((".csv", ".json")) and os.path.isfile(file)]
    starts = [_start(file) for file in texts]
    found += [
        what for sign, what in _CONTENTS.items() if any(re.search(sign, start) for start in starts)
    ]
    others = [what for what in found if not what.endswith(f"--dataset={dataset}")]
    return f"; it looks like {others[0]}" if others else ""


def _start(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(2000)

"""Reads the annotations of UCF101."""

import os

from dualpath_jax.data.datasets.annotations import (
    DIVISIONS,
    DatasetIndex,
    Video,
    format_dataset_hint,
    require_file,
)
from dualpath_jax.runtime.safe_read import open_text, truncated_repr


def read_ucf101(videos_dir: str, annotations: str | None) -> DatasetIndex:
    """Read classInd.txt, and trainlist0N.txt and testlist0N.txt of the divisions that are there.

    The splits train1, test1, train2, ... are divisions of the same videos. A video's id is its
    path, {class}/{file}.avi.

    Args:
      videos_dir: not used; the video files are {class}/{file}.avi in this folder.
      annotations: folder of the text files.

    Raises:
      ValueError: a file is missing or malformed.
    """
    del videos_dir  # only the annotations define the splits
    annotations = require_file(annotations, os.path.isdir, "the folder of trainlist01.txt")
    index_file = os.path.join(annotations, "classInd.txt")
    if not os.path.exists(index_file):
        raise ValueError(
            f"there is no classInd.txt in {annotations!r}"
            f"{format_dataset_hint(annotations, 'ucf101')}"
        )
    class_names = _read_class_names(index_file)
    splits = {}
    for division in DIVISIONS:
        names = {role: f"{role}list0{division}.txt" for role in ("train", "test")}
        paths = {role: os.path.join(annotations, name) for role, name in names.items()}
        found = [role for role, path in paths.items() if os.path.exists(path)]
        if len(found) == 1:
            (missing,) = names.keys() - set(found)
            raise ValueError(
                f"there is {names[found[0]]} in {annotations!r}, but no {names[missing]}; unpack "
                "all files again"
            )
        for role in found:
            splits[role + division] = _read_list(paths[role], class_names)
    if not splits:
        raise ValueError(f"there is no trainlist01.txt in {annotations!r}")
    return DatasetIndex(class_names, splits, share_videos=True)


def _read_class_names(path: str) -> list[str]:
    """Read lines `<number from 1> <class>`."""
    names = []
    with open_text(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            index, _, name = line.strip().partition(" ")
            if index != str(len(names) + 1) or not name.strip() or name.strip() in names:
                raise ValueError(
                    f"{path}, line {number}: {truncated_repr(line.strip())} is not "
                    f"`{len(names) + 1} <class>`"
                )
            names.append(name.strip())
    return names


def _read_list(path: str, class_names: list[str]) -> list[Video]:
    """Read lines `<class>/<file>`, in lists of training videos with the number of the class."""
    labels = {name: label for label, name in enumerate(class_names)}
    videos = []
    with open_text(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not (text := line.strip()):
                continue
            video, _, index = text.rpartition(" ") if text[-1].isdecimal() else (text, "", "")
            label = labels.get(video.partition("/")[0])
            if label is None or "/" not in video or index not in ("", str(label + 1)):
                raise ValueError(
                    f"{path}, line {number}: {truncated_repr(text)} is not `<class>/<file>` of a "
                    "class of classInd.txt, or has the number of another one"
                )
            videos.append(Video(video, video, label))
    return videos

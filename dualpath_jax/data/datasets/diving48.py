"""Reads the annotations of Diving48 V2."""

import os

from dualpath_jax.data.datasets.annotations import (
    DatasetIndex,
    Video,
    format_dataset_hint,
    read_field,
    require_file,
)
from dualpath_jax.runtime.safe_read import iterate_json_list, read_json, truncated_repr

_DOWNLOAD_URL = "http://www.svcl.ucsd.edu/projects/resound/dataset.html"
_SPLIT_SIZES = {"train": 15_027, "test": 1_970}  # videos of V2


def read_diving48(videos_dir: str, annotations: str | None) -> DatasetIndex:
    """Read Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json.

    A class is named by the four parts of its dive, such as "Back 15som 05Twis FREE". V1 is refused,
    because V2 corrects its labels.

    Args:
      videos_dir: not used; the video files are {vid_name}.mp4 in this folder.
      annotations: folder of the three files.

    Raises:
      ValueError: a file is missing, malformed or of V1.
    """
    del videos_dir  # only the annotations define the splits
    annotations = require_file(annotations, os.path.isdir, "a folder with Diving48_V2_train.json")
    class_names = _read_vocabulary(_find_file(annotations, "vocab"))
    splits, notices = {}, []
    for split, size in _SPLIT_SIZES.items():
        path = _find_file(annotations, f"V2_{split}")
        splits[split] = [_parse_video(entry, path) for entry in iterate_json_list(path)]
        if len(splits[split]) != size:
            notices.append(
                f"{path} has {len(splits[split])} videos, but that of Diving48 V2 has {size}"
            )
    return DatasetIndex(class_names, splits, notices)


def _find_file(annotations: str, name: str) -> str:
    """Return the path of Diving48_{name}.json; ValueError if it does not exist."""
    path = os.path.join(annotations, f"Diving48_{name}.json")
    if os.path.exists(path):
        return path
    if name.startswith("V2") and os.path.exists(path.replace("V2_", "")):
        raise ValueError(
            f"{path.replace('V2_', '')} is of Diving48 V1, whose labels have errors; download V2 "
            f"({os.path.basename(path)}) from {_DOWNLOAD_URL}"
        )
    raise ValueError(f"there is no {path}{format_dataset_hint(annotations, 'diving48')}")


def _read_vocabulary(path: str) -> list[str]:
    """Return the class names, each the four parts of a dive joined by spaces."""
    names = []
    for parts in read_json(path, list):
        if not (isinstance(parts, list) and len(parts) == 4):
            raise ValueError(
                f"{path}: class {len(names)} is {truncated_repr(parts)}, not a list of four parts"
            )
        names.append(" ".join(map(str, parts)))
    return names


def _parse_video(entry: dict, path: str) -> Video:
    """Return the video of one entry of the JSON file at `path`."""
    name = read_field(entry, "vid_name", path, "diving48")
    label = read_field(entry, "label", path, "diving48")
    if not label.isdecimal():
        raise ValueError(
            f"video {truncated_repr(name)} in {path} has label {truncated_repr(label)}, which is "
            "not a class index"
        )
    return Video(name, f"{name}.mp4", int(label))

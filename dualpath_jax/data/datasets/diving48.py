"""Diving48's annotations: `read_diving48`."""

import os

from dualpath_jax.data.datasets.annotations import (
    DatasetIndex,
    Video,
    looks_like,
    read_field,
    require_file,
)
from dualpath_jax.runtime.safe_read import read_json, truncated_repr

PAGE = "http://www.svcl.ucsd.edu/projects/resound/dataset.html"
_SIZES = {"train": 15_027, "test": 1_970}  # of V2


def read_diving48(
    videos_dir: str, annotations: str | None, validation_fraction: float
) -> DatasetIndex:
    """Diving48 V2: Diving48_V2_train.json, Diving48_V2_test.json, Diving48_vocab.json.

    Videos are {vid_name}.mp4. A class's name is the four parts of its dive, such as
    "Back 15som 05Twis FREE". V1, whose labels were corrected in V2, is refused.
    """
    del videos_dir, validation_fraction  # the annotations say all
    annotations = require_file(annotations, os.path.isdir, "a folder with Diving48_V2_train.json")
    class_names = _read_vocabulary(_path(annotations, "vocab"))
    splits, notices = {}, []
    for split, size in _SIZES.items():
        path = _path(annotations, f"V2_{split}")
        splits[split] = [_video(entry, path) for entry in read_json(path, list)]
        if len(splits[split]) != size:
            notices.append(f"{path} has {len(splits[split])} videos, that of Diving48 V2 {size}")
    return DatasetIndex(class_names, splits, notices)


def _path(annotations: str, name: str) -> str:
    path = os.path.join(annotations, f"Diving48_{name}.json")
    if os.path.exists(path):
        return path
    if name.startswith("V2") and os.path.exists(path.replace("V2_", "")):
        raise ValueError(
            f"{path.replace('V2_', '')} is of Diving48 V1, whose labels have errors; download V2 "
            f"({os.path.basename(path)}) from {PAGE}"
        )
    raise ValueError(f"there is no {path}{looks_like(annotations, 'diving48')}")


def _read_vocabulary(path: str) -> list[str]:
    names = []
    for parts in read_json(path, list):
        if not (isinstance(parts, list) and len(parts) == 4):
            raise ValueError(
                f"{path}: class {len(names)} is {truncated_repr(parts)}, not a list of four parts"
            )
        names.append(" ".join(map(str, parts)))
    return names


def _video(entry: dict, path: str) -> Video:
    name, label = (
        read_field(entry, "vid_name", path, "diving48"),
        read_field(entry, "label", path, "diving48"),
    )
    if not label.isdecimal():
        raise ValueError(
            f"video {truncated_repr(name)} in {path} has label {truncated_repr(label)}, which is no class index"
        )
    return Video(name, f"{name}.mp4", int(label))

"""Lists of `path,label` as annotations: `read_csv`."""

import csv
import os

from dualpath_jax.data.datasets.annotations import (
    SPLIT_NAMES,
    DatasetIndex,
    Video,
    looks_like,
    require_file,
    split_by_hash,
)
from dualpath_jax.runtime.safe_read import open_text, truncated_repr

_MAX_CLASSES = 100_000  # each gets a name in memory and a row in the classifier


def read_csv(videos_dir: str, annotations: str | None, validation_fraction: float) -> DatasetIndex:
    """Lines `path,label`: a file, or a folder of train.csv, validation.csv (or val.csv), test.csv.

    The label is what follows the last comma (Kinetics' lists, "path 12" without any comma, are read
    too); fields may be quoted; a first line `path,label` is skipped. Labels are class indices, or
    all of them names, whose classes are in sorted order.
    """
    del videos_dir
    annotations = require_file(annotations, os.path.exists, "a CSV file or a folder with train.csv")
    if os.path.isdir(annotations):
        rows = {}
        for name, split in SPLIT_NAMES.items():
            path = os.path.join(annotations, name + ".csv")
            if os.path.exists(path):
                if split in rows:
                    raise ValueError(
                        f"{annotations!r} has {name}.csv and another list of the same split, "
                        f"{split!r}; keep one of them"
                    )
                rows[split] = _read_rows(path)
        if "train" not in rows:
            raise ValueError(
                f"there is no train.csv in {annotations!r}{looks_like(annotations, 'csv')}"
            )
    else:
        rows = {"train": _read_rows(annotations)}
    class_names = _classes_of(rows)
    index = {name: i for i, name in enumerate(class_names)}
    splits = {
        split: [Video(path, path, index[label]) for path, label in pairs]
        for split, pairs in rows.items()
    }
    if not os.path.isdir(annotations):
        splits = split_by_hash(splits["train"], validation_fraction)
    return DatasetIndex(class_names, splits)


def _read_rows(path: str) -> list[tuple[str, str]]:
    """(path, label) of each line of a CSV file."""
    rows = []
    with open_text(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            fields = next(csv.reader([line.strip()]), [])
            if len(fields) == 1 and line.split()[-1].isdecimal():
                fields = line.strip().rsplit(None, 1)
            if not fields or (number == 1 and [f.strip() for f in fields] == ["path", "label"]):
                continue
            json = line.startswith(("[{", '{"')) or line.strip() in ("[", "{")
            if number == 1 and ("youtube_id" in fields or json):
                raise ValueError(f"{path} is no list of `path,label`{looks_like(path, 'csv')}")
            video, label = ",".join(fields[:-1]).strip(), fields[-1].strip()
            if not video or not label:
                raise ValueError(
                    f"{path}, line {number}: {truncated_repr(line.strip())} is not `path,label`"
                )
            rows.append((video, label))
    return rows


def _classes_of(rows: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Class names as the labels spell them, by index; every label of other splits is in train."""
    known = {label for _, label in rows["train"]}
    for split, pairs in rows.items():
        for path, label in pairs:
            if label not in known:
                raise ValueError(
                    f"video {truncated_repr(path)} of split {split!r} has label {truncated_repr(label)}, "
                    "which no video of train.csv has"
                )
    names = [pair for pair in rows["train"] if not pair[1].isdecimal()]
    if names and len(names) < len(rows["train"]):
        raise ValueError(
            f"video {truncated_repr(names[0][0])} has label {truncated_repr(names[0][1])}, where others have whole "
            "numbers: write numbers alone, or names alone. A first line with headings must be "
            "`path,label`"
        )
    if names:
        return sorted(known)
    digits = len(str(_MAX_CLASSES))
    if large := [n for n in known if len(n) > digits or int(n) >= _MAX_CLASSES]:
        raise ValueError(
            f"label {truncated_repr(min(large))} is no class index below {_MAX_CLASSES:,}; number the "
            "classes from 0 on, or write names"
        )
    count = max(map(int, known), default=-1) + 1
    if extra := known - {str(i) for i in range(count)}:
        raise ValueError(f"label {min(extra)!r} is written with leading zeros; write plain numbers")
    return [str(i) for i in range(count)]

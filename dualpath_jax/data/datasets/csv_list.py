"""Reads a data set that is listed in CSV files with lines `path,label`."""

import csv
import os

from dualpath_jax.data.datasets.annotations import (
    SPLIT_NAMES,
    DatasetIndex,
    Video,
    format_dataset_hint,
    require_file,
    split_by_hash,
)
from dualpath_jax.runtime.safe_read import open_text, truncated_repr

_MAX_CLASSES = 100_000  # each class takes a name in memory and a part of the classifier


def read_csv(videos_dir: str, annotations: str | None, validation_fraction: float) -> DatasetIndex:
    """Read CSV files with lines `path,label`.

    The label is the text after the last comma. Fields may be quoted, and a first line `path,label`
    is skipped. Lines "path 12" without a comma, as in Kinetics' lists, are read too. Labels are
    either all class indices or all class names; named classes are sorted by name.

    Args:
      videos_dir: not used; relative paths in the files are relative to this folder.
      annotations: a CSV file, or a folder with train.csv and perhaps validation.csv (or val.csv)
        and test.csv.
      validation_fraction: fraction of each class for validation, used for a single file.

    Raises:
      ValueError: the files are missing, malformed or inconsistent.
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
                f"there is no train.csv in {annotations!r}{format_dataset_hint(annotations, 'csv')}"
            )
    else:
        rows = {"train": _read_rows(annotations)}
    class_names = _find_class_names(rows)
    index = {name: i for i, name in enumerate(class_names)}
    splits = {
        split: [Video(path, path, index[label]) for path, label in pairs]
        for split, pairs in rows.items()
    }
    if not os.path.isdir(annotations):
        splits = split_by_hash(splits["train"], validation_fraction)
    return DatasetIndex(class_names, splits)


def _read_rows(path: str) -> list[tuple[str, str]]:
    """Read (path, label) from each line of a CSV file."""
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
                raise ValueError(
                    f"{path} is not a list of `path,label`{format_dataset_hint(path, 'csv')}"
                )
            video, label = ",".join(fields[:-1]).strip(), fields[-1].strip()
            if not video or not label:
                raise ValueError(
                    f"{path}, line {number}: {truncated_repr(line.strip())} is not `path,label`"
                )
            rows.append((video, label))
    return rows


def _find_class_names(rows: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Return the class names, by class index, from the labels of the training split.

    Args:
      rows: split -> its (path, label) pairs.

    Raises:
      ValueError: labels mix names and indices, or another split has a label that train lacks.
    """
    known = {label for _, label in rows["train"]}
    for split, pairs in rows.items():
        for path, label in pairs:
            if label not in known:
                raise ValueError(
                    f"video {truncated_repr(path)} of split {split!r} has label "
                    f"{truncated_repr(label)}, which no video of train.csv has"
                )
    named = [pair for pair in rows["train"] if not pair[1].isdecimal()]
    if named and len(named) < len(rows["train"]):
        path, label = named[0]
        raise ValueError(
            f"video {truncated_repr(path)} has label {truncated_repr(label)}, where others have "
            "whole numbers: write only numbers, or only names. A first line with headings must be "
            "`path,label`"
        )
    if named:
        return sorted(known)
    digits = len(str(_MAX_CLASSES))
    if large := [n for n in known if len(n) > digits or int(n) >= _MAX_CLASSES]:
        raise ValueError(
            f"label {truncated_repr(min(large))} is not a class index below {_MAX_CLASSES:,}; "
            "number the classes from 0 on, or write names"
        )
    count = max(map(int, known), default=-1) + 1
    if extra := known - {str(i) for i in range(count)}:
        raise ValueError(f"label {min(extra)!r} is written with leading zeros; write plain numbers")
    return [str(i) for i in range(count)]

"""Reads a data set that is listed in CSV files with lines `path,label`."""

import csv
import os
import unicodedata

from dualpath_jax.data.datasets.annotations import (
    SPLIT_NAMES,
    DatasetIndex,
    Video,
    format_dataset_hint,
    require_file,
)
from dualpath_jax.data.preparation.video_names import is_image_folder
from dualpath_jax.runtime.safe_read import open_text, truncated_repr

_MAX_CLASSES = 100_000  # each class takes a name in memory and a part of the classifier


def read_csv(
    videos_dir: str, annotations: str | None, group_column: str | None = None
) -> DatasetIndex:
    """Read CSV files with lines `path,label`.

    The label is the text after the last comma. Fields may be quoted. A first line is a heading if
    it is `path,label`, or if it names no file while the second line does. Lines "path 12" without a
    comma, as in Kinetics' lists, are read too. Labels are either all class indices or all class
    names; named classes are sorted by name.

    Args:
      videos_dir: relative paths in the files are relative to this folder.
      annotations: a CSV file, or a folder with train.csv and perhaps validation.csv and test.csv;
        val.csv and other spellings are read too, see `SPLIT_NAMES`.
      group_column: column of a single file that names each video's recording; its heading then
        names the columns path, label and this one, in any order.

    Raises:
      ValueError: the files are missing, malformed or inconsistent.
    """
    notices: list[str] = []
    annotations = require_file(annotations, os.path.exists, "a CSV file or a folder with train.csv")
    if os.path.isdir(annotations):
        rows = {}
        for name in sorted(os.listdir(annotations)):
            stem, extension = os.path.splitext(name.casefold())
            split = SPLIT_NAMES.get(stem)
            if extension == ".csv" and split:
                if split in rows:
                    raise ValueError(
                        f"{annotations!r} has {name} and another list of the same split, "
                        f"{split!r}; keep one of them"
                    )
                rows[split] = _read_rows(os.path.join(annotations, name), videos_dir, notices)
        rows = {
            split: rows[split] for split in dict.fromkeys(SPLIT_NAMES.values()) if split in rows
        }
        if "train" not in rows:
            raise ValueError(
                f"there is no train.csv in {annotations!r}{format_dataset_hint(annotations, 'csv')}"
            )
    elif group_column:
        rows = {"train": _read_columns(annotations, group_column)}
    else:
        rows = {"train": _read_rows(annotations, videos_dir, notices)}
    class_names = _find_class_names(rows)
    index = {name: i for i, name in enumerate(class_names)}
    splits = {
        split: [Video(path, path, index[label], *group) for path, label, *group in listed]
        for split, listed in rows.items()
    }
    has_splits = os.path.isdir(annotations)
    return DatasetIndex(class_names, splits, notices, has_splits=has_splits)


def _read_columns(path: str, group_column: str) -> list[tuple[str, str, str]]:
    """Read (path, label, recording) from a CSV file whose first line names its columns."""
    columns = ("path", "label", group_column)
    rows = []
    with open_text(path, errors="surrogateescape") as file:
        lines = csv.reader(file)
        heading = [field.strip() for field in next(lines, [])]
        if missing := [name for name in columns if name not in heading]:
            raise ValueError(
                f"--group_by=column:{group_column}: the first line of {path} must name the columns "
                f"{', '.join(columns)}, and lacks {', '.join(missing)}: "
                f"{truncated_repr(','.join(heading))}"
            )
        places = [heading.index(name) for name in columns]
        for fields in filter(None, lines):
            values = tuple(fields[i].strip() for i in places if i < len(fields))
            if len(fields) != len(heading) or not all(values):
                raise ValueError(
                    f"{path}, line {lines.line_num}: {truncated_repr(','.join(fields))} lacks one "
                    f"of {', '.join(columns)}, or has more fields than the first line"
                )
            _check_label(values[1], path, lines.line_num)
            rows.append(values)
    return rows


def _check_label(label: str, path: str, number: int) -> None:
    """Raise ValueError for a label that is not text; bytes that are not UTF-8 are surrogates."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in label):
        raise ValueError(
            f"{path}, line {number}: label {truncated_repr(label)} is not text in UTF-8; "
            "convert the list, such as with iconv -f GBK -t UTF-8 (or -f UTF-16)"
        )


def _read_rows(path: str, videos_dir: str, notices: list[str]) -> list[tuple[str, str]]:
    """Read (path, label) from each line of a CSV file; a heading is left out with a notice."""
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
            _check_label(label, path, number)
            rows.append((video, label))
    return _drop_heading(rows, path, videos_dir, notices)


def _drop_heading(
    rows: list[tuple[str, str]], path: str, videos_dir: str, notices: list[str]
) -> list[tuple[str, str]]:
    """Return the rows without a heading.

    The first row is a heading if the second row names a file, and the first one names neither a
    file of this kind nor a label of any other row.

    Raises:
      ValueError: the rows are `label,path`.
    """

    def exists(name: str) -> bool:
        path = os.path.join(videos_dir, name)
        return os.path.isfile(path) or is_image_folder(path)

    first = rows[:20]
    swapped = [exists(label) and not exists(video) for video, label in first]
    if sum(swapped) > 1 and all(swapped[1:]):
        raise ValueError(
            f"{path} has lines `label,path`, such as {truncated_repr(','.join(rows[-1]))}; write "
            "`path,label`"
        )
    if len(rows) < 2:
        return rows
    (name, label), (second, _) = rows[:2]
    unlike = os.path.splitext(name)[1] != os.path.splitext(second)[1]
    if os.path.isdir(os.path.join(videos_dir, second)):  # folders of images have no suffix
        unlike = name.count("/") != second.count("/")
    unlike = unlike and label not in (other for _, other in rows[1:])
    if unlike and exists(second) and not exists(name):
        notices.append(f"the first line of {path}, {','.join(rows[0])!r}, is taken for a heading")
        return rows[1:]
    return rows


def _find_class_names(rows: dict[str, list[tuple[str, ...]]]) -> list[str]:
    """Return the class names, by class index, from the labels of the training split.

    Args:
      rows: split -> its (path, label) pairs, or with more fields.

    Raises:
      ValueError: labels mix names and indices, or another split has a label that train lacks.
    """
    known = {label for _, label, *_ in rows["train"]}
    for split, listed in rows.items():
        for path, label, *_ in listed:
            if label not in known:
                raise ValueError(
                    f"video {truncated_repr(path)} of split {split!r} has label "
                    f"{truncated_repr(label)}, which no video of train.csv has"
                )
    named = [row for row in rows["train"] if not row[1].isdecimal()]
    if named and len(named) < len(rows["train"]):
        path, label, *_ = named[0]
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

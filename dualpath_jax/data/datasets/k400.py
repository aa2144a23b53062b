"""Kinetics-400's annotations: `read_k400`."""

import csv
import os

from dualpath_jax.data.datasets.annotations import (
    SPLIT_NAMES,
    DatasetIndex,
    Video,
    looks_like,
    require_file,
)
from dualpath_jax.runtime.safe_read import open_text, truncated_repr

NUM_CLASSES = 400
_COLUMNS = ("youtube_id", "time_start", "time_end", "split")  # and label, perhaps is_cc
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")  # the first is preferred, and what is published


def read_k400(videos_dir: str, annotations: str | None, validation_fraction: float) -> DatasetIndex:
    """Kinetics-400: CSV files, or one, with a header `label,youtube_id,time_start,time_end,split`.

    Columns are found by name. Videos are {youtube_id}_{time_start:06d}_{time_end:06d}.mp4 anywhere
    below the videos folder: folders are not looked at, as their spellings of the classes differ.
    Class indices are alphabetical over the labels of all files as they are spelled there. Rows
    without a label (the crawler's test file has no such column) are left out.
    """
    del validation_fraction  # it has its own splits
    annotations = require_file(annotations, os.path.exists, "a folder with train.csv and val.csv")
    rows, notices = [], []
    for path in _csv_files(annotations):
        found = _read_rows(path)
        labelled = [row for row in found if row[1]]
        if len(labelled) < len(found):
            notices.append(
                f"{len(found) - len(labelled)} rows of {path} have no label and are left out: "
                "without one a video can neither be trained on nor scored"
            )
        rows += labelled
    class_names = sorted({label for _, label, _ in rows})
    if not rows:
        raise ValueError(f"no row of {annotations!r} has a label; add train.csv and val.csv")
    if len(class_names) > NUM_CLASSES:
        raise ValueError(
            f"{annotations!r} has {len(class_names)} classes, Kinetics-400 has {NUM_CLASSES}; it "
            "looks like Kinetics-600 or 700, which can be listed as CSV, --dataset=csv"
        )
    index = {name: i for i, name in enumerate(class_names)}
    files, more = _files_by_stem(videos_dir)
    splits = {}
    for split, label, stem in rows:
        path = files.get(stem, stem + _SUFFIXES[0])
        splits.setdefault(split, []).append(Video(stem, path, index[label]))
    return DatasetIndex(class_names, splits, notices + more)


def _csv_files(annotations: str) -> list[str]:
    if not os.path.isdir(annotations):
        return [annotations]
    names = sorted(name for name in os.listdir(annotations) if name.endswith(".csv"))
    if not names:
        raise ValueError(
            f"there is no CSV file in {annotations!r}{looks_like(annotations, 'k400')}"
        )
    return [os.path.join(annotations, name) for name in names]


def _read_rows(path: str) -> list[tuple[str, str, str]]:
    """(split, label or "", file stem) of each row of a CSV file."""
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        header = reader.fieldnames or []
        if missing := [name for name in _COLUMNS if name not in header]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)} (its first line is "
                f"{truncated_repr(','.join(header))}){looks_like(path, 'k400')}"
            )
        return [_read_row(row, f"{path}, line {reader.line_num}") for row in reader]


def _read_row(row: dict[str, str], where: str) -> tuple[str, str, str]:
    values = {name: (row[name] or "").strip() for name in _COLUMNS}
    split = SPLIT_NAMES.get(values["split"])
    if split is None:
        raise ValueError(
            f"{where}: split is {truncated_repr(values['split'])}, not train, val or test"
        )
    try:
        start, end = int(values["time_start"]), int(values["time_end"])
    except ValueError as error:
        raise ValueError(f"{where}: a time is no whole number of seconds ({error})") from None
    if not values["youtube_id"]:
        raise ValueError(f"{where}: youtube_id is empty")
    stem = f"{values['youtube_id']}_{start:06d}_{end:06d}"
    return split, (row.get("label") or "").strip(), stem


def _files_by_stem(videos_dir: str) -> tuple[dict[str, str], list[str]]:
    """Stem -> path below the videos folder, and a notice of stems that several files have."""
    files, extra, seen = {}, [], set()
    for folder, below, names in os.walk(videos_dir, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link; it may be one to a folder above
            below.clear()
            continue
        seen.add(real)
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in _SUFFIXES:
                path = os.path.relpath(os.path.join(folder, name), videos_dir)
                files.setdefault(stem, []).append(path)
    for found in files.values():
        found.sort(key=lambda path: (_SUFFIXES.index(os.path.splitext(path)[1].lower()), path))
        extra += found[1:]
    notices = []
    if extra:
        notices.append(
            f"{len(extra)} video files below {videos_dir} are second copies by their names and "
            f"not used, such as {min(extra)!r}"
        )
    return {stem: found[0] for stem, found in files.items()}, notices

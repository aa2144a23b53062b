"""Reads the annotations of Kinetics-400."""

import csv
import os

from dualpath_jax.data.datasets.annotations import (
    SPLIT_NAMES,
    DatasetIndex,
    Video,
    format_dataset_hint,
    require_file,
)
from dualpath_jax.runtime.safe_read import open_text, truncated_repr

NUM_CLASSES = 400
_COLUMNS = ("youtube_id", "time_start", "time_end", "split")  # required; label is optional
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")  # in order of preference; the published one is first


def read_k400(videos_dir: str, annotations: str | None) -> DatasetIndex:
    """Read CSV files with the header `label,youtube_id,time_start,time_end,split`.

    Columns may be in any order, and more columns are ignored. Class indices follow the sorted
    labels of all files. Rows without a label are left out (the crawler's test file has no label
    column).

    Args:
      videos_dir: folder of the videos {youtube_id}_{time_start:06d}_{time_end:06d}.mp4, at any
        depth. Names of folders are ignored, because downloads spell the classes differently.
      annotations: a CSV file, or a folder of CSV files.

    Raises:
      ValueError: the files are missing or malformed, or have more than 400 classes.
    """
    annotations = require_file(annotations, os.path.exists, "a folder with train.csv and val.csv")
    rows, notices = [], []
    for path in _list_csv_files(annotations):
        file_rows = _read_rows(path)
        labeled = [row for row in file_rows if row[1]]
        if len(labeled) < len(file_rows):
            notices.append(
                f"{len(file_rows) - len(labeled)} rows of {path} have no label and are left out: "
                "a video without a label can neither be trained on nor scored"
            )
        rows += labeled
    class_names = sorted({label for _, label, _ in rows})
    if not rows:
        raise ValueError(f"no row of {annotations!r} has a label; add train.csv and val.csv")
    if len(class_names) > NUM_CLASSES:
        raise ValueError(
            f"{annotations!r} has {len(class_names)} classes, but Kinetics-400 has {NUM_CLASSES}; "
            "it looks like Kinetics-600 or 700, which can be listed as CSV, --dataset=csv"
        )
    index = {name: i for i, name in enumerate(class_names)}
    files, more = _index_files_by_stem(videos_dir)
    splits = {}
    for split, label, stem in rows:
        # A video that is not there is listed too, under its published name.
        path = files.get(stem, stem + _SUFFIXES[0])
        splits.setdefault(split, []).append(Video(stem, path, index[label]))
    return DatasetIndex(class_names, splits, notices + more)


def _list_csv_files(annotations: str) -> list[str]:
    """Return the paths of the CSV files in a folder, or of the one file."""
    if not os.path.isdir(annotations):
        return [annotations]
    names = sorted(name for name in os.listdir(annotations) if name.endswith(".csv"))
    if not names:
        raise ValueError(
            f"there is no CSV file in {annotations!r}{format_dataset_hint(annotations, 'k400')}"
        )
    return [os.path.join(annotations, name) for name in names]


def _read_rows(path: str) -> list[tuple[str, str, str]]:
    """Read (split, label or "", file stem) from each row of a CSV file."""
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        header = reader.fieldnames or []
        if missing := [name for name in _COLUMNS if name not in header]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)} (its first line is "
                f"{truncated_repr(','.join(header))}){format_dataset_hint(path, 'k400')}"
            )
        return [_parse_row(row, f"{path}, line {reader.line_num}") for row in reader]


def _parse_row(row: dict[str, str], where: str) -> tuple[str, str, str]:
    """Return (split, label or "", file stem) of a row; `where` begins error messages."""
    values = {name: (row[name] or "").strip() for name in _COLUMNS}
    split = SPLIT_NAMES.get(values["split"])
    if split is None:
        raise ValueError(
            f"{where}: split is {truncated_repr(values['split'])}, not train, val or test"
        )
    try:
        start, end = int(values["time_start"]), int(values["time_end"])
    except ValueError as error:
        raise ValueError(f"{where}: a time is not a whole number of seconds ({error})") from None
    if not values["youtube_id"]:
        raise ValueError(f"{where}: youtube_id is empty")
    stem = f"{values['youtube_id']}_{start:06d}_{end:06d}"
    return split, (row.get("label") or "").strip(), stem


def _index_files_by_stem(videos_dir: str) -> tuple[dict[str, str], list[str]]:
    """Find all video files below the videos folder.

    Returns:
      (file stem -> path relative to the folder; a notice of stems that several files share).
    """
    files, extra, seen = {}, [], set()
    for folder, below, names in os.walk(videos_dir, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link, perhaps to a folder above
            below.clear()
            continue
        seen.add(real)
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in _SUFFIXES:
                path = os.path.relpath(os.path.join(folder, name), videos_dir)
                files.setdefault(stem, []).append(path)
    for paths in files.values():
        paths.sort(key=lambda path: (_SUFFIXES.index(os.path.splitext(path)[1].lower()), path))
        extra += paths[1:]
    notices = []
    if extra:
        notices.append(
            f"{len(extra)} video files below {videos_dir} are, by their names, second copies and "
            f"are not used, such as {min(extra)!r}"
        )
    return {stem: paths[0] for stem, paths in files.items()}, notices

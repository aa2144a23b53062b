"""Who is in a data set: which videos, in which split, of which class.

Public: `list_videos`, `DATASETS`, `Listing`, `Video`.

To add a data set, write a reader `(videos_dir, annotations, validation_fraction) -> Listing` and
name it in `DATASETS`. A reader trusts its annotations and lists videos whether or not their files
are there; `list_videos` checks what is common to all. Splits are "train", "validation", "test".
"""

import collections
import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable

SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


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
class Listing:
    """A data set as its annotations tell it.

    Attributes:
      class_names: the name of each class index.
      splits: split name -> its videos in the order of the annotations.
      notices: what was left out or looks odd, one sentence each.
    """

    class_names: list[str]
    splits: dict[str, list[Video]]
    notices: list[str] = dataclasses.field(default_factory=list)


def list_videos(
    dataset: str, videos_dir: str, annotations: str | None = None, validation_fraction: float = 0.2
) -> Listing:
    """Reads a data set's annotations; the splits returned are not empty.

    Args:
      dataset: a name in `DATASETS`.
      videos_dir: folder of the video files.
      annotations: folder or file with the annotations; not used by "folder".
      validation_fraction: part of each class, 0 <= fraction < 1, that becomes the validation split
        where the data set has no splits of its own.

    Raises:
      ValueError: unknown data set, missing folder, or annotations that contradict themselves; the
        message names the value and what to change.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: known are {', '.join(DATASETS)}")
    if not os.path.isdir(videos_dir):
        raise ValueError(f"there is no folder of videos {videos_dir!r}; check --videos")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be in [0, 1)")
    listing = DATASETS[dataset](videos_dir, annotations, validation_fraction)
    splits = {split: videos for split, videos in listing.splits.items() if videos}
    if not splits:
        raise ValueError(f"data set {dataset!r} has no videos in {annotations or videos_dir!r}")
    for split, videos in splits.items():
        _check_split(split, videos, len(listing.class_names))
    return Listing(listing.class_names, splits, listing.notices + _shared_ids(splits))


def read_ssv2(videos_dir: str, annotations: str | None, validation_fraction: float) -> Listing:
    """Something-Something-v2: labels.json, train.json, validation.json, perhaps test.json.

    The files may have their older names, something-something-v2-*.json. Videos are {id}.webm or
    {id}.mp4. Test entries come without a template; test-answers.csv (id;template) supplies it.
    """
    del validation_fraction  # it has its own splits
    annotations = _require(annotations, os.path.isdir, "a folder with labels.json and train.json")
    labels = _read_json(_ssv2_path(annotations, "labels"), dict)
    try:
        classes = {_plain(template): int(index) for template, index in labels.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels.json in {annotations}: a label is no number ({error})") from None
    if sorted(classes.values()) != list(range(len(classes))):
        raise ValueError(
            f"labels.json in {annotations}: labels must be 0..{len(classes) - 1}, each once"
        )
    files = {entry.name for entry in os.scandir(videos_dir)}
    answers = _read_answers(annotations)
    splits, notices = {}, []
    for split in ("train", "validation", "test"):
        path = _ssv2_path(annotations, split, required=split != "test")
        if path is None:
            continue
        videos, unanswered = [], 0
        for entry in _read_json(path, list):
            id_ = str(entry["id"])
            template = entry.get("template", answers.get(id_) if split == "test" else None)
            if template is None and split == "test":
                unanswered += 1
                continue
            name = f"{id_}.mp4" if f"{id_}.mp4" in files else f"{id_}.webm"
            if f"{id_}.webm" in files:
                name = f"{id_}.webm"
            videos.append(Video(id_, name, _ssv2_class(classes, template, id_, path)))
        splits[split] = videos
        if unanswered:
            notices.append(
                f"{unanswered} entries of {path} have no template and are left out; "
                "put test-answers.csv (lines id;template) beside it to use them"
            )
    return Listing(sorted(classes, key=classes.get), splits, notices)


def read_folder(videos_dir: str, annotations: str | None, validation_fraction: float) -> Listing:
    """Class folders with videos in them, perhaps inside train, validation (or val) and test."""
    del annotations  # the folders say all
    folders, notices = _visible(videos_dir, "", want_folders=True)
    if not folders:
        raise ValueError(f"{videos_dir!r} holds no class folders; expected VIDEOS/<class>/<file>")
    if set(folders) <= set(SPLIT_FOLDERS):
        if {"val", "validation"} <= set(folders):
            raise ValueError(f"{videos_dir!r} has both val and validation; keep one of them")
        found = []
        for folder in folders:
            classes, more = _visible(videos_dir, folder, want_folders=True)
            notices += more
            found += [(SPLIT_FOLDERS[folder], name, f"{folder}/{name}") for name in classes]
    else:
        found = [("", name, name) for name in folders]
    class_names = sorted({name for _, name, _ in found})
    index = {name: i for i, name in enumerate(class_names)}
    splits = collections.defaultdict(list)
    for split, name, folder in found:
        files, more = _visible(videos_dir, folder, want_folders=False)
        notices += more
        paths = [f"{folder}/{file}" for file in files]
        splits[split] += [Video(path, path, index[name]) for path in paths]
    if "" in splits:
        splits = split_by_hash(splits[""], validation_fraction)
    return Listing(class_names, dict(splits), notices)


def read_csv(videos_dir: str, annotations: str | None, validation_fraction: float) -> Listing:
    """Lines `path,label`: a file, or a folder of train.csv, validation.csv (or val.csv), test.csv.

    The label is what follows the last comma (Kinetics' lists, "path 12" without any comma, are read
    too); fields may be quoted; a first line `path,label` is skipped. When all labels are whole
    numbers, they are the class indices; otherwise classes are the sorted names.
    """
    del videos_dir
    annotations = _require(annotations, os.path.exists, "a CSV file or a folder with train.csv")
    if os.path.isdir(annotations):
        rows = {}
        for name, split in SPLIT_FOLDERS.items():
            path = os.path.join(annotations, name + ".csv")
            if os.path.exists(path):
                rows.setdefault(split, _read_rows(path))
        if "train" not in rows:
            raise ValueError(f"there is no train.csv in {annotations!r}")
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
    return Listing(class_names, splits)


# Of the published data sets and the demo; the others' are what their annotations say.
NUM_CLASSES = {"k400": 400, "ssv2": 174, "hmdb51": 51, "diving48": 48, "demo": 8}

DATASETS: dict[str, Callable[[str, str | None, float], Listing]] = {
    "ssv2": read_ssv2,
    "folder": read_folder,
    "csv": read_csv,
}


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


def _check_split(split: str, videos: list[Video], num_classes: int) -> None:
    seen = set()
    for video in videos:
        if video.id in seen:
            raise ValueError(f"video {video.id!r} is twice in split {split!r}; remove one of them")
        seen.add(video.id)
        if not 0 <= video.label < num_classes:
            raise ValueError(
                f"video {video.id!r} of split {split!r} has label {video.label}; "
                f"there are {num_classes} classes"
            )


def _shared_ids(splits: dict[str, list[Video]]) -> list[str]:
    """Notices of videos that stand in two splits."""
    count = collections.Counter(video.id for videos in splits.values() for video in videos)
    shared = [id_ for id_, n in count.items() if n > 1]
    return [f"{len(shared)} videos are in several splits, such as {shared[0]!r}"] if shared else []


def _require(annotations: str | None, exists: Callable[[str], bool], what: str) -> str:
    if not annotations or not exists(annotations):
        raise ValueError(f"there are no annotations {annotations!r}; --annotations is {what}")
    return annotations


def _read_json(path: str, kind: type) -> dict | list:
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON ({error}); download it again") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def _ssv2_path(annotations: str, name: str, required: bool = True) -> str | None:
    for file in (f"{name}.json", f"something-something-v2-{name}.json"):
        path = os.path.join(annotations, file)
        if os.path.exists(path):
            return path
    if required:
        raise ValueError(f"there is no {name}.json (nor {file}) in {annotations!r}")
    return None


def _read_answers(annotations: str) -> dict[str, str]:
    """id -> template of the test split, empty if there is no test-answers.csv."""
    path = os.path.join(annotations, "test-answers.csv")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8-sig") as file:
        pairs = (line.strip().partition(";") for line in file if line.strip())
        return {id_: template for id_, _, template in pairs}


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _ssv2_class(classes: dict[str, int], template: str | None, id_: str, path: str) -> int:
    if template is None or _plain(template) not in classes:
        raise ValueError(
            f"video {id_} in {path} has template {template!r}, which labels.json does not have; "
            "the files must be of one release"
        )
    return classes[_plain(template)]


def _visible(root: str, folder: str, want_folders: bool) -> tuple[list[str], list[str]]:
    """Sorted names of the folders (or files) in root/folder without hidden ones, and notices."""
    entries = [e for e in os.scandir(os.path.join(root, folder)) if not e.name.startswith(".")]
    wanted = sorted(entry.name for entry in entries if entry.is_dir() == want_folders)
    others = sorted(entry.name for entry in entries if entry.is_dir() != want_folders)
    if not others:
        return wanted, []
    kind = "files outside class folders" if want_folders else "folders inside a class folder"
    place = os.path.join(root, folder) if folder else root
    return wanted, [f"{len(others)} {kind} in {place} are ignored, such as {others[0]!r}"]


def _read_rows(path: str) -> list[tuple[str, str]]:
    """(path, label) of each line of a CSV file."""
    rows = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            fields = next(csv.reader([line.strip()]), [])
            if len(fields) == 1 and line.split()[-1].isdecimal():
                fields = line.strip().rsplit(None, 1)
            if not fields or (number == 1 and [f.strip() for f in fields] == ["path", "label"]):
                continue
            video, label = ",".join(fields[:-1]).strip(), fields[-1].strip()
            if not video or not label:
                raise ValueError(f"{path}, line {number}: {line.strip()!r} is not `path,label`")
            rows.append((video, label))
    return rows


def _classes_of(rows: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Class names as the labels spell them, by index; every label of other splits is in train."""
    known = {label for _, label in rows["train"]}
    for split, pairs in rows.items():
        for path, label in pairs:
            if label not in known:
                raise ValueError(
                    f"video {path!r} of split {split!r} has label {label!r}, "
                    "which no video of train.csv has"
                )
    if not all(label.isdecimal() for label in known):
        return sorted(known)
    count = max(map(int, known), default=-1) + 1
    if extra := known - {str(i) for i in range(count)}:
        raise ValueError(f"label {min(extra)!r} is written with leading zeros; write plain numbers")
    return [str(i) for i in range(count)]

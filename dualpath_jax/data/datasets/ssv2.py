"""Something-Something-v2's annotations: `read_ssv2`."""

import os

from dualpath_jax.data.datasets.annotations import (
    DatasetIndex,
    Video,
    looks_like,
    read_field,
    require_file,
)
from dualpath_jax.runtime.safe_read import open_text, read_json, truncated_repr


def read_ssv2(videos_dir: str, annotations: str | None, validation_fraction: float) -> DatasetIndex:
    """Something-Something-v2: labels.json, train.json, validation.json, perhaps test.json.

    The files may have their older names, something-something-v2-*.json. Videos are {id}.webm or
    {id}.mp4. Test entries come without a template; test-answers.csv (id;template) supplies it.
    """
    del validation_fraction  # it has its own splits
    annotations = require_file(
        annotations, os.path.isdir, "a folder with labels.json and train.json"
    )
    classes = _read_classes(annotations)
    files = {entry.name for entry in os.scandir(videos_dir)}
    answers = _read_answers(annotations)
    splits, notices = {}, []
    for split in ("train", "validation", "test"):
        path = _path(annotations, split, required=split != "test")
        if path is None:
            continue
        videos, unanswered = [], 0
        for entry in read_json(path, list):
            id_ = read_field(entry, "id", path, "ssv2")
            template = entry.get("template")
            if template is None and split == "test":
                template = answers.get(id_)
                if template is None:
                    unanswered += 1
                    continue
            name = f"{id_}.mp4" if f"{id_}.mp4" in files else f"{id_}.webm"
            if f"{id_}.webm" in files:
                name = f"{id_}.webm"
            videos.append(Video(id_, name, _class_of(classes, template, id_, path)))
        splits[split] = videos
        if unanswered:
            notices.append(
                f"{unanswered} entries of {path} have no template and are left out; "
                "put test-answers.csv (lines id;template) beside it to use them"
            )
    return DatasetIndex(sorted(classes, key=classes.get), splits, notices)


def _read_classes(annotations: str) -> dict[str, int]:
    """Template without brackets -> class index."""
    labels = read_json(_path(annotations, "labels"), dict)
    try:
        classes = {_plain(template): int(index) for template, index in labels.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"labels.json in {annotations}: a label is no number ({error})") from None
    if sorted(classes.values()) != list(range(len(labels))):
        raise ValueError(
            f"labels.json in {annotations}: labels must be 0..{len(labels) - 1}, each once, "
            "and no two templates the same"
        )
    return classes


def _path(annotations: str, name: str, required: bool = True) -> str | None:
    for file in (f"{name}.json", f"something-something-v2-{name}.json"):
        path = os.path.join(annotations, file)
        if os.path.exists(path):
            return path
    if required:
        raise ValueError(
            f"there is no {name}.json (nor {file}) in {annotations!r}"
            f"{looks_like(annotations, 'ssv2')}"
        )
    return None


def _read_answers(annotations: str) -> dict[str, str]:
    """id -> template of the test split, empty if there is no test-answers.csv."""
    path = os.path.join(annotations, "test-answers.csv")
    if not os.path.exists(path):
        return {}
    with open_text(path) as file:
        pairs = (line.strip().partition(";") for line in file if line.strip())
        return {id_: template for id_, _, template in pairs}


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _class_of(classes: dict[str, int], template: object, id_: str, path: str) -> int:
    if not isinstance(template, str) or _plain(template) not in classes:
        raise ValueError(
            f"video {id_[:200]} in {path} has template {truncated_repr(template)}, which labels.json does "
            "not have; the files must be of one release"
        )
    return classes[_plain(template)]

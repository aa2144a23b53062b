"""Reads the annotations of Something-Something-v2."""

import os

from dualpath_jax.data.datasets.annotations import (
    DatasetIndex,
    Video,
    format_dataset_hint,
    read_field,
    require_file,
)
from dualpath_jax.runtime.safe_read import iterate_json_list, open_text, read_json, truncated_repr


def read_ssv2(videos_dir: str, annotations: str | None) -> DatasetIndex:
    """Read labels.json, train.json, validation.json and, if it exists, test.json.

    The files may also have their older names, something-something-v2-*.json. A class is the
    template of a video's caption, without brackets. Test entries come without a template;
    test-answers.csv (lines id;template) supplies it.

    Args:
      videos_dir: folder of the video files, {id}.webm or {id}.mp4.
      annotations: folder of the JSON files.

    Raises:
      ValueError: a file is missing or malformed, or a template is not in labels.json.
    """
    annotations = require_file(
        annotations, os.path.isdir, "a folder with labels.json and train.json"
    )
    classes = _read_classes(annotations)
    files = {entry.name for entry in os.scandir(videos_dir)}
    answers = _read_answers(annotations)
    splits, notices = {}, []
    for split in ("train", "validation", "test"):
        path = _find_file(annotations, split, required=split != "test")
        if path is None:
            continue
        videos, unanswered = [], 0
        for entry in iterate_json_list(path):
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
            videos.append(Video(id_, name, _find_class(classes, template, id_, path)))
        splits[split] = videos
        if unanswered:
            notices.append(
                f"{unanswered} entries of {path} have no template and are left out; "
                "put test-answers.csv (lines id;template) next to it to use them"
            )
    return DatasetIndex(sorted(classes, key=classes.get), splits, notices)


def _read_classes(annotations: str) -> dict[str, int]:
    """Read labels.json: template without brackets -> class index."""
    labels = read_json(_find_file(annotations, "labels"), dict)
    try:
        classes = {_remove_brackets(template): int(index) for template, index in labels.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"labels.json in {annotations}: a label is not a number ({error})"
        ) from None
    if sorted(classes.values()) != list(range(len(labels))):
        raise ValueError(
            f"labels.json in {annotations}: labels must be 0..{len(labels) - 1}, each once, "
            "and no two templates may be the same"
        )
    return classes


def _find_file(annotations: str, name: str, required: bool = True) -> str | None:
    """Return the path of {name}.json, under its new or older name; None if it does not exist."""
    for file in (f"{name}.json", f"something-something-v2-{name}.json"):
        path = os.path.join(annotations, file)
        if os.path.exists(path):
            return path
    if required:
        raise ValueError(
            f"there is no {name}.json (nor {file}) in {annotations!r}"
            f"{format_dataset_hint(annotations, 'ssv2')}"
        )
    return None


def _read_answers(annotations: str) -> dict[str, str]:
    """Read test-answers.csv: id -> template. Returns {} if the file does not exist."""
    path = os.path.join(annotations, "test-answers.csv")
    if not os.path.exists(path):
        return {}
    with open_text(path) as file:
        pairs = (line.strip().partition(";") for line in file if line.strip())
        return {id_: template for id_, _, template in pairs}


def _remove_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _find_class(classes: dict[str, int], template: object, id_: str, path: str) -> int:
    """Return the class index of a video's template; ValueError if it is not a known class."""
    if not isinstance(template, str) or _remove_brackets(template) not in classes:
        raise ValueError(
            f"video {id_[:200]} in {path} has template {truncated_repr(template)}, which "
            "labels.json does not have; the files must be of one release"
        )
    return classes[_remove_brackets(template)]

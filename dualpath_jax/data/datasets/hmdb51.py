"""Reads the annotations of HMDB51."""

import os
import re

from dualpath_jax.data.datasets.annotations import (
    DatasetIndex,
    Video,
    format_dataset_hint,
    require_file,
)
from dualpath_jax.runtime.safe_read import open_text, truncated_repr

_FILE_PATTERN = re.compile(r"(.+)_test_split([123])\.txt")
_ROLE_BY_DIGIT = {"0": None, "1": "train", "2": "test"}


def read_hmdb51(videos_dir: str, annotations: str | None) -> DatasetIndex:
    """Read {class}_test_split{1,2,3}.txt, whose lines are `<file>.avi <0|1|2>`.

    The splits train1, test1, train2, ... are three divisions of the same videos. The digit puts a
    video into training (1), into test (2) or into neither (0). A video's id is its path.

    Args:
      videos_dir: not used; the video files are {class}/{file}.avi in this folder.
      annotations: folder of the text files.

    Raises:
      ValueError: a file is missing or malformed.
    """
    del videos_dir  # only the annotations define the splits
    annotations = require_file(annotations, os.path.isdir, "the folder of *_test_split1.txt")
    matches = [
        match for name in os.listdir(annotations) if (match := _FILE_PATTERN.fullmatch(name))
    ]
    if not matches:
        raise ValueError(
            f"there is no <class>_test_split1.txt in {annotations!r}"
            f"{format_dataset_hint(annotations, 'hmdb51')}"
        )
    # Class names are sorted, not file names: there, sword_exercise_test... is before sword_test...
    class_names = sorted({match[1] for match in matches})
    divisions = sorted({match[2] for match in matches})
    splits = {role + division: [] for division in divisions for role in ("train", "test")}
    for division in divisions:
        for label, name in enumerate(class_names):
            path = os.path.join(annotations, f"{name}_test_split{division}.txt")
            for file, role in _read_roles(path):
                video = Video(f"{name}/{file}", f"{name}/{file}", label)
                splits[role + division].append(video)
    return DatasetIndex(class_names, splits, share_videos=True)


def _read_roles(path: str) -> list[tuple[str, str]]:
    """Read (file, "train" or "test") from each line of a file, except lines with digit 0."""
    if not os.path.exists(path):
        raise ValueError(
            f"there is no {path}, but other classes have such a file; unpack all files again"
        )
    roles = {}
    with open_text(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name, _, digit = line.strip().rpartition(" ")
            name = name.strip()
            if not name or digit not in _ROLE_BY_DIGIT:
                raise ValueError(
                    f"{path}, line {number}: {truncated_repr(line.strip())} is not `<file> <0|1|2>`"
                )
            if name in roles:
                raise ValueError(f"{path}, line {number}: {truncated_repr(name)} occurs twice")
            roles[name] = _ROLE_BY_DIGIT[digit]
    used = [(name, role) for name, role in roles.items() if role]
    if not used:
        raise ValueError(f"{path} lists no video of its class for training or test")
    return used

"""HMDB51's annotations: `read_hmdb51`."""

import os
import re

from dualpath_jax.data.datasets.annotations import DatasetIndex, Video, looks_like, require_file
from dualpath_jax.runtime.safe_read import open_text, truncated_repr

DIVISIONS = ("1", "2", "3")
_FILE = re.compile(r"(.+)_test_split([123])\.txt")
_ROLES = {"0": None, "1": "train", "2": "test"}


def read_hmdb51(
    videos_dir: str, annotations: str | None, validation_fraction: float
) -> DatasetIndex:
    """HMDB51: {class}_test_split{1,2,3}.txt, lines `<file>.avi <0|1|2>`; videos {class}/{file}.avi.

    Splits are train1, test1, train2, ...: three divisions of the same videos. 0 means that a
    division does not use a video. A video's id is its path.
    """
    del videos_dir, validation_fraction  # the annotations say all
    annotations = require_file(annotations, os.path.isdir, "the folder of *_test_split1.txt")
    found = [match for name in os.listdir(annotations) if (match := _FILE.fullmatch(name))]
    if not found:
        raise ValueError(
            f"there is no <class>_test_split1.txt in {annotations!r}"
            f"{looks_like(annotations, 'hmdb51')}"
        )
    # Sorted as names of classes: as names of files, sword_exercise_test... comes before sword_test.
    class_names = sorted({match[1] for match in found})
    divisions = sorted({match[2] for match in found})
    splits = {role + division: [] for division in divisions for role in ("train", "test")}
    for division in divisions:
        for label, name in enumerate(class_names):
            path = os.path.join(annotations, f"{name}_test_split{division}.txt")
            for file, role in _read_roles(path):
                video = Video(f"{name}/{file}", f"{name}/{file}", label)
                splits[role + division].append(video)
    return DatasetIndex(class_names, splits, share_videos=True)


def _read_roles(path: str) -> list[tuple[str, str]]:
    """(file, "train" or "test") of each line that is used."""
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}, though other classes have theirs; unpack all again")
    roles = {}
    with open_text(path, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name, _, digit = line.strip().rpartition(" ")
            name = name.strip()
            if not name or digit not in _ROLES:
                raise ValueError(
                    f"{path}, line {number}: {truncated_repr(line.strip())} is not `<file> <0|1|2>`"
                )
            if name in roles:
                raise ValueError(f"{path}, line {number}: {truncated_repr(name)} is there twice")
            roles[name] = _ROLES[digit]
    used = [(name, role) for name, role in roles.items() if role]
    if not used:
        raise ValueError(f"{path} gives its class no video, neither for training nor for the test")
    return used

"""What prepared videos say of themselves, checked.

Public: `read_splits`, `read_class_names`, `read_frame_format`, `parse_frame_format`, `read_video_table`,
`DECODE_ERRORS`.

Prepared data may come from others, or from a disk that fails. What is read here is relied on
afterwards without another look. Everything raises ValueError for what cannot be so.
"""

import math
import os
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from dualpath_jax.data.preparation.video_decoder import MAX_SIDE, FrameFormat
from dualpath_jax.runtime.safe_read import read_json, truncated_repr

_REMEDY = "check the disk and prepare the data set again with another --out"
_MAX_RECORDS = 2**40  # of a shard; so that sums stay within an int64
# What TensorFlow raises for a record that it cannot decode: the second where its message quotes the
# record's bytes, and Python cannot make text of them.
DECODE_ERRORS = (tf.errors.OpError, UnicodeDecodeError)
_FEATURES = {
    "id": tf.io.FixedLenFeature((), tf.string),
    "label": tf.io.FixedLenFeature((), tf.int64),
    "first_frame": tf.io.FixedLenFeature((), tf.int64),
    "num_frames": tf.io.FixedLenFeature((), tf.int64),
    "fps": tf.io.FixedLenFeature((), tf.float32),
    "height": tf.io.FixedLenFeature((), tf.int64),
    "width": tf.io.FixedLenFeature((), tf.int64),
    "truncated": tf.io.FixedLenFeature((), tf.int64),
}


def read_splits(data_dir: str) -> dict[str, list[int]]:
    """Records per shard of each split, by a TFDS directory's dataset_info.json.

    FileNotFoundError if there is none.
    """
    path = os.path.join(data_dir, "dataset_info.json")
    if not epath.Path(path).exists():
        raise FileNotFoundError(
            f"no prepared videos in {data_dir} (there is no {path}). Prepare them with: "
            "python scripts/prepare_dataset.py --dataset=... --videos=... --out=" + data_dir
        )
    splits = read_json(path, dict).get("splits")
    if not isinstance(splits, list):
        raise ValueError(f"{path} is damaged: splits is {truncated_repr(splits)}; {_REMEDY}")
    return dict(_read_split(path, split) for split in splits)


def _read_split(path: str, split: Any) -> tuple[str, list[int]]:
    """(name, records per shard); JSON has the numbers as strings."""
    name, lengths = (
        split.get(k) if isinstance(split, dict) else 0 for k in ("name", "shardLengths")
    )
    if isinstance(name, str) and isinstance(lengths, list):
        texts = [str(length) for length in lengths]
        if all(text.isdecimal() and len(text) < 14 for text in texts):
            numbers = [int(text) for text in texts]
            if max(numbers, default=0) <= _MAX_RECORDS:
                return name, numbers
    raise ValueError(f"{path} is damaged: a split is {truncated_repr(split)}; {_REMEDY}")


def read_class_names(data_dir: str) -> list[str]:
    """The name of each class index."""
    path = os.path.join(data_dir, "class_names.json")
    names = read_json(path, list)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is damaged: it must be a list of names; {_REMEDY}")
    return names


def read_frame_format(data_dir: str) -> FrameFormat:
    """How the frames are stored; of a data set that does not say so, as is usual."""
    path = os.path.join(data_dir, "frame_format.json")
    if not epath.Path(path).exists():
        return FrameFormat()
    return parse_frame_format(read_json(path, dict), path)


def parse_frame_format(values: dict[str, Any], where: str) -> FrameFormat:
    """The fields of a `FrameFormat`, checked; `where` they stand is for messages."""
    side, quality, fps = (values.get(key) for key in ("short_side", "quality", "fps"))
    sound = {
        "short_side": side is None or type(side) is int and 1 <= side <= MAX_SIDE,
        "quality": type(quality) is int and 1 <= quality <= 95,
        "fps": fps is None or type(fps) in (int, float) and 0 < fps < math.inf,
    }
    for name, good in sound.items():
        if not good:
            raise ValueError(
                f"{where} is damaged: {name} is {truncated_repr(values.get(name))}; {_REMEDY}"
            )
    return FrameFormat(side, quality, fps and float(fps))


def read_video_table(
    path: str, num_videos: int, num_classes: int, shards: list[int]
) -> dict[str, Any]:
    """The columns of a video table.

    Args:
      path: of its one shard.
      num_videos: how many rows it must have.
      num_classes: labels are below.
      shards: frame records of each shard. A video's are in one of them.

    Returns:
      "id" (bytes) and the numbers of `records.VideoRow`, int64 or float32: [num_videos] each.
    """
    try:
        rows = ArrayRecordReader(path).read_all()
        columns = tf.io.parse_example(tf.constant(rows, tf.string), _FEATURES)
    except (RuntimeError, *DECODE_ERRORS) as error:
        if path.startswith("gs://") and isinstance(error, RuntimeError):
            raise OSError(f"cannot read the table of videos {path}: {error}") from None
        raise ValueError(f"{path} is damaged: {str(error)[:300]}; {_REMEDY}") from None
    table = {name: column.numpy() for name, column in columns.items()}
    if len(rows) != num_videos:
        raise ValueError(f"{path} has {len(rows)} videos instead of {num_videos}; {_REMEDY}")
    ends = np.cumsum(shards)
    first, count = table["first_frame"], table["num_frames"]
    inside = (first >= 0) & (first < sum(shards)) & (count >= 1) & (count <= sum(shards))
    shard = np.searchsorted(ends, np.where(inside, first, 0), side="right")
    inside &= np.where(inside, first + np.where(inside, count, 0), 0) <= ends[shard]
    sound = {
        "label": (table["label"] >= 0) & (table["label"] < num_classes),
        "frames": inside,
        "height": (table["height"] >= 1) & (table["height"] <= MAX_SIDE),
        "width": (table["width"] >= 1) & (table["width"] <= MAX_SIDE),
        "fps": np.isfinite(table["fps"]) & (table["fps"] >= 0),
    }
    for name, good in sound.items():
        if not good.all():
            video = table["id"][np.argmin(good)]
            raise ValueError(f"{path} is damaged: impossible {name} of video {video!r}; {_REMEDY}")
    return table

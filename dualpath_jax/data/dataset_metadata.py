"""Reads and checks the metadata of prepared videos: splits, classes, frame format, video table.

Prepared data may come from others, or from a failing disk. All later code relies on these values
without checking them again. Every function here therefore raises ValueError for impossible values.
"""

import math
import os
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from dualpath_jax.data.preparation.video_decoder import MAX_SIDE, FrameFormat
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.runtime.safe_read import read_json, truncated_repr

_REMEDY = "check the disk and prepare the data set again with another --out"
_MAX_RECORDS = 2**40  # per shard; keeps sums within an int64
# TensorFlow raises one of these for a record that it cannot decode. It is a UnicodeDecodeError if
# the error message quotes bytes of the record that are not valid text.
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
    """Read the number of records in each shard of each split from a TFDS dataset_info.json.

    Args:
      data_dir: folder of a TFDS data set, local or gs://.

    Returns:
      Split name -> number of records in each shard.

    Raises:
      FileNotFoundError: `data_dir` does not have a dataset_info.json.
      ValueError: the file is damaged.
    """
    path = os.path.join(data_dir, "dataset_info.json")
    if not epath.Path(path).exists():
        raise FileNotFoundError(
            f"no prepared videos in {data_dir} (there is no {path}). Prepare them with: "
            f"{command_line('prepare')} --dataset=... --videos=... --out={data_dir}"
        )
    splits = read_json(path, dict).get("splits")
    if not isinstance(splits, list):
        raise ValueError(f"{path} is damaged: splits is {truncated_repr(splits)}; {_REMEDY}")
    return dict(_parse_split(path, split) for split in splits)


def _parse_split(path: str, split: Any) -> tuple[str, list[int]]:
    """Return (name, records per shard) of a split; the JSON file has numbers as strings."""
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
    """Read the name of each class, by class index, from class_names.json.

    Raises:
      ValueError: the file is damaged.
    """
    path = os.path.join(data_dir, "class_names.json")
    names = read_json(path, list)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is damaged: it must be a list of names; {_REMEDY}")
    return names


def read_frame_format(data_dir: str) -> FrameFormat:
    """Read how the frames are stored from frame_format.json.

    Returns:
      The frame format; the default one if the file does not exist.

    Raises:
      ValueError: the file is damaged.
    """
    path = os.path.join(data_dir, "frame_format.json")
    if not epath.Path(path).exists():
        return FrameFormat()
    return parse_frame_format(read_json(path, dict), path)


def parse_frame_format(values: dict[str, Any], where: str) -> FrameFormat:
    """Check the fields of a `FrameFormat`.

    Args:
      values: field name -> value.
      where: source of the values, for error messages.

    Raises:
      ValueError: a field is missing or impossible.
    """
    side, quality, fps = (values.get(key) for key in ("short_side", "quality", "fps"))
    is_valid = {
        "short_side": side is None or type(side) is int and 1 <= side <= MAX_SIDE,
        "quality": type(quality) is int and 1 <= quality <= 95,
        "fps": fps is None or type(fps) in (int, float) and 0 < fps < math.inf,
    }
    for name, valid in is_valid.items():
        if not valid:
            raise ValueError(
                f"{where} is damaged: {name} is {truncated_repr(values.get(name))}; {_REMEDY}"
            )
    return FrameFormat(side, quality, fps and float(fps))


def read_video_table(
    path: str, num_videos: int, num_classes: int, shards: list[int]
) -> dict[str, Any]:
    """Read the columns of a video table.

    Args:
      path: path of the table's only shard, local or gs://.
      num_videos: number of rows that the table must have.
      num_classes: number of classes; labels must be smaller.
      shards: number of frame records in each shard. The frames of a video are in one shard.

    Returns:
      Column name -> array [num_videos]: "id" (bytes), and int64 or float32 for the other fields of
      `shard_writer.VideoRow`.

    Raises:
      OSError: Cloud Storage cannot be read.
      ValueError: the table is damaged or has impossible values.
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
    # The frames of each video must be in one shard: the one that holds its first frame.
    ends = np.cumsum(shards)
    first, count = table["first_frame"], table["num_frames"]
    inside = (first >= 0) & (first < sum(shards)) & (count >= 1) & (count <= sum(shards))
    shard = np.searchsorted(ends, np.where(inside, first, 0), side="right")
    inside &= np.where(inside, first + np.where(inside, count, 0), 0) <= ends[shard]
    is_valid = {
        "label": (table["label"] >= 0) & (table["label"] < num_classes),
        "frames": inside,
        "height": (table["height"] >= 1) & (table["height"] <= MAX_SIDE),
        "width": (table["width"] >= 1) & (table["width"] <= MAX_SIDE),
        "fps": np.isfinite(table["fps"]) & (table["fps"] >= 0),
    }
    for name, valid in is_valid.items():
        if not valid.all():
            video = table["id"][np.argmin(valid)]
            raise ValueError(f"{path} is damaged: impossible {name} of video {video!r}; {_REMEDY}")
    return table

"""Reads and checks the metadata of prepared videos: splits, classes, frame format, video table.

Prepared data may come from others, or from a failing disk. All later code relies on these values
without checking them again. Every function here therefore raises ValueError for impossible values.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from dualpath_jax.data.preparation.video_decoder import MAX_SIDE
from dualpath_jax.data.video_source import FrameFormat
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.runtime.safe_read import check_regular, read_json, truncated_repr

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


@dataclasses.dataclass(frozen=True)
class Shard:
    """Describes a file of records as it was written.

    Attributes:
      records: number of records.
      num_bytes: size of the file, which array_record fills up to whole blocks of 64 KiB.
      sha256: `digest_records` of the records.
      first_sha256: `digest_records` of the first record, which a reader compares.
    """

    records: int
    num_bytes: int
    sha256: str
    first_sha256: str


@dataclasses.dataclass(frozen=True)
class Identity:
    """Identifies prepared data: the content of identity.json.

    Attributes:
      videos: split -> its video table.
      frames: storage split -> its shards of frames. A shard without records has no file.
    """

    videos: dict[str, Shard]
    frames: dict[str, list[Shard]]


class ShardDigest:
    """Counts and digests the records of a shard as they come."""

    def __init__(self):
        self._count, self._sha256 = 0, hashlib.sha256()
        self._first = self._sha256.hexdigest()

    def add(self, record: bytes) -> None:
        """Add the next record."""
        self._sha256.update(len(record).to_bytes(8, "little"))
        self._sha256.update(record)
        self._count += 1
        if self._count == 1:
            self._first = self._sha256.hexdigest()

    def describe(self, num_bytes: int) -> Shard:
        """Return the description of the shard, whose file has `num_bytes`."""
        return Shard(self._count, num_bytes, self._sha256.hexdigest(), self._first)


def digest_records(records: Iterable[bytes]) -> str:
    """Return the SHA-256 of records, each with its length before it, in hexadecimal digits."""
    digest = ShardDigest()
    for record in records:
        digest.add(record)
    return digest.describe(0).sha256


def identity_path(data_dir: str) -> str:
    """Return the path of identity.json."""
    return os.path.join(data_dir, "identity.json")


def read_identity(data_dir: str) -> Identity | None:
    """Read identity.json; None if there is none, as in data of version 0.1.0.

    Raises:
      ValueError: the file is damaged.
    """
    path = identity_path(data_dir)
    if not epath.Path(path).exists():
        return None
    content = read_json(path, dict)
    try:
        videos = {split: Shard(**entry) for split, entry in content["videos"].items()}
        frames = {
            split: [Shard(**entry) for entry in entries]
            for split, entries in content["frames"].items()
        }
        for shard in (*videos.values(), *(shard for shards in frames.values() for shard in shards)):
            values = zip(dataclasses.astuple(shard), (int, int, str, str), strict=True)
            if not all(isinstance(value, kind) for value, kind in values):
                raise TypeError(f"{shard} has a value of another type")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {truncated_repr(str(error))}; {_REMEDY}") from None
    return Identity(videos, frames)


def format_identity(identity: Identity) -> str:
    """Return the content of identity.json."""
    return json.dumps(dataclasses.asdict(identity), indent=1) + "\n"


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
    path: str, num_videos: int, num_classes: int, shards: list[int], sha256: str | None = None
) -> dict[str, Any]:
    """Read the columns of a video table.

    Args:
      path: path of the table's only shard, local or gs://.
      num_videos: number of rows that the table must have.
      num_classes: number of classes; labels must be smaller.
      shards: number of frame records in each shard. The frames of a video are in one shard.
      sha256: `digest_records` of the rows; None is not compared.

    Returns:
      Column name -> array [num_videos]: "id" (bytes), and int64 or float32 for the other fields of
      `shard_writer.VideoRow`.

    Raises:
      OSError: Cloud Storage cannot be read.
      ValueError: the table is damaged or has impossible values.
    """
    if "://" not in path and os.path.exists(path):
        check_regular(path)
    try:
        rows = ArrayRecordReader(path).read_all()
        columns = tf.io.parse_example(tf.constant(rows, tf.string), _FEATURES)
    except (RuntimeError, *DECODE_ERRORS) as error:
        if path.startswith("gs://") and isinstance(error, RuntimeError):
            raise OSError(f"cannot read the table of videos {path}: {error}") from None
        raise ValueError(f"{path} is damaged: {str(error)[:300]}; {_REMEDY}") from None
    if sha256 not in (None, digest_records(rows)):
        raise ValueError(
            f"{path} is not the table that was written here: its SHA-256 differs from that in "
            f"identity.json; {_REMEDY}"
        )
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

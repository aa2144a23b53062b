"""Writes prepared videos: frame shards, the video table and the metadata of both TFDS data sets.

`video_dataset` documents the layout of the files and reads them.
"""

import contextlib
import dataclasses
import errno
import json
import os
import tempfile
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dualpath_jax.data.preparation.video_decoder import FrameFormat
from dualpath_jax.data.video_dataset import _shard_path

_WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per read; JPEG does not compress


@dataclasses.dataclass(frozen=True)
class VideoRow:
    """One row of the video table.

    Attributes:
      id: the data set's own name of the video.
      label: class index.
      first_frame: index of its first record among all frame records of the split (or of "all").
      num_frames: number of its records, at least 1.
      fps: frames per second by the file's header or, if that is less, as stored; 0.0 if unknown.
      height: pixels of each stored frame.
      width: pixels of each stored frame.
      truncated: the file is damaged; these are the frames before the break, or after a bad start.
    """

    id: str
    label: int
    first_frame: int
    num_frames: int
    fps: float
    height: int
    width: int
    truncated: bool


class ShardWriter:
    """Writes one shard of serialized examples; the file has its name only after `commit`.

    As a context manager it commits at the end of the block, or discards if that was left by an
    exception. An OSError tells that the disk is full or fails; it may come late, at the latest from
    `commit`, which then has discarded the file.
    """

    def __init__(self, path: str):
        self._path = path
        directory, name = os.path.split(path)
        self._temporary = os.path.join(directory, "incomplete-" + name)
        self._count = 0
        try:
            self._writer = ArrayRecordWriter(self._temporary, _WRITER_OPTIONS)
        except RuntimeError as error:
            raise self._failure(error) from None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def write(self, record: bytes) -> None:
        """Adds a record: what `encode_frame` or `encode_row` returns."""
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._failure(error) from None
        self._count += 1

    def commit(self) -> None:
        """Finishes the file, makes sure that the disk has all of it, and gives it its name."""
        try:
            self._writer.close()
            with open(self._temporary, "rb") as file:
                os.fsync(file.fileno())  # some file systems tell only now that they are full
            found = ArrayRecordReader(self._temporary).num_records()
            if found != self._count:
                raise OSError(errno.EIO, f"{found} of {self._count} records written", self._path)
        except RuntimeError as error:
            self.discard()
            raise self._failure(error) from None
        except OSError:
            self.discard()
            raise
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(RuntimeError):  # it tries to write the rest
            self._writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._temporary)

    def _failure(self, error: RuntimeError) -> OSError:
        """What array_record's RuntimeError means; it names the system's error in its text only."""
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code = next((code for code in full if os.strerror(code) in str(error)), errno.EIO)
        return OSError(code, str(error), self._path)


def write_tables(
    out_dir: str,
    class_names: Sequence[str],
    rows: dict[str, list[VideoRow]],
    frame_shards: dict[str, list[int]],
    frame_format: FrameFormat,
) -> None:
    """Writes the video tables and the metadata of both TFDS data sets, dataset_info.json last.

    Args:
      out_dir: OUT; its frame shards are in place.
      class_names: the name of each class index.
      rows: split -> rows in the order of their frames. A split without rows is left out.
      frame_shards: split, or "all" -> number of records of each frame shard; one of 0 needs no
        file, and a split without records is left out.
      frame_format: how the frames are stored.
    """
    import tensorflow_datasets as tfds

    rows = {split: table for split, table in rows.items() if table}
    for split, table in rows.items():
        with ShardWriter(_shard_path(out_dir, "videos", split, 0, 1)) as writer:
            for row in table:
                writer.write(encode_row(row))
    names = json.dumps(list(class_names), indent=1)
    write_atomically(os.path.join(out_dir, "class_names.json"), names)
    stored = json.dumps(dataclasses.asdict(frame_format), indent=1)
    write_atomically(os.path.join(out_dir, "frame_format.json"), stored)
    frame_features = {"image": tfds.features.Image(encoding_format="jpeg")}
    lengths = {split: counts for split, counts in frame_shards.items() if sum(counts)}
    _write_metadata(os.path.join(out_dir, "frames"), "frames", frame_features, lengths)
    lengths = {split: [len(table)] for split, table in rows.items()}
    _write_metadata(out_dir, "videos", video_features(class_names), lengths)


def encode_frame(jpeg: bytes) -> bytes:
    """A frame record: serialized tf.train.Example as TFDS makes it of {"image": jpeg}."""
    return _example({"image": jpeg})


def encode_row(row: VideoRow) -> bytes:
    """A record of the video table: serialized tf.train.Example as TFDS makes it."""
    # A file name may hold any bytes; Python shows those outside UTF-8 as surrogates.
    return _example(dataclasses.asdict(row) | {"id": row.id.encode("utf-8", "surrogateescape")})


def video_features(class_names: Sequence[str]) -> dict:
    """TFDS features of the video table."""
    import tensorflow_datasets as tfds

    # TFDS keeps names as stripped lines of a file. Where that loses some, class_names.json has all.
    if all(name and name == name.strip() and name.isprintable() for name in class_names):
        label = tfds.features.ClassLabel(names=list(class_names))
    else:
        label = tfds.features.ClassLabel(num_classes=len(class_names))
    return {
        "id": tfds.features.Text(),
        "label": label,
        "first_frame": np.int64,
        "num_frames": np.int64,
        "fps": np.float32,
        "height": np.int32,
        "width": np.int32,
        "truncated": np.bool_,
    }


def write_atomically(path: str, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    temporary = path + ".incomplete"
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _example(values: dict) -> bytes:
    features = tf.train.Features()
    for name, value in values.items():
        if isinstance(value, bytes):
            features.feature[name].bytes_list.value.append(value)
        elif isinstance(value, float):
            features.feature[name].float_list.value.append(value)
        else:
            features.feature[name].int64_list.value.append(int(value))
    return tf.train.Example(features=features).SerializeToString(deterministic=True)


def _write_metadata(
    data_dir: str, name: str, features: dict, shard_lengths: dict[str, list[int]]
) -> None:
    """Writes dataset_info.json and what goes with it, so that TFDS can read `data_dir`."""
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=data_dir, module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    info.set_file_format("array_record")
    splits = []
    for split, lengths in shard_lengths.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=data_dir, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        paths = (_shard_path(data_dir, name, split, i, len(lengths)) for i in range(len(lengths)))
        size = sum(os.path.getsize(path) for path, n in zip(paths, lengths, strict=True) if n)
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
            )
        )
    info.set_splits(tfds.core.splits.SplitDict(splits))
    with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
        info.write_to_directory(temporary)
        names = sorted(os.listdir(temporary), key=lambda name: name == "dataset_info.json")
        for file in names:  # dataset_info.json, the mark of a whole data set, comes last
            os.replace(os.path.join(temporary, file), os.path.join(data_dir, file))

"""Writes prepared videos: frame shards, the video table and the metadata of both TFDS data sets.

`video_dataset` documents the layout of the files and reads them.
"""

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dualpath_jax.data import dataset_metadata
from dualpath_jax.data.video_dataset import shard_path
from dualpath_jax.data.video_source import FrameFormat
from dualpath_jax.runtime import files

_WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per read; JPEG does not compress


@dataclasses.dataclass(frozen=True)
class VideoRow:
    """Holds one row of the video table.

    Attributes:
      id: the video's name in the data set.
      label: class index, from 0.
      first_frame: index of its first record among all frame records of the storage split.
      num_frames: number of its records, at least 1.
      fps: frames per second of the file's header, or of the stored frames if these are fewer; 0.0
        if unknown.
      height: pixels of each stored frame.
      width: pixels of each stored frame.
      truncated: True if the file is damaged and only a part of its frames is stored.
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
    """Writes one shard of serialized examples; the file gets its name in `commit`.

    As a context manager it commits at the end of the block, or discards the file after an
    exception. A full or failing disk raises an OSError. The error may come late, at the latest from
    `commit`, which discards the file in that case.

    Args:
      path: the file to write.
    """

    def __init__(self, path: str):
        self._path = path
        # A random name, because two workers of a cluster may write the same shard;
        # `files.remove_incomplete` knows it.
        self._temporary = f"{path}.incomplete-{secrets.token_hex(8)}"
        self._count, self._digest = 0, dataset_metadata.ShardDigest()
        try:
            self._writer = ArrayRecordWriter(self._temporary, _WRITER_OPTIONS)
        except RuntimeError as error:
            raise self._to_os_error(error) from None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def write(self, record: bytes) -> None:
        """Add a record, from `encode_frame` or `encode_row`; OSError if the disk is full."""
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._to_os_error(error) from None
        self._count += 1
        self._digest.add(record)

    def describe(self) -> dataset_metadata.Shard:
        """Return the description of the committed file."""
        return self._digest.describe(os.path.getsize(self._path))

    def commit(self) -> None:
        """Finish the file, check that the disk holds all of it, and give it its name.

        Raises:
          OSError: the disk is full or lost records; the file is discarded.
        """
        try:
            self._writer.close()
            with open(self._temporary, "rb") as file:
                os.fsync(file.fileno())  # some file systems report only here that they are full
            count = ArrayRecordReader(self._temporary).num_records()
            if count != self._count:
                raise OSError(errno.EIO, f"{count} of {self._count} records written", self._path)
        except RuntimeError as error:
            self.discard()
            raise self._to_os_error(error) from None
        except OSError:
            self.discard()
            raise
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Remove the unfinished file."""
        with contextlib.suppress(RuntimeError):  # `close` tries to write the rest
            self._writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._temporary)

    def _to_os_error(self, error: RuntimeError) -> OSError:
        """Return array_record's RuntimeError as an OSError, by the system error in its text."""
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code = next((code for code in full if os.strerror(code) in str(error)), errno.EIO)
        return OSError(code, str(error), self._path)


def write_tables(
    out_dir: str,
    class_names: Sequence[str],
    rows: dict[str, list[VideoRow]],
    frame_shards: dict[str, list[dataset_metadata.Shard]],
    frame_format: FrameFormat,
) -> None:
    """Write the video tables and the metadata of both TFDS data sets, dataset_info.json last.

    Args:
      out_dir: the folder of the prepared data set, which already holds the frame shards.
      class_names: the name of each class index.
      rows: split -> rows in the order of their frames. A split without rows is left out.
      frame_shards: storage split -> its frame shards. A shard of 0 records needs no file, and a
        split without records is left out.
      frame_format: how the frames are stored.

    Raises:
      OSError: the disk is full or fails.
    """
    import tensorflow_datasets as tfds

    rows = {split: table for split, table in rows.items() if table}
    tables = {}
    for split, table in rows.items():
        with ShardWriter(shard_path(out_dir, "videos", split, 0, 1)) as writer:
            for row in table:
                writer.write(encode_row(row))
        tables[split] = writer.describe()
    names = json.dumps(list(class_names), indent=1)
    files.write_text(os.path.join(out_dir, "class_names.json"), names)
    stored = json.dumps(dataclasses.asdict(frame_format), indent=1)
    files.write_text(os.path.join(out_dir, "frame_format.json"), stored)
    frame_features = {"image": tfds.features.Image(encoding_format="jpeg")}
    lengths = {s: [shard.records for shard in shards] for s, shards in frame_shards.items()}
    lengths = {split: counts for split, counts in lengths.items() if sum(counts)}
    identity = dataset_metadata.Identity(tables, {split: frame_shards[split] for split in lengths})
    path = dataset_metadata.identity_path(out_dir)
    files.write_text(path, dataset_metadata.format_identity(identity))
    _write_metadata(os.path.join(out_dir, "frames"), "frames", frame_features, lengths)
    lengths = {split: [len(table)] for split, table in rows.items()}
    _write_metadata(out_dir, "videos", build_video_features(class_names), lengths)


def encode_frame(jpeg: bytes) -> bytes:
    """Return a frame record: a serialized tf.train.Example, as TFDS encodes {"image": jpeg}."""
    return _serialize_example({"image": jpeg})


def encode_row(row: VideoRow) -> bytes:
    """Return a record of the video table: a serialized tf.train.Example, as TFDS encodes it."""
    # A file name may hold any bytes; Python represents those outside UTF-8 as surrogates.
    return _serialize_example(
        dataclasses.asdict(row) | {"id": row.id.encode("utf-8", "surrogateescape")}
    )


def build_video_features(class_names: Sequence[str]) -> dict:
    """Return the TFDS features of the video table."""
    import tensorflow_datasets as tfds

    # TFDS stores names as stripped lines of a file. If that would change names, the feature has
    # none; class_names.json always has all names exactly.
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


def _serialize_example(values: dict) -> bytes:
    """Return a serialized tf.train.Example of bytes, float and integer features."""
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
    """Write dataset_info.json and the files it needs, so that TFDS can read `data_dir`.

    Args:
      data_dir: the folder of a TFDS data set.
      name: the data set's name.
      features: TFDS features by name.
      shard_lengths: split -> number of records of each shard.
    """
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
        paths = (shard_path(data_dir, name, split, i, len(lengths)) for i in range(len(lengths)))
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
        for file in names:  # dataset_info.json comes last: it marks the data set as complete
            os.replace(os.path.join(temporary, file), os.path.join(data_dir, file))

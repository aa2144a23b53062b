"""Reads prepared videos: a video table and frame records, both readable as TFDS data sets.

    OUT/                    TFDS data set "videos": a `shard_writer.VideoRow` per video
    OUT/class_names.json    the class names, exactly
    OUT/frame_format.json   the fields of `video_source.FrameFormat`
    OUT/identity.json       digests and sizes of the files, see `dataset_metadata.Identity`
    OUT/frames/             TFDS data set "frames": one JPEG per record, split names as in OUT, or
                            one split "all" if the splits of OUT share videos

The frames of a video are consecutive records, and videos are in the order of the table. With one
uncompressed record per frame, the cost of a clip depends on the number of its frames, not on the
length of the video.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import resource
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader

from dualpath_jax.data import dataset_metadata
from dualpath_jax.data.datasets.annotations import SHARED_SPLIT
from dualpath_jax.runtime import file_lock, safe_read
from dualpath_jax.runtime.command_line import command_line

tf.config.set_visible_devices([], "GPU")  # accelerators belong to JAX

# For tf.io.parse_single_example of the records that `VideoDataset.read_frames` returns.
FRAME_FEATURES = {"image": tf.io.FixedLenFeature((), tf.string)}

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access


class UnreadableVideo(ValueError):
    """Reports that stored frames of a video are damaged."""


class ChangedData(OSError):
    """Reports that a file of prepared data is not the one that belongs there."""


class VideoDataset:
    """Reads a split of prepared videos: the table is in memory, frames are read by random access.

    While it exists it holds a lock on the local folder, which `prepare_dataset` respects. A shard
    is opened at its first use; the reader stops if it has changed by then.

    Attributes:
      ids: list of str [n].
      labels: int32 [n], class indices.
      first_frame: int64 [n], index of the first frame record in the split (or in "all").
      num_frames: int64 [n], at least 1.
      fps: float32 [n], 0.0 where unknown.
      heights, widths: int64 [n], pixels of the stored frames.
      class_names: list of str, one per class.
      frame_format: how the frames are stored.
      identity: what was read, as digests: "videos" of ids and labels, "frames" of all frames of
        the split; "" where unknown.

    Args:
      data_dir: folder of the prepared data set, local or gs://.
      split: "train", "validation" or "test"; of HMDB51 "train1", "test1", "train2", ...

    Raises:
      FileNotFoundError: `data_dir` has no prepared data set, or an unfinished one.
      ChangedData: a file is missing, or not the one that was prepared.
      OSError: it cannot be read from Cloud Storage.
      ValueError: there is no such split, it has no videos, the stored files are damaged, or a
        program is preparing videos there.
    """

    def __init__(self, data_dir: str, split: str):
        data_dir = os.path.expanduser(data_dir)
        file_lock.lock_while_reading(data_dir, self)
        splits = dataset_metadata.read_splits(data_dir)
        if split not in splits:
            raise ValueError(
                f"no videos of split {split!r} in {data_dir}: it has {', '.join(splits)}; choose "
                "by --config.data.train_split and --config.eval.split. If it should have them, its "
                "bad_videos.jsonl may list the reasons; otherwise check the annotations and run "
                f"`{command_line('prepare')}` with another --out"
            )
        self.class_names = dataset_metadata.read_class_names(data_dir)
        self.frame_format = dataset_metadata.read_frame_format(data_dir)
        frames = dataset_metadata.read_splits(os.path.join(data_dir, "frames"))
        storage_split = split if split in frames else SHARED_SPLIT
        if not sum(frames.get(storage_split, [])):
            raise ValueError(
                f"{data_dir} has no frames of split {split!r}; prepare the data set again"
            )
        lengths = frames[storage_split]
        path = shard_path(data_dir, "videos", split, 0, 1)
        identity = dataset_metadata.read_identity(data_dir)
        if identity is None:
            _warn_of_missing_identity(data_dir)
        elif split not in identity.videos or storage_split not in identity.frames:
            where = dataset_metadata.identity_path(data_dir)
            raise ValueError(
                f"{where} does not know split {split!r}; prepare the data set again with another "
                "--out"
            )
        table = dataset_metadata.read_video_table(
            path,
            sum(splits[split]),
            len(self.class_names),
            lengths,
            identity and identity.videos[split].sha256,
        )
        self.ids = [id_.decode("utf-8", "surrogateescape") for id_ in table["id"]]
        self.labels = table["label"].astype(np.int32)
        self.first_frame = table["first_frame"]
        self.num_frames = table["num_frames"]
        self.fps = table["fps"]
        self.heights = table["height"]
        self.widths = table["width"]
        self._shard_lengths, self._shard_ends = lengths, np.cumsum(lengths)
        self._shard_paths = [
            frame_shard_path(data_dir, storage_split, shard, len(lengths))
            for shard in range(len(lengths))
        ]
        shards = identity.frames[storage_split] if identity else None
        self._states = self._check_shards(shards)
        self._firsts = [shard.first_sha256 for shard in shards or ()]
        named = json.dumps([self.ids, self.labels.tolist()])
        self.identity = {
            "videos": hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest(),
            "frames": _digest_shards(shards) if shards else "",
        }
        self._readers: dict[int, ArrayRecordReader] = {}
        _allow_open_files(len(lengths))

    def __len__(self) -> int:
        return len(self.ids)

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Read the raw records of some frames of one video.

        Several threads may call it at the same time.

        Args:
          video_index: row of the table, 0..n-1.
          frame_indices: int [T], each in 0..num_frames-1, any order, repeats allowed.

        Returns:
          T serialized tf.train.Example, see `FRAME_FEATURES`.

        Raises:
          IndexError: the video does not have such a frame.
          UnreadableVideo: the file is damaged, according to its checksums.
          ChangedData: the file has changed since the data set was opened.
          OSError: it cannot be read from Cloud Storage.
        """
        frames = np.asarray(frame_indices, np.int64)
        count = self.num_frames[video_index]
        if frames.size and not (frames.min() >= 0 and frames.max() < count):
            raise IndexError(
                f"video {self.ids[video_index]!r} has frames 0..{count - 1}, asked for {frames}"
            )
        first = self.first_frame[video_index]
        shard = int(np.searchsorted(self._shard_ends, first, side="right"))
        start = self._shard_ends[shard - 1] if shard else 0
        try:
            reader, positions = self._reader(shard), (first - start + frames).tolist()
            if np.all(np.diff(frames) == 1) and not self._shard_paths[shard].startswith("gs://"):
                # The system reads ahead in a local file: single reads then take less CPU time than
                # threads that wait for each other, and are as fast.
                return [reader.read([position])[0] for position in positions]
            return reader.read(positions)  # in several threads
        except RuntimeError as error:
            _check_reached(self._shard_paths[shard], error)
            raise UnreadableVideo(
                f"video {self.ids[video_index]!r} in {self._shard_paths[shard]}: {error}"
            ) from None

    def _check_shards(self, shards: list[dataset_metadata.Shard] | None) -> list[tuple | None]:
        """Compare the files of the frames with what was prepared, and return their states.

        Args:
          shards: as they were prepared; None if that is unknown.

        Raises:
          ChangedData: a file is missing, or not the one that was prepared.
        """
        if shards and [shard.records for shard in shards] != list(self._shard_lengths):
            raise ChangedData(
                f"identity.json counts other frames than dataset_info.json in "
                f"{os.path.dirname(self._shard_paths[0])}; prepare the data set again with another "
                "--out"
            )
        # A shard without records has no file; in Cloud Storage, each question takes a while.
        states = [
            _file_state(path) if length and "://" not in path else None
            for path, length in zip(self._shard_paths, self._shard_lengths, strict=True)
        ]
        for path, state, shard in zip(self._shard_paths, states, shards or (), strict=False):
            if state and state[0] != shard.num_bytes:
                raise ChangedData(
                    f"{path} has {state[0]:,} bytes, and was prepared with {shard.num_bytes:,}: it "
                    "was cut off or replaced. Copy the right file there, or prepare the data set "
                    "again with another --out"
                )
        return states

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard in self._readers:
            return self._readers[shard]
        path = self._shard_paths[shard]
        self._check_unchanged(shard)
        reader = ArrayRecordReader(path, options=_READER_OPTIONS, file_reader_buffer_size=32768)
        self._check_unchanged(shard)  # the file may have been replaced while it was opened
        first = _read_first(reader)
        if (count := reader.num_records()) != self._shard_lengths[shard]:
            raise ChangedData(
                f"{path} holds {count} frames instead of {self._shard_lengths[shard]}: it is not "
                "the file that was prepared; prepare the data set again with another --out"
            )
        expected = self._firsts[shard] if self._firsts and first else None
        if expected not in (None, dataset_metadata.digest_records(first)):
            raise ChangedData(
                f"{path} begins with another frame than the file that was prepared; copy the right "
                "file there, or prepare the data set again with another --out"
            )
        return self._readers.setdefault(shard, reader)  # another thread may have been faster

    def _check_unchanged(self, shard: int) -> None:
        """Raise ChangedData if the file of a shard is not the one that was found at the start."""
        path = self._shard_paths[shard]
        if self._states[shard] is not None and _file_state(path) != self._states[shard]:
            raise ChangedData(
                f"{path} has changed since this program began to read the data. It stops, so that "
                "frames of other videos are not read by mistake; run the same command again"
            )


def frame_shard_path(out_dir: str, split: str, shard: int, num_shards: int) -> str:
    """Return the path of a shard of frame records, named as TFDS names them."""
    return shard_path(os.path.join(out_dir, "frames"), "frames", split, shard, num_shards)


def shard_path(data_dir: str, name: str, split: str, shard: int, num_shards: int) -> str:
    """Return the path of a shard of the TFDS data set `name`."""
    return os.path.join(data_dir, f"{name}-{split}.array_record-{shard:05d}-of-{num_shards:05d}")


def _file_state(path: str) -> tuple[int, int]:
    """Return size and time of change of a local file, one of which differs if it is replaced.

    The inode is not compared: on some network file systems it changes by itself.

    Raises:
      ChangedData: there is no such file.
      ValueError: it is not a regular file.
    """
    try:
        status = os.stat(path)
        safe_read.check_regular(path, status)
    except FileNotFoundError:
        raise ChangedData(
            f"{path} is missing; copy it there, or prepare the data set again with another --out"
        ) from None
    return status.st_size, status.st_mtime_ns


def _read_first(reader: ArrayRecordReader) -> list[bytes]:
    """Return the first record in a list, which is empty if this record is damaged.

    Raises:
      RuntimeError: the file cannot be opened or is damaged as a whole. Then `num_records` is 0.
    """
    try:
        return reader.read([0])
    except RuntimeError:
        if not reader.num_records():
            raise
        return []


def _digest_shards(shards: list[dataset_metadata.Shard]) -> str:
    text = json.dumps([dataclasses.asdict(shard) for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _warn_of_missing_identity(data_dir: str) -> None:
    """Print once that changes of the frames will not be noticed."""
    print(
        f"note: {data_dir} has no identity.json, as data of version 0.1.0: a replaced file of "
        f"frames may not be noticed. The `{command_line('prepare')}` that made it adds one",
        file=sys.stderr,
    )


def _allow_open_files(num_shards: int) -> None:
    """Raise the limit of open files: each shard of two data sets stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * num_shards + 512
    if soft < wanted and soft != resource.RLIM_INFINITY:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not report
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _check_reached(path: str, error: RuntimeError) -> None:
    """Raise OSError if array_record's `error` is about access to the file, not its records."""
    if path.startswith("gs://") and path in str(error):
        raise OSError(f"cannot read from Cloud Storage: {error}") from None
    if "open() failed" in str(error):
        raise OSError(f"cannot open {path}: {error}") from None

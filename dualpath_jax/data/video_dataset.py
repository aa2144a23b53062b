"""Reads prepared videos: a video table and frame records, both readable as TFDS data sets.

    OUT/                    TFDS data set "videos": a `shard_writer.VideoRow` per video
    OUT/class_names.json    the class names, exactly
    OUT/frame_format.json   the fields of `video_decoder.FrameFormat`
    OUT/frames/             TFDS data set "frames": one JPEG per record, split names as in OUT, or
                            one split "all" if the splits of OUT share videos

The frames of a video are consecutive records, and videos are in the order of the table. With one
uncompressed record per frame, the cost of a clip depends on the number of its frames, not on the
length of the video.
"""

import contextlib
import os
import resource
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader

from dualpath_jax.data import dataset_metadata
from dualpath_jax.data.datasets.annotations import SHARED_SPLIT
from dualpath_jax.runtime.command_line import command_line

tf.config.set_visible_devices([], "GPU")  # accelerators belong to JAX

# For tf.io.parse_single_example of the records that `VideoDataset.read_frames` returns.
FRAME_FEATURES = {"image": tf.io.FixedLenFeature((), tf.string)}

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access


class UnreadableVideo(ValueError):
    """Reports that stored frames of a video are damaged."""


class VideoDataset:
    """Reads a split of prepared videos: the table is in memory, frames are read by random access.

    Attributes:
      ids: list of str [n].
      labels: int32 [n], class indices.
      first_frame: int64 [n], index of the first frame record in the split (or in "all").
      num_frames: int64 [n], at least 1.
      fps: float32 [n], 0.0 where unknown.
      heights, widths: int64 [n], pixels of the stored frames.
      class_names: list of str, one per class.
      frame_format: how the frames are stored.

    Args:
      data_dir: folder of the prepared data set, local or gs://.
      split: "train", "validation" or "test"; of HMDB51 "train1", "test1", "train2", ...

    Raises:
      FileNotFoundError: `data_dir` has no prepared data set, or an unfinished one.
      OSError: Cloud Storage does not deliver it.
      ValueError: there is no such split, it has no videos, or the stored files are damaged.
    """

    def __init__(self, data_dir: str, split: str):
        data_dir = os.fspath(data_dir)
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
        table = dataset_metadata.read_video_table(
            path, sum(splits[split]), len(self.class_names), lengths
        )
        self.ids = [id_.decode("utf-8", "surrogateescape") for id_ in table["id"]]
        self.labels = table["label"].astype(np.int32)
        self.first_frame = table["first_frame"]
        self.num_frames = table["num_frames"]
        self.fps = table["fps"]
        self.heights = table["height"]
        self.widths = table["width"]
        self._shard_ends = np.cumsum(lengths)
        self._shard_paths = [
            frame_shard_path(data_dir, storage_split, shard, len(lengths))
            for shard in range(len(lengths))
        ]
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
          OSError: Cloud Storage does not deliver it.
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

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            reader = ArrayRecordReader(
                self._shard_paths[shard], options=_READER_OPTIONS, file_reader_buffer_size=32768
            )
            self._readers.setdefault(shard, reader)  # another thread may have been faster
        return self._readers[shard]


def frame_shard_path(out_dir: str, split: str, shard: int, num_shards: int) -> str:
    """Return the path of a shard of frame records, named as TFDS names them."""
    return shard_path(os.path.join(out_dir, "frames"), "frames", split, shard, num_shards)


def shard_path(data_dir: str, name: str, split: str, shard: int, num_shards: int) -> str:
    """Return the path of a shard of the TFDS data set `name`."""
    return os.path.join(data_dir, f"{name}-{split}.array_record-{shard:05d}-of-{num_shards:05d}")


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

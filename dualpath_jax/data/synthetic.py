"""Makes videos in memory, for checks and timings without prepared data."""

import io
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dualpath_jax.data import augment, pipeline
from dualpath_jax.data.datasets.registry import NUM_CLASSES, PLACEHOLDER_NUM_CLASSES
from dualpath_jax.data.preparation.shard_writer import encode_frame
from dualpath_jax.data.video_source import FrameFormat


class SyntheticVideos:
    """Implements `VideoSource` with videos whose every frame is the same smooth noise.

    Args:
      class_names: one per class; labels repeat in this order.
      num_videos: length of the split.
      num_frames: of each video.
      height: of each frame, pixels.
      width: of each frame, pixels.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        num_videos: int,
        num_frames: int = 120,
        height: int = 256,
        width: int = 340,
    ):
        self.class_names = list(class_names)
        self.frame_format = FrameFormat()
        self.identity = {"videos": "synthetic", "frames": "synthetic"}
        self.ids = [str(i) for i in range(num_videos)]
        self.labels = np.arange(num_videos, dtype=np.int32) % len(self.class_names)
        self.num_frames = np.full(num_videos, num_frames, np.int64)
        self.first_frame = np.arange(num_videos, dtype=np.int64) * num_frames
        self.fps = np.full(num_videos, 25, np.float32)
        self.heights = np.full(num_videos, height, np.int64)
        self.widths = np.full(num_videos, width, np.int64)
        noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        self._record = encode_frame(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.ids)

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Return the record of the frame, once for each index."""
        del video_index
        return [self._record] * len(frame_indices)


def make_synthetic_split(data: Any, num_videos: int) -> SyntheticVideos:
    """Return a split for `config.data` with as many classes as its `source` has, or 2.

    Classes are called 0, 1, ...; with mirrored clips the first ones have the names that
    `data.label_swap` needs.
    """
    names = [str(i) for i in range(NUM_CLASSES.get(data.source, PLACEHOLDER_NUM_CLASSES))]
    if data.flip:
        swapped = [name for pair in augment.read_label_swaps(data.label_swap) for name in pair]
        names[: len(swapped)] = swapped
    return SyntheticVideos(names, num_videos)


def train_batches(
    dataset: SyntheticVideos, data: Any, seed: int, first_step: int, num_steps: int, *args, **kwargs
) -> Generator[pipeline.Batch]:
    """Return the first batch of `pipeline.train_batches` for every step."""
    batch = next(pipeline.train_batches(dataset, data, seed, 0, 1, *args, **kwargs))
    return (batch for _ in range(first_step, num_steps))

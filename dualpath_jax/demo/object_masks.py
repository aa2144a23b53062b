"""Provides masks of the moving object in the demo's videos, from the renderer's own code."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dualpath_jax.data.preparation.shard_writer import encode_frame
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.demo import render


class ObjectMasks:
    """Replaces the demo's `VideoDataset`: the object is white and everything else is black.

    The pipeline treats it like the videos: masks are sampled, cropped, scaled and tiled in the
    same way.

    Args:
      dataset: a split of the prepared demo.
      split: name of the split.

    Raises:
      ValueError: the data set is not the demo that `render.render_demo` writes.
    """

    def __init__(self, dataset: VideoDataset, split: str):
        if list(dataset.class_names) != render.class_names():
            raise ValueError(
                f"object masks exist only for the demo's videos, but the classes here are "
                f"{', '.join(dataset.class_names[:3])}, ...: pass runs of configs/demo.py"
            )
        first = min(map(int, dataset.ids))  # ids count through all splits
        self._numbers = [int(video) - first for video in dataset.ids]
        self.ids, self.labels = dataset.ids, dataset.labels
        self.class_names = dataset.class_names
        self.num_frames = dataset.num_frames
        self.heights, self.widths = dataset.heights, dataset.widths
        self._split = split

    def __len__(self) -> int:
        return len(self.ids)

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Return the masks of frames as records; see `VideoDataset.read_frames`."""
        masks = render.find_scene(self._split, self._numbers[video_index]).masks()
        return [_encode_mask(masks[frame]) for frame in frame_indices]


def _encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask, float32 [size, size] in 0..1, as a stored frame."""
    buffer = io.BytesIO()
    gray = Image.fromarray(np.round(255 * mask).astype(np.uint8)).convert("RGB")
    gray.save(buffer, "JPEG", quality=100, subsampling=0)
    return encode_frame(buffer.getvalue())

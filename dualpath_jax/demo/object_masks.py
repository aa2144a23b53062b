"""Where the moving object of the demo's videos is, by the renderer's own code.

Public: `ObjectMasks`.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dualpath_jax.data.preparation.shard_writer import encode_frame
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.demo import render


class ObjectMasks:
    """Stands in for the demo's `VideoDataset`: its videos with the object white, all else black.

    The pipeline makes batches of it as of the videos, so that masks are sampled, cut, scaled and
    tiled as these are.

    Args:
      dataset: a split of the prepared demo.
      split: its name.

    Raises:
      ValueError: it is not the demo as `demo.render_demo` makes it.
    """

    def __init__(self, dataset: VideoDataset, split: str):
        if list(dataset.class_names) != render.class_names():
            raise ValueError(
                f"the object's place is known in the demo's videos alone, and the classes here are "
                f"{', '.join(dataset.class_names[:3])}, ...: pass runs of configs/demo.py"
            )
        first = min(map(int, dataset.ids))
        self._numbers = [int(video) - first for video in dataset.ids]
        self.ids, self.labels = dataset.ids, dataset.labels
        self.class_names = dataset.class_names
        self.num_frames = dataset.num_frames
        self.heights, self.widths = dataset.heights, dataset.widths
        self._split = split

    def __len__(self) -> int:
        return len(self.ids)

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Records of the masks of some frames; see `VideoDataset.read_frames`."""
        masks = render.find_scene(self._split, self._numbers[video_index]).masks()
        return [_record(masks[frame]) for frame in frame_indices]


def _record(mask: np.ndarray) -> bytes:
    """float32 [size, size], 0..1, as a stored frame."""
    buffer = io.BytesIO()
    grey = Image.fromarray(np.round(255 * mask).astype(np.uint8)).convert("RGB")
    grey.save(buffer, "JPEG", quality=100, subsampling=0)
    return encode_frame(buffer.getvalue())

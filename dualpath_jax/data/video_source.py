"""Defines how frames are stored, and the interface through which the pipeline reads videos."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class FrameFormat:
    """Describes how frames are stored, which is also how the input of a trained model is made.

    Attributes:
      short_side: pixels of the shorter side, 1..65,500; None keeps the size of the video. Smaller
        videos keep theirs.
      quality: JPEG quality of the frames, 1..95.
      fps: frames per second that are kept of videos that have more, above 0; None keeps all.
    """

    short_side: int | None = 256
    quality: int = 90
    fps: float | None = None


class VideoSource(Protocol):
    """Gives random access to the stored frames of n videos.

    `video_dataset.VideoDataset` implements it for prepared data. Other implementations hold one
    decoded video (`inference.trained_model.SingleVideo`), a few videos of each class
    (`data.few_shots.FewShots`), made-up videos
    (`data.synthetic.SyntheticVideos`) or masks (`demo.object_masks.ObjectMasks`).

    Attributes:
      ids: n names of videos, for messages and predictions.
      labels: int32 [n], class indices.
      num_frames: int64 [n], at least 1.
      heights, widths: int64 [n], pixels of the stored frames.
      class_names: one per class.
    """

    ids: Sequence[str]
    labels: np.ndarray
    num_frames: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    class_names: list[str]

    def __len__(self) -> int: ...

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Return the records of some frames of a video, see `VideoDataset.read_frames`."""
        ...

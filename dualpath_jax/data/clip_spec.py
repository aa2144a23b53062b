"""Defines the format of a clip: its frames, their sizes, and its framesets. No TensorFlow."""

import dataclasses
import enum
from typing import Any, NamedTuple

import numpy as np

from dualpath_jax.data import frame_sampling

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalization(data_config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of red, green and blue; CLIP's where they are None."""
    mean, std = data_config.mean, data_config.std
    return CLIP_MEAN if mean is None else mean, CLIP_STD if std is None else std


class ClipInputs(enum.Enum):
    """Names the inputs that a model takes of a clip of T frames; nothing else is made."""

    ALL_FRAMES = "all T frames at full size"
    BOTH_PATHS = "S frames at full size, and framesets of all T frames"
    SPATIAL_PATH = "S frames at full size"
    TEMPORAL_PATH = "framesets of all T frames"


@dataclasses.dataclass(frozen=True)
class FramesetShape:
    """Describes how T frames become framesets.

    Attributes:
      num_frames: T.
      grid: (w, h), frames across and down.
      frame_scale: factor by which each frame is reduced.
      image_size: side of a frame before the reduction, in pixels.

    Raises:
      ValueError: T is not a multiple of w h, or `image_size` not one of `frame_scale`.
    """

    num_frames: int
    grid: tuple[int, int]
    frame_scale: int
    image_size: int

    def __post_init__(self):
        across, down = self.grid
        if self.num_frames % (across * down):
            raise ValueError(
                f"num_frames={self.num_frames} is not divisible by the {across * down} frames of a "
                f"{across}x{down} frameset: choose a multiple of {across * down}"
            )
        if self.image_size % self.frame_scale:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by frame_scale={self.frame_scale}"
            )

    @property
    def num_framesets(self) -> int:
        """Return G = T / (w h)."""
        return self.num_frames // (self.grid[0] * self.grid[1])

    @property
    def frame_size(self) -> int:
        """Return the side of a frame in the frameset, in pixels."""
        return self.image_size // self.frame_scale

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) of a frameset, in pixels."""
        return self.grid[1] * self.frame_size, self.grid[0] * self.frame_size


class Views(NamedTuple):
    """Counts the views of a video in evaluation: V = temporal x spatial.

    Attributes:
      temporal: clips per video.
      spatial: crops per clip, 1 or 3.
    """

    temporal: int
    spatial: int

    @property
    def total(self) -> int:
        """Return V, the number of views of a video."""
        return self.temporal * self.spatial


@dataclasses.dataclass(frozen=True)
class ClipFormat:
    """Describes a clip, with the keys of the same names in `config.data` (config/schema.py).

    Attributes:
      num_frames: T, frames of a clip.
      image_size: side of a spatial frame, in pixels.
      num_spatial_frames: S; T if all frames are at full size, 0 if none is.
      sampling: "dense" or "segments", see `frame_sampling`.
      sampling_interval: distance between frames of dense clips; None takes the paper's.
      framesets: their shape; None if the model takes none.
    """

    num_frames: int
    image_size: int
    num_spatial_frames: int
    sampling: str
    sampling_interval: int | None
    framesets: FramesetShape | None

    @property
    def stored_frames(self) -> np.ndarray:
        """Return the positions, of 0..T-1, of the frames that are read: int64, rising."""
        return np.arange(self.num_frames) if self.framesets else self.spatial_frames

    @property
    def spatial_frames(self) -> np.ndarray:
        """Return the positions, of 0..T-1, of the S frames of the spatial path: int64, rising."""
        return frame_sampling.spatial_subset(self.num_frames, self.num_spatial_frames)


def build_clip_format(data_config: Any, inputs: ClipInputs = ClipInputs.BOTH_PATHS) -> ClipFormat:
    """Build and check the clip format of a configuration.

    Args:
      data_config: `config.data`.
      inputs: what the model takes. Keys of other inputs are neither read nor checked:
        `num_spatial_frames` without a subset of frames; `grid`, `frame_scale` and `frameset_input`
        without framesets.

    Raises:
      ValueError: the values do not fit together.
    """
    shape, num_spatial = None, data_config.num_frames
    if inputs in (ClipInputs.BOTH_PATHS, ClipInputs.TEMPORAL_PATH):
        shape = FramesetShape(
            data_config.num_frames,
            tuple(data_config.grid),
            data_config.frame_scale,
            data_config.image_size,
        )
        if data_config.frameset_input != "rgb" and data_config.num_frames == 1:
            raise ValueError(
                f"data.frameset_input={data_config.frameset_input} of data.num_frames=1 is zero "
                "everywhere: take more frames, or rgb"
            )
    if inputs in (ClipInputs.BOTH_PATHS, ClipInputs.SPATIAL_PATH):
        num_spatial = data_config.num_spatial_frames
    if inputs == ClipInputs.TEMPORAL_PATH:
        num_spatial = 0
    else:
        frame_sampling.spatial_subset(data_config.num_frames, num_spatial)
    if data_config.sampling not in frame_sampling.SAMPLINGS:
        known = ", ".join(frame_sampling.SAMPLINGS)
        raise ValueError(f"unknown data.sampling {data_config.sampling!r}: known are {known}")
    interval = data_config.sampling_interval if data_config.sampling == "dense" else None
    if data_config.sampling == "dense" and interval is None:
        frame_sampling.default_interval(data_config.num_frames)
    return ClipFormat(
        num_frames=data_config.num_frames,
        image_size=data_config.image_size,
        num_spatial_frames=num_spatial,
        sampling=data_config.sampling,
        sampling_interval=interval,
        framesets=shape,
    )

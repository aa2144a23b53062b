"""Describes what a clip is: its frames, their sizes, and its framesets. Needs no TensorFlow."""

import dataclasses
from typing import Any

from dualpath_jax.data import frame_sampling


@dataclasses.dataclass(frozen=True)
class FramesetShape:
    """How T frames of `image_size` pixels become framesets.

    Attributes:
      num_frames: T.
      grid: (w, h), frames across and down.
      frame_scale: how much each frame is reduced.
      image_size: side of an unreduced frame, pixels.
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
        """G = T / (w h)."""
        return self.num_frames // (self.grid[0] * self.grid[1])

    @property
    def frame_size(self) -> int:
        """Side of a frame inside the frameset, pixels."""
        return self.image_size // self.frame_scale

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frameset, pixels."""
        return self.grid[1] * self.frame_size, self.grid[0] * self.frame_size


@dataclasses.dataclass(frozen=True)
class ClipFormat:
    """What a clip is. See the keys of the same names under `data` in dualpath_jax/config/schema.py.

    Without framesets, `framesets` is None and the spatial frames are all frames.
    """

    num_frames: int
    image_size: int
    num_spatial_frames: int
    sampling: str
    sampling_interval: int | None
    framesets: FramesetShape | None


def build_clip_format(data: Any, framesets: bool = True) -> ClipFormat:
    """Clip format of `config.data`; ValueError for values that do not go together.

    Args:
      data: `config.data`.
      framesets: spatial frames and framesets (DualPath), or every frame at full size (the other
        methods, for which `num_spatial_frames`, `grid` and `frame_scale` mean nothing).
    """
    shape, num_spatial = None, data.num_frames
    if framesets:
        shape = FramesetShape(data.num_frames, tuple(data.grid), data.frame_scale, data.image_size)
        num_spatial = data.num_spatial_frames
    frame_sampling.spatial_subset(data.num_frames, num_spatial)
    if data.sampling not in frame_sampling.SAMPLINGS:
        known = ", ".join(frame_sampling.SAMPLINGS)
        raise ValueError(f"unknown data.sampling {data.sampling!r}: known are {known}")
    interval = data.sampling_interval if data.sampling == "dense" else None
    if data.sampling == "dense" and interval is None:
        frame_sampling.default_interval(data.num_frames)
    return ClipFormat(
        num_frames=data.num_frames,
        image_size=data.image_size,
        num_spatial_frames=num_spatial,
        sampling=data.sampling,
        sampling_interval=interval,
        framesets=shape,
    )

"""Grid framesets: w x h consecutive frames as one image (sec. 4.2, Fig. 3). TensorFlow ops.

Public: `FramesetShape`, `tile_framesets`.
"""

import dataclasses

import tensorflow as tf


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


def tile_framesets(frames: tf.Tensor, grid: tuple[int, int]) -> tf.Tensor:
    """Lay frames out row by row in time order.

    Args:
      frames: [T, fh, fw, C], each already scaled to its place (tiling first and scaling the mosaic
        would bleed across frames).
      grid: (w, h), frames across and down.

    Returns:
      [G, h fh, w fw, C]; frameset g holds frames g w h ... (g + 1) w h - 1.
    """
    across, down = grid
    _, height, width, channels = frames.shape
    tiles = tf.reshape(frames, [-1, down, across, height, width, channels])
    tiles = tf.transpose(tiles, [0, 1, 3, 2, 4, 5])
    return tf.reshape(tiles, [-1, down * height, across * width, channels])

"""Builds grid framesets: w x h consecutive frames as one image (sec. 4.2, Fig. 3)."""

import tensorflow as tf


def tile_framesets(frames: tf.Tensor, grid: tuple[int, int]) -> tf.Tensor:
    """Tile frames row by row in time order.

    Args:
      frames: [T, fh, fw, C], any dtype, already scaled to their size in the grid. (Scaling the
        tiled image instead would mix pixels of neighboring frames.)
      grid: (w, h), frames across and down; T is a multiple of w h.

    Returns:
      [G, h fh, w fw, C] with G = T / (w h); frameset g holds frames g w h ... (g + 1) w h - 1.
    """
    across, down = grid
    _, height, width, channels = frames.shape
    tiles = tf.reshape(frames, [-1, down, across, height, width, channels])
    tiles = tf.transpose(tiles, [0, 1, 3, 2, 4, 5])
    return tf.reshape(tiles, [-1, down * height, across * width, channels])

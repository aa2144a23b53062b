"""Grid framesets: w x h consecutive frames as one image (sec. 4.2, Fig. 3). TensorFlow ops.

Public: `FramesetShape`, `tile_framesets`.
"""

import tensorflow as tf


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

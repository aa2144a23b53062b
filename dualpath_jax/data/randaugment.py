"""Applies the parts of RandAugment (Cubuk et al. 2020) that run on the host.

All frames of a clip and its framesets share one draw (`randaugment_ops.draw_ops`). Its operations
are applied in three steps:
1. Geometry: the host warps the frames (`randaugment_ops.affine_matrix`, `warp_frames`).
2. Operations that map each channel by a table: the host computes the tables (`lookup_tables`), and
   the device applies them.
3. Other color operations: the device applies them (`preprocess.augment_color`).
Within each step, operations keep the order of the draw.
"""

import functools

import numpy as np
import tensorflow as tf

from dualpath_jax.data.randaugment_ops import OPS, TABLES


def warp_frames(frames: tf.Tensor, matrix: tf.Tensor, fill: np.ndarray) -> tf.Tensor:
    """Warp all frames by one affine map, with bilinear interpolation.

    Args:
      frames: uint8 [n, h, w, 3] in 0..255.
      matrix: float32 [3, 3], see `randaugment_ops.affine_matrix`.
      fill: float [3] in 0..255, color of pixels from outside the frame.

    Returns:
      uint8 [n, h, w, 3]; `frames` unchanged if `matrix` is the identity.
    """
    return tf.cond(
        tf.reduce_all(matrix == tf.eye(3)),
        lambda: frames,
        lambda: _warp(frames, matrix, tf.constant(fill, tf.float32)),
    )


@tf.function(jit_compile=True, autograph=False)  # faster than ImageProjectiveTransformV3
def _warp(frames: tf.Tensor, matrix: tf.Tensor, fill: tf.Tensor) -> tf.Tensor:
    """Warp frames like `warp_frames`, also by the identity."""
    count, height, width, channels = frames.shape
    # The matrix maps coordinates in 0..1; pixel centers are half a pixel from the corner.
    to_pixels = np.array([[width, 0, -0.5], [0, height, -0.5], [0, 0, 1]], np.float32)
    total = to_pixels @ matrix @ np.linalg.inv(to_pixels)
    rows, columns = tf.meshgrid(
        tf.range(height, dtype=tf.float32), tf.range(width, dtype=tf.float32), indexing="ij"
    )
    x, y = (tf.reshape(r[0] * columns + r[1] * rows + r[2], [-1]) for r in (total[0], total[1]))
    left, top = tf.floor(x), tf.floor(y)
    # A table with one row per pixel position, which holds all frames: [h w, n 3].
    table = tf.transpose(tf.cast(frames, tf.float32) - fill, [1, 2, 0, 3])
    table = tf.reshape(table, [height * width, count * channels])
    warped = 0.0
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - tf.abs(y - row)) * (1 - tf.abs(x - column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = tf.where(inside, row * width + column, 0.0)  # exact below 2**24 pixels
        neighbors = tf.gather(table, tf.cast(index, tf.int32))
        warped += neighbors * tf.where(inside, weight, 0.0)[:, None]
    warped = tf.reshape(warped, [height, width, count, channels]) + fill
    return tf.transpose(tf.cast(tf.round(warped), tf.uint8), [2, 0, 1, 3])


def lookup_tables(frames: tf.Tensor, ops: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Compose the table operations of a draw into one table for each channel.

    Args:
      frames: uint8 [n, h, w, 3] in 0..255; AutoContrast and Equalize use the histogram of all.
      ops: int32 [N], drawn operations, see `randaugment_ops.draw_ops`.
      values: float32 [N], their values.

    Returns:
      uint8 [3, 256]: new value of each level of red, green and blue.
    """
    identity = tf.tile(tf.range(256)[None], [3, 1])

    def is_drawn(*names: str) -> tf.Tensor:
        return tf.reduce_any([tf.reduce_any(ops == OPS.index(name)) for name in names])

    def compute_histogram() -> tf.Tensor:
        pixels = tf.transpose(tf.reshape(tf.cast(frames, tf.int32), [-1, 3]))
        return tf.math.bincount(pixels, minlength=256, maxlength=256, axis=-1)

    def compose_tables() -> tf.Tensor:
        table = identity
        # The histogram is most of the work; only two operations need it.
        needs_histogram = is_drawn("auto_contrast", "equalize")
        counts = tf.cond(needs_histogram, compute_histogram, lambda: tf.zeros([3, 256], tf.int32))

        def current_histogram() -> tf.Tensor:
            """Return the histogram after the operations so far."""
            return tf.stack(
                [
                    tf.math.unsorted_segment_sum(counts[c], table[c], num_segments=256)
                    for c in range(3)
                ]
            )

        for op, value in zip(
            tf.unstack(ops, ops.shape[0]), tf.unstack(values, ops.shape[0]), strict=True
        ):
            bits = tf.cast(value, tf.int32)
            steps = {
                OPS.index("auto_contrast"): lambda: _auto_contrast(current_histogram()),
                OPS.index("equalize"): lambda: _equalize(current_histogram()),
                OPS.index("invert"): lambda: 255 - identity,
                OPS.index("posterize"): functools.partial(_posterize, identity, bits),
            }
            step = tf.switch_case(
                op,
                [steps.get(i, lambda: identity) for i in range(len(TABLES) + 1)],
                lambda: identity,
            )
            table = tf.gather(step, table, axis=1, batch_dims=1)
        return table

    return tf.cast(tf.cond(is_drawn(*TABLES), compose_tables, lambda: identity), tf.uint8)


def _posterize(levels: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the upper `bits` bits of levels, int32 [3, 256]."""
    return tf.bitwise.left_shift(tf.bitwise.right_shift(levels, 8 - bits), 8 - bits)


def _auto_contrast(counts: tf.Tensor) -> tf.Tensor:
    """Stretch the levels that occur to 0..255, per channel.

    Args:
      counts: int32 [3, 256], histogram of each channel.

    Returns:
      int32 [3, 256]: new value of each level.
    """
    occurs, levels = counts > 0, tf.range(256)
    low = tf.reduce_min(tf.where(occurs, levels, 255), axis=1, keepdims=True)
    high = tf.reduce_max(tf.where(occurs, levels, 0), axis=1, keepdims=True)
    stretched = (levels - low) * 255 // tf.maximum(high - low, 1)
    return tf.where(high > low, tf.clip_by_value(stretched, 0, 255), levels)


def _equalize(counts: tf.Tensor) -> tf.Tensor:
    """Spread the levels evenly, per channel, as PIL does.

    Args:
      counts: int32 [3, 256], histogram of each channel.

    Returns:
      int32 [3, 256]: new value of each level.
    """
    levels = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, levels, 0), axis=1)
    step = (tf.reduce_sum(counts, 1) - tf.gather(counts, last, axis=1, batch_dims=1)) // 255
    step = step[:, None]
    below = tf.cumsum(counts, axis=1, exclusive=True)
    spread = (below + step // 2) // tf.maximum(step, 1)
    return tf.where(step > 0, tf.minimum(spread, 255), levels)

"""RandAugment (Cubuk et al. 2020) of clips: the draw, and its part that the host does.

Public: `OPS`, `value_of`, `draw`, `affine`, `warp_frames`, `lookup_tables`.

One draw serves all frames of a clip and its framesets. Three places share the work, in this order:
geometry on the host (`affine`, `warp_frames`), operations that are a table per channel (tables made on
the host by `lookup_tables`, looked up on the device), the other colour operations on the device
(`preprocess.augment_color`). Within each, operations keep the order of the draw.

Ranges are those that grow with the magnitude in timm's `rand-m7-n4-inc1`, and as there an
operation that was drawn is applied half of the time. Without Sharpness, which would need the pixels
around each, across the frames of a frameset, and without SolarizeAdd.
"""

import functools

import numpy as np
import tensorflow as tf

from dualpath_jax.data.randaugment_ops import OPS, TABLES


def warp_frames(frames: tf.Tensor, matrix: tf.Tensor, fill: np.ndarray) -> tf.Tensor:
    """Move the pixels of all frames alike, bilinear.

    Args:
      frames: uint8 [n, h, w, 3].
      matrix: float32 [3, 3], see `affine`.
      fill: [3], colour of what comes from outside, 0..255.

    Returns:
      uint8 [n, h, w, 3]; as it was, where `matrix` is the identity.
    """
    return tf.cond(
        tf.reduce_all(matrix == tf.eye(3)),
        lambda: frames,
        lambda: _moved(frames, matrix, tf.constant(fill, tf.float32)),
    )


@tf.function(jit_compile=True, autograph=False)  # five times faster than ImageProjectiveTransformV3
def _moved(frames: tf.Tensor, matrix: tf.Tensor, fill: tf.Tensor) -> tf.Tensor:
    count, height, width, channels = frames.shape
    # Pixel centres lie half a pixel from the corner that the map counts from.
    to_pixels = np.array([[width, 0, -0.5], [0, height, -0.5], [0, 0, 1]], np.float32)
    total = to_pixels @ matrix @ np.linalg.inv(to_pixels)
    rows, columns = tf.meshgrid(
        tf.range(height, dtype=tf.float32), tf.range(width, dtype=tf.float32), indexing="ij"
    )
    x, y = (tf.reshape(r[0] * columns + r[1] * rows + r[2], [-1]) for r in (total[0], total[1]))
    left, top = tf.floor(x), tf.floor(y)
    # One row of a table for each place, with all frames of it: [h w, n 3].
    table = tf.transpose(tf.cast(frames, tf.float32) - fill, [1, 2, 0, 3])
    table = tf.reshape(table, [height * width, count * channels])
    moved = 0.0
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - tf.abs(y - row)) * (1 - tf.abs(x - column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = tf.where(inside, row * width + column, 0.0)  # exact below 2**24 pixels
        rows_of_table = tf.gather(table, tf.cast(place, tf.int32))
        moved += rows_of_table * tf.where(inside, weight, 0.0)[:, None]
    moved = tf.reshape(moved, [height, width, count, channels]) + fill
    return tf.transpose(tf.cast(tf.round(moved), tf.uint8), [2, 0, 1, 3])


def lookup_tables(frames: tf.Tensor, ops: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """The table operations of a draw as one table for each channel.

    Args:
      frames: uint8 [n, h, w, 3]; AutoContrast and Equalize go by the histogram of all of them.
      ops, values: of `draw`, int32 and float32 [N].

    Returns:
      uint8 [3, 256]: what becomes of each level of red, green and blue.
    """
    identity = tf.tile(tf.range(256)[None], [3, 1])

    def drawn(*names: str) -> tf.Tensor:
        return tf.reduce_any([tf.reduce_any(ops == OPS.index(name)) for name in names])

    def histogram() -> tf.Tensor:
        pixels = tf.transpose(tf.reshape(tf.cast(frames, tf.int32), [-1, 3]))
        return tf.math.bincount(pixels, minlength=256, maxlength=256, axis=-1)

    def composed() -> tf.Tensor:
        table = identity
        asked = drawn("auto_contrast", "equalize")  # nine tenths of the work
        counts = tf.cond(asked, histogram, lambda: tf.zeros([3, 256], tf.int32))

        def seen() -> tf.Tensor:  # the histogram after the operations before
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
                OPS.index("auto_contrast"): lambda: _auto_contrast(seen()),
                OPS.index("equalize"): lambda: _equalize(seen()),
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

    return tf.cast(tf.cond(drawn(*TABLES), composed, lambda: identity), tf.uint8)


def _posterize(levels: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the upper bits: int32 [3, 256]."""
    return tf.bitwise.left_shift(tf.bitwise.right_shift(levels, 8 - bits), 8 - bits)


def _auto_contrast(counts: tf.Tensor) -> tf.Tensor:
    """Stretch what occurs to 0..255, in each channel: counts int32 [3, 256] -> table [3, 256]."""
    occurs, levels = counts > 0, tf.range(256)
    low = tf.reduce_min(tf.where(occurs, levels, 255), axis=1, keepdims=True)
    high = tf.reduce_max(tf.where(occurs, levels, 0), axis=1, keepdims=True)
    stretched = (levels - low) * 255 // tf.maximum(high - low, 1)
    return tf.where(high > low, tf.clip_by_value(stretched, 0, 255), levels)


def _equalize(counts: tf.Tensor) -> tf.Tensor:
    """Spread the levels evenly, as PIL does: counts int32 [3, 256] -> table [3, 256]."""
    levels = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, levels, 0), axis=1)
    step = (tf.reduce_sum(counts, 1) - tf.gather(counts, last, axis=1, batch_dims=1)) // 255
    step = step[:, None]
    below = tf.cumsum(counts, axis=1, exclusive=True)
    spread = (below + step // 2) // tf.maximum(step, 1)
    return tf.where(step > 0, tf.minimum(spread, 255), levels)

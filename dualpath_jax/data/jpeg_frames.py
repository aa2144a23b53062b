"""Stored frames of a clip: decoded, cut, scaled, mirrored and erased. TensorFlow ops.

Public: `decode_ratio`, `decode`, `resize`, `mirror`, `erase`, `RATIOS`.
"""

import numpy as np
import tensorflow as tf

RATIOS = (1, 2, 4)
# Pixels that must be left, in parts of those needed, so that no photograph of scikit-image's
# differs by more than 2 / 255 on average from the full path. Grass and gravel, the worst: 1.9 at
# 1.6, 2.6 at 1.5, 5.7 at 1.0.
MARGIN = 1.6
# Up to this shrinking, as of 256 to 224 pixels, antialiasing changes those photographs by 1.1 / 255
# on average at the most, and costs three times as much as plain bilinear sampling.
PLAIN_SHRINKING = 1.15


def decode_ratio(side: int, frame_size: int) -> int:
    """By how much libjpeg may reduce a frame that only feeds a frameset.

    Args:
      side: shorter side of the crop, pixels of the stored frame.
      frame_size: side that it gets in the frameset, pixels.

    Returns:
      1, 2 or 4: the largest that leaves `MARGIN` times the pixels needed.
    """
    enough = (r for r in RATIOS if side >= MARGIN * r * frame_size)
    return max(enough, default=1)


def decode(jpegs: list[tf.Tensor], box: tf.Tensor, ratio: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Frames cut at `box`, reduced by libjpeg.

    Args:
      jpegs: n scalars.
      box: int32 [4]: top, left, height and width in pixels of the stored frames.
      ratio: 1, 2 or 4.

    Returns:
      uint8 [n, h, w, 3], cut at the whole reduced pixels that cover `box`, and float32 [4]: `box`
      in pixels of these.
    """
    start, end = box[:2] // ratio, -(-(box[:2] + box[2:]) // ratio)
    window = tf.concat([start, end - start], 0)  # libjpeg crops after reducing
    # Written out: a map_fn over the frames costs as much again as decoding small ones.
    frames = tf.stack(
        [
            tf.image.decode_and_crop_jpeg(
                jpeg, window, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
            )
            for jpeg in jpegs
        ]
    )
    inner = tf.cast(box, tf.float32) / ratio - tf.cast(tf.pad(start, [[0, 2]]), tf.float32)
    return frames, inner


def resize(frames: tf.Tensor, box: tf.Tensor, size: int) -> tf.Tensor:
    """Frames scaled to squares, bilinear; antialiased beyond `PLAIN_SHRINKING`.

    Args:
      frames: [n, h, w, 3], uint8 or float32, 0..255.
      box: float32 [4], the part of them (top, left, height, width) that is wanted, in pixels.
      size: side of the result.

    Returns:
      uint8 [n, size, size, 3].
    """
    scale = size / box[2:]

    def antialiased() -> tf.Tensor:
        return tf.raw_ops.ScaleAndTranslate(
            images=tf.cast(frames, tf.float32),
            size=[size, size],
            scale=scale,
            translation=-box[:2] * scale,
            kernel_type="triangle",
            antialias=True,
        )

    def plain() -> tf.Tensor:
        return tf.image.resize(frames, (size, size))

    whole = tf.reduce_all(box == tf.cast([0, 0, *tf.unstack(tf.shape(frames)[1:3])], tf.float32))
    shrinks_little = tf.reduce_min(scale) >= 1 / PLAIN_SHRINKING
    resized = tf.cond(whole & shrinks_little, plain, antialiased)
    return tf.ensure_shape(tf.cast(tf.round(resized), tf.uint8), [frames.shape[0], size, size, 3])


def mirror(images: tf.Tensor) -> tf.Tensor:
    """[n, H, W, 3] with left and right exchanged."""
    rows = tf.reshape(images, [-1, *images.shape[2:]])  # four times faster than in four dimensions
    return tf.reshape(tf.reverse(rows, [1]), images.shape)


def erase(images: tf.Tensor, box: tf.Tensor, fill: np.ndarray) -> tf.Tensor:
    """Paint `box` (int32 [4]: top, left, height, width) of uint8 [n, H, W, 3] with a colour."""
    top, left, height, width = tf.unstack(box)
    rows, columns = tf.range(images.shape[1]), tf.range(images.shape[2])
    inside = ((rows >= top) & (rows < top + height))[:, None]
    inside &= ((columns >= left) & (columns < left + width))[None]
    return tf.where(inside[None, :, :, None], tf.cast(tf.round(fill), tf.uint8), images)

"""Stored frames of a clip: decoded, cut, scaled, mirrored and erased. TensorFlow ops.

Public: `decode_ratio`, `snap_box`, `decode_crops`, `resize`, `mirror`, `erase`, `RATIOS`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

RATIOS = (1, 2, 4)
# Pixels that must be left, in parts of those needed, so that no photograph of scikit-image's
# differs by more than 2 / 255 on average from the full path. Grass and gravel, the worst: 1.8 at
# 1.8, 2.4 at 1.7.
MARGIN = 1.8
# Up to this shrinking, as of 256 to 224 pixels, bilinear sampling needs no antialiasing. Beyond it
# the mean over areas is nearer than a triangle filter to the bicubic one that CLIP was trained with
# (256 to 56 pixels, frames of Kinetics: 1.3 / 255 on average against 1.8) and 2.6 times faster.
PLAIN_SHRINKING = 1.15
# Frames that are decoded and scaled at a time, which a core's cache holds: 5% of a clip's time.
GROUP = 4


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


def snap_box(box: np.ndarray, ratio: int) -> np.ndarray:
    """A box, int32 [4]: top, left, height, width, cut to multiples of `ratio`."""
    start, end = -(-box[:2] // ratio) * ratio, (box[:2] + box[2:]) // ratio * ratio
    return np.concatenate([start, end - start]).astype(np.int32)


def decode_crops(jpegs: list[tf.Tensor], box: tf.Tensor, ratio: int, size: int) -> tf.Tensor:
    """Frames cut at `box`, reduced by libjpeg, and scaled to squares as by `resize`.

    Args:
      jpegs: n scalars.
      box: int32 [4]: top, left, height and width in pixels of the stored frames, multiples of
        `ratio`.
      ratio: 1, 2 or 4.
      size: side of the result.

    Returns:
      uint8 [n, size, size, 3].
    """
    window = box // ratio  # libjpeg crops after reducing

    def scaled(method: str) -> tf.Tensor:
        done: list[tf.Tensor] = []
        for few in _groups(jpegs, len(jpegs)):
            with tf.control_dependencies(done[-1:]):
                # Written out: a map_fn over the frames costs as much again as decoding small ones.
                frames = [
                    tf.image.decode_and_crop_jpeg(
                        jpeg, window, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
                    )
                    for jpeg in few
                ]
                done.append(_scale(tf.stack(frames), size, method))
        return tf.concat(done, 0)

    return _by_shrinking(window[2:], size, scaled)


def resize(frames: tf.Tensor, size: int) -> tf.Tensor:
    """Frames scaled to squares: bilinear, or the mean over areas beyond `PLAIN_SHRINKING`.

    Args:
      frames: uint8 [n, h, w, 3].
      size: side of the result.

    Returns:
      uint8 [n, size, size, 3].
    """

    def scaled(method: str) -> tf.Tensor:
        groups = _groups(frames, frames.shape[0])
        return tf.concat([_scale(few, size, method) for few in groups], 0)

    return _by_shrinking(tf.shape(frames)[1:3], size, scaled)


def _groups(
    frames: Sequence[tf.Tensor] | tf.Tensor, count: int
) -> list[Sequence[tf.Tensor] | tf.Tensor]:
    """`count` frames, `GROUP` at a time."""
    return [frames[k : k + GROUP] for k in range(0, count, GROUP)]


def _by_shrinking(sides: tf.Tensor, size: int, scaled: Callable[[str], tf.Tensor]) -> tf.Tensor:
    """`scaled` by the method that suits frames with `sides` (int32 [2], pixels)."""
    shrinks_little = tf.reduce_max(sides) <= int(PLAIN_SHRINKING * size)
    return tf.cond(shrinks_little, lambda: scaled("bilinear"), lambda: scaled("area"))


def _scale(frames: tf.Tensor, size: int, method: str) -> tf.Tensor:
    """uint8 [n, h, w, 3] -> uint8 [n, size, size, 3]."""
    if method == "bilinear":  # from float32 it is as exact as from uint8, and takes half the time
        frames = tf.cast(frames, tf.float32)
    resized = tf.image.resize(frames, (size, size), method=method)
    return tf.cast(tf.round(resized), tf.uint8)


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

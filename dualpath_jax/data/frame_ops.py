"""Decodes, crops, scales, mirrors and erases the stored frames of a clip. TensorFlow ops."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

# Factors by which libjpeg may reduce a frame while it decodes it.
DECODE_RATIOS = (1, 2, 4)
# A reduced frame must have this many times the pixels needed per side. The resulting frames then
# differ from those of full decoding by at most 2.7 / 255 on average (tests/data/test_frame_ops.py).
DECODE_MARGIN = 1.8
# Up to this reduction, such as 256 to 224 pixels, bilinear sampling needs no antialiasing. Beyond
# it, the mean over areas is faster than a triangle filter and closer to the bicubic filter that
# CLIP was trained with (docs/notes/measurements.md).
_MAX_BILINEAR_REDUCTION = 1.15
# Frames that are decoded and scaled together; their pixels fit into a core's cache.
FRAMES_PER_GROUP = 4


def choose_decode_ratio(side: int, frame_size: int) -> int:
    """Return the factor by which libjpeg may reduce a frame that is used only in a frameset.

    Args:
      side: shorter side of the crop, in pixels of the stored frame.
      frame_size: side of the frame in the frameset, in pixels.

    Returns:
      1, 2 or 4: the largest factor that leaves `DECODE_MARGIN` times the pixels needed per side.
    """
    allowed = (r for r in DECODE_RATIOS if side >= DECODE_MARGIN * r * frame_size)
    return max(allowed, default=1)


def snap_box(box: np.ndarray, ratio: int) -> np.ndarray:
    """Shrink a box to multiples of `ratio`.

    Args:
      box: int32 [4]: top, left, height, width, in pixels.
      ratio: a number of `DECODE_RATIOS`.

    Returns:
      int32 [4]: the largest box inside `box` whose four numbers are multiples of `ratio`.
    """
    start, end = -(-box[:2] // ratio) * ratio, (box[:2] + box[2:]) // ratio * ratio
    return np.concatenate([start, end - start]).astype(np.int32)


def decode_crops(jpegs: list[tf.Tensor], box: tf.Tensor, ratio: int, size: int) -> tf.Tensor:
    """Decode frames cropped at `box` and scale them to squares as `resize` does.

    Args:
      jpegs: n scalar strings, the encoded frames.
      box: int32 [4]: top, left, height and width in pixels of the stored frames, multiples of
        `ratio`.
      ratio: factor by which libjpeg reduces the frames, see `choose_decode_ratio`.
      size: side of the result, in pixels.

    Returns:
      uint8 [n, size, size, 3], RGB in 0..255.
    """
    window = box // ratio  # libjpeg crops after it reduces

    def decode_and_resize(method: str) -> tf.Tensor:
        done: list[tf.Tensor] = []
        for group in _split_into_groups(jpegs, len(jpegs)):
            with tf.control_dependencies(done[-1:]):  # one group after the other
                # Unrolled, because map_fn doubles the cost of small frames.
                frames = [
                    tf.image.decode_and_crop_jpeg(
                        jpeg, window, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
                    )
                    for jpeg in group
                ]
                done.append(_resize_group(tf.stack(frames), size, method))
        return tf.concat(done, 0)

    return _call_by_reduction(window[2:], size, decode_and_resize)


def resize(frames: tf.Tensor, size: int) -> tf.Tensor:
    """Scale frames to squares: bilinear for small reductions, the mean over areas for large ones.

    Args:
      frames: uint8 [n, h, w, 3] in 0..255.
      size: side of the result, in pixels.

    Returns:
      uint8 [n, size, size, 3] in 0..255.
    """

    def resize_groups(method: str) -> tf.Tensor:
        groups = _split_into_groups(frames, frames.shape[0])
        return tf.concat([_resize_group(group, size, method) for group in groups], 0)

    return _call_by_reduction(tf.shape(frames)[1:3], size, resize_groups)


def _split_into_groups(
    frames: Sequence[tf.Tensor] | tf.Tensor, count: int
) -> list[Sequence[tf.Tensor] | tf.Tensor]:
    """Split `count` frames into groups of `FRAMES_PER_GROUP`."""
    return [frames[k : k + FRAMES_PER_GROUP] for k in range(0, count, FRAMES_PER_GROUP)]


def _call_by_reduction(
    sides: tf.Tensor, size: int, resize_fn: Callable[[str], tf.Tensor]
) -> tf.Tensor:
    """Call `resize_fn` with the method that suits frames of `sides` (int32 [2], in pixels)."""
    is_small_reduction = tf.reduce_max(sides) <= int(_MAX_BILINEAR_REDUCTION * size)
    return tf.cond(is_small_reduction, lambda: resize_fn("bilinear"), lambda: resize_fn("area"))


def _resize_group(frames: tf.Tensor, size: int, method: str) -> tf.Tensor:
    """Scale uint8 [n, h, w, 3] to uint8 [n, size, size, 3]."""
    if method == "bilinear":  # as exact from float32 as from uint8, and faster
        frames = tf.cast(frames, tf.float32)
    resized = tf.image.resize(frames, (size, size), method=method)
    return tf.cast(tf.round(resized), tf.uint8)


def mirror(images: tf.Tensor) -> tf.Tensor:
    """Exchange left and right of images [n, H, W, 3]."""
    rows = tf.reshape(images, [-1, *images.shape[2:]])  # faster with three axes than with four
    return tf.reshape(tf.reverse(rows, [1]), images.shape)


def erase(images: tf.Tensor, box: tf.Tensor, fill: np.ndarray) -> tf.Tensor:
    """Paint a box of all images with one color.

    Args:
      images: uint8 [n, H, W, 3] in 0..255.
      box: int32 [4]: top, left, height, width, in pixels.
      fill: float [3], the color in 0..255.

    Returns:
      uint8 [n, H, W, 3].
    """
    top, left, height, width = tf.unstack(box)
    rows, columns = tf.range(images.shape[1]), tf.range(images.shape[2])
    inside = ((rows >= top) & (rows < top + height))[:, None]
    inside &= ((columns >= left) & (columns < left + width))[None]
    return tf.where(inside[None, :, :, None], tf.cast(tf.round(fill), tf.uint8), images)

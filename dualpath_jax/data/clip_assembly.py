"""Assembles the model's inputs from the stored records of a clip, with TensorFlow ops.

The frames of a clip are cut, scaled, warped (RandAugment's geometry), mirrored and erased; then the
framesets are tiled.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import numpy as np
import tensorflow as tf

from dualpath_jax.data import augment, frame_ops, randaugment
from dualpath_jax.data.clip_spec import ClipFormat, normalization
from dualpath_jax.data.dataset_metadata import DECODE_ERRORS
from dualpath_jax.data.framesets import tile_framesets
from dualpath_jax.data.video_dataset import FRAME_FEATURES
from dualpath_jax.data.video_source import VideoSource
from dualpath_jax.runtime.cpu_count import num_cores


class ClipSample(TypedDict, total=False):
    """Holds the raw records of one clip and everything that was drawn for it.

    Attributes:
      records: bytes [n], serialized tf.train.Example of each of `ClipFormat.stored_frames`.
      box: int32 [4], top, left, height and width of the crop, pixels of the stored frame.
      decode_ratio: int32, index in `frame_ops.DECODE_RATIOS` of the JPEG decoder's scale.
      flip: bool, mirror the clip.
      label: int32.
      mask: float32, 0 for padding.
      example_id: int64, row in the video table; -1 for padding.
      ops, op_values, matrix: int32 [N], float32 [N], float32 [3, 3]; only with RandAugment.
      erase: int32 [4], box in pixels of the smallest input; only with random erasing.
    """

    records: list[bytes]
    box: np.ndarray
    decode_ratio: np.int32
    flip: bool
    label: np.int32
    mask: np.float32
    example_id: np.int64
    ops: np.ndarray
    op_values: np.ndarray
    matrix: np.ndarray
    erase: np.ndarray


def make_clip_sample(
    dataset: VideoSource,
    clip: ClipFormat,
    example: int,
    frames: np.ndarray,
    crop: augment.Crop,
    real: bool = True,
) -> ClipSample:
    """Read the records of a clip and return them as a sample, without augmentation's draws.

    Args:
      dataset: the split.
      clip: what a clip is.
      example: row of the video in the table.
      frames: int64 [T], indices of the frames.
      crop: part of each frame, and whether it is mirrored.
      real: False for padding, which has mask 0 and example_id -1.

    Raises:
      UnreadableVideo: a record cannot be read.
    """
    side = min(crop.height, crop.width)
    # Crops are cut alike with and without framesets, so that all methods see the same clips.
    unit = frame_ops.choose_decode_ratio(side, max(1, clip.image_size // 4))
    ratio = 1
    if clip.framesets:
        ratio = min(unit, frame_ops.choose_decode_ratio(side, clip.framesets.frame_size))
    box = np.array([crop.top, crop.left, crop.height, crop.width], np.int32)
    return {
        "records": dataset.read_frames(example, frames[clip.stored_frames]),
        "box": frame_ops.snap_box(box, unit),
        "decode_ratio": np.int32(frame_ops.DECODE_RATIOS.index(ratio)),  # index of the ratio
        "flip": crop.flip,
        "label": np.int32(dataset.labels[example]),
        "mask": np.float32(real),
        "example_id": np.int64(example if real else -1),
    }


def compose_inputs(
    spatial: tf.Tensor | None,
    cells: tf.Tensor | None,
    sample: dict[str, tf.Tensor],
    clip: ClipFormat,
    fill: np.ndarray,
) -> dict[str, tf.Tensor]:
    """Compose a clip's inputs from its scaled frames and its draws.

    Args:
      spatial: uint8 [S, H, W, 3]; None if the model does not take them.
      cells: uint8 [T, fh, fw, 3], all frames as they are in framesets; None without these. All of
        them are made alike, so that a still picture does not flicker.
      sample: the clip's `ClipSample` as tensors.
      clip: what a clip is.
      fill: see `fill_color`.
    """
    images = [x for x in (spatial, cells) if x is not None]
    if "matrix" in sample:
        images = [randaugment.warp_frames(x, sample["matrix"], fill) for x in images]
    images = tf.cond(sample["flip"], lambda: [frame_ops.mirror(x) for x in images], lambda: images)
    color = {}
    if "ops" in sample:
        color = {key: sample[key] for key in ("ops", "op_values")}
        color["tables"] = randaugment.lookup_tables(images[-1], *color.values())
    if "erase" in sample:
        box = sample["erase"]  # pixels of the smallest input: the same part of all inputs

        def erased() -> list[tf.Tensor]:
            side = images[-1].shape[1]
            return [frame_ops.erase(x, box * (x.shape[1] // side), fill) for x in images]

        images = tf.cond(box[2] > 0, erased, lambda: images)
    inputs = {}
    if spatial is not None:
        inputs["spatial"] = images[0]
    if cells is not None:
        inputs["temporal"] = tile_framesets(images[-1], clip.framesets.grid)
    return inputs | {key: sample[key] for key in ("label", "mask", "example_id")} | color


def fill_color(data: Any) -> np.ndarray:
    """Return the color of erased pixels and of those outside of a frame, float32 [3].

    It is the mean of the data, which normalization maps to 0.
    """
    mean, _ = normalization(data)
    return 255 * np.array(mean, np.float32)


def _assemble(
    sample: dict[str, tf.Tensor], clip: ClipFormat, fill: np.ndarray
) -> dict[str, tf.Tensor]:
    """Decode the records of one clip and compose its inputs."""
    jpegs = tf.io.parse_example(sample["records"], FRAME_FEATURES)["image"]
    jpegs = dict(zip(clip.stored_frames, tf.unstack(jpegs, len(clip.stored_frames)), strict=True))

    def read(frames: list[tf.Tensor], ratio: int, size: int) -> tf.Tensor:
        return frame_ops.decode_crops(frames, sample["box"], ratio, size)

    spatial = cells = None
    if clip.num_spatial_frames:
        spatial = read([jpegs[i] for i in clip.spatial_frames], 1, clip.image_size)
    if clip.framesets is not None:
        size, frames = clip.framesets.frame_size, list(jpegs.values())
        branches = [lambda r=ratio: read(frames, r, size) for ratio in frame_ops.DECODE_RATIOS]
        cells = tf.switch_case(sample["decode_ratio"], branches)
    return compose_inputs(spatial, cells, sample, clip, fill)


def _signature(clip: ClipFormat, layers: int, erasing: bool) -> dict[str, tf.TensorSpec]:
    """Return the tensor specs of a `ClipSample`, including the draws of RandAugment and erasing."""
    signature = {
        "records": tf.TensorSpec([len(clip.stored_frames)], tf.string),
        "box": tf.TensorSpec([4], tf.int32),
        "decode_ratio": tf.TensorSpec([], tf.int32),
        "flip": tf.TensorSpec([], tf.bool),
        "label": tf.TensorSpec([], tf.int32),
        "mask": tf.TensorSpec([], tf.float32),
        "example_id": tf.TensorSpec([], tf.int64),
    }
    if layers:
        signature["ops"] = tf.TensorSpec([layers], tf.int32)
        signature["op_values"] = tf.TensorSpec([layers], tf.float32)
        signature["matrix"] = tf.TensorSpec([3, 3], tf.float32)
    if erasing:
        signature["erase"] = tf.TensorSpec([4], tf.int32)
    return signature


@functools.cache
def _traced(
    clip: ClipFormat, fill: tuple[float, ...], layers: int, erasing: bool
) -> Callable[[dict[str, Any]], dict[str, tf.Tensor]]:
    """Return `_assemble` as a graph, which all passes over a data set and all clips share."""

    def assemble(sample: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return _assemble(sample, clip, np.array(fill, np.float32))

    signature = [_signature(clip, layers, erasing)]
    return tf.function(assemble, input_signature=signature, autograph=False)


def decode_clips(
    samples: Iterator[ClipSample],
    clip: ClipFormat,
    data: Any,
    problems: list[Exception],
    training: bool = False,
) -> tf.data.Dataset:
    """Decode samples to clips (see `pipeline`, without the axis B), in order and in parallel.

    Args:
      samples: of `make_clip_sample`; in training with the draws of RandAugment and erasing.
      clip: what a clip is.
      data: `config.data`.
      problems: a list that receives the exceptions of `samples`, as TensorFlow passes on only
        their text.
      training: True if the samples have RandAugment's and erasing's draws, as `data` asks.
    """
    layers = data.randaugment_layers if training else 0
    erasing = training and data.erasing_probability > 0

    def generate():
        try:
            yield from samples
        except Exception as problem:
            problems.append(problem)
            raise

    signature = _signature(clip, layers, erasing)
    clips = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return parallel_map(clips, _traced(clip, tuple(fill_color(data)), layers, erasing))


def parallel_map(clips: tf.data.Dataset, function: Callable[..., Any]) -> tf.data.Dataset:
    """Apply `function` to `clips` in order, two calls per core in parallel.

    With one call per core, cores are idle while finished clips wait for an earlier one. tf.data's
    autotuner is off, because the end of a stream waits for its thread (TensorFlow 2.21); so is
    AutoGraph, which is slow and not needed.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    function = tf.autograph.experimental.do_not_convert(function)
    mapped = clips.map(function, num_parallel_calls=2 * num_cores(), deterministic=True)
    return mapped.with_options(options)


def build_clip_fn(clip: ClipFormat, data: Any) -> Callable[[dict[str, Any]], dict[str, tf.Tensor]]:
    """Return the function that `decode_clips` applies, for single clips of evaluation.

    For a single clip, building a tf.data pipeline would take longer than assembling it.
    """
    return _traced(clip, tuple(fill_color(data)), layers=0, erasing=False)


def find_decode_error(sample: ClipSample, clip: ClipFormat, data: Any) -> str:
    """Return why the records of a sample cannot be decoded; "" if they can."""
    try:
        _assemble({k: tf.convert_to_tensor(v) for k, v in sample.items()}, clip, fill_color(data))
    except DECODE_ERRORS as problem:
        return str(problem)
    return ""

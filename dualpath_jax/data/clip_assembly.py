"""What a clip is, and how its stored records become the model's inputs. TensorFlow ops.

Public: `ClipFormat`, `clip_format`, `make_clip_sample`, `compose_inputs`, `fill_color`, `decode_clips`,
`parallel_map`, `build_clip_fn`, `find_decode_error`.

An element is what the pipeline's generators yield for one clip: its raw records, what was drawn for
it, and its label. A clip is cut, scaled, warped (RandAugment's geometry), mirrored and erased, then
tiled.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from dualpath_jax.data import augment, frame_ops, frame_sampling, randaugment
from dualpath_jax.data.clip_spec import ClipFormat
from dualpath_jax.data.dataset_metadata import DECODE_ERRORS
from dualpath_jax.data.framesets import tile_framesets
from dualpath_jax.data.video_dataset import FRAME_FEATURES, VideoDataset
from dualpath_jax.runtime.cpu_count import num_cores


def make_clip_sample(
    dataset: VideoDataset,
    clip: ClipFormat,
    example: int,
    frames: np.ndarray,
    crop: augment.Crop,
    real: bool = True,
) -> dict[str, Any]:
    """An element: numpy values and the records of `frames` (int64 [T]), of video `example`.

    One that is not `real` is padding: mask 0, example_id -1. UnreadableVideo if it cannot be read.
    """
    side = min(crop.height, crop.width)
    # Crops are cut alike with and without framesets, so that all methods see the same clips.
    unit = frame_ops.decode_ratio(side, max(1, clip.image_size // 4))
    ratio = 1
    if clip.framesets:
        ratio = min(unit, frame_ops.decode_ratio(side, clip.framesets.frame_size))
    box = np.array([crop.top, crop.left, crop.height, crop.width], np.int32)
    return {
        "records": dataset.read_frames(example, frames),
        "box": frame_ops.snap_box(box, unit),
        "decode_ratio": np.int32(frame_ops.RATIOS.index(ratio)),  # its place
        "flip": crop.flip,
        "label": np.int32(dataset.labels[example]),
        "mask": np.float32(real),
        "example_id": np.int64(example if real else -1),
    }


def compose_inputs(
    spatial: tf.Tensor,
    others: tf.Tensor | None,
    element: dict[str, tf.Tensor],
    clip: ClipFormat,
    fill: np.ndarray,
) -> dict[str, tf.Tensor]:
    """Scaled frames of one clip to its inputs, with what was drawn for it.

    Args:
      spatial: uint8 [S, H, W, 3].
      others: uint8 [T - S, fh, fw, 3], the frames that only feed framesets; None without these.
      element: of it "flip", "label", "mask", "example_id"; where there, "ops", "op_values" and
        "matrix" (RandAugment) and "erase".
      clip: what a clip is.
      fill: of `fill_color`.
    """
    if "matrix" in element:
        spatial = randaugment.warp_frames(spatial, element["matrix"], fill)
        if clip.framesets is not None:
            others = randaugment.warp_frames(others, element["matrix"], fill)
    images = [spatial]
    if clip.framesets is not None:
        chosen = frame_sampling.spatial_subset(clip.num_frames, clip.num_spatial_frames)
        rest = np.setdiff1d(np.arange(clip.num_frames), chosen)
        small = tf.concat([frame_ops.resize(spatial, clip.framesets.frame_size), others], 0)
        images.append(tf.gather(small, np.argsort(np.concatenate([chosen, rest]))))  # in time order
    images = tf.cond(element["flip"], lambda: [frame_ops.mirror(x) for x in images], lambda: images)
    colour = {}
    if "ops" in element:
        colour = {key: element[key] for key in ("ops", "op_values")}
        colour["tables"] = randaugment.lookup_tables(images[-1], *colour.values())
    if "erase" in element:
        box = element["erase"]  # in pixels of the last, so that it is the same part of both

        def erased() -> list[tf.Tensor]:
            side = images[-1].shape[1]
            return [frame_ops.erase(x, box * (x.shape[1] // side), fill) for x in images]

        images = tf.cond(box[2] > 0, erased, lambda: images)
    inputs = {"spatial": images[0]}
    if clip.framesets is not None:
        inputs["temporal"] = tile_framesets(images[1], clip.framesets.grid)
    return inputs | {key: element[key] for key in ("label", "mask", "example_id")} | colour


def fill_color(data: Any) -> np.ndarray:
    """The colour of what is erased or comes from outside: 0 when normalised; float32 [3]."""
    return 255 * np.array(data.mean, np.float32)


def _assemble(
    element: dict[str, tf.Tensor], clip: ClipFormat, fill: np.ndarray
) -> dict[str, tf.Tensor]:
    """Raw records of one clip to its inputs: see the module's docstring."""
    jpegs = tf.io.parse_example(element["records"], FRAME_FEATURES)["image"]
    jpegs = tf.unstack(jpegs, clip.num_frames)
    chosen = frame_sampling.spatial_subset(clip.num_frames, clip.num_spatial_frames)

    def read(indices: np.ndarray, ratio: int, size: int) -> tf.Tensor:
        return frame_ops.decode_crops([jpegs[i] for i in indices], element["box"], ratio, size)

    spatial, others = read(chosen, 1, clip.image_size), None
    if clip.framesets is not None:
        size = clip.framesets.frame_size
        rest = np.setdiff1d(np.arange(clip.num_frames), chosen)
        others = tf.zeros([0, size, size, 3], tf.uint8)
        if rest.size:
            branches = [lambda r=ratio: read(rest, r, size) for ratio in frame_ops.RATIOS]
            others = tf.switch_case(element["decode_ratio"], branches)
    return compose_inputs(spatial, others, element, clip, fill)


def _signature(clip: ClipFormat, layers: int, erasing: bool) -> dict[str, tf.TensorSpec]:
    """Of the elements of `make_clip_sample`, with what RandAugment (`layers`) and erasing drew."""
    signature = {
        "records": tf.TensorSpec([clip.num_frames], tf.string),
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
    """`_assemble` as a graph, built once for all passes over a data set and all clips."""

    def assemble(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return _assemble(element, clip, np.array(fill, np.float32))

    signature = [_signature(clip, layers, erasing)]
    return tf.function(assemble, input_signature=signature, autograph=False)


def decode_clips(
    elements: Iterator[dict[str, Any]],
    clip: ClipFormat,
    data: Any,
    problems: list[Exception],
    training: bool = False,
) -> tf.data.Dataset:
    """Elements to clips (see `pipeline`, without the axis B), in order, decoded in parallel.

    Args:
      elements: of `make_clip_sample`; in training with what RandAugment and erasing drew.
      clip: what a clip is.
      data: `config.data`.
      problems: gets what `elements` raises, of which TensorFlow passes on the text only.
      training: do the elements have what `data` says of RandAugment and erasing?
    """
    layers = data.randaugment_layers if training else 0
    erasing = training and data.erasing_probability > 0

    def generate():
        try:
            yield from elements
        except Exception as problem:
            problems.append(problem)
            raise

    signature = _signature(clip, layers, erasing)
    clips = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return parallel_map(clips, _traced(clip, tuple(fill_color(data)), layers, erasing))


def parallel_map(clips: tf.data.Dataset, function: Callable[..., Any]) -> tf.data.Dataset:
    """`clips` through `function`, in order, twice as many at a time as there are cores.

    With one for each core, cores stand idle while their clips, done, wait for one before them.
    Without tf.data's autotuner: its thread wakes up ever more rarely, once a minute at last, and
    what ends a stream waits for that (TensorFlow 2.21: 1.2 s after an evaluation of 1.3 s). Without
    AutoGraph, which takes as long to rewrite `function` as TensorFlow to trace it.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    function = tf.autograph.experimental.do_not_convert(function)
    mapped = clips.map(function, num_parallel_calls=2 * num_cores(), deterministic=True)
    return mapped.with_options(options)


def build_clip_fn(clip: ClipFormat, data: Any) -> Callable[[dict[str, Any]], dict[str, tf.Tensor]]:
    """What `decode_clips` does to an element, as a function.

    For clips that come one by one; a tf.data pipeline takes longer to build than to make a clip.
    """
    return _traced(clip, tuple(fill_color(data)), layers=0, erasing=False)


def find_decode_error(element: dict[str, Any], clip: ClipFormat, data: Any) -> str:
    """Why the records of an element cannot be made into a clip; "" if they can."""
    try:
        _assemble({k: tf.convert_to_tensor(v) for k, v in element.items()}, clip, fill_color(data))
    except DECODE_ERRORS as problem:
        return str(problem)
    return ""

"""tf.data pipeline: stored videos to uint8 batches of spatial frames and framesets.

Public: `ClipFormat`, `clip_format`, `train_batches`, `eval_batches`, `num_eval_steps`.

Python enters once: a generator yields the raw records of one clip with its crop; parsing, decoding
and resizing are TF ops. Everything random is drawn by the generator from (seed, epoch, example).

A batch is a dict of numpy arrays:
  spatial     uint8   [B, S, H, W, 3]     in 0..255, RGB; without framesets all T frames
  temporal    uint8   [B, G, H', W', 3]   likewise; absent without framesets
  label       int32   [B]
  mask        float32 [B]                 0 for padding, else 1
  example_id  int64   [B]                 place in the split's video table; -1 for padding
In evaluation, spatial and temporal have an axis V (views) after B. In training with RandAugment
(N operations), for what `preprocess.colour` does to both inputs:
  ops         int32   [B, N]              places in `randaugment.OPS`
  op_values   float32 [B, N]              see `randaugment.value_of`
  tables      uint8   [B, 3, 256]         what becomes of each level of red, green, blue, before ops

A clip is cut, warped (RandAugment's geometry), scaled, mirrored and erased, then tiled.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from dualpath_jax.data import augment, jpeg_frames, order, randaugment, sampling
from dualpath_jax.data.framesets import FramesetShape, tile_framesets
from dualpath_jax.data.records import FRAME_FEATURES, VideoDataset

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ClipFormat:
    """What a clip is. See the keys of the same names under `data` in configs/base.py.

    Without framesets, `framesets` is None and the spatial frames are all frames.
    """

    num_frames: int
    image_size: int
    num_spatial_frames: int
    sampling: str
    sampling_interval: int | None
    framesets: FramesetShape | None


def clip_format(data: Any, framesets: bool = True) -> ClipFormat:
    """Clip format of `config.data`; ValueError for values that do not go together.

    Args:
      data: `config.data`.
      framesets: spatial frames and framesets (DualPath), or every frame at full size (the other
        methods, for which `num_spatial_frames`, `grid` and `frame_scale` mean nothing).
    """
    _check_augmentation(data)
    shape, num_spatial = None, data.num_frames
    if framesets:
        shape = FramesetShape(data.num_frames, tuple(data.grid), data.frame_scale, data.image_size)
        num_spatial = data.num_spatial_frames
    sampling.spatial_subset(data.num_frames, num_spatial)
    if data.sampling not in sampling.SAMPLINGS:
        known = ", ".join(sampling.SAMPLINGS)
        raise ValueError(f"unknown data.sampling {data.sampling!r}: known are {known}")
    if data.sampling == "dense" and data.sampling_interval is None:
        sampling.default_interval(data.num_frames)
    return ClipFormat(
        num_frames=data.num_frames,
        image_size=data.image_size,
        num_spatial_frames=num_spatial,
        sampling=data.sampling,
        sampling_interval=data.sampling_interval,
        framesets=shape,
    )


def _check_augmentation(data: Any) -> None:
    """ValueError for a value out of range."""
    if data.randaugment_layers < 0:
        raise ValueError(f"data.randaugment_layers={data.randaugment_layers} must not be negative")
    if data.randaugment_layers and not 0 <= data.randaugment_magnitude <= randaugment.MAX_MAGNITUDE:
        raise ValueError(
            f"data.randaugment_magnitude={data.randaugment_magnitude} must be in 0..10"
        )
    if not 0 <= data.erasing_probability <= 1:
        raise ValueError(f"data.erasing_probability={data.erasing_probability} must be in 0..1")


def _element(
    dataset: VideoDataset,
    clip: ClipFormat,
    example: int,
    frames: np.ndarray,
    crop: augment.Crop,
    real: bool = True,
) -> dict[str, Any]:
    side = min(crop.height, crop.width)
    ratio = jpeg_frames.decode_ratio(side, clip.framesets.frame_size) if clip.framesets else 1
    return {
        "records": dataset.read_frames(example, frames),
        "box": np.array([crop.top, crop.left, crop.height, crop.width], np.int32),
        "decode_ratio": np.int32(jpeg_frames.RATIOS.index(ratio)),  # its place
        "flip": crop.flip,
        "label": np.int32(dataset.labels[example]),
        "mask": np.float32(real),
        "example_id": np.int64(example if real else -1),
    }


def _train_elements(
    dataset: VideoDataset,
    clip: ClipFormat,
    data: Any,
    mirrored: np.ndarray | None,
    seed: int,
    steps: range,
    rows: slice,
) -> Iterator[dict[str, Any]]:
    for step in steps:
        examples, epochs = order.train_order(seed, step, data.batch_size, len(dataset))
        for example, epoch in zip(examples[rows], epochs[rows], strict=True):
            rng = np.random.default_rng(order.example_seed(seed, int(epoch), int(example)))
            frames = sampling.sample_frames(
                clip.sampling,
                int(dataset.num_frames[example]),
                clip.num_frames,
                clip.sampling_interval,
                rng,
            )
            crop = augment.random_resized_crop(
                int(dataset.heights[example]),
                int(dataset.widths[example]),
                rng,
                tuple(data.crop_scale),
                tuple(data.crop_ratio),
                data.flip,
            )
            element = _element(dataset, clip, int(example), frames, crop)
            if crop.flip:
                element["label"] = mirrored[element["label"]]
            if data.randaugment_layers:
                ops, values = randaugment.draw(
                    rng, data.randaugment_layers, data.randaugment_magnitude
                )
                element |= {"ops": ops, "op_values": values}
                element["matrix"] = randaugment.affine(ops, values)
            if data.erasing_probability:
                side = clip.framesets.frame_size if clip.framesets else clip.image_size
                element["erase"] = augment.random_erasing(side, rng, data.erasing_probability)
            yield element


def _eval_elements(
    dataset: VideoDataset,
    clip: ClipFormat,
    temporal_views: int,
    spatial_crops: int,
    batch_size: int,
    rows: slice,
) -> Iterator[dict[str, Any]]:
    for step in range(num_eval_steps(len(dataset), batch_size)):
        for place in range(step * batch_size, (step + 1) * batch_size)[rows]:
            real = place < len(dataset)
            example = place if real else 0
            for view in range(temporal_views):
                frames = sampling.sample_frames(
                    clip.sampling,
                    int(dataset.num_frames[example]),
                    clip.num_frames,
                    clip.sampling_interval,
                    view=view,
                    num_views=temporal_views,
                )
                for k in range(spatial_crops):
                    height, width = int(dataset.heights[example]), int(dataset.widths[example])
                    crop = augment.view_crop(height, width, k, spatial_crops)
                    yield _element(dataset, clip, example, frames, crop, real)


def _frames(
    element: dict[str, tf.Tensor], clip: ClipFormat, fill: np.ndarray
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Cut, warped: spatial frames uint8 [S, H, W, 3]; all for framesets [T, fh, fw, 3], or None."""
    jpegs = tf.io.parse_example(element["records"], FRAME_FEATURES)["image"]
    jpegs = tf.unstack(jpegs, clip.num_frames)
    chosen = sampling.spatial_subset(clip.num_frames, clip.num_spatial_frames)

    def read(indices: np.ndarray, ratio: int) -> tuple[tf.Tensor, tf.Tensor]:
        frames, box = jpeg_frames.decode([jpegs[i] for i in indices], element["box"], ratio)
        if "matrix" in element:
            frames = randaugment.warp(frames, box, element["matrix"], fill)
        return frames, box

    full, box = read(chosen, 1)
    spatial = jpeg_frames.resize(full, box, clip.image_size)
    if clip.framesets is None:
        return spatial, None
    size = clip.framesets.frame_size
    small = jpeg_frames.resize(full, box, size)
    others = np.setdiff1d(np.arange(clip.num_frames), chosen)
    if others.size:
        branches = [
            lambda ratio=ratio: jpeg_frames.resize(*read(others, ratio), size)
            for ratio in jpeg_frames.RATIOS
        ]
        small = tf.concat([small, tf.switch_case(element["decode_ratio"], branches)], 0)
        small = tf.gather(small, np.argsort(np.concatenate([chosen, others])))  # in time order
    return spatial, small


def _assemble(
    element: dict[str, tf.Tensor], clip: ClipFormat, fill: np.ndarray
) -> dict[str, tf.Tensor]:
    """Raw records of one clip to its inputs: see the module's docstring.

    `fill` is the colour, 0..255, of what is erased or comes from outside.
    """
    images = [x for x in _frames(element, clip, fill) if x is not None]
    images = tf.cond(element["flip"], lambda: [tf.reverse(x, [2]) for x in images], lambda: images)
    colour = {}
    if "ops" in element:
        colour = {key: element[key] for key in ("ops", "op_values")}
        colour["tables"] = randaugment.lookup_tables(images[-1], *colour.values())
    if "erase" in element:
        box = element["erase"]  # in pixels of the last, so that it is the same part of both

        def erased() -> list[tf.Tensor]:
            side = images[-1].shape[1]
            return [jpeg_frames.erase(x, box * (x.shape[1] // side), fill) for x in images]

        images = tf.cond(box[2] > 0, erased, lambda: images)
    inputs = {"spatial": images[0]}
    if clip.framesets is not None:
        inputs["temporal"] = tile_framesets(images[1], clip.framesets.grid)
    return inputs | {key: element[key] for key in ("label", "mask", "example_id")} | colour


def _tf_dataset(
    elements: Any, clip: ClipFormat, data: Any, num_ops: int = 0, erasing: bool = False
) -> tf.data.Dataset:
    """Clips, in order, decoded in parallel; with `num_ops` operations of RandAugment."""
    signature = {
        "records": tf.TensorSpec([clip.num_frames], tf.string),
        "box": tf.TensorSpec([4], tf.int32),
        "decode_ratio": tf.TensorSpec([], tf.int32),
        "flip": tf.TensorSpec([], tf.bool),
        "label": tf.TensorSpec([], tf.int32),
        "mask": tf.TensorSpec([], tf.float32),
        "example_id": tf.TensorSpec([], tf.int64),
    }
    if num_ops:
        signature["ops"] = tf.TensorSpec([num_ops], tf.int32)
        signature["op_values"] = tf.TensorSpec([num_ops], tf.float32)
        signature["matrix"] = tf.TensorSpec([3, 3], tf.float32)
    if erasing:
        signature["erase"] = tf.TensorSpec([4], tf.int32)
    fill = 255 * np.array(data.mean, np.float32)  # becomes 0 when normalised
    clips = tf.data.Dataset.from_generator(elements, output_signature=signature)
    return clips.map(
        lambda element: _assemble(element, clip, fill),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """This host's rows of a global batch."""
    if batch_size % process_count:
        raise ValueError(f"batch size {batch_size} is not divisible by {process_count} hosts")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def train_batches(
    dataset: VideoDataset,
    data: Any,
    seed: int,
    first_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    framesets: bool = True,
) -> Iterator[Batch]:
    """This host's share of the training batches of steps first_step ... num_steps - 1.

    Args:
      dataset: the training split.
      data: `config.data` (batch_size is global, over all hosts).
      seed: of the run.
      first_step: where to begin; beginning later costs nothing and gives the same batches.
      num_steps: length of the run.
      process_index, process_count: which host of how many.
      framesets: see `clip_format`.
    """
    clip = clip_format(data, framesets)
    rows = _rows(data.batch_size, process_index, process_count)
    steps = range(first_step, num_steps)
    mirrored = augment.mirrored_labels(dataset.class_names, data.label_swap) if data.flip else None

    def elements():
        return _train_elements(dataset, clip, data, mirrored, seed, steps, rows)

    clips = _tf_dataset(
        elements, clip, data, data.randaugment_layers, erasing=data.erasing_probability > 0
    )
    batches = clips.batch(rows.stop - rows.start, drop_remainder=True)
    return batches.prefetch(data.prefetch).as_numpy_iterator()


def num_eval_steps(num_examples: int, batch_size: int) -> int:
    """Batches that cover `num_examples` once, the last one padded."""
    return -(-num_examples // batch_size)


def eval_batches(
    dataset: VideoDataset,
    data: Any,
    temporal_views: int,
    spatial_crops: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    framesets: bool = True,
) -> Iterator[Batch]:
    """This host's share of one pass over `dataset`: every video once, then padding of mask 0."""
    clip = clip_format(data, framesets)
    rows = _rows(batch_size, process_index, process_count)

    def elements():
        return _eval_elements(dataset, clip, temporal_views, spatial_crops, batch_size, rows)

    views = _tf_dataset(elements, clip, data).batch(temporal_views * spatial_crops)
    first = {key: lambda x: x[0] for key in ("label", "mask", "example_id")}
    clips = views.map(lambda e: {k: first[k](v) if k in first else v for k, v in e.items()})
    batches = clips.batch(rows.stop - rows.start, drop_remainder=True)
    return batches.prefetch(data.prefetch).as_numpy_iterator()

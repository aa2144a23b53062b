"""tf.data pipeline: stored videos to uint8 batches of spatial frames and framesets.

Public: `train_batches`, `eval_batches`, `num_eval_steps`, `EvalClips`; what is drawn for them:
`TrainingClips`, `eval_samples`.

Python enters once: a generator yields the raw records of one clip with its crop; parsing, decoding
and resizing are TF ops (`clips`). Everything random is drawn by the generator from (seed, epoch,
example).

A batch is a dict of numpy arrays:
  spatial     uint8   [B, S, H, W, 3]     in 0..255, RGB; without framesets all T frames
  temporal    uint8   [B, G, H', W', 3]   likewise; absent without framesets
  label       int32   [B]
  mask        float32 [B]                 0 for padding, else 1
  example_id  int64   [B]                 place in the split's video table; -1 for padding
In evaluation, spatial and temporal have an axis V (views) after B. In training with RandAugment
(N operations), for what `preprocess.augment_color` does to both inputs:
  ops         int32   [B, N]              places in `randaugment_ops.OPS`
  op_values   float32 [B, N]              see `randaugment_ops.value_of`
  tables      uint8   [B, 3, 256]         what becomes of each level of red, green, blue, before ops
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from dualpath_jax.data import augment, frame_sampling, index_sampler, randaugment_ops
from dualpath_jax.data.clip_assembly import (
    build_clip_fn,
    decode_clips,
    find_decode_error,
    make_clip_sample,
)
from dualpath_jax.data.clip_spec import ClipFormat, build_clip_format
from dualpath_jax.data.dataset_metadata import DECODE_ERRORS
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.data.video_dataset import UnreadableVideo, VideoDataset

Batch = dict[str, np.ndarray]


class TrainingClips:
    """Draws training clips: everything random in them is a function of (seed, epoch, example).

    Args:
      dataset: the training split.
      clip: what a clip is.
      data: `config.data`.
      seed: of the run.
      broken: what takes the place of a video that cannot be read.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        clip: ClipFormat,
        data: Any,
        seed: int,
        broken: UnreadableVideos,
    ):
        self._dataset, self._clip, self._data, self._seed = dataset, clip, data, seed
        self._broken = broken
        self._mirrored = (
            augment.mirrored_labels(dataset.class_names, data.label_swap) if data.flip else None
        )

    def samples(self, steps: range, rows: slice) -> Iterator[dict[str, Any]]:
        """What becomes the batches of `steps`, this host's rows of each."""
        for step in steps:
            for _, element in self.samples_of_step(step, rows):
                yield element

    def samples_of_step(self, step: int, rows: slice) -> Iterator[tuple[int, dict[str, Any]]]:
        """(epoch, element) of each clip."""
        examples, epochs = index_sampler.train_indices(
            self._seed, step, self._data.batch_size, len(self._dataset)
        )
        for example, epoch in zip(examples[rows], epochs[rows], strict=True):
            yield int(epoch), self._broken.replace(int(example), int(epoch), self._draw)

    def _draw(self, example: int, epoch: int) -> dict[str, Any]:
        dataset, clip, data = self._dataset, self._clip, self._data
        rng = np.random.default_rng(index_sampler.example_seed(self._seed, epoch, example))
        frames = frame_sampling.sample_frames(
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
        element = make_clip_sample(dataset, clip, example, frames, crop)
        if crop.flip:
            element["label"] = self._mirrored[element["label"]]
        if data.randaugment_layers:
            ops, values = randaugment_ops.draw_ops(
                rng, data.randaugment_layers, data.randaugment_magnitude
            )
            element |= {"ops": ops, "op_values": values}
            element["matrix"] = randaugment_ops.affine_matrix(ops, values)
        if data.erasing_probability:
            side = clip.framesets.frame_size if clip.framesets else clip.image_size
            element["erase"] = augment.random_erasing(side, rng, data.erasing_probability)
        return element


def eval_samples(
    dataset: VideoDataset,
    clip: ClipFormat,
    temporal_views: int,
    spatial_crops: int,
    batch_size: int,
    rows: slice,
) -> Iterator[dict[str, Any]]:
    """What becomes the batches of one pass, this host's rows of each; an element for every view."""
    for step in range(num_eval_steps(len(dataset), batch_size)):
        for place in range(step * batch_size, (step + 1) * batch_size)[rows]:
            real = place < len(dataset)
            example = place if real else 0
            yield from _view_samples(dataset, clip, temporal_views, spatial_crops, example, real)


def _view_samples(
    dataset: VideoDataset,
    clip: ClipFormat,
    temporal_views: int,
    spatial_crops: int,
    example: int,
    real: bool = True,
) -> Iterator[dict[str, Any]]:
    """An element for every view of a video."""
    height, width = int(dataset.heights[example]), int(dataset.widths[example])
    for view in range(temporal_views):
        frames = frame_sampling.sample_frames(
            clip.sampling,
            int(dataset.num_frames[example]),
            clip.num_frames,
            clip.sampling_interval,
            view=view,
            num_views=temporal_views,
        )
        for k in range(spatial_crops):
            crop = augment.eval_crop(height, width, k, spatial_crops)
            yield make_clip_sample(dataset, clip, example, frames, crop, real)


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
    broken: UnreadableVideos | None = None,
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
      broken: notes and replaces videos that cannot be read; a new one by default.

    Raises:
      ValueError: for values that do not go together (at once); more than `data.max_broken_videos`
        videos cannot be read (when it shows).
    """
    clip = build_clip_format(data, framesets)
    rows = _rows(data.batch_size, process_index, process_count)
    broken = broken or UnreadableVideos(dataset.ids, data.max_broken_videos)
    clips = TrainingClips(dataset, clip, data, seed, broken)

    def batches() -> Iterator[Batch]:
        step = first_step
        while step < num_steps:
            problems: list[Exception] = []
            elements = clips.samples(range(step, num_steps), rows)
            stream = decode_clips(elements, clip, data, problems, training=True)
            stream = stream.batch(rows.stop - rows.start, drop_remainder=True)
            try:
                for batch in stream.prefetch(data.prefetch).as_numpy_iterator():
                    yield batch
                    step += 1
            except DECODE_ERRORS:
                if problems:
                    raise problems[0] from None
                # A clip of this step was read and cannot be decoded: without it, from here again.
                found = False
                for epoch, element in clips.samples_of_step(step, rows):
                    if reason := find_decode_error(element, clip, data):
                        broken.note_clip(int(element["example_id"]), epoch, reason)
                        found = True
                if not found:
                    raise

    return batches()


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
    """This host's share of one pass over `dataset`: every video once, then padding of mask 0.

    Raises:
      UnreadableVideo: none is left out, so this ends the pass.
    """
    clip = build_clip_format(data, framesets)
    rows = _rows(batch_size, process_index, process_count)
    views = temporal_views * spatial_crops

    def elements() -> Iterator[dict[str, Any]]:
        return eval_samples(dataset, clip, temporal_views, spatial_crops, batch_size, rows)

    def batches() -> Iterator[Batch]:
        problems: list[Exception] = []
        stream = decode_clips(elements(), clip, data, problems).batch(views)
        stream = stream.batch(rows.stop - rows.start, drop_remainder=True)
        count = 0
        try:
            for batch in stream.prefetch(data.prefetch).as_numpy_iterator():
                yield _merge_views(batch)
                count += 1
        except DECODE_ERRORS:
            if problems:
                raise problems[0] from None
            size = views * (rows.stop - rows.start)
            for element in itertools.islice(elements(), count * size, (count + 1) * size):
                if reason := find_decode_error(element, clip, data):
                    video = dataset.ids[int(element["example_id"])]
                    raise UnreadableVideo(f"video {video!r} cannot be decoded: {reason}") from None
            raise

    return batches()


def _merge_views(batch: Batch) -> Batch:
    """A batch of views: what they have in common, [B, V], becomes the video's, [B]."""
    return batch | {key: batch[key][:, 0] for key in ("label", "mask", "example_id")}


class EvalClips:
    """Makes videos, one by one as they come, into the batches that `eval_batches` has of them.

    Args:
      data: `config.data`.
      temporal_views, spatial_crops: V is their product.
      framesets: see `clip_format`.
    """

    def __init__(self, data: Any, temporal_views: int, spatial_crops: int, framesets: bool = True):
        self._clip = build_clip_format(data, framesets)
        self._views = (temporal_views, spatial_crops)
        self._make = build_clip_fn(self._clip, data)

    def __call__(self, video: VideoDataset) -> Batch:
        """A batch of one: the first video of `video`. Threads may call it at the same time.

        Raises:
          UnreadableVideo: its frames are not there or cannot be decoded.
        """
        try:
            views = [self._make(e) for e in _view_samples(video, self._clip, *self._views, 0)]
        except DECODE_ERRORS as problem:
            raise UnreadableVideo(f"video {video.ids[0]!r} cannot be decoded: {problem}") from None
        batch = {key: np.stack([view[key] for view in views])[None] for key in views[0]}
        return _merge_views(batch)

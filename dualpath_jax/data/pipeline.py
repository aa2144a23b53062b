"""Makes uint8 batches of spatial frames and framesets from stored videos, with tf.data.

Python enters once: a generator yields the raw records of one clip with its crop (`ClipSample`).
Parsing, decoding and resizing are TensorFlow ops (`clip_assembly`). The generator draws everything
random from (seed, epoch, example).

A batch is a dict of numpy arrays:
  spatial     uint8   [B, S, H, W, 3]     in 0..255, RGB; S is T for methods without paths
  temporal    uint8   [B, G, H', W', 3]   in 0..255, RGB: framesets
  label       int32   [B]
  mask        float32 [B]                 0 for padding, else 1
  example_id  int64   [B]                 row in the split's video table; -1 for padding
An input that the model does not take (`ClipInputs`) is neither decoded nor in the batch.
In evaluation, spatial and temporal have an axis V (views) after B. In training with RandAugment
(N operations), a batch also has the arguments of `preprocess.augment_color`:
  ops         int32   [B, N]              indices in `randaugment_ops.OPS`
  op_values   float32 [B, N]              see `randaugment_ops.compute_op_value`
  tables      uint8   [B, 3, 256]         new value of each level of red, green, blue, before ops
"""

import itertools
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from dualpath_jax.data import augment, frame_sampling, index_sampler, randaugment_ops
from dualpath_jax.data.clip_assembly import (
    ClipSample,
    build_clip_fn,
    decode_clips,
    find_decode_error,
    make_clip_sample,
)
from dualpath_jax.data.clip_spec import ClipFormat, ClipInputs, Views, build_clip_format
from dualpath_jax.data.dataset_metadata import DECODE_ERRORS
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.data.video_dataset import UnreadableVideo
from dualpath_jax.data.video_source import VideoSource

Batch = dict[str, np.ndarray]


class TrainingClips:
    """Draws training clips; everything random in them is a function of (seed, epoch, example).

    Args:
      dataset: the training split.
      clip: what a clip is.
      data: `config.data`.
      seed: of the run.
      unreadable: replaces videos that cannot be read.
    """

    def __init__(
        self,
        dataset: VideoSource,
        clip: ClipFormat,
        data: Any,
        seed: int,
        unreadable: UnreadableVideos,
    ):
        self._dataset, self._clip, self._data, self._seed = dataset, clip, data, seed
        self._unreadable = unreadable
        self._mirrored = (
            augment.mirrored_labels(dataset.class_names, data.label_swap) if data.flip else None
        )

    def samples(self, steps: range, rows: slice) -> Iterator[ClipSample]:
        """Yield the samples of the batches of `steps`, this host's rows of each."""
        for step in steps:
            for _, sample in self.samples_of_step(step, rows):
                yield sample

    def samples_of_step(self, step: int, rows: slice) -> Iterator[tuple[int, ClipSample]]:
        """Yield (epoch, sample) of each clip of one step."""
        examples, epochs = index_sampler.train_indices(
            self._seed, step, self._data.batch_size, len(self._dataset)
        )
        for example, epoch in zip(examples[rows], epochs[rows], strict=True):
            yield int(epoch), self._unreadable.make_or_replace(int(example), int(epoch), self._draw)

    def _draw(self, example: int, epoch: int) -> ClipSample:
        """Draw frames, crop and augmentations of an example, and read its records."""
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
        sample = make_clip_sample(dataset, clip, example, frames, crop)
        if crop.flip:
            sample["label"] = self._mirrored[sample["label"]]
        if data.randaugment_layers:
            ops, values = randaugment_ops.draw_ops(
                rng, data.randaugment_layers, data.randaugment_magnitude
            )
            sample |= {"ops": ops, "op_values": values}
            sample["matrix"] = randaugment_ops.affine_matrix(ops, values)
        if data.erasing_probability:
            side = clip.framesets.frame_size if clip.framesets else clip.image_size
            sample["erase"] = augment.random_erasing(side, rng, data.erasing_probability)
        return sample


def eval_samples(
    dataset: VideoSource,
    clip: ClipFormat,
    views: Views,
    batch_size: int,
    rows: slice,
    first_batch: int = 0,
) -> Iterator[ClipSample]:
    """Yield a sample for every view in one pass, of this host's rows of each batch."""
    for step in range(first_batch, _num_eval_steps(len(dataset), batch_size)):
        for row in range(step * batch_size, (step + 1) * batch_size)[rows]:
            real = row < len(dataset)
            example = row if real else 0
            yield from _view_samples(dataset, clip, views, example, real)


def _view_samples(
    dataset: VideoSource,
    clip: ClipFormat,
    views: Views,
    example: int,
    real: bool = True,
) -> Iterator[ClipSample]:
    """Yield a sample for every view of a video."""
    height, width = int(dataset.heights[example]), int(dataset.widths[example])
    for view in range(views.temporal):
        frames = frame_sampling.sample_frames(
            clip.sampling,
            int(dataset.num_frames[example]),
            clip.num_frames,
            clip.sampling_interval,
            view=view,
            num_views=views.temporal,
        )
        for k in range(views.spatial):
            crop = augment.eval_crop(height, width, k, views.spatial)
            yield make_clip_sample(dataset, clip, example, frames, crop, real)


def _host_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Return this host's rows of a global batch."""
    if batch_size % process_count:
        raise ValueError(f"batch size {batch_size} is not divisible by {process_count} hosts")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def train_batches(
    dataset: VideoSource,
    data: Any,
    seed: int,
    first_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    inputs: ClipInputs = ClipInputs.BOTH_PATHS,
    unreadable: UnreadableVideos | None = None,
) -> Generator[Batch]:
    """Return this host's share of the training batches of steps first_step ... num_steps - 1.

    Close the generator if you do not exhaust it.

    Args:
      dataset: the training split.
      data: `config.data` (batch_size is global, over all hosts).
      seed: of the run.
      first_step: the first step; a later start costs nothing and gives the same batches.
      num_steps: length of the run.
      process_index: of this host.
      process_count: number of hosts.
      inputs: what the model takes.
      unreadable: records and replaces videos that cannot be read; a new one by default.

    Raises:
      ValueError: settings do not fit each other (raised at once), or more than
        `data.max_broken_videos` videos cannot be read (raised when that many were found).
    """
    clip = build_clip_format(data, inputs)
    rows = _host_rows(data.batch_size, process_index, process_count)
    unreadable = unreadable or UnreadableVideos(dataset.ids, data.max_broken_videos)
    clips = TrainingClips(dataset, clip, data, seed, unreadable)

    def batches() -> Generator[Batch]:
        step = first_step
        while step < num_steps:
            problems: list[Exception] = []
            samples = clips.samples(range(step, num_steps), rows)
            stream = decode_clips(samples, clip, data, problems, training=True)
            stream = stream.batch(rows.stop - rows.start, drop_remainder=True)
            try:
                for batch in stream.prefetch(data.prefetch).as_numpy_iterator():
                    yield batch
                    step += 1
            except DECODE_ERRORS:
                if problems:
                    raise problems[0] from None
                # A clip of this step cannot be decoded: record it and repeat the step without it.
                recorded = False
                for epoch, sample in clips.samples_of_step(step, rows):
                    if reason := find_decode_error(sample, clip, data):
                        unreadable.record_clip(int(sample["example_id"]), epoch, reason)
                        recorded = True
                if not recorded:
                    raise

    return batches()


def _num_eval_steps(num_examples: int, batch_size: int) -> int:
    """Return how many batches cover `num_examples` once, the last one padded."""
    return -(-num_examples // batch_size)


def eval_batches(
    dataset: VideoSource,
    data: Any,
    views: Views,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    inputs: ClipInputs = ClipInputs.BOTH_PATHS,
    first_batch: int = 0,
) -> Generator[Batch]:
    """Return this host's share of one pass over `dataset`: each video once, then padding (mask 0).

    Close the generator if you do not exhaust it. `first_batch` leaves out the batches before it.

    Raises:
      UnreadableVideo: a video cannot be read. This ends the pass, because no video is left out.
    """
    clip = build_clip_format(data, inputs)
    rows = _host_rows(batch_size, process_index, process_count)

    def samples() -> Iterator[ClipSample]:
        return eval_samples(dataset, clip, views, batch_size, rows, first_batch)

    def batches() -> Generator[Batch]:
        problems: list[Exception] = []
        stream = decode_clips(samples(), clip, data, problems).batch(views.total)
        stream = stream.batch(rows.stop - rows.start, drop_remainder=True)
        count = 0
        try:
            for batch in stream.prefetch(data.prefetch).as_numpy_iterator():
                yield _merge_views(batch)
                count += 1
        except DECODE_ERRORS:
            if problems:
                raise problems[0] from None
            size = views.total * (rows.stop - rows.start)
            for sample in itertools.islice(samples(), count * size, (count + 1) * size):
                if reason := find_decode_error(sample, clip, data):
                    video = dataset.ids[int(sample["example_id"])]
                    raise UnreadableVideo(f"video {video!r} cannot be decoded: {reason}") from None
            raise

    return batches()


def _merge_views(batch: Batch) -> Batch:
    """Reduce label, mask and id of a batch of views, [B, V], to those of the videos, [B]."""
    return batch | {key: batch[key][:, 0] for key in ("label", "mask", "example_id")}


class EvalClips:
    """Makes evaluation batches of single videos, as `eval_batches` makes them of a data set.

    Args:
      data: `config.data`.
      views: clips and crops of each video.
      inputs: what the model takes.
    """

    def __init__(self, data: Any, views: Views, inputs: ClipInputs = ClipInputs.BOTH_PATHS):
        self._clip = build_clip_format(data, inputs)
        self._views = views
        self._make = build_clip_fn(self._clip, data)

    def __call__(self, video: VideoSource) -> Batch:
        """Return a batch of the first video of `video`.

        Several threads may call it at the same time.

        Raises:
          UnreadableVideo: its frames are missing or cannot be decoded.
        """
        try:
            views = [self._make(e) for e in _view_samples(video, self._clip, self._views, 0)]
        except DECODE_ERRORS as problem:
            raise UnreadableVideo(f"video {video.ids[0]!r} cannot be decoded: {problem}") from None
        batch = {key: np.stack([view[key] for view in views])[None] for key in views[0]}
        return _merge_views(batch)

"""Compares the data pipeline's speed with other loaders; measures its stages and memory.

Every loader gets the same clips (the pipeline chooses the videos and frames) and the same cores,
those that this process may use. The command lines are scripts/benchmark_pipeline.py and
scripts/benchmark_memory.py.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import numpy as np
import psutil
import tensorflow as tf

from dualpath_jax.data import frame_ops, pipeline, video_dataset
from dualpath_jax.data.clip_assembly import compose_inputs, fill_color, parallel_map
from dualpath_jax.data.clip_spec import ClipFormat, Views, build_clip_format
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import shard_writer
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset
from dualpath_jax.data.preparation.video_decoder import IGNORE_TAG_ERRORS
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.runtime.cpu_count import CAN_CHOOSE_CORES, num_cores

# Row of the video table, frames int64 [T], and the other fields of `make_clip_sample`.
Clip = tuple[int, np.ndarray, dict[str, tf.Tensor]]


def prepare_files(paths: Sequence[str], out: str) -> video_dataset.VideoDataset:
    """Prepare video files as a data set of one class; a video's id is its absolute path."""
    paths = [os.path.abspath(path) for path in paths]
    listing = DatasetIndex(["any"], {"train": [Video(path, path, 0) for path in paths]})
    with contextlib.redirect_stdout(sys.stderr):
        options = PrepareOptions(num_workers=num_cores(), progress=False)
        prepare_dataset(listing, os.sep, out, options)
    return video_dataset.VideoDataset(out, "train")


class RepeatedVideos:
    """Repeats the videos of `dataset` up to `length` videos, with the interface of a data set."""

    def __init__(self, dataset: video_dataset.VideoDataset, length: int):
        rows = np.arange(length) % len(dataset)
        self._dataset, self._rows = dataset, rows
        self.class_names = dataset.class_names
        self.ids = [dataset.ids[row] for row in rows]
        self.labels, self.num_frames = dataset.labels[rows], dataset.num_frames[rows]
        self.heights, self.widths = dataset.heights[rows], dataset.widths[rows]
        self.last_frames = np.zeros(0, np.int64)  # the frames of the last read

    def __len__(self) -> int:
        return len(self._rows)

    def read_frames(self, video_index: int, frame_indices: np.ndarray) -> list[bytes]:
        """Read frames, see `VideoDataset.read_frames`, and note them in `last_frames`."""
        self.last_frames = np.array(frame_indices)
        return self._dataset.read_frames(self._rows[video_index], frame_indices)


# ---------------------------------------------------------------- loaders
# A loader yields the number of clips of each batch that it has loaded.


def load_ours(
    videos: RepeatedVideos, data_config: Any, training: bool, clips: Sequence[Clip]
) -> Iterator[int]:
    """Load with this package's pipeline; testing takes one centered view of each video."""
    del clips  # the pipeline chooses them
    if training:
        steps = len(videos) // data_config.batch_size
        batches = pipeline.train_batches(videos, data_config, 0, 0, steps)
    else:
        batches = pipeline.eval_batches(videos, data_config, Views(1, 1), data_config.batch_size)
    for batch in batches:
        yield len(batch["label"])


def load_decord(
    videos: RepeatedVideos, data_config: Any, training: bool, clips: Sequence[Clip]
) -> Iterator[int]:
    """Decode the video of each clip with decord or decord2, one clip per core at a time."""
    return _load_online(decode_decord, videos, data_config, training, clips)


def load_torchcodec(
    videos: RepeatedVideos, data_config: Any, training: bool, clips: Sequence[Clip]
) -> Iterator[int]:
    """Decode the video of each clip with torchcodec, one clip per core at a time."""
    return _load_online(decode_torchcodec, videos, data_config, training, clips)


def load_pyav(
    videos: RepeatedVideos, data_config: Any, training: bool, clips: Sequence[Clip]
) -> Iterator[int]:
    """Decode the video of each clip with PyAV, one clip per core at a time."""
    return _load_online(decode_pyav, videos, data_config, training, clips)


def load_jpeg(
    videos: RepeatedVideos, data_config: Any, training: bool, clips: Sequence[Clip]
) -> Iterator[int]:
    """Decode the clips' stored JPEGs fully, from memory, and discard them: the speed limit.

    Spatial frames are decoded twice, as the pipeline does: for the spatial path and for a cell.
    """
    del training
    spatial, jpegs = build_clip_format(data_config).spatial_frames, []
    for video, frames, _ in clips:
        records = videos.read_frames(video, frames)
        stored = tf.io.parse_example(records, video_dataset.FRAME_FEATURES)["image"].numpy()
        jpegs.append(np.concatenate([stored, stored[spatial]]))

    def decode(clip):
        images = [
            tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")
            for jpeg in tf.unstack(clip, len(jpegs[0]))
        ]
        return tf.add_n([tf.shape(image)[0] for image in images])  # forces all to be decoded

    decoded = tf.data.Dataset.from_tensor_slices(np.stack(jpegs))
    for batch in (
        parallel_map(decoded, decode).batch(data_config.batch_size).prefetch(data_config.prefetch)
    ):
        yield len(batch)


LOADERS: dict[str, Callable[..., Iterator[int]]] = {
    "ours": load_ours,
    "decord": load_decord,
    "decord2": load_decord,
    "torchcodec": load_torchcodec,
    "PyAV": load_pyav,
    "JPEG": load_jpeg,
}


def find_missing_readers() -> dict[str, str]:
    """Return the loaders that cannot run here, each with the reason."""
    names = ("decord", "decord2", "torchcodec")
    installed = [name for name in names if any(importlib.metadata.distributions(name=name))]
    problems = {name: "is not installed" for name in names if name not in installed}
    if "decord" in installed and "decord2" in installed:
        problems["decord"] = "has the same module as decord2, which is installed as well"
    if "torchcodec" in installed and "torchcodec.decoders" not in sys.modules:
        problems["torchcodec"] = "needs FFmpeg's libraries, and to be imported before TensorFlow"
    return problems


def decode_decord(path: str, frames: np.ndarray) -> np.ndarray:
    """Decode frames [T] of a video with decord or decord2, which seek, as uint8 [T, H, W, 3]."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return reader.get_batch(np.minimum(frames, len(reader) - 1)).asnumpy()


def decode_torchcodec(path: str, frames: np.ndarray) -> np.ndarray:
    """Decode frames [T] of a video with torchcodec, which seeks, as uint8 [T, H, W, 3]."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    return decoder.get_frames_at(np.minimum(frames, len(decoder) - 1).tolist()).data.numpy()


def decode_pyav(path: str, frames: np.ndarray) -> np.ndarray:
    """Decode frames [T] of a video with PyAV as uint8 [T, H, W, 3].

    Decoding begins at the key frame before the first frame. Frames are identified by their time
    stamps, which assumes a constant frame rate.
    """
    wanted, decoded = set(frames.tolist()), {}
    with av.open(path, **IGNORE_TAG_ERRORS) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"  # the cores are busy with other clips
        ticks = 1 / (stream.average_rate * stream.time_base)  # per frame
        start = stream.start_time or 0
        container.seek(start + round(int(frames.min()) * ticks), stream=stream)
        for frame in container.decode(stream):
            index = round(((frame.pts or 0) - start) / ticks)
            if index in wanted:
                decoded[index] = frame.to_ndarray(format="rgb24")
            if index >= frames.max():
                break
    nearest = {i: min(decoded, key=lambda j, i=i: abs(i - j)) for i in wanted}
    return np.stack([decoded[nearest[i]] for i in frames.tolist()])


def make_transform(clip: ClipFormat, data_config: Any) -> Callable[..., dict[str, tf.Tensor]]:
    """Return a function (frames uint8 [T, H, W, 3], sample) -> the clip's model inputs.

    It applies the crops and augmentation of the pipeline; `clip` is of both paths. The sample has
    the fields of `make_clip_sample` without records.
    """
    fill = fill_color(data_config)

    @tf.function(reduce_retracing=True)
    def transform(frames, sample):
        top, left, height, width = tf.unstack(sample["box"])
        frames = frames[:, top : top + height, left : left + width]

        def resize_frames(indices, size):
            images = tf.ensure_shape(tf.gather(frames, indices), [len(indices), None, None, 3])
            return frame_ops.resize(images, size)

        spatial = resize_frames(clip.spatial_frames, clip.image_size)
        cells = resize_frames(range(clip.num_frames), clip.framesets.frame_size)
        return compose_inputs(spatial, cells, sample, clip, fill)

    return transform


def _load_online(
    decode: Callable[[str, np.ndarray], np.ndarray],
    videos: RepeatedVideos,
    data_config: Any,
    training: bool,
    clips: Sequence[Clip],
) -> Iterator[int]:
    """Decode and transform the clips in threads, one per core; yield the size of each batch."""
    del training  # the clips already belong to training or testing
    transform = make_transform(build_clip_format(data_config), data_config)

    def load_clip(number: int) -> dict[str, np.ndarray]:
        video, frames, sample = clips[number]
        images = decode(videos.ids[video], frames)
        stored = [videos.heights[video], videos.widths[video]] * 2
        scale = np.tile(images.shape[1:3], 2) / stored  # the box refers to the stored frames
        box = tf.cast(tf.round(tf.cast(sample["box"], tf.float64) * scale), tf.int32)
        inputs = transform(images, sample | {"box": box})
        return {key: value.numpy() for key, value in inputs.items()}

    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
        results = pool.map(load_clip, range(len(clips)))
        for _ in range(len(clips) // data_config.batch_size):
            loaded = [next(results) for _ in range(data_config.batch_size)]
            batch = {key: np.stack([clip[key] for clip in loaded]) for key in loaded[0]}
            yield len(batch["label"])


# ---------------------------------------------------------------- comparisons


def _measure_speed(batches: Iterator[int]) -> tuple[float, float]:
    """Return (clips per second, CPU milliseconds per clip) of all batches after the first."""
    next(batches)  # starts threads and traces functions
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return count / wall, 1e3 * cpu / count


def _compare_speeds(runs: dict[str, Callable[[], Iterator[int]]], rounds: int) -> dict[str, Any]:
    """Time `runs` in alternating order; see the result of `compare_loaders`.

    The ratios compare the first of `runs` with each other one.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            speed, cost = _measure_speed(runs[name]())
            speeds[name].append(speed)
            costs[name].append(cost)
    first, *others = runs

    def ratio(values: dict[str, list[float]], power: int) -> dict[str, float]:
        pairs = {name: zip(values[first], values[name], strict=True) for name in others}
        return {name: statistics.median((a / b) ** power for a, b in pairs[name]) for name in pairs}

    return {
        "clips_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "cpu_ms_per_clip": {name: statistics.median(values) for name, values in costs.items()},
        "ratios": ratio(speeds, 1),
        "cpu_ratios": ratio(costs, -1),
        "rounds": speeds,
    }


def _record_clips(
    dataset: video_dataset.VideoDataset, data_config: Any, training: bool, length: int
) -> list[Clip]:
    """Return the clips that the pipeline chooses; this also loads the files into memory."""
    videos, clip = RepeatedVideos(dataset, length), build_clip_format(data_config)
    rows = slice(0, data_config.batch_size)
    if training:
        unreadable = UnreadableVideos(videos.ids, 0)
        training_clips = pipeline.TrainingClips(videos, clip, data_config, 0, unreadable)
        samples = training_clips.samples(range(length // data_config.batch_size), rows)
    else:
        samples = pipeline.eval_samples(videos, clip, Views(1, 1), data_config.batch_size, rows)
    clips = []
    for sample in samples:
        drawn = {k: tf.convert_to_tensor(v) for k, v in sample.items() if k != "records"}
        clips.append((int(sample["example_id"]), videos.last_frames, drawn))
    return clips


def compare_loaders(
    dataset: video_dataset.VideoDataset,
    data_config: Any,
    training: bool,
    num_batches: int,
    rounds: int,
    loaders: Sequence[str] = tuple(LOADERS),
) -> dict[str, Any]:
    """Measure clips per second of the pipeline and of other loaders on the same clips.

    Args:
      dataset: from `prepare_files`.
      data_config: `config.data`.
      training: training clips, or one centered view of each video.
      num_batches: at least 2; the first is not timed.
      rounds: number of measurements of each loader, in alternating order.
      loaders: names in `LOADERS`, "ours" first.

    Returns:
      {"clips_per_second", "cpu_ms_per_clip": the median of each loader; "ratios": ratio of our
      clips per second to each other loader's, the median over rounds; "cpu_ratios": the same by
      CPU time, which other programs on the machine disturb less; "rounds": clips per second of
      each loader in each round}.
    """
    length = num_batches * data_config.batch_size
    clips = _record_clips(dataset, data_config, training, length)
    runs = {
        name: lambda load=LOADERS[name]: load(
            RepeatedVideos(dataset, length), data_config, training, clips
        )
        for name in loaders
    }
    return _compare_speeds(runs, rounds)


def compare_video_lengths(
    dataset: video_dataset.VideoDataset,
    data_config: Any,
    lengths: Sequence[int],
    num_batches: int,
    rounds: int,
) -> dict[str, Any]:
    """Compare the pipeline's speed on the same videos, cut or looped to each of `lengths` frames.

    Returns:
      As `compare_loaders`, by length; the ratios compare the first length with each other one.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for length in lengths:
            cut = _write_cut_videos(dataset, os.path.join(folder, str(length)), length)
            videos = RepeatedVideos(cut, num_batches * data_config.batch_size)
            runs[str(length)] = lambda videos=videos: load_ours(videos, data_config, True, [])
        return _compare_speeds(runs, rounds)


def _write_cut_videos(
    dataset: video_dataset.VideoDataset, out: str, length: int
) -> video_dataset.VideoDataset:
    """Write a data set of the same stored frames with `length` frames in every video."""
    os.makedirs(os.path.join(out, "frames"))
    writer = shard_writer.ShardWriter(video_dataset.frame_shard_path(out, "train", 0, 1))
    rows = []
    for video, count in enumerate(dataset.num_frames):
        for record in dataset.read_frames(video, np.arange(length) % count):
            writer.write(record)
        rows.append(
            shard_writer.VideoRow(
                id=dataset.ids[video],
                label=int(dataset.labels[video]),
                first_frame=video * length,
                num_frames=length,
                fps=float(dataset.fps[video]),
                height=int(dataset.heights[video]),
                width=int(dataset.widths[video]),
                truncated=False,
            )
        )
    writer.commit()
    frames = {"train": [writer.describe()]}
    names, frame_format = dataset.class_names, dataset.frame_format
    shard_writer.write_tables(out, names, {"train": rows}, frames, frame_format)
    return video_dataset.VideoDataset(out, "train")


# ---------------------------------------------------------------- stages

# TensorFlow's name of an operation -> stage; all other operations are "flip, tile, erase".
_OP_STAGES = {
    "PyFunc": "read",  # the generator: order, choice of frames, crop, records
    "ParseExampleV2": "read",
    "DecodeAndCropJpeg": "decode, crop",
    "DecodeJpeg": "decode, crop",
    "DecodeImage": "decode, crop",
    "ResizeBilinear": "resize",
    "ResizeArea": "resize",
    "Cast": "resize",
    "Round": "resize",
    "ExecuteAsyncOnStream": "warp",  # compiled by XLA
}
STAGES = ("read", "decode, crop", "resize", "warp", "flip, tile, erase", "batch and the rest")


def stage_costs(
    prepared: str, data_config: Any, training: bool, num_batches: int
) -> dict[str, float]:
    """Measure CPU milliseconds per clip of each of `STAGES`, on one core, without overlap.

    TensorFlow's profiler reports the duration of each operation of the running pipeline. The last
    stage is the rest of the CPU time that a clip takes without the profiler. The measurement runs
    in a new process.

    Args:
      prepared: folder of `prepare_files`.
      data_config: `config.data`.
      training: training clips, or one centered view of each video.
      num_batches: at least 2; the first is not timed.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_use_one_core) as pool:
        return pool.submit(_stage_costs, prepared, data_config, training, num_batches).result()


def _use_one_core() -> None:
    """Restrict this process to one core, where the system allows it."""
    if CAN_CHOOSE_CORES:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _stage_costs(
    prepared: str, data_config: Any, training: bool, num_batches: int
) -> dict[str, float]:
    """Implement `stage_costs` in the process that it starts."""
    from jax.profiler import ProfileData

    videos = RepeatedVideos(
        video_dataset.VideoDataset(prepared, "train"), num_batches * data_config.batch_size
    )
    total = _measure_speed(load_ours(videos, data_config, training, []))[1]
    costs = dict.fromkeys(STAGES, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        options = tf.profiler.experimental.ProfilerOptions(python_tracer_level=0)
        tf.profiler.experimental.start(folder, options)
        wall, cpu = time.perf_counter(), time.process_time()
        count = sum(load_ours(videos, data_config, training, []))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        tf.profiler.experimental.stop()
        trace = next(pathlib.Path(folder).rglob("*.xplane.pb")).read_bytes()
    for plane in ProfileData.from_serialized_xspace(trace).planes:
        for line in plane.lines:
            for event in line.events:
                if stage := _find_stage(event.name):
                    costs[stage] += event.duration_ns / 1e6 / count
    # Other programs on the core lengthen all operations: scale them to our share of the time.
    costs = {stage: cost * cpu / wall for stage, cost in costs.items()}
    costs["batch and the rest"] = max(0.0, total - sum(costs.values()))
    return costs


def _find_stage(event: str) -> str | None:
    """Return the stage of a profiler event, or None if it is not an operation of a stage."""
    operation = event.split("#")[0].split(":")[-1]  # "map/Cast:Cast#...#" is one run of a Cast
    if operation in _OP_STAGES:
        return _OP_STAGES[operation]
    # The generator's own operations are part of its PyFunc, and the iterator contains everything.
    if operation in ("IteratorGetNext", "MakeIterator", "RandomIndexShuffle"):
        return None
    if "Dataset" in operation or not hasattr(tf.raw_ops, operation):
        return None
    return "flip, tile, erase"


# ---------------------------------------------------------------- memory


def sample_memory(
    dataset: video_dataset.VideoDataset,
    data_config: Any,
    training: bool,
    minutes: float,
    interval: float,
    report: Callable[[float, float, int], None] = lambda minutes, mib, clips: None,
) -> list[tuple[float, float, int]]:
    """Read `dataset` in a loop and sample the resident memory of this process.

    Args:
      dataset: a small data set.
      data_config: `config.data`.
      training: read endless training batches; otherwise repeat passes, as in testing.
      minutes: duration.
      interval: seconds between samples.
      report: receives each sample.

    Returns:
      Samples (minutes since the start, MiB, clips read so far).
    """
    process, samples, clips = psutil.Process(), [], 0
    start, due = time.monotonic(), interval
    for batch in _endless_batches(dataset, data_config, training):
        clips += int(batch["mask"].sum())
        now = time.monotonic() - start
        if now >= due:
            due = now + interval
            samples.append((now / 60, process.memory_info().rss / 2**20, clips))
            report(*samples[-1])
        if now >= 60 * minutes:
            break
    return samples


def _endless_batches(
    dataset: video_dataset.VideoDataset, data_config: Any, training: bool
) -> Iterator[pipeline.Batch]:
    """Yield training or test batches without end."""
    if training:
        yield from pipeline.train_batches(dataset, data_config, 0, 0, sys.maxsize)
    while True:
        yield from pipeline.eval_batches(dataset, data_config, Views(1, 1), data_config.batch_size)


def memory_deviation(
    samples: Sequence[tuple[float, float, int]], after: float
) -> tuple[float, float]:
    """Return the median MiB of samples and the largest deviation from it as a fraction.

    Args:
      samples: from `sample_memory`.
      after: ignore samples of the first `after` minutes.

    Raises:
      ValueError: no sample is left.
    """
    values = [mib for minutes, mib, _ in samples if minutes >= after]
    if not values:
        raise ValueError(f"there is no sample later than {after:g} minutes: run longer")
    median = statistics.median(values)
    return median, max(abs(value / median - 1) for value in values)

"""How fast the data pipeline is beside what others do, where its time goes, how much memory it has.

Public: `prepare_files`, `compare_loaders`, `compare_video_lengths`, `stage_costs`, `sample_memory`, `memory_deviation`,
`LOADERS`, `Videos`; the command lines are scripts/benchmark_pipeline.py and benchmark_memory.py.

Every loader gets the same clips (which frames of which video, as the pipeline chose them) and the
same cores: those that this process may run on.
"""

import concurrent.futures
import contextlib
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

from dualpath_jax.data import frame_ops, frame_sampling, pipeline, video_dataset
from dualpath_jax.data.clip_assembly import compose_inputs, fill_color, parallel_map
from dualpath_jax.data.clip_spec import ClipFormat, build_clip_format
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import shard_writer
from dualpath_jax.data.preparation.prepare import prepare_dataset
from dualpath_jax.data.preparation.video_decoder import ANY_TAGS
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.runtime.cpu_count import CAN_CHOOSE_CORES, num_cores

# Row of the video table, frames int64 [T], and what was drawn (`clips.make_element`, no records).
Clip = tuple[int, np.ndarray, dict[str, tf.Tensor]]


def prepare_files(paths: Sequence[str], out: str) -> video_dataset.VideoDataset:
    """Video files as a prepared data set of one class; the id of a video is its absolute path."""
    paths = [os.path.abspath(path) for path in paths]
    listing = DatasetIndex(["any"], {"train": [Video(path, path, 0) for path in paths]})
    with contextlib.redirect_stdout(sys.stderr):
        prepare_dataset(listing, os.sep, out, num_workers=num_cores(), progress=False)
    return video_dataset.VideoDataset(out, "train")


class Videos:
    """`dataset` repeated to `length` videos."""

    def __init__(self, dataset: video_dataset.VideoDataset, length: int):
        rows = np.arange(length) % len(dataset)
        self._dataset, self._rows = dataset, rows
        self.class_names = dataset.class_names
        self.ids = [dataset.ids[row] for row in rows]
        self.labels, self.num_frames = dataset.labels[rows], dataset.num_frames[rows]
        self.heights, self.widths = dataset.heights[rows], dataset.widths[rows]
        self.last_frames = np.zeros(0, np.int64)  # that were read

    def __len__(self) -> int:
        return len(self._rows)

    def read_frames(self, video_index: int, frame_indices: np.ndarray) -> list[bytes]:
        """See `records.VideoDataset.read_frames`."""
        self.last_frames = np.array(frame_indices)
        return self._dataset.read_frames(self._rows[video_index], frame_indices)


# ---------------------------------------------------------------- loaders
# A loader yields the number of clips in each batch that it has made.


def load_ours(videos: Videos, data: Any, training: bool, clips: Sequence[Clip]) -> Iterator[int]:
    """The pipeline itself; testing takes one centred view of each video."""
    del clips  # it chooses them
    if training:
        steps = len(videos) // data.batch_size
        batches = pipeline.train_batches(videos, data, 0, 0, steps)
    else:
        batches = pipeline.eval_batches(videos, data, 1, 1, data.batch_size)
    for batch in batches:
        yield len(batch["label"])


def load_decord(videos: Videos, data: Any, training: bool, clips: Sequence[Clip]) -> Iterator[int]:
    """Videos decoded for each clip by decord, one clip per core at a time."""
    return _load_online(decode_decord, videos, data, training, clips)


def load_pyav(videos: Videos, data: Any, training: bool, clips: Sequence[Clip]) -> Iterator[int]:
    """Videos decoded for each clip by PyAV, one clip per core at a time."""
    return _load_online(decode_pyav, videos, data, training, clips)


def load_jpeg(videos: Videos, data: Any, training: bool, clips: Sequence[Clip]) -> Iterator[int]:
    """The limit: the stored JPEGs of the clips decoded whole, from memory, and thrown away."""
    del training
    raw = [videos.read_frames(video, frames) for video, frames, _ in clips]
    jpegs = [
        tf.io.parse_example(clip, video_dataset.FRAME_FEATURES)["image"].numpy() for clip in raw
    ]

    def decode(clip):
        images = [
            tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")
            for jpeg in tf.unstack(clip, data.num_frames)
        ]
        return tf.add_n([tf.shape(image)[0] for image in images])  # so that all are decoded

    decoded = tf.data.Dataset.from_tensor_slices(np.stack(jpegs))
    for batch in parallel_map(decoded, decode).batch(data.batch_size).prefetch(data.prefetch):
        yield len(batch)


LOADERS: dict[str, Callable[..., Iterator[int]]] = {
    "ours": load_ours,
    "decord": load_decord,
    "PyAV": load_pyav,
    "JPEG": load_jpeg,
}


def decode_decord(path: str, frames: np.ndarray) -> np.ndarray:
    """Frames [T] of a video as uint8 [T, H, W, 3]: decord seeks, decodes and picks."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return reader.get_batch(np.minimum(frames, len(reader) - 1)).asnumpy()


def decode_pyav(path: str, frames: np.ndarray) -> np.ndarray:
    """Frames [T] of a video as uint8 [T, H, W, 3]: from the key frame before the first to the last.

    Frames are told by their time stamps, as if the frame rate were constant.
    """
    wanted, found = set(frames.tolist()), {}
    with av.open(path, **ANY_TAGS) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"  # the cores are busy with other clips
        ticks = 1 / (stream.average_rate * stream.time_base)  # per frame
        start = stream.start_time or 0
        container.seek(start + round(int(frames.min()) * ticks), stream=stream)
        for frame in container.decode(stream):
            index = round(((frame.pts or 0) - start) / ticks)
            if index in wanted:
                found[index] = frame.to_ndarray(format="rgb24")
            if index >= frames.max():
                break
    near = {i: min(found, key=lambda j, i=i: abs(i - j)) for i in wanted}
    return np.stack([found[near[i]] for i in frames.tolist()])


def make_transform(clip: ClipFormat, data: Any) -> Callable[..., dict[str, tf.Tensor]]:
    """(frames uint8 [T, H, W, 3], element) -> what the pipeline makes of such a clip.

    The element is one of `clips.make_element`, without records.
    """
    chosen = frame_sampling.spatial_subset(clip.num_frames, clip.num_spatial_frames)
    rest = np.setdiff1d(np.arange(clip.num_frames), chosen)
    fill = fill_color(data)

    @tf.function(reduce_retracing=True)
    def transform(frames, element):
        top, left, height, width = tf.unstack(element["box"])
        frames = frames[:, top : top + height, left : left + width]

        def scaled(indices, size):
            images = tf.ensure_shape(tf.gather(frames, indices), [len(indices), None, None, 3])
            return frame_ops.resize(images, size)

        others = scaled(rest, clip.framesets.frame_size) if clip.framesets else None
        return compose_inputs(scaled(chosen, clip.image_size), others, element, clip, fill)

    return transform


def _load_online(
    decode: Callable[[str, np.ndarray], np.ndarray],
    videos: Videos,
    data: Any,
    training: bool,
    clips: Sequence[Clip],
) -> Iterator[int]:
    del training  # the clips know
    transform = make_transform(build_clip_format(data), data)

    def load(number: int) -> dict[str, np.ndarray]:
        video, frames, element = clips[number]
        images = decode(videos.ids[video], frames)
        stored = [videos.heights[video], videos.widths[video]] * 2
        scale = np.tile(images.shape[1:3], 2) / stored  # the box is one of the stored frames
        box = tf.cast(tf.round(tf.cast(element["box"], tf.float64) * scale), tf.int32)
        inputs = transform(images, element | {"box": box})
        return {key: value.numpy() for key, value in inputs.items()}

    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
        made = pool.map(load, range(len(clips)))
        for _ in range(len(clips) // data.batch_size):
            loaded = [next(made) for _ in range(data.batch_size)]
            batch = {key: np.stack([clip[key] for clip in loaded]) for key in loaded[0]}
            yield len(batch["spatial"])


# ---------------------------------------------------------------- comparisons


def _time(batches: Iterator[int]) -> tuple[float, float]:
    """(clips per second, CPU milliseconds per clip) of all batches after the first."""
    next(batches)  # starts threads and traces functions
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return count / wall, 1e3 * cpu / count


def _take_turns(runs: dict[str, Callable[[], Iterator[int]]], rounds: int) -> dict[str, Any]:
    """Times `runs` in alternating order; medians, and the ratios of the first."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            speed, cost = _time(runs[name]())
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


def _record(
    dataset: video_dataset.VideoDataset, data: Any, training: bool, length: int
) -> list[Clip]:
    """The clips that the pipeline chooses; reading them also brings the files into memory."""
    videos, clip = Videos(dataset, length), build_clip_format(data)
    rows = slice(0, data.batch_size)
    if training:
        broken = UnreadableVideos(videos.ids, 0)
        training_clips = pipeline.TrainingClips(videos, clip, data, 0, broken)
        elements = training_clips.samples(range(length // data.batch_size), rows)
    else:
        elements = pipeline.eval_samples(videos, clip, 1, 1, data.batch_size, rows)
    clips = []
    for element in elements:
        drawn = {k: tf.convert_to_tensor(v) for k, v in element.items() if k != "records"}
        clips.append((int(element["example_id"]), videos.last_frames, drawn))
    return clips


def compare_loaders(
    dataset: video_dataset.VideoDataset,
    data: Any,
    training: bool,
    num_batches: int,
    rounds: int,
    loaders: Sequence[str] = tuple(LOADERS),
) -> dict[str, Any]:
    """Clips per second of the pipeline and of other loaders on the same clips.

    Args:
      dataset: from `prepare_files`.
      data: `config.data`.
      training: training clips, or one centred view of each video.
      num_batches: at least 2; the first is not timed.
      rounds: how often each loader is timed, in alternating order.
      loaders: names in `LOADERS`, "ours" first.

    Returns:
      {"clips_per_second", "cpu_ms_per_clip": median of each loader; "ratios": clips per second of
      ours to those of each other, the median of the rounds' ratios; "cpu_ratios": the same by CPU
      time, which other programs on the machine disturb less; "rounds": clips per second of each}.
    """
    length = num_batches * data.batch_size
    clips = _record(dataset, data, training, length)
    runs = {
        name: lambda load=LOADERS[name]: load(Videos(dataset, length), data, training, clips)
        for name in loaders
    }
    return _take_turns(runs, rounds)


def compare_video_lengths(
    dataset: video_dataset.VideoDataset,
    data: Any,
    lengths: Sequence[int],
    num_batches: int,
    rounds: int,
) -> dict[str, Any]:
    """The pipeline on the same videos cut (or looped) to each of `lengths` frames; see `compare_loaders`.

    Ratios are of the first length to each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for length in lengths:
            cut = _write_cut(dataset, os.path.join(folder, str(length)), length)
            videos = Videos(cut, num_batches * data.batch_size)
            runs[str(length)] = lambda videos=videos: load_ours(videos, data, True, [])
        return _take_turns(runs, rounds)


def _write_cut(
    dataset: video_dataset.VideoDataset, out: str, length: int
) -> video_dataset.VideoDataset:
    """A data set of the same stored frames with `length` of them in every video."""
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
    lengths = {"train": [len(rows) * length]}
    names, frame_format = dataset.class_names, dataset.frame_format
    shard_writer.write_tables(out, names, {"train": rows}, lengths, frame_format)
    return video_dataset.VideoDataset(out, "train")


# ---------------------------------------------------------------- stages

_OPS = {  # TensorFlow's name of an operation -> stage; others are "flip, tile, erase"
    "PyFunc": "read",  # the generator: order, choice of frames, crop, records
    "ParseExampleV2": "read",
    "DecodeAndCropJpeg": "decode, crop",
    "DecodeJpeg": "decode, crop",
    "DecodeImage": "decode, crop",
    "ResizeBilinear": "resize",
    "ResizeArea": "resize",
    "Cast": "resize",
    "Round": "resize",
    "ExecuteAsyncOnStream": "warp",  # what XLA has compiled
}
STAGES = ("read", "decode, crop", "resize", "warp", "flip, tile, erase", "batch and the rest")


def stage_costs(prepared: str, data: Any, training: bool, num_batches: int) -> dict[str, float]:
    """CPU milliseconds per clip of each of `STAGES`, on one core, without overlap.

    TensorFlow's profiler says how long each operation of the running pipeline takes. The last stage
    is what remains of the CPU time that a clip costs without the profiler. Runs in a process of its
    own.

    Args:
      prepared: folder of `prepare_files`.
      data, training, num_batches: as in `compare_loaders`.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_use_one_core) as pool:
        return pool.submit(_stage_costs, prepared, data, training, num_batches).result()


def _use_one_core() -> None:
    if CAN_CHOOSE_CORES:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _stage_costs(prepared: str, data: Any, training: bool, num_batches: int) -> dict[str, float]:
    from jax.profiler import ProfileData

    videos = Videos(video_dataset.VideoDataset(prepared, "train"), num_batches * data.batch_size)
    total = _time(load_ours(videos, data, training, []))[1]
    costs = dict.fromkeys(STAGES, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        options = tf.profiler.experimental.ProfilerOptions(python_tracer_level=0)
        tf.profiler.experimental.start(folder, options)
        wall, cpu = time.perf_counter(), time.process_time()
        count = sum(load_ours(videos, data, training, []))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        tf.profiler.experimental.stop()
        trace = next(pathlib.Path(folder).rglob("*.xplane.pb")).read_bytes()
    for plane in ProfileData.from_serialized_xspace(trace).planes:
        for line in plane.lines:
            for event in line.events:
                if stage := _stage_of(event.name):
                    costs[stage] += event.duration_ns / 1e6 / count
    # Other programs on the core lengthen every operation alike: give them their part of CPU time.
    costs = {stage: cost * cpu / wall for stage, cost in costs.items()}
    costs["batch and the rest"] = max(0.0, total - sum(costs.values()))
    return costs


def _stage_of(event: str) -> str | None:
    operation = event.split("#")[0].split(":")[-1]  # "map/Cast:Cast#...#" is one run of a Cast
    if operation in _OPS:
        return _OPS[operation]
    # What the generator does in Python is inside its PyFunc, and the iterator is round everything.
    if operation in ("IteratorGetNext", "MakeIterator", "RandomIndexShuffle"):
        return None
    if "Dataset" in operation or not hasattr(tf.raw_ops, operation):  # or no operation
        return None
    return "flip, tile, erase"


# ---------------------------------------------------------------- memory


def sample_memory(
    dataset: video_dataset.VideoDataset,
    data: Any,
    training: bool,
    minutes: float,
    interval: float,
    report: Callable[[float, float, int], None] = lambda minutes, mib, clips: None,
) -> list[tuple[float, float, int]]:
    """Reads `dataset` in a loop and samples the resident memory of this process.

    Args:
      dataset: a small one.
      data: `config.data`.
      training: training batches without end; or pass after pass, as in testing.
      minutes: how long.
      interval: seconds between samples.
      report: told each sample.

    Returns:
      Samples (minutes since the start, MiB, clips read so far).
    """
    process, samples, clips = psutil.Process(), [], 0
    start, due = time.monotonic(), interval
    for batch in _endless(dataset, data, training):
        clips += int(batch["mask"].sum())
        now = time.monotonic() - start
        if now >= due:
            due = now + interval
            samples.append((now / 60, process.memory_info().rss / 2**20, clips))
            report(*samples[-1])
        if now >= 60 * minutes:
            break
    return samples


def _endless(
    dataset: video_dataset.VideoDataset, data: Any, training: bool
) -> Iterator[pipeline.Batch]:
    if training:
        yield from pipeline.train_batches(dataset, data, 0, 0, sys.maxsize)
    while True:
        yield from pipeline.eval_batches(dataset, data, 1, 1, data.batch_size)


def memory_deviation(
    samples: Sequence[tuple[float, float, int]], after: float
) -> tuple[float, float]:
    """Median MiB of the samples after `after` minutes, and the largest deviation as a fraction."""
    values = [mib for minutes, mib, _ in samples if minutes >= after]
    if not values:
        raise ValueError(f"no sample later than {after:g} minutes: run longer")
    median = statistics.median(values)
    return median, max(abs(value / median - 1) for value in values)

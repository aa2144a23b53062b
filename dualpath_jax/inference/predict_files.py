"""Applies a trained model to video files, for scripts/predict.py."""

import collections
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures

import numpy as np
import tqdm

from dualpath_jax.analysis import prediction_figures
from dualpath_jax.data import pipeline
from dualpath_jax.data.preparation import video_decoder
from dualpath_jax.data.preparation.video_names import (
    IGNORED_FOLDERS,
    VIDEO_SUFFIXES,
    is_image_folder,
)
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool, pull_streams
from dualpath_jax.inference import sliding_windows, trained_model
from dualpath_jax.runtime import files, terminal
from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.runtime.progress_bar import ProgressBar

_MAX_NAMED = 10  # skipped files that are named


@dataclasses.dataclass(frozen=True)
class VideoResult:
    """Holds the prediction for a video, or for a window of one.

    Attributes:
      video: path of the file, or of the folder of images.
      class_names: the most probable classes, most probable first; empty for an unreadable video.
      probabilities: probabilities of these classes, in 0..1.
      start, end: seconds from the beginning of the video for a window; otherwise None.
      note: why the video is unreadable, or which part of it is missing; "" without a problem.
    """

    video: str
    class_names: list[str]
    probabilities: list[float]
    start: float | None = None
    end: float | None = None
    note: str = ""


def find_videos(paths: Sequence[str]) -> list[str]:
    """Return the files among `paths`, and the videos in the folders among them.

    Folders are searched recursively for `VIDEO_SUFFIXES` and for folders of images; the videos of a
    folder are sorted. Hidden folders, and those whose names begin with @, are not searched. Other
    files that are not hidden are named on standard error.

    Raises:
      FileNotFoundError: a path does not exist, or a folder has no video.
    """
    videos = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no video or folder {path!r}")
        if not os.path.isdir(path) or is_image_folder(path):
            videos.append(path)
            continue
        inside, skipped = [], []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(IGNORED_FOLDERS)]
            if is_image_folder(folder):
                inside.append(folder)
                continue
            for name in names:
                is_video = os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES
                if not name.startswith("."):
                    (inside if is_video else skipped).append(os.path.join(folder, name))
        inside.sort()
        _report_skipped(path, sorted(skipped))
        if not inside:
            raise FileNotFoundError(
                f"no videos in {path!r}: known suffixes are {' '.join(sorted(VIDEO_SUFFIXES))}"
            )
        videos += inside
    return videos


def _report_skipped(folder: str, skipped: list[str]) -> None:
    """Print the names of files that have no suffix of a video."""
    if not skipped:
        return
    named = ", ".join(repr(os.path.relpath(path, folder)) for path in skipped[:_MAX_NAMED])
    more = f" and {len(skipped) - _MAX_NAMED:,} more" if len(skipped) > _MAX_NAMED else ""
    print(
        f"note: in {folder!r} these have no suffix of a video and are skipped: {named}{more}",
        file=sys.stderr,
    )


def predict_videos(
    model: trained_model.TrainedModel,
    videos: Sequence[str],
    show: Callable[[VideoResult], None],
    top_k: int = 5,
    window: float | None = None,
    stride: float | None = None,
    features: str | None = None,
    pictures: str | None = None,
    progress: bool = False,
    limits: video_decoder.DecodeLimits | None = None,
    frame_rate: float | None = None,
) -> int:
    """Predict videos or their windows, call `show` with each result, and count bad videos.

    Videos are decoded in processes that can be killed: whole videos several at a time, windows one
    after the other. If a video turns out to be bad, its earlier windows have already been shown.

    Args:
      model: the model.
      videos: paths of video files and of folders of images.
      show: called with each result in order.
      top_k: number of classes per result.
      window: length of a window, seconds; None predicts whole videos.
      stride: seconds from one window to the next; None for half a window.
      features: .npz file to write: `video` (for windows also `start` and `end`) and each array of
        `TrainedModel.features`, all with one row per result.
      pictures: folder for an image of each video, see `prediction_figures`.
      progress: True shows a progress bar, see `ProgressBar`.
      limits: of decoding; `seconds` apply to each video or window. None: the defaults.
      frame_rate: frames per second of folders of images; None: unknown.

    Raises:
      ValueError: an option is out of range or needs another one.
    """
    _check_options(top_k, window, stride, features)
    limits = limits or video_decoder.DecodeLimits()
    parts = _decode_parts(model, videos, window, stride, limits, frame_rate)
    figures = pictures and prediction_figures.PredictionFigures(pictures, model.class_names, top_k)
    bad, feature_rows = set(), []
    with ProgressBar(len(videos), "predict", "videos", shown=progress) as bar:
        for part, clips in _make_clips_ahead(model, parts):
            bar.update_to(part.number)
            result, arrays = _predict_part(model, part, clips, top_k, bool(features))
            if arrays is None:
                bad.add(result.video)
            else:
                if features:
                    feature_rows.append((result, arrays))
                if figures:
                    probabilities = trained_model.mean_probabilities(arrays["logits"])
                    figures.add(part.number, result, part.frames, probabilities)
            with tqdm.tqdm.external_write_mode():
                show(result)
        bar.update_to(len(videos))
    if figures:
        figures.close()
    if features:
        _write_features(features, feature_rows)
    return len(bad)


def _check_options(
    top_k: int, window: float | None, stride: float | None, features: str | None
) -> None:
    """Raise ValueError if options of `predict_videos` are out of range or do not fit together."""
    if top_k < 1:
        raise ValueError(f"--top_k={top_k} must be at least 1")
    if features and not features.endswith(".npz"):
        raise ValueError(f"--features={features!r} must end with .npz")
    if features:
        files.check_output_file("--features", features)
    if stride is not None and window is None:
        raise ValueError(f"--stride={stride:g} needs --window")


@dataclasses.dataclass(frozen=True)
class _VideoPart:
    """Holds a decoded video or window.

    Attributes:
      number: index of the video.
      frames: the frames; None if decoding failed.
      result: the result so far, without a prediction.
    """

    number: int
    frames: trained_model.SingleVideo | None
    result: VideoResult


def _predict_part(
    model: trained_model.TrainedModel,
    part: _VideoPart,
    clips: pipeline.Batch | None,
    top_k: int,
    with_features: bool,
) -> tuple[VideoResult, dict[str, np.ndarray] | None]:
    """Return the result of a part and the model's arrays, which are None for a bad part.

    The arrays are `TrainedModel.features`, or without `with_features` only the logits.
    """
    if clips is None:
        return part.result, None
    arrays = model.features(clips) if with_features else {"logits": model.logits(clips)}
    prediction = trained_model.Prediction.from_logits(arrays["logits"], model.class_names, top_k)
    return dataclasses.replace(part.result, **dataclasses.asdict(prediction)), arrays


def _decode_parts(
    model: trained_model.TrainedModel,
    videos: Sequence[str],
    window: float | None,
    stride: float | None,
    limits: video_decoder.DecodeLimits,
    frame_rate: float | None,
) -> Iterator[_VideoPart]:
    """Check the windows and return an iterator over the decoded videos or windows."""
    if window is None:
        return _decode_whole_videos(model, videos, limits, frame_rate)
    stride = window / 2 if stride is None else stride
    sliding_windows.check_windows(window, stride)
    return _decode_windows(model, videos, window, stride, limits, frame_rate)


def _decode_whole_videos(
    model: trained_model.TrainedModel,
    videos: Sequence[str],
    limits: video_decoder.DecodeLimits,
    frame_rate: float | None,
) -> Iterator[_VideoPart]:
    """Yield whole videos, decoded in several processes."""
    stored = model.frame_format
    sizes = (stored.short_side, stored.quality)
    arguments = [(video, *sizes, limits, stored.fps, frame_rate) for video in videos]
    workers = min(len(videos), num_cores())
    with WorkerPool(workers, limits) as pool:
        results = pool.map(video_decoder.video_to_jpegs, arguments)
        for number, (video, result) in enumerate(zip(videos, results, strict=True)):
            if isinstance(result, Failure):
                yield _VideoPart(number, None, VideoResult(video, [], [], note=result.reason))
                continue
            jpegs, info = result
            frames = trained_model.SingleVideo(
                jpegs, info.height, info.width, video, model.class_names
            )
            yield _VideoPart(number, frames, VideoResult(video, [], [], note=info.truncated))


def _decode_windows(
    model: trained_model.TrainedModel,
    videos: Sequence[str],
    seconds: float,
    stride: float,
    limits: video_decoder.DecodeLimits,
    frame_rate: float | None,
) -> Iterator[_VideoPart]:
    """Yield the windows of all videos, decoded one after the other."""
    arguments = [(video, seconds, stride, model.frame_format, frame_rate) for video in videos]
    for number, item in pull_streams(sliding_windows.decode_windows, arguments, limits):
        video = videos[number]
        if isinstance(item, Failure):
            yield _VideoPart(number, None, VideoResult(video, [], [], note=item.reason))
            continue
        frames = trained_model.SingleVideo(
            item.jpegs, item.height, item.width, video, model.class_names
        )
        result = VideoResult(video, [], [], item.start, item.end, item.note)
        yield _VideoPart(number, frames, result)


_MAX_WAITING_PARTS = 2  # parts whose clips are made while the model computes an earlier one


def _make_clips_ahead(
    model: trained_model.TrainedModel, parts: Iterable[_VideoPart]
) -> Iterator[tuple[_VideoPart, pipeline.Batch | None]]:
    """Yield each part with its clips (None for a bad one), in order.

    A thread makes the clips of later parts while the caller uses those of an earlier one.
    """
    waiting = collections.deque()
    with futures.ThreadPoolExecutor(1) as executor:
        for part in parts:
            clips = executor.submit(model.clips_from_frames, part.frames) if part.frames else None
            waiting.append((part, clips))
            if len(waiting) > _MAX_WAITING_PARTS:
                part, clips = waiting.popleft()
                yield part, clips and clips.result()
        for part, clips in waiting:
            yield part, clips and clips.result()


def _write_features(path: str, rows: Sequence[tuple[VideoResult, dict[str, np.ndarray]]]) -> None:
    """Write the features of all results as arrays [results, V, ...], with the results' names."""
    results = [result for result, _ in rows]
    table = {"video": np.array([result.video for result in results], dtype=str)}
    if results and results[0].start is not None:
        table["start"] = np.array([result.start for result in results])
        table["end"] = np.array([result.end for result in results])
    for name in rows[0][1] if rows else ():
        table[name] = np.stack([arrays[name] for _, arrays in rows])
    with files.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **table)


def format_result(result: VideoResult) -> str:
    """Format a result as one line of text."""
    name = terminal.escape_name(result.video)
    if result.start is not None:
        name += f"  {result.start:.1f}-{result.end:.1f} s"
    if not result.class_names:
        return f"{name}  cannot be read: {result.note}"
    classes = "  ".join(
        f"{probability:.3f} {terminal.escape_name(label)}"
        for label, probability in zip(result.class_names, result.probabilities, strict=True)
    )
    return f"{name}  {classes}" + (f"  ({result.note})" if result.note else "")

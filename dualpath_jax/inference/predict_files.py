"""A trained model on video files: what scripts/predict.py does.

Public: `VideoResult`, `find_videos`, `predict_videos`, `format_result`.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures

import numpy as np
import tqdm

from dualpath_jax.analysis import prediction_figures
from dualpath_jax.cli import check_output_file
from dualpath_jax.data import pipeline
from dualpath_jax.data.preparation import video_decoder
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool, pull_streams
from dualpath_jax.inference import sliding_windows, trained_model
from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.runtime.progress_bar import ProgressBar

# Files of a folder that are taken for videos.
VIDEO_SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
)


@dataclasses.dataclass(frozen=True)
class VideoResult:
    """What was found out about a video, or a window of one.

    Attributes:
      video: path.
      class_names, probabilities: the most probable first; empty for a video that cannot be read.
      start, end: seconds, of a window; else None.
      note: why the video cannot be read, or what of it is missing; "" if all is well.
    """

    video: str
    class_names: list[str]
    probabilities: list[float]
    start: float | None = None
    end: float | None = None
    note: str = ""


def find_videos(paths: Sequence[str]) -> list[str]:
    """The files of `paths`, and those in its folders that have a video's suffix, sorted.

    Raises:
      FileNotFoundError: a path is not there, or a folder has no video.
    """
    videos = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"no video or folder {path!r}")
        if not os.path.isdir(path):
            videos.append(path)
            continue
        inside = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES
        ]
        if not inside:
            raise FileNotFoundError(
                f"no videos in {path!r}: known suffixes are {' '.join(sorted(VIDEO_SUFFIXES))}"
            )
        videos += sorted(inside)
    return videos


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
) -> int:
    """Show what `model` says of each video, or of each window; returns how many are bad.

    All are decoded in processes that can be killed, within `limits`, whose seconds are for a whole
    video or for a window: whole videos several at a time, windows one after the other. The windows
    before the place where a video turns out to be bad are shown.

    Args:
      top_k: classes of each.
      window, stride: seconds; None: whole videos; half a window.
      features: file .npz to write, with `video` (and `start`, `end`) and for each an entry of
        every array of `Trained.features`.
      pictures: folder for a picture of each video, see `prediction_view`.
      progress: show how far it is, see `bar`.
      limits: what one video may cost; None: the usual ones.

    Raises:
      ValueError: an option makes no sense.
    """
    if top_k < 1:
        raise ValueError(f"--top_k={top_k} must be at least 1")
    if features and not features.endswith(".npz"):
        raise ValueError(f"--features={features!r} must end with .npz")
    if features:
        check_output_file("--features", features)
    if stride is not None and window is None:
        raise ValueError(f"--stride={stride:g} needs --window")
    limits = limits or video_decoder.DecodeLimits()
    if window is None:
        parts = _whole(model, videos, limits)
    else:
        stride = window / 2 if stride is None else stride
        sliding_windows.check_windows(window, stride)
        parts = _windows(model, videos, window, stride, limits)
    drawn = prediction_figures.Pictures(pictures, model.class_names, top_k) if pictures else None
    bad, kept, places = set(), [], []
    with ProgressBar(len(videos), "predict", "videos", shown=progress) as bar:
        for part, clips in _with_clips(model, parts):
            bar.update_to(part.number)
            found = part.found
            if clips is None:
                bad.add(found.video)
            else:
                arrays = model.features(clips) if features else {"logits": model.logits(clips)}
                said = trained_model.Prediction.of(arrays["logits"], model.class_names, top_k)
                found = dataclasses.replace(found, **dataclasses.asdict(said))
                if features:
                    kept.append(arrays)
                    places.append(found)
                if drawn:
                    probabilities = trained_model.mean_probabilities(arrays["logits"])
                    drawn.add(part.number, found, part.frames, probabilities)
            with tqdm.tqdm.external_write_mode():
                show(found)
        bar.update_to(len(videos))
    if drawn:
        drawn.close()
    if features:
        _write_features(features, kept, places)
    return len(bad)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A video or a window: the number of its video, its frames (None: bad), what is known of it."""

    number: int
    frames: trained_model.SingleVideo | None
    found: VideoResult


def _whole(
    model: trained_model.TrainedModel, videos: Sequence[str], limits: video_decoder.DecodeLimits
) -> Iterator[_Part]:
    stored = model.frame_format
    sizes = (stored.short_side, stored.quality)
    arguments = [(video, *sizes, limits, stored.fps) for video in videos]
    workers = min(len(videos), num_cores())
    with WorkerPool(workers, limits) as pool:
        results = pool.map(video_decoder.video_to_jpegs, arguments)
        for number, (video, result) in enumerate(zip(videos, results, strict=True)):
            if isinstance(result, Failure):
                yield _Part(number, None, VideoResult(video, [], [], note=result.reason))
                continue
            jpegs, facts = result
            frames = trained_model.SingleVideo(
                jpegs, facts.height, facts.width, video, model.class_names
            )
            yield _Part(number, frames, VideoResult(video, [], [], note=facts.truncated))


def _windows(
    model: trained_model.TrainedModel,
    videos: Sequence[str],
    seconds: float,
    stride: float,
    limits: video_decoder.DecodeLimits,
) -> Iterator[_Part]:
    arguments = [(video, seconds, stride, model.frame_format) for video in videos]
    for number, one in pull_streams(sliding_windows.decode_windows, arguments, limits):
        video = videos[number]
        if isinstance(one, Failure):
            yield _Part(number, None, VideoResult(video, [], [], note=one.reason))
            continue
        frames = trained_model.SingleVideo(
            one.jpegs, one.height, one.width, video, model.class_names
        )
        yield _Part(number, frames, VideoResult(video, [], [], one.start, one.end, one.note))


_AHEAD = 2  # parts whose clips are made while the model is at an earlier one


def _with_clips(
    model: trained_model.TrainedModel, parts: Iterable[_Part]
) -> Iterator[tuple[_Part, pipeline.Batch | None]]:
    """Each part with its clips, in order."""
    waiting = collections.deque()
    with futures.ThreadPoolExecutor(1) as executor:
        for part in parts:
            made = executor.submit(model.clips_from_frames, part.frames) if part.frames else None
            waiting.append((part, made))
            if len(waiting) > _AHEAD:
                part, made = waiting.popleft()
                yield part, made and made.result()
        for part, made in waiting:
            yield part, made and made.result()


def _write_features(
    path: str, kept: Sequence[dict[str, np.ndarray]], places: Sequence[VideoResult]
) -> None:
    """All arrays [videos or windows, V, ...], in the order of `video`."""
    table = {"video": np.array([found.video for found in places], dtype=str)}
    if places and places[0].start is not None:
        table["start"] = np.array([found.start for found in places])
        table["end"] = np.array([found.end for found in places])
    for name in kept[0] if kept else ():
        table[name] = np.stack([arrays[name] for arrays in kept])
    temporary = f"{path}.tmp.npz"
    np.savez(temporary, **table)
    os.replace(temporary, path)


def format_result(found: VideoResult) -> str:
    """For people."""
    name = found.video
    if found.start is not None:
        name += f"  {found.start:.1f}-{found.end:.1f} s"
    if not found.class_names:
        return f"{name}  cannot be read: {found.note}"
    classes = "  ".join(
        f"{probability:.3f} {label}"
        for label, probability in zip(found.class_names, found.probabilities, strict=True)
    )
    return f"{name}  {classes}" + (f"  ({found.note})" if found.note else "")

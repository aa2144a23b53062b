"""Decodes a long video in sliding windows, with only the frames of one window in memory."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator

from dualpath_jax.data.preparation import video_decoder
from dualpath_jax.data.video_source import FrameFormat

_ROUNDING = 1e-6  # seconds by which times may differ from what they should be
_NO_FRAME_RATE = (
    "it has no frame rate, which windows need; for a folder of images pass --frame_rate"
)
_NO_FRAME_LIMIT = video_decoder.DecodeLimits(max_frames=2**62)


@dataclasses.dataclass(frozen=True)
class Window:
    """Holds a part of a video.

    Attributes:
      start, end: seconds from the first frame of the video, by time stamps.
      jpegs: the frames as JPEG files.
      height, width: size of each frame, pixels.
      note: in the last window, the part of the video that is missing, see
        `video_decoder.FrameReader`; otherwise "".
    """

    start: float
    end: float
    jpegs: list[bytes]
    height: int
    width: int
    note: str = ""


def check_windows(seconds: float, stride: float) -> None:
    """Check the length and the stride of windows, both in seconds.

    Raises:
      ValueError: one of them is not a finite number above 0.
    """
    for name, value in (("window", seconds), ("stride", stride)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name}={value:g} must be a number of seconds above 0")


def _cut_window(
    frames: Iterable[tuple[float, bytes]], start: float, seconds: float, shape: tuple[int, int]
) -> Window:
    """Return the window of the frames, given with their times, from `start` on."""
    inside = [jpeg for time, jpeg in frames if start <= time + _ROUNDING < start + seconds]
    return Window(start, start + seconds, inside, *shape)


def decode_windows(
    path: str,
    seconds: float,
    stride: float,
    frame_format: FrameFormat,
    frame_rate: float | None = None,
) -> Iterator[Window]:
    """Yield the windows of a video and decode frames as they are needed.

    Windows begin at 0, `stride`, 2 `stride`, ... The last one may be shorter; if less than half of
    it is left, it begins earlier and has its full length. A window in which no frame is shown is
    left out. Frames count by their time stamps, see `video_decoder.FrameClock`.

    Args:
      path: a video file, or a folder of images.
      seconds, stride: length of a window, and time from the start of one to that of the next.
      frame_format: format of the frames in the windows.
      frame_rate: frames per second of a folder of images.

    Raises:
      ValueError: see `check_windows`.
      video_decoder.VideoError: the file cannot be decoded, or it has no frame rate.
    """
    check_windows(seconds, stride)
    options = (frame_format.short_side, frame_format.fps, frame_rate)
    reader = video_decoder.decode_frames(path, _NO_FRAME_LIMIT, *options)
    number = 0  # of the window that is being filled
    frames: collections.deque[tuple[float, bytes]] = collections.deque()  # times, JPEG files
    last: Window | None = None  # the last window, until another one follows
    newest = covered = -1.0  # times of the last frame, and of the last one in a window
    shape = (0, 0)
    for frame in reader:
        if reader.time is None:
            raise video_decoder.VideoError(_NO_FRAME_RATE)
        newest = max(newest, reader.time)
        while newest + _ROUNDING >= number * stride + seconds:  # the window is complete
            window = _cut_window(frames, number * stride, seconds, shape)
            if not window.jpegs:
                number = max(number, math.floor((newest - seconds) / stride)) + 1
                continue
            if last is not None:
                yield last
            last, covered = window, frames[-1][0]
            number += 1
        # Later windows need no frames from before their start; the last one may begin earlier.
        while frames and frames[0][0] + _ROUNDING < min(number * stride, newest - seconds):
            frames.popleft()
        shape = frame.shape[:2]
        frames.append((newest, video_decoder.to_jpeg(frame, frame_format.quality)))

    if frames and newest > covered:
        if last is not None:
            yield last
        start = number * stride
        if reader.end - start < seconds / 2:
            start = max(0.0, reader.end - seconds)
        window = _cut_window(frames, start, seconds, shape)
        last = dataclasses.replace(window, end=min(window.end, reader.end))
    if last is not None:
        yield dataclasses.replace(last, note=reader.truncated)

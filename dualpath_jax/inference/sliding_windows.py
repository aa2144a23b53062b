"""Decodes a long video in sliding windows, with only the frames of one window in memory."""

import dataclasses
import math
from collections.abc import Iterator

from dualpath_jax.data.preparation import video_decoder

_NO_FRAME_LIMIT = video_decoder.DecodeLimits(max_frames=2**62)


@dataclasses.dataclass(frozen=True)
class Window:
    """Holds a part of a video.

    Attributes:
      start, end: seconds from the beginning of the video, by the frame rate in the file.
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


def decode_windows(
    path: str, seconds: float, stride: float, frame_format: video_decoder.FrameFormat
) -> Iterator[Window]:
    """Yield the windows of a video and decode frames as they are needed.

    A video shorter than a window is one window. If frames remain after the last window, one more
    window of full length ends with the video.

    Args:
      path: a video file.
      seconds: length of a window, rounded to a whole number of frames, at least one.
      stride: seconds from the start of a window to the start of the next, also rounded.
      frame_format: format of the frames in the windows.

    Raises:
      ValueError: see `check_windows`.
      video_decoder.VideoError: the file cannot be decoded, or it has no frame rate.
    """
    check_windows(seconds, stride)
    reader = video_decoder.decode_frames(
        path, _NO_FRAME_LIMIT, frame_format.short_side, frame_format.fps
    )
    if not reader.fps:
        raise video_decoder.VideoError("the file has no frame rate, which windows need")
    length = max(1, round(seconds * reader.fps))
    step = max(1, round(stride * reader.fps))
    kept: list[bytes] = []
    first = 0  # index of the frame kept[0]
    count = 0  # frames decoded
    covered = 0  # end of the last window
    shape = (0, 0)

    def window(start: int, note: str = "") -> Window:
        jpegs = kept[start - first : start - first + length]
        end = start + len(jpegs)
        return Window(start / reader.fps, end / reader.fps, jpegs, *shape, note)

    due = 0  # start of the next window
    for frame in reader:
        if count == due + length:  # the window is complete, and the video has more frames
            yield window(due)
            covered, due = count, due + step
        kept.append(video_decoder.to_jpeg(frame, frame_format.quality))
        shape, count = frame.shape[:2], count + 1
        if count - first > length:  # later windows need at most the last `length` frames
            del kept[: count - first - length]
            first = count - length
    if covered < count:
        yield window(max(0, count - length), reader.truncated)

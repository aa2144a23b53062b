"""A long video in sliding windows, with the frames of one window in memory.

Public: `Window`, `decode_windows`, `check_windows`.
"""

import dataclasses
import math
from collections.abc import Iterator

from dualpath_jax.data.preparation import video_decoder

EVERYTHING = video_decoder.DecodeLimits(max_frames=2**62)


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a video.

    Attributes:
      start, end: seconds from its beginning, by the frame rate that the file states.
      jpegs: its frames; `height` x `width` pixels each.
      note: of the last window, what of the video is missing, see `decode.FrameReader`; else "".
    """

    start: float
    end: float
    jpegs: list[bytes]
    height: int
    width: int
    note: str = ""


def check_windows(seconds: float, stride: float) -> None:
    """ValueError for what is no length of a window or no stride."""
    for name, value in (("window", seconds), ("stride", stride)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name}={value:g} must be a number of seconds above 0")


def decode_windows(
    path: str, seconds: float, stride: float, frame_format: video_decoder.FrameFormat
) -> Iterator[Window]:
    """Windows of a video, decoded as they are needed.

    Args:
      path: a video file.
      seconds: length of a window, to the nearest whole number of frames, at least one; a shorter
        video is one window.
      stride: from the beginning of a window to that of the next, likewise. What is left at the end
        after the last whole window is a window of full length that ends there.
      frame_format: of the frames.

    Raises:
      ValueError: see `check_windows`.
      decode.VideoError: the file cannot be decoded, or does not state its frame rate.
    """
    check_windows(seconds, stride)
    reader = video_decoder.decode_frames(
        path, EVERYTHING, frame_format.short_side, frame_format.fps
    )
    if not reader.fps:
        raise video_decoder.VideoError("it does not state its frame rate, which windows need")
    length = max(1, round(seconds * reader.fps))
    step = max(1, round(stride * reader.fps))
    kept: list[bytes] = []
    first = count = covered = 0  # frame that kept[0] is; frames seen; end of the last window
    shape = (0, 0)

    def window(start: int, note: str = "") -> Window:
        jpegs = kept[start - first : start - first + length]
        end = start + len(jpegs)
        return Window(start / reader.fps, end / reader.fps, jpegs, *shape, note)

    due = 0  # beginning of the next window
    for frame in reader:
        if count == due + length:  # and it is not the last one
            yield window(due)
            covered, due = count, due + step
        kept.append(video_decoder.to_jpeg(frame, frame_format.quality))
        shape, count = frame.shape[:2], count + 1
        if count - first > length:  # the last `length` frames are enough for any window to come
            del kept[: count - first - length]
            first = count - length
    if covered < count:
        yield window(max(0, count - length), reader.truncated)

"""A long video in sliding windows, with the frames of one window in memory.

Public: `Window`, `windows`.
"""

import dataclasses
from collections.abc import Iterator

from dualpath_jax.data import decode

EVERYTHING = decode.DecodeLimits(max_frames=2**62)


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a video.

    Attributes:
      start, end: seconds from its beginning, by the frame rate that the file states.
      jpegs: its frames; `height` x `width` pixels each.
    """

    start: float
    end: float
    jpegs: list[bytes]
    height: int
    width: int


def windows(
    path: str, seconds: float, stride: float, short_side: int, quality: int
) -> Iterator[Window]:
    """Windows of a video, decoded as they are needed.

    Args:
      path: a video file.
      seconds: length of a window; a shorter video is one window.
      stride: from the beginning of a window to that of the next. What is left at the end after the
        last whole window is a window of full length that ends there.
      short_side, quality: of the frames, see `decode.video_to_jpegs`.

    Raises:
      ValueError: `seconds` or `stride` is not above 0.
      decode.VideoError: the file cannot be decoded, or does not state its frame rate.
    """
    if seconds <= 0 or stride <= 0:
        raise ValueError(f"--window={seconds:g} and --stride={stride:g} must be above 0 seconds")
    reader = decode.decode_frames(path, EVERYTHING, short_side)
    if not reader.fps:
        raise decode.VideoError("it does not state its frame rate, which windows need")
    length = max(1, round(seconds * reader.fps))
    step = max(1, round(stride * reader.fps))
    kept: list[bytes] = []
    first = count = covered = 0  # frame that kept[0] is; frames seen; end of the last window
    shape = (0, 0)

    def window(start: int) -> Window:
        jpegs = kept[start - first : start - first + length]
        end = start + len(jpegs)
        return Window(start / reader.fps, end / reader.fps, jpegs, *shape)

    due = 0  # beginning of the next window
    for frame in reader:
        kept.append(decode.to_jpeg(frame, quality))
        shape, count = frame.shape[:2], count + 1
        if count - first > length:  # the last `length` frames are enough for any window to come
            del kept[: count - first - length]
            first = count - length
        if count == due + length:
            yield window(due)
            covered, due = count, due + step
    if covered < count:
        yield window(max(0, count - length))

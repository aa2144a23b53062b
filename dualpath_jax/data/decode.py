"""Video files to frames: `decode_frames`, `video_to_jpegs`.

Videos come from strangers: they hang decoders, crash them, and claim sizes that fill the memory.
Many files are therefore decoded in the processes of `workers.WorkerPool`, which import this
module; so it imports nothing heavy.
"""

import dataclasses
import io
import os
from collections.abc import Iterator

import av
import av.logging
import av.stream
import numpy as np
from PIL import Image

NOT_FOUND = "file not found"

# Demuxers that make "videos" of text, play lists and still pictures ("png_pipe" and such besides).
NOT_VIDEO = frozenset(
    {"concat", "dash", "hls", "image2", "imf", "lrc", "sdp", "srt", "tty", "webvtt"}
)


class VideoError(Exception):
    """A video that cannot be used; the message says why in plain words."""


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """What one file may cost before it is given up as bad.

    Attributes:
      seconds: wall clock for one file in `WorkerPool`. A ten-second clip takes about one second;
        a file that needs a minute has most likely caught the decoder in a loop.
      memory_mb: MiB of address space a worker may map on top of what it has at its start. An 8K
        stream with 16 reference frames needs about 1 GiB; the limit keeps one file from bringing
        down the machine.
      max_pixels: width x height. The default is the largest frame of H.264 level 6.2 and AV1
        level 6.3; more is a broken header or an attack.
      max_frames: 20,000 frames are 11 minutes at 30 fps, far beyond an action clip; more is a
        wrong file.
    """

    seconds: float = 60.0
    memory_mb: int = 2048
    max_pixels: int = 8192 * 4352
    max_frames: int = 20_000


@dataclasses.dataclass(frozen=True)
class StoredVideo:
    """A whole video as JPEG images.

    Attributes:
      jpegs: one JPEG file per frame, in decode order, at least one.
      height, width: pixels of every frame, after rotation and scaling.
      fps: frames per second by the header, 0.0 if it says nothing.
      truncated: why the video ends early, "" if it does not.
    """

    jpegs: list[bytes]
    height: int
    width: int
    fps: float
    truncated: str


class FrameReader:
    """The frames of one video; iterate once. See `decode_frames`.

    Attributes:
      fps: frames per second by the header, 0.0 if it says nothing.
      truncated: why the video ended early, "" if it did not; known when the iteration has ended.
    """

    def __init__(self, path: str, limits: DecodeLimits, short_side: int | None):
        self._limits = limits
        self._short_side = short_side
        self._container = _open(path)
        try:
            self._stream = _video_stream(self._container)
            codec = self._stream.codec_context
            codec.thread_count = 1  # the workers are the parallelism
            codec.thread_type = "NONE"
            self._check_pixels(self._stream.width, self._stream.height)
            self.fps = float(self._stream.guessed_rate or self._stream.average_rate or 0)
        except BaseException:
            self._container.close()
            raise
        self.truncated = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields uint8 [H, W, 3] RGB frames, 0..255. VideoError if there is none or too many."""
        count, size, last, error = 0, None, None, ""
        with self._container:
            packets = self._container.decode(self._stream)
            while True:
                try:
                    frame = next(packets, None)
                except MemoryError:
                    raise
                except (av.FFmpegError, ValueError) as problem:
                    error = describe(problem)
                    break
                if frame is None:
                    break
                if count == self._limits.max_frames:
                    raise VideoError(f"more than {self._limits.max_frames} frames")
                self._check_pixels(frame.width, frame.height)
                if frame.time is not None:
                    last = frame.time if last is None else max(last, frame.time)
                turns = round(frame.rotation / 90)  # degrees counter-clockwise, as np.rot90 counts
                size = size or self._target_size(frame, turns)
                yield _to_rgb(frame, size, turns)
                count += 1
            if not count:
                raise VideoError(f"no frame could be decoded ({error or 'the stream is empty'})")
            self.truncated = f"frame {count}: {error}" if error else self._early_end(last)

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise VideoError(
                f"{width}x{height} pixels, more than the limit of {self._limits.max_pixels}"
            )

    def _target_size(self, frame: av.VideoFrame, turns: int) -> tuple[int, int]:
        """(height, width) of every frame yielded: that of the first, scaled to the short side."""
        height, width = frame.height, frame.width
        if self._short_side and min(height, width) > self._short_side:
            scale = self._short_side / min(height, width)
            height, width = round(height * scale), round(width * scale)
        return (width, height) if turns % 2 else (height, width)

    def _early_end(self, last: float | None) -> str:
        """A cut mkv ends silently; then the header's duration tells. `last` is in seconds."""
        if last is None:
            return ""
        stream, container = self._stream, self._container
        if stream.duration:
            claimed = float(stream.duration * stream.time_base)
        else:
            claimed = (container.duration or 0) / av.time_base
        start = (container.start_time or 0) / av.time_base
        shown = last - start + (1 / self.fps if self.fps else 0.0)
        missing = claimed - shown
        if missing > max(0.5, 0.1 * claimed):  # headers lie by a frame or two, sound may run on
            return f"ends after {shown:.1f} s of the {claimed:.1f} s its header claims"
        return ""


def decode_frames(path: str, limits: DecodeLimits, short_side: int | None = None) -> FrameReader:
    """Opens a video for one pass over its frames.

    Frames come in decode order (time stamps lie), upright (rotation metadata is applied), all of
    the first frame's size even if the stream changes size. Pixels are taken as square, as the
    field's loaders do. A video that breaks midway gives its good frames, and the reader's
    `truncated` then says why.

    Args:
      path: a video file.
      limits: `max_pixels` and `max_frames` are checked here; `seconds` and `memory_mb` only in a
        `WorkerPool`.
      short_side: pixels of the shorter side after scaling, aspect kept; with None, or where the
        video is smaller, frames keep their size.

    Returns:
      A `FrameReader`: iterate for uint8 [H, W, 3] RGB frames, 0..255.

    Raises:
      VideoError: missing or unreadable file, no video stream, or too large (here); no frame at
        all, or too many (on iteration).
    """
    return FrameReader(path, limits, short_side)


def video_to_jpegs(
    path: str, short_side: int | None, quality: int, limits: DecodeLimits
) -> StoredVideo:
    """Decodes a whole video and compresses each frame as JPEG (4:2:0, `quality` 1..95).

    Raises:
      VideoError: as `decode_frames`.
    """
    reader = decode_frames(path, limits, short_side)
    jpegs, height, width = [], 0, 0
    for frame in reader:
        height, width = frame.shape[:2]
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        jpegs.append(buffer.getvalue())
    return StoredVideo(jpegs, height, width, reader.fps, reader.truncated)


def _open(path: str):
    if not os.path.isfile(path):
        raise VideoError(NOT_FOUND)
    try:
        # "file:" and the white list: "a:b.mp4" is no URL, and a play list opens no connection.
        container = av.open(
            "file:" + path,
            metadata_errors="replace",
            container_options={"protocol_whitelist": "file"},
        )
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError, OSError) as problem:
        raise VideoError(f"cannot be opened as a video ({describe(problem)})") from None
    return container


def _video_stream(container):
    if container.format.name in NOT_VIDEO or container.format.name.endswith("_pipe"):
        raise VideoError(f"not a video (format {container.format.name})")
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # the cover of a sound file
            return stream
    raise VideoError("no video stream" + (", only audio" if container.streams.audio else ""))


def _to_rgb(frame: av.VideoFrame, size: tuple[int, int], turns: int) -> np.ndarray:
    """uint8 [H, W, 3], scaled to `size` (height, width as shown) and turned upright."""
    height, width = size[::-1] if turns % 2 else size
    frame = frame.reformat(
        width=width, height=height, format="rgb24", interpolation="AREA", threads=1
    )
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(), turns))


def describe(problem: BaseException) -> str:
    """An exception in one line, for the list of bad videos."""
    return f"{type(problem).__name__}: {getattr(problem, 'strerror', None) or problem}"

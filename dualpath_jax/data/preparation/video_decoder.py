"""Video files to frames: `decode_frames`, `video_to_jpegs`, `check_video`, `to_jpeg`.

Videos come from strangers: they hang decoders, crash them, and claim sizes that fill the memory.
Many files are therefore decoded in the processes of `workers.WorkerPool`, which import this
module; so it imports nothing heavy.
"""

import dataclasses
import io
import math
import os
from collections.abc import Iterator

import av
import av.logging
import av.stream
import numpy as np
from PIL import Image

NOT_FOUND = "file not found"
MAX_SIDE = 65_500  # pixels, of a JPEG

# Demuxers that make "videos" of text, play lists and still pictures ("png_pipe" and such besides).
NOT_VIDEO = frozenset(
    {"concat", "dash", "hls", "image2", "imf", "lrc", "sdp", "srt", "tty", "webvtt"}
)

# For `av.open`: tags that are no UTF-8 are no error. PyAV from 19 on takes any and has no such
# argument.
ANY_TAGS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# Matrices (AVColorSpace) that swscale cannot convert by, and what stands in for them. Constant
# luminance BT.2020 is near to the other one; YCgCo and reserved numbers are taken as untagged.
_MATRICES = {10: 9} | dict.fromkeys((3, 8, *range(11, 32)), 2)
_CHECKED_FRAMES = 16  # `check_video` compresses one frame in so many


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
      max_frames: frames kept. 20,000 are 11 minutes at 30 fps, far beyond an action clip; more is
        a wrong file.
    """

    seconds: float = 60.0
    memory_mb: int = 2048
    max_pixels: int = 8192 * 4352
    max_frames: int = 20_000


@dataclasses.dataclass(frozen=True)
class FrameFormat:
    """How frames are stored, and so what a model was trained on.

    Attributes:
      short_side: pixels of the shorter side; None: that of the video. Smaller videos keep theirs.
      quality: of the JPEG frames, 1..95.
      fps: frames per second that are kept of videos that have more; None: all.
    """

    short_side: int | None = 256
    quality: int = 90
    fps: float | None = None


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What is known of a decoded video.

    Attributes:
      num_frames: frames kept, at least 1.
      fps: frames per second, as `FrameReader.fps`.
      height, width: pixels of every frame, after rotation and scaling.
      truncated: as `FrameReader.truncated`.
      num_bytes: of all its JPEG images.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    truncated: str
    num_bytes: int


class FrameReader:
    """The frames of one video; iterate once. See `decode_frames`.

    Attributes:
      fps: frames per second, by the header or, if that is less, as asked for; 0.0 if neither says.
      truncated: what of the video is missing and why, "" if nothing is; known when the iteration
        has ended.
    """

    def __init__(
        self, path: str, limits: DecodeLimits, short_side: int | None, fps: float | None = None
    ):
        self._limits = limits
        self._short_side = short_side
        self._container = _open(path)
        try:
            self._stream = _video_stream(self._container)
            codec = self._stream.codec_context
            codec.thread_count = 1  # the workers are the parallelism
            codec.thread_type = "NONE"
            self._check_pixels(self._stream.width, self._stream.height)
            self._rate = float(self._stream.guessed_rate or self._stream.average_rate or 0)
        except BaseException:
            self._container.close()
            raise
        self._thinning = FrameRateFilter(fps, self._rate) if fps else None
        self.fps = float(min(fps, self._rate or fps)) if fps else self._rate
        self.truncated = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields uint8 [H, W, 3] RGB frames, 0..255. VideoError if there is none or too many."""
        count, size, end, error = 0, None, None, ""
        with self._container:
            frames = self._decoded()
            while True:
                try:
                    frame = next(frames, None)
                    if frame is None:
                        break
                    if frame.time is not None:
                        end = max(end or frame.time, frame.time + self._shown(frame))
                    if self._thinning and not self._thinning.keeps(frame.time):
                        continue
                    self._check_pixels(frame.width, frame.height)
                    turns = round(frame.rotation / 90)  # counter-clockwise, as np.rot90 counts
                    size = size or self._target_size(frame, turns)
                    image = _to_rgb(frame, size, turns)
                except MemoryError:
                    raise
                except (av.FFmpegError, ValueError) as problem:
                    error = describe_video(problem)
                    break
                if count == self._limits.max_frames:
                    raise VideoError(
                        f"more than {self._limits.max_frames} frames (--max_frames allows more)"
                    )
                yield image
                count += 1
            if not count:
                reason = error or self._bad_start or "the stream is empty"
                raise VideoError(f"no frame could be decoded ({reason})")
            if error or self._cut:
                self.truncated = f"after {count} frames: {error or self._cut}"
            elif self._bad_start:
                self.truncated = f"does not begin with a frame: {self._bad_start}"
            else:
                self.truncated = self._early_end(end)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """The stream's frames. Packets that fail before the first frame are passed over."""
        self._bad_start = self._cut = ""
        self._started = False
        for packet in self._packets():
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except (av.FFmpegError, ValueError) as problem:
                if self._started:
                    raise
                self._bad_start = self._bad_start or describe_video(problem)
                continue
            self._started = self._started or bool(frames)
            yield from frames

    def _packets(self) -> Iterator[av.Packet]:
        """The stream's, the last one empty, without the frame that the file ends amid."""
        last = None
        for packet in self._container.demux(self._stream):
            if last is not None and packet.size:  # something was lost in its middle
                yield last
            elif last is not None:
                self._cut = "the rest of the file is missing"
            last = packet if packet.is_corrupt and self._started else None
            if last is None:
                yield packet

    def _shown(self, frame: av.VideoFrame) -> float:
        """For how many seconds a frame is shown."""
        if frame.duration and frame.time_base:
            return float(frame.duration * frame.time_base)
        return 1 / self._rate if self._rate else 0.0

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

    def _early_end(self, end: float | None) -> str:
        """A cut mkv ends silently; then the header's duration tells. `end` is in seconds."""
        if end is None:
            return ""
        stream, container = self._stream, self._container
        if stream.duration:
            claimed = float(stream.duration * stream.time_base)
        else:
            claimed = (container.duration or 0) / av.time_base
        shown = end - (container.start_time or 0) / av.time_base
        missing = claimed - shown
        if missing > max(0.5, 0.1 * claimed):  # headers lie by a frame or two, sound may run on
            return f"ends after {shown:.1f} s of the {claimed:.1f} s its header claims"
        return ""


class FrameRateFilter:
    """Which frames of a stream to keep, so that at most `fps` are left of each second.

    Points of time lie 1/fps apart, from the first frame on. A point keeps the first frame that is
    no more than half a frame's time before it; in a steady stream that is the nearest one. Where
    frames lie farther apart than points, all are kept. None is kept twice.

    Times are those of the time stamps until one does not rise: that file's mean nothing, and from
    there on they are those of a steady `rate`, in decode order.

    Args:
      fps: frames per second to keep.
      rate: frames per second by the header, 0.0 if it says nothing.
    """

    def __init__(self, fps: float, rate: float):
        self._fps = fps
        self._rate = rate
        self._stamped = True
        self._start = self._last = None  # time stamps in seconds
        self._count = 0
        self._point = -1  # the last one that has its frame

    def keeps(self, stamp: float | None) -> bool:
        """Takes the time stamp of the next frame, in seconds."""
        if stamp is None or (self._last is not None and stamp <= self._last):
            self._stamped = False
        if self._stamped:
            self._start = stamp if self._start is None else self._start
            self._last = stamp
            time = stamp - self._start
        elif self._rate:
            time = self._count / self._rate
        else:
            return True  # nothing is known of time
        self._count += 1
        half = 0.5 / self._rate if self._rate else 0.0  # of the time to the next frame
        point = math.floor((time + half) * self._fps + 1e-6)
        if point <= self._point:
            return False
        self._point = point
        return True


def decode_frames(
    path: str, limits: DecodeLimits, short_side: int | None = None, fps: float | None = None
) -> FrameReader:
    """Opens a video for one pass over its frames.

    Frames come in decode order (time stamps lie), upright (rotation metadata is applied), all of
    the first frame's size even if the stream changes size. Pixels are taken as square, as the
    field's loaders do. Colours are converted by the matrix and range that the file names; one that
    names none has BT.601's and limited range, whatever its size, as in ffmpeg and decord. HDR is
    not tone-mapped. A video that breaks midway gives its good frames, one whose beginning cannot be
    decoded those after it, and the reader's `truncated` then says why.

    Args:
      path: a video file.
      limits: `max_pixels` and `max_frames` are checked here; `seconds` and `memory_mb` only in a
        `WorkerPool`.
      short_side: pixels of the shorter side after scaling, aspect kept; with None, or where the
        video is smaller, frames keep their size.
      fps: frames per second of presentation time to keep; with None, or where the video has fewer,
        all frames.

    Returns:
      A `FrameReader`: iterate for uint8 [H, W, 3] RGB frames, 0..255.

    Raises:
      VideoError: missing or unreadable file, no video stream, or too large (here); no frame at
        all, or too many (on iteration).
    """
    return FrameReader(path, limits, short_side, fps)


def video_to_jpegs(
    path: str, short_side: int | None, quality: int, limits: DecodeLimits, fps: float | None = None
) -> tuple[list[bytes], VideoFacts]:
    """Decodes a whole video and compresses each frame as JPEG (4:2:0, `quality` 1..95).

    Returns:
      One JPEG file per frame, in decode order, and what is known of the video.

    Raises:
      VideoError: as `decode_frames`.
    """
    reader = decode_frames(path, limits, short_side, fps)
    jpegs, shape = [], ()
    for frame in reader:
        jpegs.append(to_jpeg(frame, quality))
        shape = frame.shape[:2]
    return jpegs, VideoFacts(len(jpegs), reader.fps, *shape, reader.truncated, _size(jpegs))


def check_video(
    path: str, short_side: int | None, quality: int, limits: DecodeLimits, fps: float | None = None
) -> VideoFacts:
    """Decodes a whole video as `video_to_jpegs` does, but compresses only one frame in 16.

    Returns:
      What `video_to_jpegs` would know of it, with `num_bytes` estimated.

    Raises:
      VideoError: as `decode_frames`.
    """
    reader = decode_frames(path, limits, short_side, fps)
    jpegs, count, shape = [], 0, ()
    for frame in reader:
        if count % _CHECKED_FRAMES == 0:
            jpegs.append(to_jpeg(frame, quality))
        count += 1
        shape = frame.shape[:2]
    num_bytes = round(_size(jpegs) / len(jpegs) * count)
    return VideoFacts(count, reader.fps, *shape, reader.truncated, num_bytes)


def to_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """A uint8 [H, W, 3] RGB frame as a JPEG file (4:2:0, `quality` 1..95)."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _size(jpegs: list[bytes]) -> int:
    return sum(map(len, jpegs))


def _open(path: str):
    if not os.path.isfile(path):
        raise VideoError(NOT_FOUND)
    try:
        # "file:" and the white list: "a:b.mp4" is no URL, and a play list opens no connection.
        container = av.open(
            "file:" + path,
            container_options={"protocol_whitelist": "file"},
            **ANY_TAGS,
        )
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError, OSError) as problem:
        raise VideoError(f"cannot be opened as a video ({describe_video(problem)})") from None
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
    frame.colorspace = _MATRICES.get(frame.colorspace, frame.colorspace)
    frame = frame.reformat(
        width=width, height=height, format="rgb24", interpolation="AREA", threads=1
    )
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(), turns))


def describe_video(problem: BaseException) -> str:
    """An exception in one line, for the list of bad videos."""
    return f"{type(problem).__name__}: {getattr(problem, 'strerror', None) or problem}"

"""Decodes video files to frames: `decode_frames`, `video_to_jpegs`, `check_video`, `to_jpeg`.

Video files are untrusted: some hang a decoder, crash it, or claim sizes that fill the memory. Many
files are therefore decoded in the processes of `worker_pool.WorkerPool`. These import this module,
which therefore imports nothing heavy.
"""

import dataclasses
import io
import math
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import av
import av.logging
import av.stream
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from PIL import Image

from dualpath_jax.runtime.safe_read import check_regular

if TYPE_CHECKING:
    from dualpath_jax.data.preparation.image_folder import ImageFolderReader

NOT_FOUND = "file not found"
MAX_SIDE = 65_500  # pixels, the limit of JPEG

# Demuxers that make "videos" of text, playlists and still images. ("png_pipe" and other names that
# end in "_pipe" are refused too.)
_NON_VIDEO_FORMATS = frozenset(
    {"concat", "dash", "hls", "image2", "imf", "lrc", "sdp", "srt", "tty", "webvtt"}
)

# Arguments of `av.open` that make it accept tags outside UTF-8. PyAV 19 and later always accept
# them and do not have this argument.
IGNORE_TAG_ERRORS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# Color matrices (AVColorSpace) that swscale does not support -> the matrices used instead. BT.2020
# with constant luminance is close to the one without; YCgCo and reserved numbers count as untagged.
_MATRIX_SUBSTITUTES = {10: 9} | dict.fromkeys((3, 8, *range(11, 32)), 2)
# Codecs of still images, whose "streams" are covers and thumbnails of another stream.
_STILL_CODECS = frozenset({"bmp", "gif", "mjpeg", "png", "tiff", "webp"})
_CHECK_INTERVAL = 16  # `check_video` compresses one of so many frames


class VideoError(Exception):
    """Reports a video that cannot be used; the message gives the reason in plain words."""


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """Limits the cost of decoding one file; a file that exceeds a limit is bad.

    Attributes:
      seconds: wall-clock seconds for one file in `WorkerPool`. The default is far more than a short
        clip takes; a file that needs longer has most likely sent the decoder into a loop.
      memory_mb: MiB of address space that a worker may map in addition to what it has at its start.
        The default is twice what an 8K stream with 16 reference frames needs; the limit keeps one
        file from filling the machine's memory.
      max_pixels: width x height. The default is the largest frame of H.264 level 6.2 and AV1
        level 6.3; more indicates a broken header or an attack.
      max_frames: number of frames kept. The default is 11 minutes at 30 fps; more indicates a file
        that is not an action clip.
    """

    seconds: float = 60.0
    memory_mb: int = 2048
    max_pixels: int = 8192 * 4352
    max_frames: int = 20_000


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Describes a decoded video.

    Attributes:
      num_frames: number of frames kept, at least 1.
      fps: frames per second, as in `FrameReader.fps`.
      height: pixels of every frame, after rotation and scaling.
      width: pixels of every frame, after rotation and scaling.
      truncated: the missing part and the reason, as in `FrameReader.truncated`.
      num_bytes: bytes of all its JPEG files together.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    truncated: str
    num_bytes: int


class FrameReader:
    """Iterates once over the frames of one video. See `decode_frames`.

    Attributes:
      fps: frames per second of the header, or the requested ones if these are fewer; 0.0 if both
        are unknown.
      time: seconds from the first frame to the one that was yielded last, see `FrameClock`; None
        if times are unknown.
      end: seconds from the first frame to the end of the one that was decoded last.
      truncated: which part of the video is missing and why, "" if it is complete; it is set when
        the iteration has ended.
    """

    def __init__(
        self, path: str, limits: DecodeLimits, short_side: int | None, fps: float | None = None
    ):
        self._limits = limits
        self._short_side = short_side
        self._container = _open_container(path)
        try:
            self._stream = _find_video_stream(self._container)
            codec = self._stream.codec_context
            codec.thread_count = 1  # the worker processes run in parallel
            codec.thread_type = "NONE"
            self._check_pixels(self._stream.width, self._stream.height)
            self._rate = float(self._stream.guessed_rate or self._stream.average_rate or 0)
        except BaseException:
            self._container.close()
            raise
        self._rate_filter = FrameRateFilter(fps, self._rate) if fps else None
        self.fps = float(min(fps, self._rate or fps)) if fps else self._rate
        self._clock = FrameClock(self._rate)
        self.time: float | None = None
        self.end = 0.0
        self.truncated = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield uint8 [H, W, 3] RGB frames, 0..255.

        Raises:
          VideoError: no frame can be decoded, or there are too many.
        """
        count, size, end, error = 0, None, None, ""
        with self._container:
            frames = self._decode_packets()
            while True:
                try:
                    frame = next(frames, None)
                    if frame is None:
                        break
                    time = self._clock.tick(frame.time)
                    if frame.time is not None:
                        end = max(end or frame.time, frame.time + self._display_seconds(frame))
                    if time is not None:
                        self.end = max(self.end, time + self._display_seconds(frame))
                    if self._rate_filter and not self._rate_filter.should_keep(time):
                        continue
                    self._check_pixels(frame.width, frame.height)
                    orientation = Orientation.of_frame(frame)
                    size = size or self._target_size(frame, orientation)
                    image = _convert_to_rgb(frame, size, orientation)
                except MemoryError:
                    raise
                except (av.FFmpegError, ValueError) as problem:
                    error = describe_error(problem)
                    break
                if count == self._limits.max_frames:
                    raise VideoError(
                        f"more than {self._limits.max_frames} frames (--max_frames allows more)"
                    )
                self.time = time
                yield image
                count += 1
            if not count:
                reason = error or self._bad_start or "the stream is empty"
                raise VideoError(f"no frame could be decoded ({reason})")
            if error or self._cut_reason:
                self.truncated = f"after {count} frames: {error or self._cut_reason}"
            elif self._lost_packets:
                self.truncated = (
                    f"{self._lost_packets} packets cannot be decoded, {self._lost_reason}"
                )
            elif self._bad_start:
                self.truncated = f"does not begin with a frame: {self._bad_start}"
            else:
                self.truncated = self._describe_early_end(end)

    def _decode_packets(self) -> Iterator[av.VideoFrame]:
        """Yield the decoded frames; skip packets that fail."""
        self._bad_start = self._cut_reason = self._lost_reason = ""
        self._lost_packets, decoded = 0, 0
        self._started = False
        for packet in self._read_packets():
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except (av.FFmpegError, ValueError) as problem:
                if self._started:
                    reason = f"the first after {decoded} frames: {describe_error(problem)}"
                    self._lost_packets += 1
                    self._lost_reason = self._lost_reason or reason
                else:
                    self._bad_start = self._bad_start or describe_error(problem)
                continue
            self._started = self._started or bool(frames)
            decoded += len(frames)
            yield from frames

    def _read_packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the stream, except one in whose middle the file ends.

        The last packet is empty: it flushes the decoder.
        """
        held = None  # a corrupt packet, until the next one shows whether the file ends here
        for packet in self._container.demux(self._stream):
            if held is not None and packet.size:  # the file continues: only a part was lost
                yield held
            elif held is not None:
                self._cut_reason = "the rest of the file is missing"
            held = packet if packet.is_corrupt and self._started else None
            if held is None:
                yield packet

    def _display_seconds(self, frame: av.VideoFrame) -> float:
        """Return the seconds for which a frame is displayed, 0.0 if unknown."""
        if frame.duration and frame.time_base:
            return float(frame.duration * frame.time_base)
        return 1 / self._rate if self._rate else 0.0

    def _check_pixels(self, width: int, height: int) -> None:
        """Raise a VideoError if a frame is too large."""
        if width * height > self._limits.max_pixels:
            raise VideoError(
                f"{width}x{height} pixels, more than the limit of {self._limits.max_pixels}"
            )

    def _target_size(self, frame: av.VideoFrame, orientation: "Orientation") -> tuple[int, int]:
        """Return (height, width) of the yielded frames: those of the first frame, scaled."""
        height, width = scaled_size(frame.height, frame.width, self._short_side)
        return (width, height) if orientation.transposed else (height, width)

    def _describe_early_end(self, end: float | None) -> str:
        """Return a sentence if the header claims more than `end`, in seconds, and "" otherwise.

        It finds mkv files that are cut off, for which the demuxer reports no error.
        """
        if end is None:
            return ""
        stream, container = self._stream, self._container
        if stream.duration:
            claimed = float(stream.duration * stream.time_base)
        elif "DURATION" in stream.metadata:  # mkv's, of this stream
            claimed = _parse_clock(stream.metadata["DURATION"])
        elif len(container.streams) == 1:
            claimed = (container.duration or 0) / av.time_base
        else:
            return ""  # the file's duration may be that of the sound
        seen = end - (container.start_time or 0) / av.time_base
        # Headers are often wrong by a frame or two, and the sound may be longer than the frames.
        if claimed - seen > max(0.5, 0.1 * claimed):
            return f"ends after {seen:.1f} s of the {claimed:.1f} s its header claims"
        return ""


def scaled_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Return (height, width) with the shorter side reduced to `short_side`, if that is smaller."""
    if not short_side or min(height, width) <= short_side:
        return height, width
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


class FrameClock:
    """Computes the times of the frames of a stream, in seconds from its first frame.

    They are the time stamps until a time stamp does not increase. The time stamps of such a file
    are wrong; from there on, the times are those of a steady `rate`, in decode order.

    Args:
      rate: frames per second of the header, 0.0 if unknown.
    """

    def __init__(self, rate: float):
        self._rate = rate
        self._use_stamps = True
        self._start = self._last = None  # time stamps in seconds
        self._count = 0

    def tick(self, stamp: float | None) -> float | None:
        """Return the time of the next frame, None if it is unknown.

        Args:
          stamp: the frame's time stamp in seconds, None if it has none.
        """
        count = self._count
        self._count += 1
        if stamp is None or (self._last is not None and stamp <= self._last):
            self._use_stamps = False
        if self._use_stamps:
            self._start = stamp if self._start is None else self._start
            self._last = stamp
            return stamp - self._start
        return count / self._rate if self._rate else None


class FrameRateFilter:
    """Selects the frames of a stream to keep, so that at most `fps` remain of each second.

    The first frame begins a grid of points 1/fps seconds apart. Each point keeps the first frame
    that comes no more than half a frame's duration before it; in a steady stream that is the
    nearest one. Where frames are farther apart than points, all are kept, each once.

    Args:
      fps: frames per second to keep, above 0.
      rate: frames per second of the header, 0.0 if unknown.
    """

    def __init__(self, fps: float, rate: float):
        self._fps = fps
        self._half_frame = 0.5 / rate if rate else 0.0  # seconds
        self._point = -1  # the last grid point that has kept a frame

    def should_keep(self, time: float | None) -> bool:
        """Return True if the next frame is to be kept; call it once per frame, in order.

        Args:
          time: of the frame, by a `FrameClock`; None if it is unknown.
        """
        if time is None:
            return True
        point = math.floor((time + self._half_frame) * self._fps + 1e-6)
        if point <= self._point:
            return False
        self._point = point
        return True


def decode_frames(
    path: str,
    limits: DecodeLimits,
    short_side: int | None = None,
    fps: float | None = None,
    frame_rate: float | None = None,
) -> "FrameReader | ImageFolderReader":
    """Open a video, a file or a folder of images, for one pass over its frames.

    Frames come in decode order, because time stamps may be wrong. They are upright (the display
    matrix is applied) and have the size of the first frame even if the stream changes size.
    Pixels are taken as square, as other loaders of video datasets do. Colors are converted with the
    matrix and range that the file names; the defaults are BT.601 and limited range at every size,
    as in ffmpeg and decord. HDR is not tone-mapped. A video that breaks off yields the frames
    before the break; of one with damaged packets, the frames that decode are yielded. The reader's
    `truncated` then gives the reason.

    Args:
      path: a video file, or a folder of images, see `image_folder`.
      limits: `max_pixels` and `max_frames` are checked here; `seconds` and `memory_mb` only in a
        `WorkerPool`.
      short_side: pixels of the shorter side after scaling, aspect kept. If it is None or the video
        is smaller, frames keep their size.
      fps: frames per second of presentation time to keep, above 0. If it is None or the video has
        fewer, all frames are kept.
      frame_rate: frames per second of a folder of images; None: unknown.

    Returns:
      A `FrameReader` or `ImageFolderReader`, which yields uint8 [H, W, 3] RGB frames, 0..255.

    Raises:
      VideoError: the file is missing or unreadable, has no video stream, or is too large (on this
        call); it has no frame or too many (on iteration).
    """
    if os.path.isdir(path):
        from dualpath_jax.data.preparation.image_folder import ImageFolderReader  # imports this one

        return ImageFolderReader(path, limits, short_side, fps, frame_rate)
    return FrameReader(path, limits, short_side, fps)


def video_to_jpegs(
    path: str,
    short_side: int | None,
    quality: int,
    limits: DecodeLimits,
    fps: float | None = None,
    frame_rate: float | None = None,
) -> tuple[list[bytes], VideoInfo]:
    """Decode a whole video and compress each frame as JPEG with 4:2:0 subsampling.

    Args:
      path, short_side, limits, fps, frame_rate: as for `decode_frames`.
      quality: JPEG quality, 1..95.

    Returns:
      One JPEG file per frame, in decode order, and the description of the video.

    Raises:
      VideoError: as from `decode_frames` and on iteration.
    """
    reader = decode_frames(path, limits, short_side, fps, frame_rate)
    jpegs, shape = [], ()
    for frame in reader:
        jpegs.append(to_jpeg(frame, quality))
        shape = frame.shape[:2]
    return jpegs, VideoInfo(len(jpegs), reader.fps, *shape, reader.truncated, _total_bytes(jpegs))


def check_video(
    path: str,
    short_side: int | None,
    quality: int,
    limits: DecodeLimits,
    fps: float | None = None,
    frame_rate: float | None = None,
) -> VideoInfo:
    """Decode a whole video as `video_to_jpegs` does, but compress only one frame in 16.

    Returns:
      The description that `video_to_jpegs` returns, with `num_bytes` estimated.

    Raises:
      VideoError: as from `video_to_jpegs`.
    """
    reader = decode_frames(path, limits, short_side, fps, frame_rate)
    jpegs, count, shape = [], 0, ()
    for frame in reader:
        if count % _CHECK_INTERVAL == 0:
            jpegs.append(to_jpeg(frame, quality))
        count += 1
        shape = frame.shape[:2]
    num_bytes = round(_total_bytes(jpegs) / len(jpegs) * count)
    return VideoInfo(count, reader.fps, *shape, reader.truncated, num_bytes)


def to_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """Compress a uint8 [H, W, 3] RGB frame as a JPEG file (4:2:0, `quality` 1..95)."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _total_bytes(jpegs: list[bytes]) -> int:
    return sum(map(len, jpegs))


def _open_container(path: str):
    """Open a local video file; VideoError if that fails."""
    try:
        check_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise VideoError(NOT_FOUND) from None
    except OSError as problem:  # links that lead to themselves, or no permission
        raise VideoError(f"cannot be opened as a video ({describe_error(problem)})") from None
    except ValueError as problem:
        raise VideoError(str(problem).removeprefix(f"{path} is ")) from None
    try:
        # "file:" keeps "a:b.mp4" from being read as a URL; with the allowed protocols a playlist
        # cannot open a connection.
        container = av.open(
            "file:" + path,
            container_options={"protocol_whitelist": "file"},
            **IGNORE_TAG_ERRORS,
        )
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError, OSError) as problem:
        raise VideoError(f"cannot be opened as a video ({describe_error(problem)})") from None
    return container


def _find_video_stream(container):
    """Return the video stream that a player would choose; VideoError if there is none.

    Moving pictures come before covers and thumbnails, then the stream that is marked as default,
    then the one with most pixels.
    """
    if container.format.name in _NON_VIDEO_FORMATS or container.format.name.endswith("_pipe"):
        raise VideoError(f"not a video (format {container.format.name})")
    attached = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        raise VideoError("no video stream" + (", only audio" if container.streams.audio else ""))
    streams = [stream for stream in streams if stream.codec_context is not None]
    if not streams:
        raise VideoError("there is no decoder for its video stream")

    def rank(stream: av.VideoStream) -> tuple[bool, bool, int]:
        moving = stream.codec_context.name not in _STILL_CODECS and stream.frames != 1
        default = bool(stream.disposition & av.stream.Disposition.default)
        return moving, default, stream.width * stream.height

    return max(streams, key=rank)  # of equals the first


def _parse_clock(text: str) -> float:
    """Return the seconds of "00:01:02.5", 0.0 for anything else."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


@dataclasses.dataclass(frozen=True)
class Orientation:
    """Describes how a stored frame is made upright, one of eight ways.

    Attributes:
      transposed: exchange rows and columns, first of all.
      mirrored: reverse the columns.
      upside_down: reverse the rows.
    """

    transposed: bool = False
    mirrored: bool = False
    upside_down: bool = False

    @classmethod
    def of_frame(cls, frame: av.VideoFrame) -> "Orientation":
        """Return the orientation by the frame's display matrix, to the nearest quarter turn.

        The matrix (libavutil/display.h) maps the stored point (p, q) to (a p + c q, b p + d q).
        """
        matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
        if matrix is None:
            return cls()
        a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the upright image [H, W, 3] of a stored one."""
        if self.transposed:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


def _convert_to_rgb(
    frame: av.VideoFrame, size: tuple[int, int], orientation: Orientation
) -> np.ndarray:
    """Return a frame as uint8 [H, W, 3] RGB, upright, of `size` (height, width).

    Args:
      frame: a decoded frame, as stored in the file.
      size: height and width of the upright frame.
      orientation: makes the frame upright.
    """
    height, width = size[::-1] if orientation.transposed else size
    frame.colorspace = _MATRIX_SUBSTITUTES.get(frame.colorspace, frame.colorspace)
    frame = frame.reformat(
        width=width, height=height, format="rgb24", interpolation="AREA", threads=1
    )
    return np.ascontiguousarray(orientation.apply(frame.to_ndarray()))


def describe_error(problem: BaseException) -> str:
    """Describe an exception in one line, for the list of bad videos."""
    return f"{type(problem).__name__}: {getattr(problem, 'strerror', None) or problem}"

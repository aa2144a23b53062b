"""Reads a folder of images, such as video/img_00001.jpg, as one video.

The images are in the order of their numbers. As other videos, these folders are untrusted.
"""

import collections
import os
import re
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from dualpath_jax.data.preparation.video_decoder import (
    DecodeLimits,
    FrameRateFilter,
    VideoError,
    describe_error,
    scaled_size,
)
from dualpath_jax.data.preparation.video_names import IMAGE_SUFFIXES
from dualpath_jax.runtime.safe_read import check_regular

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_OPTICAL_FLOW = "flow"  # names of images of optical flow, which may lie next to the frames
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.ASCII | re.DOTALL)


class ImageFolderReader:
    """Iterates once over the images of a folder, as `video_decoder.FrameReader` over a file.

    Attributes:
      fps: frames per second of the folder, or the requested ones if these are fewer; 0.0 if it is
        unknown.
      time: seconds from the first frame to the one that was yielded last; None if unknown.
      end: seconds from the first frame to the end of the one that was read last.
      truncated: which images are missing or unreadable, "" if none; set when the iteration ends.

    Args:
      path: the folder.
      limits: `max_pixels` and `max_frames` are checked.
      short_side, fps: see `video_decoder.decode_frames`.
      frame_rate: frames per second of the folder; None: unknown.

    Raises:
      VideoError: the names of the images give no order, there are fewer than two images, or `fps`
        needs a frame rate.
    """

    def __init__(
        self,
        path: str,
        limits: DecodeLimits,
        short_side: int | None,
        fps: float | None,
        frame_rate: float | None,
    ):
        if fps and not frame_rate:
            raise VideoError("a folder of images has no frame rate: pass --frame_rate")
        self._path, self._limits, self._short_side = path, limits, short_side
        self._names, self._gaps = _sort_images(path)
        self._rate = frame_rate or 0.0
        self._rate_filter = FrameRateFilter(fps, self._rate) if fps else None
        self.fps = float(min(fps, self._rate)) if fps else float(self._rate)
        self.time: float | None = None
        self.end = 0.0
        self.truncated = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield uint8 [H, W, 3] RGB frames, 0..255.

        Raises:
          VideoError: no image can be read, they differ in size, or there are too many.
        """
        count, first, broken = 0, None, []
        for position, name in enumerate(self._names):
            time = position / self._rate if self._rate else None
            if self._rate_filter and not self._rate_filter.should_keep(time):
                continue
            try:
                image = _read_image(os.path.join(self._path, name), self._limits)
            except (MemoryError, VideoError):
                raise
            except Exception as problem:  # decoders raise many kinds for damaged images
                broken.append(f"{name!r}, {describe_error(problem)}")
                continue
            first = first or (name, image.size)
            if image.size != first[1]:
                sizes = ["{}x{} ({!r})".format(*size, n) for n, size in (first, (name, image.size))]
                raise VideoError(f"images of different sizes: {' and '.join(sizes)}")
            if count == self._limits.max_frames:
                raise VideoError(
                    f"more than {self._limits.max_frames} frames (--max_frames allows more)"
                )
            self.time, self.end = time, (position + 1) / self._rate if self._rate else 0.0
            size = scaled_size(image.height, image.width, self._short_side)
            if size != (image.height, image.width):
                image = image.resize(size[::-1], Image.Resampling.BOX)
            yield np.asarray(image)
            count += 1
        if not count:
            raise VideoError(f"no image can be read (the first is {broken[0]})")
        problems = [self._gaps] if self._gaps else []
        if broken:
            problems.append(f"{len(broken)} images cannot be read, the first is {broken[0]}")
        self.truncated = "; ".join(problems)


def _sort_images(folder: str) -> tuple[list[str], str]:
    """Return the names of the frames in a folder by number, and a sentence on missing numbers.

    Images of optical flow next to the frames are left out.

    Raises:
      VideoError: the numbers give no order, or there are fewer than two frames.
    """
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as problem:
        raise VideoError(f"cannot be opened as a folder ({describe_error(problem)})") from None
    kinds: dict[tuple[str, str], list[tuple[int, str]]] = collections.defaultdict(list)
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            match = _NUMBERED.fullmatch(stem)
            before, number, after = match.groups() if match else (stem, "0", "")
            kinds[before, after].append((int(number[-18:]), name))
    if len(kinds) > 1:
        kinds = {k: v for k, v in kinds.items() if not k[0].lower().startswith(_OPTICAL_FLOW)}
    if not kinds:
        raise VideoError("a folder without images")
    if len(kinds) > 1:
        first, second = (members[0][1] for members in list(kinds.values())[:2])
        raise VideoError(
            f"the names of its images differ in more than one number, such as {first!r} and "
            f"{second!r}: name them by one number, img_00001.jpg"
        )
    [images] = kinds.values()
    images.sort()
    if len(images) < 2:
        raise VideoError(f"one image, {images[0][1]!r}, is not a video")
    return [name for _, name in images], _describe_gaps(images)


def _describe_gaps(images: list[tuple[int, str]]) -> str:
    """Return a sentence on the numbers that are missing, "" if none are.

    Args:
      images: (number, name) of each image, sorted.

    Raises:
      VideoError: two images have one number.
    """
    pairs = list(zip(images, images[1:], strict=False))
    steps = [later - earlier for (earlier, _), (later, _) in pairs]
    if 0 in steps:
        (number, first), (_, second) = pairs[steps.index(0)]
        raise VideoError(f"two images have the number {number}: {first!r} and {second!r}")
    gaps = [pair for pair, step in zip(pairs, steps, strict=True) if step != min(steps)]
    if not gaps or 2 * len(gaps) > len(steps):  # or the numbers do not count frames
        return ""
    (_, before), (_, after) = gaps[0]
    others = f" and in {len(gaps) - 1} other places" if len(gaps) > 1 else ""
    return f"numbers are missing between {before!r} and {after!r}{others}"


def _read_image(path: str, limits: DecodeLimits) -> Image.Image:
    """Return an image, upright, in RGB.

    Raises:
      VideoError: it is too large, also for Pillow, or has more than 8 bits.
      Exception: it is damaged.
    """
    check_regular(path)
    name = os.path.basename(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
        try:
            opened = Image.open(path, formats=_FORMATS)
        except Image.DecompressionBombError as problem:  # Pillow has a limit of its own
            raise VideoError(f"{name!r}: {problem}") from None
        with opened as image:
            if image.width * image.height > limits.max_pixels:
                raise VideoError(
                    f"{image.width}x{image.height} pixels ({name!r}), more than the limit of "
                    f"{limits.max_pixels}"
                )
            if image.mode.startswith(("I", "F")):
                raise VideoError(f"{name!r} has more than 8 bits a channel: store it with 8")
            return ImageOps.exif_transpose(image).convert("RGB")

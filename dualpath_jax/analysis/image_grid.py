"""Draws heat maps over frames and arranges images in grids; writes PNG and GIF files."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dualpath_jax.runtime import files

_GAP = 4  # pixels between pictures
_LINE_HEIGHT = 16  # pixels for a line of text
_OVERLAY_STRENGTH = 0.75  # opacity of the color at the highest attention
_COLORS = np.array(
    [(0, 60, 255), (0, 190, 255), (255, 230, 0), (255, 0, 0)]
)  # at 0, 1/3, 2/3 and 1


def upscale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image to `size` (width, height) in pixels, bicubically; uint8 [H, W, 3]."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def overlay_heatmap(image: np.ndarray, attention: np.ndarray, hottest: float) -> np.ndarray:
    """Draw attention over a gray image, in colors from blue through yellow to red.

    Zero attention leaves the image gray. The color depends on the square root of the attention, so
    that a tenth of the highest value is still visible.

    Args:
      image: uint8 [H, W, 3].
      attention: [h, w], not negative. Its cells divide the image; each has one color.
      hottest: attention with the last color. Images with the same value can be compared.

    Returns:
      uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * attention.shape[0] // height
    columns = np.arange(width) * attention.shape[1] // width
    level = np.sqrt(np.clip(attention / max(hottest, 1e-12), 0, 1))[rows][:, columns]
    stops = np.linspace(0, 1, len(_COLORS))
    color = np.stack([np.interp(level, stops, channel) for channel in _COLORS.T], axis=-1)
    opacity = _OVERLAY_STRENGTH * level[..., None]
    gray = image.mean(axis=-1, keepdims=True)  # only the attention has colors
    return np.round(gray * (1 - opacity) + color * opacity).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds a row of pictures, uint8 [H, W, 3] of one height, and the line of text above them."""

    title: str
    pictures: Sequence[np.ndarray]


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load matplotlib's font, which covers most scripts; `size` is in pixels."""
    fonts = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(fonts, "DejaVuSans.ttf"), size)


def draw_grid(rows: Sequence[Row]) -> Image.Image:
    """Draw the rows below one another on white."""
    widths = [sum(picture.shape[1] + _GAP for picture in row.pictures) for row in rows]
    heights = [_LINE_HEIGHT + row.pictures[0].shape[0] + _GAP for row in rows]
    font = load_font(10)
    text = max(font.getlength(row.title) for row in rows)
    canvas = Image.new("RGB", (max(*widths, int(text)) + _GAP, sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, height in zip(rows, heights, strict=True):
        draw.text((_GAP, top + 2), row.title, fill="black", font=font)
        left = _GAP
        for picture in row.pictures:
            canvas.paste(Image.fromarray(picture), (left, top + _LINE_HEIGHT))
            left += picture.shape[1] + _GAP
        top += height
    return canvas


def write_png(path: str, picture: Image.Image) -> None:
    """Write a picture as PNG with 256 colors, which makes the file smaller."""
    with files.atomic_path(path) as temporary:
        picture.quantize(256, method=Image.Quantize.MEDIANCUT).save(temporary, optimize=True)


def write_gif(path: str, pictures: Sequence[Image.Image], milliseconds: int = 200) -> None:
    """Write the pictures as a GIF that repeats; each is shown for `milliseconds`."""
    first, *others = [picture.convert("P", palette=Image.Palette.ADAPTIVE) for picture in pictures]
    with files.atomic_path(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=milliseconds, loop=0)


def unused_path(folder: pathlib.Path, video: str, taken: set[str]) -> pathlib.Path:
    """Return a path without suffix for the pictures of `video`, and add its name to `taken`.

    Videos with the same name are numbered.

    Args:
      folder: folder of the pictures.
      video: path of the video file.
      taken: names that are in use; is changed.
    """
    stem = name = pathlib.Path(video).stem
    number = 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return folder / name

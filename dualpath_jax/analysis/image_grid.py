"""Draws heat maps over frames and arranges images in grids; writes PNG and GIF files."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dualpath_jax.runtime import files

GAP = 4  # pixels between pictures
_MAX_NAME_BYTES = 200  # of a file name's stem; file systems allow 255 with suffixes
_FONT_SIZE = 14
_LINE_HEIGHT = 22  # pixels for a line of text
_BAR = (240, 12)  # (width, height) of the color bar
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
      attention: [h, w], not negative; is interpolated to the pixels of the image.
      hottest: attention with the last color. Images with the same value can be compared.

    Returns:
      uint8 [H, W, 3].
    """
    attention = Image.fromarray(attention.astype(np.float32)).resize(
        image.shape[1::-1], Image.Resampling.BILINEAR
    )
    level = np.sqrt(np.clip(np.asarray(attention) / max(hottest, 1e-12), 0, 1))[..., None]
    gray = image.mean(axis=-1, keepdims=True)  # only the attention has colors
    return np.round(gray + _OVERLAY_STRENGTH * level * (_color(level) - gray)).astype(np.uint8)


def _color(level: np.ndarray) -> np.ndarray:
    """Map levels [..., 1] in 0..1 to colors [..., 3] in 0..255."""
    stops = np.linspace(0, 1, len(_COLORS))
    return np.concatenate([np.interp(level, stops, channel) for channel in _COLORS.T], axis=-1)


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds a row of pictures, and the line of text above them.

    Attributes:
      title: text at the left. If it has several parts, they divide the row equally.
      pictures: uint8 [H, W, 3], all of one size.
    """

    title: str | Sequence[str]
    pictures: Sequence[np.ndarray]


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load matplotlib's font, which covers most scripts; `size` is in pixels."""
    fonts = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(fonts, "DejaVuSans.ttf"), size)


def draw_grid(rows: Sequence[Row]) -> Image.Image:
    """Draw the rows below one another on white, and the scale of colors below them."""
    font = load_font(_FONT_SIZE)
    titles = [[row.title] if isinstance(row.title, str) else list(row.title) for row in rows]
    widths = [len(row.pictures) * (row.pictures[0].shape[1] + GAP) for row in rows]
    texts = [len(t) * (max(map(font.getlength, t)) + 4 * GAP) for t in titles]
    heights = [_LINE_HEIGHT + row.pictures[0].shape[0] + GAP for row in rows]
    size = (int(max(*widths, *texts)) + GAP, sum(heights) + _LINE_HEIGHT)
    canvas = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, parts, width, height in zip(rows, titles, widths, heights, strict=True):
        for number, text in enumerate(parts):
            left = GAP + number * width // len(parts)
            draw.text((left, top + 3), text, fill="black", font=font)
        for number, picture in enumerate(row.pictures):
            left = GAP + number * (picture.shape[1] + GAP)
            canvas.paste(Image.fromarray(picture), (left, top + _LINE_HEIGHT))
        top += height
    _draw_legend(canvas, top)
    return canvas


def _draw_legend(canvas: Image.Image, top: int) -> None:
    """Draw the color bar of `overlay_heatmap` with its two ends named, over the width at `top`."""
    draw, font = ImageDraw.Draw(canvas), load_font(_FONT_SIZE - 2)
    first, last = "no attention", "highest of its row (square root)"
    words = font.getlength(first) + font.getlength(last) + 4 * GAP
    width, height = min(_BAR[0], max(1, canvas.width - int(words))), _BAR[1]
    bar = overlay_heatmap(
        np.full((height, width, 3), 128, np.uint8), np.linspace(0, 1, width)[None] ** 2, 1.0
    )
    draw.text((GAP, top + 3), first, fill="black", font=font)
    left = 2 * GAP + int(font.getlength(first))
    canvas.paste(Image.fromarray(bar), (left, top + 5))
    draw.text((left + width + GAP, top + 3), last, fill="black", font=font)


def write_png(path: str, picture: Image.Image) -> None:
    """Write a picture as PNG with 256 colors, dithered, which makes the file smaller."""
    palette = picture.quantize(256, method=Image.Quantize.MEDIANCUT)
    picture = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    with files.atomic_path(path) as temporary:
        picture.save(temporary, optimize=True)


def write_gif(path: str, pictures: Sequence[Image.Image], milliseconds: int = 200) -> None:
    """Write the pictures as a GIF that repeats; each is shown for `milliseconds`."""
    first, *others = [picture.convert("P", palette=Image.Palette.ADAPTIVE) for picture in pictures]
    with files.atomic_path(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=milliseconds, loop=0)


def replace_unprintable(text: str) -> str:
    """Return a text with "_" for control characters and for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "_" for c in text)


def unused_path(folder: pathlib.Path, video: str, taken: set[str]) -> pathlib.Path:
    """Return a path without suffix for the pictures of `video`, and add its name to `taken`.

    Videos with the same name are numbered. Control characters and bytes that are not UTF-8 become
    "_", and long names are cut, so that a suffix fits.

    Args:
      folder: folder of the pictures.
      video: path of the video file.
      taken: names that are in use; is changed.
    """
    stem = replace_unprintable(pathlib.Path(video).stem)
    stem = name = stem.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    number = 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return folder / name

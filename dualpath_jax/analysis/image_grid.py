"""Pictures of attention: heat maps over frames, grids of them as PNG, a clip as GIF.

Public: `upscale`, `overlay_heatmap`, `Row`, `text_font`, `draw_grid`, `write_png`, `write_gif`, `unused_path`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between pictures
LINE = 16  # pixels for a line of text
STRENGTH = 0.75  # how much of the picture the hottest place hides
_COLOURS = np.array([(0, 60, 255), (0, 190, 255), (255, 230, 0), (255, 0, 0)])  # of 0, 1/3, ... 1


def upscale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at `size` (width, height) pixels, smooth."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def overlay_heatmap(image: np.ndarray, attention: np.ndarray, hottest: float) -> np.ndarray:
    """Attention over a picture in grey: from blue over yellow to red; none leaves the grey.

    Colours go by the square root, so that what is a tenth of the hottest is still seen.

    Args:
      image: uint8 [H, W, 3].
      attention: [h, w], not negative; one shade for each of its places, which divide the picture.
      hottest: what has the last colour, so that pictures can be compared.

    Returns:
      uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * attention.shape[0] // height
    columns = np.arange(width) * attention.shape[1] // width
    level = np.sqrt(np.clip(attention / max(hottest, 1e-12), 0, 1))[rows][:, columns]
    stops = np.linspace(0, 1, len(_COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in _COLOURS.T], axis=-1)
    hidden = STRENGTH * level[..., None]
    grey = image.mean(axis=-1, keepdims=True)  # colours are those of the attention alone
    return np.round(grey * (1 - hidden) + colour * hidden).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Row:
    """Pictures that stand side by side, uint8 [H, W, 3] of one size each, under a line of text."""

    title: str
    pictures: Sequence[np.ndarray]


def text_font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's, which has most of the world's letters; `size` in pixels."""
    fonts = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(fonts, "DejaVuSans.ttf"), size)


def draw_grid(rows: Sequence[Row]) -> Image.Image:
    """The rows under one another, on white."""
    widths = [sum(picture.shape[1] + GAP for picture in row.pictures) for row in rows]
    heights = [LINE + row.pictures[0].shape[0] + GAP for row in rows]
    font = text_font(10)
    text = max(font.getlength(row.title) for row in rows)
    canvas = Image.new("RGB", (max(*widths, int(text)) + GAP, sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, height in zip(rows, heights, strict=True):
        draw.text((GAP, top + 2), row.title, fill="black", font=font)
        left = GAP
        for picture in row.pictures:
            canvas.paste(Image.fromarray(picture), (left, top + LINE))
            left += picture.shape[1] + GAP
        top += height
    return canvas


def write_png(path: str, picture: Image.Image) -> None:
    """A picture of 256 colours, which takes a third of the space."""
    picture.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


def write_gif(path: str, pictures: Sequence[Image.Image], milliseconds: int = 200) -> None:
    """An animation that repeats, one picture after the other."""
    colours = [picture.convert("P", palette=Image.Palette.ADAPTIVE) for picture in pictures]
    first, *others = colours
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def unused_path(folder: pathlib.Path, video: str, taken: set[str]) -> pathlib.Path:
    """Path without suffix for the pictures of `video`; videos of one name are numbered."""
    stem = name = pathlib.Path(video).stem
    number = 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return folder / name

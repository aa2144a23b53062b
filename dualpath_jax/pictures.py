"""Pictures of attention: heat maps over frames, grids of them as PNG, a clip as GIF.

Public: `heat`, `Row`, `grid`, `write_gif`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

GAP = 4  # pixels between pictures
LINE = 16  # pixels for a line of text
STRENGTH = 0.6  # how much of the picture the hottest place hides
# Colours of 0, 1/4, ... 1: from black over violet and orange to pale yellow.
_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


def enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at `size` (width, height) pixels, smooth."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def heat(image: np.ndarray, attention: np.ndarray, hottest: float) -> np.ndarray:
    """Attention over a picture: the more, the brighter and the less of the picture is seen.

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
    level = np.clip(attention / max(hottest, 1e-12), 0, 1)[rows][:, columns]
    stops = np.linspace(0, 1, len(_COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in _COLOURS.T], axis=-1)
    hidden = STRENGTH * np.sqrt(level)[..., None]  # what is cold leaves the picture as it is
    return np.round(image * (1 - hidden) + colour * hidden).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Row:
    """Pictures that stand side by side, uint8 [H, W, 3] of one size each, under a line of text."""

    title: str
    pictures: Sequence[np.ndarray]


def grid(rows: Sequence[Row]) -> Image.Image:
    """The rows under one another, on white."""
    widths = [sum(picture.shape[1] + GAP for picture in row.pictures) for row in rows]
    heights = [LINE + row.pictures[0].shape[0] + GAP for row in rows]
    text = max(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(row.title) for row in rows)
    canvas = Image.new("RGB", (max(*widths, int(text)) + GAP, sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, height in zip(rows, heights, strict=True):
        draw.text((GAP, top + 2), row.title, fill="black")
        left = GAP
        for picture in row.pictures:
            canvas.paste(Image.fromarray(picture), (left, top + LINE))
            left += picture.shape[1] + GAP
        top += height
    return canvas


def write_gif(path: str, pictures: Sequence[Image.Image], milliseconds: int = 200) -> None:
    """An animation that repeats, one picture after the other."""
    colours = [picture.convert("P", palette=Image.Palette.ADAPTIVE) for picture in pictures]
    first, *others = colours
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)

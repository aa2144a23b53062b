"""Cutting, mirroring and erasing of clips. One draw serves all frames of a clip.

Public: `Crop`, `random_resized_crop`, `eval_crop`, `random_erasing`, `read_label_swaps`,
`mirrored_labels`. RandAugment is in `randaugment`.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from dualpath_jax.runtime.safe_read import read_json

# Something-Something-v2's classes of which one is the mirror image of the other.
SSV2_LABEL_SWAP = (
    ("Pulling something from left to right", "Pulling something from right to left"),
    ("Pushing something from left to right", "Pushing something from right to left"),
    (
        "Turning the camera left while filming something",
        "Turning the camera right while filming something",
    ),
)


@dataclasses.dataclass(frozen=True)
class Crop:
    """A box in pixels of the stored frames, to become the model's square, mirrored if `flip`."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_resized_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> Crop:
    """A box of random area and aspect ratio (Szegedy et al. 2015), mirrored half of the time.

    Args:
      height, width: size of the stored frames, pixels.
      rng: randomness of this example.
      scale: smallest and largest part of the frame's area.
      ratio: smallest and largest width / height.
      flip: allow mirroring.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        box_width, box_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            break
    else:  # nothing fitted (a very long frame): a square of the short side
        box_width = box_height = min(height, width)
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    return Crop(top, left, box_height, box_width, flip=bool(flip and rng.random() < 0.5))


def eval_crop(height: int, width: int, crop: int, num_crops: int) -> Crop:
    """Test crop `crop` of 1 (centred) or 3 (along the long side): a square of the short side."""
    if num_crops not in (1, 3):
        raise ValueError(f"eval.spatial_crops={num_crops} must be 1 or 3")
    side = min(height, width)
    place = 0.5 if num_crops == 1 else crop / 2
    return Crop(round((height - side) * place), round((width - side) * place), side, side)


def random_erasing(
    side: int,
    rng: np.random.Generator,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """The box to erase in every frame of a clip (Zhong et al. 2020, with timm's defaults).

    Args:
      side: of the square frame, pixels.
      rng: randomness of this example.
      probability: that anything is erased.
      area: smallest and largest part of the frame's area.
      ratio: smallest and largest height / width.

    Returns:
      int32 [4]: top, left, height, width; zeros for nothing.
    """
    if rng.random() < probability:
        for _ in range(10):
            pixels = rng.uniform(*area) * side**2
            aspect = np.exp(rng.uniform(*np.log(ratio)))
            height, width = round(np.sqrt(pixels * aspect)), round(np.sqrt(pixels / aspect))
            if 0 < height < side and 0 < width < side:
                top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
                return np.array([top, left, height, width], np.int32)
    return np.zeros(4, np.int32)


def read_label_swaps(label_swap: str | None) -> list[tuple[str, str]]:
    """Pairs of class names that mirroring exchanges, as `data.label_swap` gives them.

    Args:
      label_swap: "ssv2", or a JSON file [["a name", "its mirror image"], ...]; None: no pairs.

    Raises:
      ValueError: no such file, or it holds something else.
    """
    if label_swap is None:
        return []
    if label_swap == "ssv2":
        return list(SSV2_LABEL_SWAP)
    shape = 'a JSON file like [["moves left", "moves right"], ...]'
    if not os.path.isfile(label_swap):
        raise ValueError(f"data.label_swap={label_swap!r} must be 'ssv2' or {shape}: no such file")
    try:
        content = read_json(label_swap, list)
    except ValueError as error:
        raise ValueError(f"data.label_swap={label_swap!r} must be {shape}: {error}") from None
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise ValueError(f"data.label_swap={label_swap!r} must be {shape}")
    pairs = [(str(a), str(b)) for a, b in content]
    counts = collections.Counter(name for pair in pairs for name in pair)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"data.label_swap={label_swap!r} names {twice} more than once")
    return pairs


def mirrored_labels(class_names: Sequence[str], label_swap: str | None) -> np.ndarray:
    """The class of a mirrored clip, by the class of the clip: int32 [classes].

    Args:
      class_names: one per class.
      label_swap: see `read_label_swaps`.

    Raises:
      ValueError: a name of `label_swap` is no class; or two classes are each other with left and
        right exchanged, and `label_swap` does not name them.
    """
    places = {name: i for i, name in enumerate(class_names)}
    mirrored = np.arange(len(class_names), dtype=np.int32)
    for pair in read_label_swaps(label_swap):
        unknown = [name for name in pair if name not in places]
        if unknown:
            raise ValueError(
                f"data.label_swap={label_swap!r} names {unknown[0]!r}, which is no class of the "
                f"data: its {len(class_names)} classes are {', '.join(class_names[:5])}, ..."
            )
        a, b = (places[name] for name in pair)
        mirrored[[a, b]] = b, a
    for name, place in places.items():
        other = places.get(_exchange_sides(name), place)
        if other != place and mirrored[place] == place:
            raise ValueError(
                f"data.flip=True would mirror clips of {name!r} into {class_names[other]!r} and "
                "keep their label: set data.flip=False, or name such pairs by data.label_swap"
            )
    return mirrored


def _exchange_sides(name: str) -> str:
    """`name` with left for right and right for left."""
    sides = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub("|".join(sides), lambda found: sides[found.group()], name)

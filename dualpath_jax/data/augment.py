"""Draws the crop, the mirroring and the erased box of a clip, which all its frames share.

RandAugment is in `randaugment_ops` and `randaugment`.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from dualpath_jax.runtime.safe_read import read_json

# Pairs of Something-Something-v2 classes of which one is the mirror image of the other.
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
    """Describes the box of the stored frames that becomes the model's square input.

    Attributes:
      top: first row of the box, in pixels of the stored frames.
      left: first column of the box.
      height: number of rows of the box.
      width: number of columns of the box.
      flip: True to exchange left and right.
    """

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
    """Draw a box of random area and aspect ratio (Szegedy et al. 2015).

    Args:
      height: height of the stored frames, in pixels.
      width: width of the stored frames, in pixels.
      rng: random generator of this example.
      scale: smallest and largest area of the box, as fractions of the frame's area.
      ratio: smallest and largest width / height of the box.
      flip: mirror half of the boxes.

    Returns:
      The box; a square of the frame's short side if ten draws do not fit into the frame.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        box_width, box_height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            break
    else:  # no draw fitted, because the frame is very long
        box_width = box_height = min(height, width)
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    return Crop(top, left, box_height, box_width, flip=bool(flip and rng.random() < 0.5))


def eval_crop(height: int, width: int, crop: int, num_crops: int) -> Crop:
    """Return a square test crop, as large as the short side of the frame.

    Args:
      height: height of the stored frames, in pixels.
      width: width of the stored frames, in pixels.
      crop: index of the crop, 0..num_crops-1.
      num_crops: 1 (the center) or 3 (along the long side).

    Raises:
      ValueError: `num_crops` is neither 1 nor 3.
    """
    if num_crops not in (1, 3):
        raise ValueError(f"eval.spatial_crops={num_crops} must be 1 or 3")
    side = min(height, width)
    position = 0.5 if num_crops == 1 else crop / 2
    return Crop(round((height - side) * position), round((width - side) * position), side, side)


def random_erasing(
    side: int,
    rng: np.random.Generator,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Draw the box to erase in every frame of a clip (Zhong et al. 2020, timm's defaults).

    Args:
      side: side of the square frame, in pixels.
      rng: random generator of this example.
      probability: probability that a box is erased.
      area: smallest and largest area of the box, as fractions of the frame's area.
      ratio: smallest and largest height / width of the box.

    Returns:
      int32 [4]: top, left, height, width, in pixels; all zeros to erase nothing.
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
    """Return the pairs of class names that mirroring exchanges.

    Args:
      label_swap: `config.data.label_swap`: "ssv2", the path of a JSON file
        [["a name", "its mirror image"], ...], or None for no pairs.

    Raises:
      ValueError: the file does not exist, or it holds something else.
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
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"data.label_swap={label_swap!r} names {repeated} more than once")
    return pairs


def mirrored_labels(class_names: Sequence[str], label_swap: str | None) -> np.ndarray:
    """Return the class that a clip of each class has after mirroring.

    Args:
      class_names: name of each class, by class index.
      label_swap: `config.data.label_swap`, see `read_label_swaps`.

    Returns:
      int32 [classes]: class index of the mirrored clip, by class index of the clip.

    Raises:
      ValueError: `label_swap` names an unknown class, or two class names differ only by left and
        right (in any case, with any separators) and `label_swap` does not name them.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    mirrored = np.arange(len(class_names), dtype=np.int32)
    for pair in read_label_swaps(label_swap):
        unknown = [name for name in pair if name not in labels]
        if unknown:
            raise ValueError(
                f"data.label_swap={label_swap!r} names {unknown[0]!r}, which is not a class of the "
                f"data: its {len(class_names)} classes are {', '.join(class_names[:5])}, ..."
            )
        a, b = (labels[name] for name in pair)
        mirrored[[a, b]] = b, a
    plain = {_plain_words(name): label for name, label in labels.items()}
    for name, label in labels.items():
        other = plain.get(_swap_left_right(_plain_words(name)), label)
        if other != label and mirrored[label] == label:
            raise ValueError(
                f"data.flip=True would mirror clips of {name!r} into {class_names[other]!r} and "
                "keep their label: set data.flip=False, or name such pairs in data.label_swap"
            )
    return mirrored


def _plain_words(name: str) -> str:
    """Return the words of a class name in lower case with single spaces between them.

    Words end at spaces, `_`, `-`, `.` and before a capital: "swipe left" of "SwipeLeft".
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return " ".join(re.split(r"[\s_.-]+", spaced.casefold()))


def _swap_left_right(words: str) -> str:
    """Replace left by right and right by left in `_plain_words`."""
    sides = {"left": "right", "right": "left"}
    return re.sub("|".join(sides), lambda match: sides[match.group()], words)

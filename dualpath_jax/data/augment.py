"""Where a clip is cut out of its video. One draw serves all frames of a clip.

Public: `Crop`, `random_resized_crop`, `view_crop`.
"""

import dataclasses

import numpy as np


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
    else:  # nothing fitted (a very long frame): the centred square
        box_width = box_height = min(height, width)
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    return Crop(top, left, box_height, box_width, flip=bool(flip and rng.random() < 0.5))


def view_crop(height: int, width: int, crop: int, num_crops: int) -> Crop:
    """Test crop `crop` of 1 (centred) or 3 (along the long side): a square of the short side."""
    if num_crops not in (1, 3):
        raise ValueError(f"eval.spatial_crops={num_crops} must be 1 or 3")
    side = min(height, width)
    place = 0.5 if num_crops == 1 else crop / 2
    return Crop(round((height - side) * place), round((width - side) * place), side, side)

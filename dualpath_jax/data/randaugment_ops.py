"""RandAugment's operations and the draw of a clip (Cubuk et al. 2020). Needs no TensorFlow.

Ranges are those that grow with the magnitude in timm's `rand-m7-n4-inc1`. As there, an operation
that was drawn is applied half of the time. Sharpness is left out, since it would mix pixels across
the frames of a frameset; SolarizeAdd is left out too.
"""

from collections.abc import Sequence

import numpy as np

# An operation's code is its place here.
TABLES = ("auto_contrast", "equalize", "invert", "posterize")

GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")

COLOR = ("solarize", "color", "contrast", "brightness")

OPS = ("identity", *TABLES, *GEOMETRY, *COLOR)

PROBABILITY = 0.5  # that an operation that was drawn is applied; timm's

MAX_MAGNITUDE = 10

# Value at MAX_MAGNITUDE, by timm. Given either sign: degrees, parts of a side, change of a factor.
_SIGNED = {
    "rotate": 30.0,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.45,
    "translate_y": 0.45,
    "color": 0.9,
    "contrast": 0.9,
    "brightness": 0.9,
}


def value_of(op: str, strength: float, sign: float) -> float:
    """What `op` is applied with.

    Args:
      op: a name of `OPS`.
      strength: magnitude / MAX_MAGNITUDE, 0..1.
      sign: 1 or -1.

    Returns:
      Degrees (rotate); pixels per pixel (shear); parts of a side (translate); factor, 1 for none
      (color, contrast, brightness); bits kept (posterize); first level that is inverted (solarize).
    """
    if op in _SIGNED:
        return _SIGNED[op] * strength * sign + (op in COLOR)
    if op == "posterize":
        return max(4 - int(4 * strength), 1)
    if op == "solarize":
        return 256 - int(256 * strength)
    return 0.0


def draw_ops(
    rng: np.random.Generator, layers: int, magnitude: float
) -> tuple[np.ndarray, np.ndarray]:
    """The operations of one clip.

    Args:
      rng: randomness of this example.
      layers: N, operations drawn; identity takes the place of one that is not applied.
      magnitude: 0..10.

    Returns:
      (places in `OPS`, int32 [N]; their values, see `value_of`, float32 [N]).
    """
    ops = rng.integers(1, len(OPS), layers)
    ops = np.where(rng.random(layers) < PROBABILITY, ops, 0)
    signs = rng.choice([-1.0, 1.0], layers)
    strength = magnitude / MAX_MAGNITUDE
    values = [value_of(OPS[op], strength, sign) for op, sign in zip(ops, signs, strict=True)]
    return ops.astype(np.int32), np.array(values, np.float32)


def affine_matrix(ops: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """The geometric operations of a draw as one map.

    Returns:
      float32 [3, 3]: takes (x, y, 1) of a pixel of the result, both 0..1 from the upper left corner
      of the image, to where it comes from. Shear is about that corner, rotation about the centre.
    """
    total = np.eye(3)
    for op, value in zip(ops, values, strict=True):
        name, step = OPS[op], np.eye(3)
        if name == "rotate":
            cos, sin = np.cos(np.radians(value)), np.sin(np.radians(value))
            step[:2] = [[cos, -sin, (1 - cos + sin) / 2], [sin, cos, (1 - cos - sin) / 2]]
        elif name in GEOMETRY:
            row = int(name.endswith("_y"))
            step[row, 2 if name.startswith("translate") else 1 - row] = value
        total = total @ step
    return total.astype(np.float32)

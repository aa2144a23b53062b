"""Defines RandAugment's operations and draws those of a clip (Cubuk et al. 2020). No TensorFlow.

Value ranges are those of timm's `rand-m7-n4-inc1`, which grow with the magnitude. As in timm, a
drawn operation is applied half of the time. Two operations are left out: Sharpness, because it
would mix pixels across the frames of a frameset, and SolarizeAdd.
"""

from collections.abc import Sequence

import numpy as np

# Operations by the step that applies them, see `randaugment`.
TABLES = ("auto_contrast", "equalize", "invert", "posterize")
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
COLOR = ("solarize", "color", "contrast", "brightness")
OPS = ("identity", *TABLES, *GEOMETRY, *COLOR)  # an operation's code is its index here

_APPLY_PROBABILITY = 0.5  # of a drawn operation; timm's value
_MAX_MAGNITUDE = 10
# Value at _MAX_MAGNITUDE (timm), which gets a random sign: degrees (rotate), fraction of a side
# (shear, translate), change of a factor (the others).
_MAX_SIGNED_VALUES = {
    "rotate": 30.0,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.45,
    "translate_y": 0.45,
    "color": 0.9,
    "contrast": 0.9,
    "brightness": 0.9,
}


def compute_op_value(op: str, strength: float, sign: float) -> float:
    """Compute the value with which an operation is applied.

    Args:
      op: a name in `OPS`.
      strength: magnitude as a fraction of the largest one, 0..1.
      sign: 1 or -1.

    Returns:
      Degrees (rotate); pixels per pixel (shear); fraction of a side (translate); factor, where 1
      changes nothing (color, contrast, brightness); number of bits kept (posterize); first level
      that is inverted (solarize); 0 for operations without a value.
    """
    if op in _MAX_SIGNED_VALUES:
        return _MAX_SIGNED_VALUES[op] * strength * sign + (op in COLOR)
    if op == "posterize":
        return max(4 - int(4 * strength), 1)
    if op == "solarize":
        return 256 - int(256 * strength)
    return 0.0


def draw_ops(
    rng: np.random.Generator, layers: int, magnitude: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the operations of one clip.

    Args:
      rng: random generator of this example.
      layers: N, number of operations. Those that are not applied become "identity".
      magnitude: strength of the operations, 0..10.

    Returns:
      (indices in `OPS`, int32 [N]; values, float32 [N], see `compute_op_value`).
    """
    ops = rng.integers(1, len(OPS), layers)
    ops = np.where(rng.random(layers) < _APPLY_PROBABILITY, ops, 0)
    signs = rng.choice([-1.0, 1.0], layers)
    strength = magnitude / _MAX_MAGNITUDE
    values = [
        compute_op_value(OPS[op], strength, sign) for op, sign in zip(ops, signs, strict=True)
    ]
    return ops.astype(np.int32), np.array(values, np.float32)


def affine_matrix(ops: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """Compose the geometric operations of a draw into one affine map.

    Args:
      ops: indices in `OPS`, N of them; other operations are skipped.
      values: their N values, see `compute_op_value`.

    Returns:
      float32 [3, 3]: maps (x, y, 1) of a pixel in the result to its source in the image, with x and
      y in 0..1 from the upper left corner. Shear is about that corner, rotation about the center.
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

"""Tests RandAugment's draws, and compares each operation with PIL."""

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from dualpath_jax.data import randaugment, randaugment_ops
from dualpath_jax.data.randaugment_ops import OPS
from dualpath_jax.models import preprocess

FILL = (122, 116, 104)


@pytest.fixture(scope="module")
def clip():
    """Return two frames of little contrast, uint8 [2, 64, 96, 3]."""
    coffee = Image.fromarray(skimage.data.coffee()).resize((192, 64))
    frames = (np.asarray(coffee) * 0.6 + 30).astype(np.uint8).reshape(64, 2, 96, 3)
    return frames.transpose(1, 0, 2, 3)


def picture(frames):
    """Return the frames as one image, one below the other."""
    return Image.fromarray(np.concatenate(frames))


def on_device(frames, *steps, last=None):
    """Apply color operations (name, value) to uint8 frames; return float [n, h, w, 3]."""
    ops = np.array([OPS.index(name) for name, _ in steps], np.int32)
    values = np.array([value for _, value in steps], np.float32)
    tables = randaugment.lookup_tables(tf.constant(frames), tf.constant(ops), tf.constant(values))
    inputs = [frames[None]] if last is None else [frames[None], last[None]]
    return np.asarray(
        preprocess.augment_color(inputs, ops[None], values[None], np.asarray(tables)[None])[0][0]
    )


@pytest.mark.parametrize(
    ("name", "value", "reference"),
    [
        ("auto_contrast", 0, ImageOps.autocontrast),
        ("equalize", 0, ImageOps.equalize),
        ("invert", 0, ImageOps.invert),
        ("posterize", 2, lambda x: ImageOps.posterize(x, 2)),
        ("solarize", 77, lambda x: ImageOps.solarize(x, 77)),
        ("color", 1.63, lambda x: ImageEnhance.Color(x).enhance(1.63)),
        ("color", 0.37, lambda x: ImageEnhance.Color(x).enhance(0.37)),
        ("contrast", 1.63, lambda x: ImageEnhance.Contrast(x).enhance(1.63)),
        ("contrast", 0.37, lambda x: ImageEnhance.Contrast(x).enhance(0.37)),
        ("brightness", 1.63, lambda x: ImageEnhance.Brightness(x).enhance(1.63)),
        ("brightness", 0.37, lambda x: ImageEnhance.Brightness(x).enhance(0.37)),
    ],
)
def test_color_like_pil(clip, name, value, reference):
    expected = np.asarray(reference(picture(clip))).astype(int)
    ours = np.concatenate(on_device(clip, (name, value)))
    assert np.abs(ours - expected).max() <= 2
    # The operation changes the image, and its position in the draw does not matter.
    assert np.abs(np.concatenate(clip) - expected).max() > 10
    ours = np.concatenate(on_device(clip, ("rotate", 9), (name, value), ("identity", 0)))
    assert np.abs(ours - expected).max() <= 2


def test_equalize_uses_the_statistics_of_the_clip(clip):
    """Check that equalizing each frame separately would give something else."""
    clip = clip.copy()
    clip[1] //= 2
    expected = np.asarray(ImageOps.equalize(picture(clip))).astype(int)
    separate = np.concatenate([on_device(frame[None], ("equalize", 0))[0] for frame in clip])
    assert np.abs(np.concatenate(on_device(clip, ("equalize", 0))) - expected).max() <= 2
    assert np.abs(separate - expected).mean() > 20


def test_contrast_of_both_inputs_uses_the_mean_of_the_last(clip):
    full = on_device(clip, ("contrast", 1.63))
    part = on_device(clip[:1], ("contrast", 1.63), last=clip)
    assert np.abs(part - full[:1]).max() < 1e-3
    assert np.abs(on_device(clip[:1] // 2, ("contrast", 1.63)) - full[:1]).max() > 5


def test_operations_compose(clip):
    """Check that operations compose in order, with the statistics of the previous result."""
    steps = [("posterize", 2), ("auto_contrast", 0), ("invert", 0)]
    expected = ImageOps.invert(ImageOps.autocontrast(ImageOps.posterize(picture(clip), 2)))
    assert np.abs(np.concatenate(on_device(clip, *steps)) - np.asarray(expected)).max() <= 2
    steps = [("solarize", 77), ("brightness", 1.63)]
    expected = ImageEnhance.Brightness(ImageOps.solarize(picture(clip), 77)).enhance(1.63)
    expected = np.asarray(expected).astype(int)
    assert np.abs(np.concatenate(on_device(clip, *steps)) - expected).max() <= 2
    assert np.abs(np.concatenate(on_device(clip, *steps[::-1])) - expected).max() > 50


def test_a_single_color_is_unchanged(clip):
    gray = np.full_like(clip, 100)
    for name in ("auto_contrast", "equalize"):
        assert np.array_equal(on_device(gray, (name, 0)).round(), gray)


def warped(frames, *steps):
    ops = [OPS.index(name) for name, _ in steps]
    matrix = randaugment_ops.affine_matrix(ops, [value for _, value in steps])
    fill = np.array(FILL, np.float32)
    return randaugment.warp_frames(tf.constant(frames), matrix, fill).numpy().astype(int)


def transform(image, *coefficients):
    size, kind = image.size, Image.Transform.AFFINE
    return image.transform(size, kind, coefficients, Image.Resampling.BILINEAR, fillcolor=FILL)


@pytest.mark.parametrize(
    ("name", "value", "reference"),
    [
        ("rotate", 21, lambda x: x.rotate(21, Image.Resampling.BILINEAR, fillcolor=FILL)),
        ("shear_x", 0.21, lambda x: transform(x, 1, 0.21, 0, 0, 1, 0)),
        ("shear_y", -0.21, lambda x: transform(x, 1, 0, 0, -0.21, 1, 0)),
        ("translate_x", 0.3, lambda x: transform(x, 1, 0, 0.3 * 64, 0, 1, 0)),
        ("translate_y", -0.3, lambda x: transform(x, 1, 0, 0, 0, 1, -0.3 * 64)),
    ],
)
def test_geometry_like_pil(clip, name, value, reference):
    frames = clip[:, :, :64]
    ours = warped(frames, (name, value))
    for frame, result in zip(frames, ours, strict=True):
        difference = np.abs(np.asarray(reference(Image.fromarray(frame))).astype(int) - result)
        assert np.quantile(difference, 0.95) <= 1  # PIL treats edges differently
        other = np.abs(np.asarray(reference(Image.fromarray(frame))).astype(int) - frame)
        assert np.quantile(other, 0.95) > 30


def test_geometric_operations_compose(clip):
    frames = clip[:, :, :64]
    steps = [("rotate", 21), ("translate_x", 0.2)]
    twice = warped(warped(frames, steps[0]).astype(np.uint8), steps[1])
    inside = np.s_[:, 8:-8, 8:-24]
    difference = np.abs(warped(frames, *steps) - twice)[inside].mean()
    assert difference < 2
    assert np.abs(warped(frames, *steps[::-1]) - twice)[inside].mean() > 3 * difference


def test_geometry_is_relative_to_the_size(clip):
    """Check a translation by a quarter of 96 pixels, its fill color, and the identity."""
    moved = warped(clip, ("translate_x", 0.25))
    assert np.array_equal(moved[:, :, :72], clip[:, :, 24:])
    assert (moved[:, :, 72:] == FILL).all()
    assert np.array_equal(warped(clip, ("color", 2.0)), clip)


def test_draw_ops():
    draws = [randaugment_ops.draw_ops(np.random.default_rng(i), 4, 7) for i in range(3000)]
    ops = np.stack([ops for ops, _ in draws])
    share = np.bincount(ops.ravel(), minlength=len(OPS)) / ops.size
    assert abs(share[0] - 0.5) < 0.02
    assert np.abs(share[1:] - 0.5 / 13).max() < 0.008
    values = {name: set() for name in OPS}
    for row, value in draws:
        for op, v in zip(row, value, strict=True):
            values[OPS[op]].add(round(float(v), 4))
    assert values == {
        "identity": {0.0},
        "auto_contrast": {0.0},
        "equalize": {0.0},
        "invert": {0.0},
        "posterize": {2.0},
        "rotate": {-21.0, 21.0},
        "shear_x": {-0.21, 0.21},
        "shear_y": {-0.21, 0.21},
        "translate_x": {-0.315, 0.315},
        "translate_y": {-0.315, 0.315},
        "solarize": {77.0},
        "color": {0.37, 1.63},
        "contrast": {0.37, 1.63},
        "brightness": {0.37, 1.63},
    }
    again = randaugment_ops.draw_ops(np.random.default_rng(5), 4, 7)
    assert all(np.array_equal(a, b) for a, b in zip(again, draws[5], strict=True))


def test_strength_grows_with_the_magnitude():
    assert [randaugment_ops.compute_op_value("posterize", m / 10, 1) for m in (0, 5, 10)] == [
        4,
        2,
        1,
    ]
    assert [randaugment_ops.compute_op_value("solarize", m / 10, 1) for m in (0, 5, 10)] == [
        256,
        128,
        0,
    ]
    assert randaugment_ops.compute_op_value("brightness", 0, -1) == 1

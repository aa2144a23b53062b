"""Checks the inputs that are made of frames in memory against those of the pipeline."""

import numpy as np
import pytest
import tensorflow as tf

from dualpath_jax.config import recipes
from dualpath_jax.data import frame_ops, framesets
from dualpath_jax.inference import frame_inputs


@pytest.mark.parametrize("side", [24, 32, 36, 37, 64, 80])
def test_frames_are_scaled_as_in_the_pipeline(side):
    """Check enlargement, bilinear sampling, and means over areas; rounding may differ by 1."""
    frames = np.random.default_rng(side).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    expected = frame_ops.resize(tf.constant(frames), 32).numpy().astype(int)
    actual = np.asarray(frame_inputs.resize(frames, 32)).astype(int)
    difference = np.abs(actual - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    if side == 80:  # twin: the other method gives another image
        matrix = frame_inputs._bilinear_matrix(side, 32)
        other = np.einsum("ih,nhwc,jw->nijc", matrix, frames, matrix)
        assert np.abs(other - expected).max() > 10


def test_the_same_limit_as_the_pipeline():
    assert frame_inputs.MAX_BILINEAR_REDUCTION == frame_ops._MAX_BILINEAR_REDUCTION


def test_views_and_framesets():
    """Check which frames and crops each view has, and the order of frames in framesets."""
    config = recipes.finetune("demo")
    config.data.image_size = 32
    config.eval.temporal_views, config.eval.spatial_crops = 2, 3
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 48, 3), dtype=np.uint8)
    clips = frame_inputs.clips_from_arrays(config, frames)
    assert clips["spatial"].shape == (2, 6, 2, 32, 32, 3)
    assert clips["temporal"].shape == (2, 6, 1, 64, 64, 3)
    indices = np.minimum((np.arange(16) + 0.75) * 40 / 16, 39).astype(int)  # the second clip
    crop = frames[1][indices][:, :, 16:]  # the third of three crops
    np.testing.assert_array_equal(clips["spatial"][1, 5], crop[[4, 12]])
    cells = frame_ops.resize(tf.constant(crop), 16)
    tiled = framesets.tile_framesets(cells, (4, 4)).numpy().astype(int)
    assert np.abs(np.asarray(clips["temporal"][1, 5]).astype(int) - tiled).max() <= 1
    # A video of as many frames as a clip has only one clip.
    clips = frame_inputs.clips_from_arrays(config, frames[:, :16])
    assert clips["spatial"].shape[1] == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((8, 32, 32, 3), np.float32, "frames of dtype float32 are not uint8: pass RGB values in"),
        ((8, 32, 32, 3), np.int64, "frames of dtype int64 are not uint8: pass RGB values in 0"),
        ((8, 32, 32, 3), np.uint16, "frames of dtype uint16 are not uint8: pass RGB values in 0"),
        ((32, 32, 3), np.uint8, r"frames of shape \(32, 32, 3\) are not a video: pass \[T, H, W"),
        ((8, 3, 32, 32), np.uint8, r"frames of shape \(8, 3, 32, 32\) are not a video"),
        ((0, 32, 32, 3), np.uint8, "at least one frame"),
    ],
)
def test_other_arrays_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        frame_inputs.check_frames(np.zeros(shape, dtype))
    assert frame_inputs.check_frames(np.zeros((1, 4, 4, 3), np.uint8)).shape == (1, 4, 4, 3)

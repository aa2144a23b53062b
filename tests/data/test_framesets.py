"""Tests the exact pixels of grid framesets."""

import numpy as np
import pytest

from dualpath_jax.data.clip_spec import FramesetShape
from dualpath_jax.data.framesets import tile_framesets


def test_pixels_of_a_4x4_frameset():
    # Each pixel holds its frame, row and column; frames have 2 x 3 pixels.
    frame, row, column = np.meshgrid(np.arange(32), np.arange(2), np.arange(3), indexing="ij")
    frames = np.stack([frame, row, column], axis=-1).astype(np.uint8)
    framesets = tile_framesets(frames, (4, 4)).numpy()
    assert framesets.shape == (2, 8, 12, 3)
    assert framesets.dtype == np.uint8
    for g, y, x in np.ndindex(2, 8, 12):
        time = 16 * g + 4 * (y // 2) + x // 3
        assert framesets[g, y, x].tolist() == [time, y % 2, x % 3]


def test_wide_grid_is_laid_out_row_by_row():
    frames = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    assert tile_framesets(frames, (3, 2)).numpy()[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tile_framesets(frames, (2, 3)).numpy()[0, :, :, 0].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("num_frames", "grid", "scale", "framesets", "size"),
    [
        (16, (4, 4), 4, 1, (224, 224)),
        (48, (4, 4), 4, 3, (224, 224)),
        (64, (2, 2), 2, 16, (224, 224)),
        (64, (8, 8), 8, 1, (224, 224)),
        (16, (4, 4), 1, 1, (896, 896)),
    ],
)
def test_shapes_of_the_paper(num_frames, grid, scale, framesets, size):
    shape = FramesetShape(num_frames, grid, scale, 224)
    assert shape.num_framesets == framesets
    assert shape.size == size


def test_errors_name_the_bad_value():
    with pytest.raises(ValueError, match="num_frames=20"):
        FramesetShape(20, (4, 4), 4, 224)
    with pytest.raises(ValueError, match="image_size=224 is not divisible by frame_scale=3"):
        FramesetShape(16, (4, 4), 3, 224)

"""Where clips are cut."""

import numpy as np
import pytest

from dualpath_jax.data import augment


def test_test_crops():
    assert augment.view_crop(256, 340, 0, 1) == augment.Crop(0, 42, 256, 256)
    lefts = [augment.view_crop(256, 340, k, 3).left for k in range(3)]
    assert lefts == [0, 42, 84]
    tops = [augment.view_crop(400, 256, k, 3).top for k in range(3)]
    assert tops == [0, 72, 144]
    with pytest.raises(ValueError, match="spatial_crops=2"):
        augment.view_crop(256, 340, 0, 2)


def test_random_crops_stay_inside_and_have_the_asked_area():
    rng = np.random.default_rng(0)
    crops = [augment.random_resized_crop(256, 340, rng, (0.08, 1.0), flip=True) for _ in range(500)]
    for crop in crops:
        assert 0 <= crop.top <= 256 - crop.height
        assert 0 <= crop.left <= 340 - crop.width
        assert 0.74 < crop.width / crop.height < 1.35
    areas = np.array([crop.height * crop.width for crop in crops]) / (256 * 340)
    assert 0.075 < areas.min() < 0.12
    assert areas.max() > 0.8
    assert 0.4 < np.mean([crop.flip for crop in crops]) < 0.6


def test_no_flip_unless_asked():
    rng = np.random.default_rng(0)
    assert not any(augment.random_resized_crop(64, 64, rng, (0.5, 1.0)).flip for _ in range(50))


def test_a_very_long_frame_is_cut_in_its_height():
    rng = np.random.default_rng(0)
    crop = augment.random_resized_crop(10, 1000, rng, (0.9, 1.0))
    assert (crop.height, crop.width) == (10, 10)

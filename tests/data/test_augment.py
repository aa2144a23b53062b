"""Tests the boxes that are cropped and erased, and the classes of mirrored clips."""

import json

import numpy as np
import pytest

from dualpath_jax.data import augment


def test_eval_crops():
    assert augment.eval_crop(256, 340, 0, 1) == augment.Crop(0, 42, 256, 256)
    lefts = [augment.eval_crop(256, 340, k, 3).left for k in range(3)]
    assert lefts == [0, 42, 84]
    tops = [augment.eval_crop(400, 256, k, 3).top for k in range(3)]
    assert tops == [0, 72, 144]
    with pytest.raises(ValueError, match="spatial_crops=2"):
        augment.eval_crop(256, 340, 0, 2)


def test_random_crops_stay_inside_and_have_the_given_area():
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


def test_flip_is_off_by_default():
    rng = np.random.default_rng(0)
    assert not any(augment.random_resized_crop(64, 64, rng, (0.5, 1.0)).flip for _ in range(50))


def test_a_very_long_frame_gets_a_square_crop():
    rng = np.random.default_rng(0)
    crop = augment.random_resized_crop(10, 1000, rng, (0.9, 1.0))
    assert (crop.height, crop.width) == (10, 10)


def test_erased_boxes():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.random_erasing(56, rng, 0.25) for _ in range(2000)])
    erased = boxes[boxes[:, 2] > 0]
    assert 0.22 < len(erased) / 2000 < 0.28
    assert not boxes[boxes[:, 2] == 0].any()
    assert (erased[:, :2] >= 0).all()
    assert (erased[:, :2] + erased[:, 2:] <= 56).all()
    areas, aspects = erased[:, 2] * erased[:, 3] / 56**2, erased[:, 2] / erased[:, 3]
    assert 0.015 < areas.min() < 0.03
    assert 0.3 < areas.max() < 0.36
    assert 0.2 < aspects.min() < 0.4
    assert 2.5 < aspects.max() < 4
    assert not any(augment.random_erasing(56, rng, 0.0).any() for _ in range(50))


PULL = ["Pulling something from left to right", "Pulling something from right to left"]
PUSH = ["Pushing something from left to right", "Pushing something from right to left"]
TURN = [
    "Turning the camera left while filming something",
    "Turning the camera right while filming something",
]


def test_mirrored_labels_of_ssv2():
    names = ["Holding something", *PULL, "Poking something", *PUSH[::-1], *TURN]
    mirrored = augment.mirrored_labels(names, "ssv2")
    assert mirrored.tolist() == [0, 2, 1, 3, 5, 4, 7, 6]
    with pytest.raises(ValueError, match="Turning the camera left.*which is not a class of the"):
        augment.mirrored_labels(names[:-2], "ssv2")


def test_mirrored_labels_of_a_file(tmp_path):
    path = tmp_path / "swap.json"
    path.write_text(json.dumps([["clockwise", "anticlockwise"]]))
    names = ["clockwise", "up", "anticlockwise"]
    assert augment.mirrored_labels(names, str(path)).tolist() == [2, 1, 0]
    assert augment.mirrored_labels(names, None).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="'clockwise', which is not a class.* 2 classes are up"):
        augment.mirrored_labels(["up", "down"], str(path))
    for bad in ('[["a", "b", "c"]]', "[1]", "{", '"ab"'):
        path.write_text(bad)
        with pytest.raises(ValueError, match="must be a JSON file like"):
            augment.read_label_swaps(str(path))
    path.write_text('[["a", "b"], ["b", "c"]]')
    with pytest.raises(ValueError, match=r"names \['b'\] more than once"):
        augment.read_label_swaps(str(path))
    with pytest.raises(ValueError, match="'ssv3' must be 'ssv2' or a JSON file"):
        augment.read_label_swaps("ssv3")


def test_mirroring_left_into_right_is_refused():
    with pytest.raises(ValueError, match="'turn Left' into 'turn Right'"):
        augment.mirrored_labels(["up", "turn Left", "turn Right"], None)
    for left, right in (
        ("SWIPE_LEFT", "SWIPE_RIGHT"),
        ("swipe-left", "Swipe Right"),
        ("swipeLeft", "SwipeRight"),
        ("swipe.left", "swipe_right"),
        ("swipeleft", "swiperight"),
    ):
        with pytest.raises(ValueError, match="data.flip=True would mirror clips of"):
            augment.mirrored_labels(["up", left, right], None)
    # A class "left" without a class "right" cannot be recognized as a mistake.
    assert augment.mirrored_labels(["up", "turn left"], None).tolist() == [0, 1]

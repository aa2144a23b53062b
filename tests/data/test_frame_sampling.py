"""Tests the exact frame indices of each sampling mode (PAPER.md, "Frames and framesets")."""

import numpy as np
import pytest

from dualpath_jax.data import frame_sampling


class LargestDraw:
    """Imitates a random generator whose draws are always (nearly) the largest possible."""

    def integers(self, high):
        return high - 1

    def random(self, size):
        return np.full(size, 1 - 2**-32)


@pytest.mark.parametrize(("num_frames", "interval"), [(16, 4), (32, 2), (48, 1)])
def test_intervals_of_the_paper(num_frames, interval):
    frames = frame_sampling.sample_frames("dense", 300, num_frames)
    assert set(np.diff(frames)) == {interval}
    assert len(frames) == num_frames
    with pytest.raises(ValueError, match="num_frames=24"):
        frame_sampling.sample_frames("dense", 300, 24)


def test_dense_center_and_views():
    # A clip spans 13 of 100 frames; possible starts are 0 ... 87.
    assert frame_sampling.dense_indices(100, 4, 4).tolist() == [43, 47, 51, 55]
    starts = [frame_sampling.dense_indices(100, 4, 4, view=v, num_views=3)[0] for v in range(3)]
    assert starts == [0, 43, 87]


def test_dense_training_covers_every_start():
    rng = np.random.default_rng(0)
    starts = {int(frame_sampling.dense_indices(10, 3, 2, rng)[0]) for _ in range(200)}
    assert starts == set(range(6))
    assert frame_sampling.dense_indices(10, 3, 2, LargestDraw()).tolist() == [5, 7, 9]


def test_dense_wraps_around_in_a_short_video():
    assert frame_sampling.dense_indices(5, 4, 2).tolist() == [0, 2, 4, 1]
    assert frame_sampling.dense_indices(1, 3, 4).tolist() == [0, 0, 0]
    # The video is exactly long enough: one possible start, and no wrap.
    assert frame_sampling.dense_indices(7, 4, 2, LargestDraw()).tolist() == [0, 2, 4, 6]


def test_segments_take_the_middle_in_evaluation():
    assert frame_sampling.segment_indices(32, 16).tolist() == list(range(1, 32, 2))
    assert frame_sampling.segment_indices(40, 4).tolist() == [5, 15, 25, 35]
    assert frame_sampling.segment_indices(10, 4).tolist() == [1, 3, 6, 8]


def test_segments_draw_one_frame_each_in_training():
    rng = np.random.default_rng(0)
    drawn = np.stack([frame_sampling.segment_indices(40, 4, rng) for _ in range(500)])
    for segment in range(4):
        assert set(drawn[:, segment]) == set(range(10 * segment, 10 * segment + 10))
    assert frame_sampling.segment_indices(40, 4, LargestDraw()).tolist() == [9, 19, 29, 39]


def test_segments_of_a_short_video_share_frames():
    assert frame_sampling.segment_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert frame_sampling.segment_indices(1, 4, LargestDraw()).tolist() == [0, 0, 0, 0]


def test_segment_views_are_evenly_spaced_offsets():
    views = [frame_sampling.segment_indices(40, 4, view=v, num_views=2).tolist() for v in range(2)]
    assert views == [[2, 12, 22, 32], [7, 17, 27, 37]]


@pytest.mark.parametrize(
    ("num_frames", "num_spatial", "expected"),
    [
        (16, 8, [1, 3, 5, 7, 9, 11, 13, 15]),
        (32, 8, [2, 6, 10, 14, 18, 22, 26, 30]),
        (48, 8, [3, 9, 15, 21, 27, 33, 39, 45]),
        (16, 12, [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15]),
        (16, 16, list(range(16))),
        (16, 2, [4, 12]),
    ],
)
def test_spatial_frames_are_a_subset(num_frames, num_spatial, expected):
    assert frame_sampling.spatial_subset(num_frames, num_spatial).tolist() == expected


def test_errors_name_the_bad_value():
    with pytest.raises(ValueError, match="num_spatial_frames=17"):
        frame_sampling.spatial_subset(16, 17)
    with pytest.raises(ValueError, match="'random'"):
        frame_sampling.sample_frames("random", 100, 16)

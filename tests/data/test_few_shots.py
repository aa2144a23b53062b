"""Checks the training on a few videos of each class."""

import collections

import numpy as np
import pytest

from dualpath_jax.data import few_shots
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.training.inputs import open_datasets

IDS = [f"v{i}" for i in range(20)]
LABELS = np.array([0] * 12 + [1] * 7 + [2])


@pytest.mark.parametrize(("shots", "sizes"), [(1, [1, 1, 1]), (4, [4, 4, 1]), (99, [12, 7, 1])])
def test_videos_of_each_class(shots, sizes):
    rows = few_shots.choose_shots(IDS, LABELS, shots)
    counts = collections.Counter(LABELS[rows].tolist())
    assert [counts[label] for label in range(3)] == sizes
    assert (np.diff(rows) > 0).all()
    more = few_shots.choose_shots(IDS, LABELS, shots + 1)
    assert set(rows) <= set(more)
    # The order of the list decides nothing.
    backward = few_shots.choose_shots(IDS[::-1], LABELS[::-1], shots)
    assert {IDS[::-1][row] for row in backward} == {IDS[row] for row in rows}


def test_a_split_with_few_shots(config):
    whole, test = open_datasets(config)
    config.data.shots = 2
    few, same_test = open_datasets(config)
    assert (len(whole), len(few), len(test), len(same_test)) == (40, 16, 21, 21)
    assert isinstance(whole, VideoDataset)
    rows = [whole.ids.index(id_) for id_ in few.ids]
    assert rows != list(range(16))
    assert few.read_frames(3, [0, 2]) == whole.read_frames(rows[3], [0, 2])
    for name in ("labels", "num_frames", "heights", "widths"):
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name)[rows])
    assert sorted(few.labels.tolist()) == [label for label in range(8) for _ in range(2)]

"""Restricts a training split to a few videos of each class, for `data.shots`."""

import collections
from collections.abc import Sequence

import numpy as np

from dualpath_jax.data.datasets.validation_split import hash_name
from dualpath_jax.data.video_dataset import VideoDataset


def choose_shots(ids: Sequence[str], labels: np.ndarray, shots: int) -> np.ndarray:
    """Return the rows of `shots` videos of each class, or of all of a class with fewer; sorted.

    The choice is made by a hash of the ids: the same for every run, and the videos of fewer shots
    are among those of more.
    """
    counts: collections.Counter = collections.Counter()
    rows = []
    for row in sorted(range(len(ids)), key=lambda row: hash_name(ids[row])):
        counts[int(labels[row])] += 1
        if counts[int(labels[row])] <= shots:
            rows.append(row)
    return np.array(sorted(rows), np.int64)


class FewShots:
    """Implements `VideoSource` with `shots` videos of each class of a prepared split.

    Attributes:
      identity: of the whole split; the setting `data.shots` says which part it is.
    """

    def __init__(self, dataset: VideoDataset, shots: int):
        self._dataset = dataset
        self._rows = choose_shots(dataset.ids, dataset.labels, shots)
        self.ids = [dataset.ids[row] for row in self._rows]
        for name in ("labels", "num_frames", "heights", "widths"):
            setattr(self, name, getattr(dataset, name)[self._rows])
        self.class_names, self.identity = dataset.class_names, dataset.identity
        self.frame_format = dataset.frame_format

    def __len__(self) -> int:
        return len(self.ids)

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Return the records of some frames of a video, see `VideoDataset.read_frames`."""
        return self._dataset.read_frames(int(self._rows[video_index]), frame_indices)

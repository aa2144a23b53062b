"""Computes the numbers of a report: class accuracy, confusions, calibration, mistakes, settings.

Shapes: C classes, n videos.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

_NUM_BINS = 15  # as in Guo et al. 2017, who define the expected calibration error (ECE)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Count videos by (label, predicted class): int64 [C, C] from two arrays of int64 [n]."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def class_counts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the videos and the correct ones per class, each [C], from a confusion matrix."""
    return matrix.sum(axis=1), np.diag(matrix)


def order_by_similarity(matrix: np.ndarray) -> list[int]:
    """Order the classes so that those often confused with each other are neighbors.

    Clusters by average linkage on the share of confusions; the leaves are in their optimal order
    (Bar-Joseph 2001).

    Args:
      matrix: [C, C], see `confusion_matrix`.
    """
    size = len(matrix)
    if size < 3:
        return list(range(size))
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    dissimilarity = 1 - (share + share.T) / 2
    np.fill_diagonal(dissimilarity, 0)
    condensed = distance.squareform(dissimilarity, checks=False)
    tree = hierarchy.linkage(condensed, "average", optimal_ordering=True)
    return hierarchy.leaves_list(tree).tolist()


def worst_pairs(matrix: np.ndarray, number: int) -> list[tuple[int, int, int]]:
    """Return the most frequent confusions as (label, predicted class, videos), most first."""
    wrong = matrix - np.diag(np.diag(matrix))
    best = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = zip(*np.unravel_index(best, wrong.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


@dataclasses.dataclass(frozen=True)
class CalibrationBins:
    """Holds calibration by bins of equal width in the probability of the most probable class.

    Attributes:
      edges: [bins + 1] in 0..1; a bin includes its upper edge and not its lower one.
      count: [bins] videos per bin.
      confidence, accuracy: [bins] means per bin in 0..1; NaN in an empty bin.
      ece: expected calibration error, the mean of |accuracy - confidence| over videos.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int = _NUM_BINS
) -> CalibrationBins:
    """Bin the probabilities of the most probable classes.

    Args:
      confidence: [n] in 0..1, the probability of each video's most probable class.
      correct: bool [n], True where that class is the label.
      bins: number of bins.
    """
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a bin is empty
        mean = np.bincount(index, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(index, weights=correct, minlength=bins) / count
    gap = np.where(count > 0, np.abs(accuracy - mean), 0)
    return CalibrationBins(
        edges, count, mean, accuracy, float((gap * count).sum() / len(confidence))
    )


def confident_mistakes(confidence: np.ndarray, correct: np.ndarray, number: int) -> list[int]:
    """Return the rows of the wrong videos with the highest confidence [n], highest first."""
    wrong = np.flatnonzero(~correct)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:number].tolist()


def pairwise_differences(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys whose values differ between runs, with the value of each run.

    Values are compared as JSON, where a tuple equals a list. A missing key counts as None.
    """
    keys = sorted({key for by_key in settings for key in by_key})
    rows = {key: [json.loads(json.dumps(by_key.get(key))) for by_key in settings] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}

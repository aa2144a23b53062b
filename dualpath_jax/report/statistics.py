"""The numbers of a report: accuracy of classes, confusions, calibration, mistakes, settings.

Public: `confidence_interval`, `class_counts`, `confusion_matrix`, `order_by_similarity`, `worst_pairs`, `CalibrationBins`,
`calibration`, `confident_mistakes`, `pairwise_differences`.

C classes, n videos.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial import distance

NUM_BINS = 15  # of Guo et al. 2017, whose ECE this is


def confidence_interval(fraction: float, number: int) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction of `number` videos: chance in which videos they are."""
    test = stats.binomtest(min(round(fraction * number), number), number)
    found = test.proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """[C, C] int64: number of videos by (label, predicted class), both [n]."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def class_counts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(videos, correct ones) of each class [C], by a confusion matrix."""
    return matrix.sum(axis=1), np.diag(matrix)


def order_by_similarity(matrix: np.ndarray) -> list[int]:
    """Classes so that those taken for each other stand side by side.

    Average linkage by the share of confusions, leaves in their optimal order (Bar-Joseph 2001).
    """
    size = len(matrix)
    if size < 3:
        return list(range(size))
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    apart = 1 - (share + share.T) / 2
    np.fill_diagonal(apart, 0)
    condensed = distance.squareform(apart, checks=False)
    tree = hierarchy.linkage(condensed, "average", optimal_ordering=True)
    return hierarchy.leaves_list(tree).tolist()


def worst_pairs(matrix: np.ndarray, number: int) -> list[tuple[int, int, int]]:
    """The most frequent confusions: (label, predicted class, videos), most first."""
    wrong = matrix - np.diag(np.diag(matrix))
    best = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = zip(*np.unravel_index(best, wrong.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


@dataclasses.dataclass(frozen=True)
class CalibrationBins:
    """Videos by the probability of their most probable class, in bins of equal width.

    Attributes:
      edges: [bins + 1], 0..1; a bin holds its upper edge and not its lower one.
      count: [bins] videos.
      confidence, accuracy: [bins] means, 0..1; nan in an empty bin.
      ece: expected calibration error, the mean of |accuracy - confidence| over videos.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def calibration(
    confidence: np.ndarray, correct: np.ndarray, bins: int = NUM_BINS
) -> CalibrationBins:
    """Probabilities [n] in 0..1 and whether they were right, bool [n]."""
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a bin is empty
        mean = np.bincount(place, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(place, weights=correct, minlength=bins) / count
    gap = np.where(count > 0, np.abs(accuracy - mean), 0)
    return CalibrationBins(
        edges, count, mean, accuracy, float((gap * count).sum() / len(confidence))
    )


def confident_mistakes(confidence: np.ndarray, correct: np.ndarray, number: int) -> list[int]:
    """Videos that are wrong with the highest probability [n], highest first."""
    wrong = np.flatnonzero(~correct)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:number].tolist()


def pairwise_differences(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all of `settings`: key -> value in each, None if none.

    A tuple equals the list that JSON makes of it.
    """
    keys = sorted({key for one in settings for key in one})
    rows = {key: [json.loads(json.dumps(one.get(key))) for one in settings] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}

"""Decides whether a training ends because its score does not rise any more."""

from collections.abc import Sequence


def stops_early(scores: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` scores are not above the best one before; 0: never.

    Args:
      scores: of the evaluations so far in order, by `eval.criterion`.
      patience: `config.early_stopping_evaluations`.
    """
    if not patience or len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience])

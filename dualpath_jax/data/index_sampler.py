"""Chooses the examples of each training step, as a pure function of (seed, step).

There is no state between steps. A run can therefore resume at any step, and every host can compute
its own share.
"""

import numpy as np
import tensorflow as tf


def train_indices(
    seed: int, step: int, batch_size: int, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples of training step `step`.

    Every epoch is its own permutation of all examples. A batch may straddle two epochs, and no
    example is dropped.

    Args:
      seed: seed of the run.
      step: global step, from 0.
      batch_size: B, over all hosts.
      num_examples: n, number of examples of the split.

    Returns:
      (example indices int64 [B] in [0, n), epochs int64 [B]).
    """
    position = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epoch, offset = np.divmod(position, num_examples)
    index = np.zeros_like(offset)
    for number in np.unique(epoch) if num_examples > 1 else ():
        rows = epoch == number
        index[rows] = tf.random.experimental.index_shuffle(
            offset[rows], np.array([seed % 2**31, number], np.int64), np.int64(num_examples - 1)
        ).numpy()
    return index, epoch


def example_seed(seed: int, epoch: int, example: int) -> np.random.SeedSequence:
    """Return the seed of all random choices for one example in one epoch."""
    return np.random.SeedSequence([seed % 2**32, epoch, example])

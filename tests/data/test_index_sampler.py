"""Tests that the order of examples is a function of (seed, step)."""

import numpy as np

from dualpath_jax.data import index_sampler


def ids(seed, steps, batch, n):
    pairs = [index_sampler.train_indices(seed, step, batch, n) for step in steps]
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def test_every_epoch_is_a_permutation():
    examples, epochs = ids(0, range(21), 10, 70)
    for epoch in range(3):
        assert sorted(examples[epochs == epoch]) == list(range(70))
    assert not np.array_equal(examples[:70], examples[70:140])


def test_batches_straddle_epochs_without_loss():
    examples, epochs = ids(3, range(7), 10, 35)
    assert epochs.tolist() == [0] * 35 + [1] * 35
    assert sorted(examples[:35]) == sorted(examples[35:]) == list(range(35))


def test_a_step_needs_no_other_step():
    first = index_sampler.train_indices(5, 1_000_000, 8, 1000)
    again = index_sampler.train_indices(5, 1_000_000, 8, 1000)
    assert np.array_equal(first[0], again[0])
    assert first[1].tolist() == [8000] * 8
    assert not np.array_equal(first[0], index_sampler.train_indices(6, 1_000_000, 8, 1000)[0])


def test_the_order_never_changes():
    """Check exact indices, because a run must see the same batches under newer versions."""
    assert index_sampler.train_indices(0, 0, 8, 100)[0].tolist() == EXPECTED


def test_one_example():
    examples, epochs = index_sampler.train_indices(0, 2, 3, 1)
    assert examples.tolist() == [0, 0, 0]
    assert epochs.tolist() == [6, 7, 8]


def test_seeds_differ_by_epoch_and_example():
    draws = {
        np.random.default_rng(index_sampler.example_seed(*key)).random()
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }
    assert len(draws) == 4
    assert np.random.default_rng(index_sampler.example_seed(-1, 0, 0)).random() >= 0


EXPECTED = [89, 69, 80, 58, 46, 47, 3, 52]

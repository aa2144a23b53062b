"""Checks intervals of accuracies."""

import pytest

from dualpath_jax.analysis.confidence import confidence_interval, format_accuracy


def test_interval_of_wilson():
    assert confidence_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert confidence_interval(1.0, 400)[1] == 1.0


def test_accuracy_as_text():
    assert format_accuracy(0.8, 10) == "0.8000 (95%: 0.490 to 0.943)"

"""Tests which timings the comparison of methods on the demo stores, without training."""

import pytest

from scripts import compare_methods


@pytest.fixture
def timed(monkeypatch):
    """Return a list of the methods in each timing; scores and times are fake."""
    calls = []

    def time_steps(configs, out):
        calls.append(list(configs))
        return dict.fromkeys(configs, 1.0)

    entry = {"top1": 0.5, "trainable_params": 1}
    monkeypatch.setattr(compare_methods, "train_and_score", lambda *_: entry)
    monkeypatch.setattr(compare_methods, "time_steps", time_steps)
    return calls


def test_an_added_method_is_timed_with_the_others(timed, tmp_path):
    for methods in (["dualpath", "linear"], ["dualpath", "linear", "aim"], ["dualpath", "linear"]):
        rows = compare_methods.compare_methods(tmp_path, methods, 10)
        assert [row["step_time"] for row in rows] == [1.0] * len(methods)
    assert timed == [["dualpath", "linear"], ["dualpath", "linear", "aim"]]  # once each

"""Tests when a training gives advice, and that it does not otherwise."""

import json
import math

import pytest

from dualpath_jax.training import metrics_logger
from dualpath_jax.training.advice import TrainingAdvice

GUESSING = math.log(10)


def lines(losses, rates=None, accuracy=0.1):
    """Return the advice that a training on ten classes gives after each of its logged steps."""
    advice = TrainingAdvice(10)
    rates = [1e-3] * len(losses) if rates is None else rates
    steps = [
        {"loss": loss, "learning_rate": rate, "accuracy": accuracy}
        for loss, rate in zip(losses, rates, strict=True)
    ]
    return [advice.add_step(step) for step in steps]


def test_a_loss_that_stays_is_noticed_once():
    given = lines([GUESSING * f for f in (1.1, 1.0, 1.02, 0.99, 1.0, 1.01, 1.0, 1.0)])
    assert [line is not None for line in given] == [False] * 5 + [True] + [False] * 2
    assert "the loss stays at 2.30 = ln(10), that of guessing" in given[5]
    assert "model.adapter_layer_norm=True" in given[5]


@pytest.mark.parametrize(
    ("losses", "rates"),
    [
        ([GUESSING * f for f in (1.1, 1.0, 1.0, 1.0, 0.9, 0.95)], None),  # it falls
        ([GUESSING] * 9, [1e-4 * i for i in range(1, 10)]),  # the warm-up lasts
        ([GUESSING * 20] * 9, None),  # it diverged, which is another problem
        ([float("nan")] + [GUESSING] * 4 + [float("nan")] * 3, None),
        ([GUESSING] * 5, None),  # too few entries; the first only sets the learning rate
    ],
)
def test_other_losses_are_not(losses, rates):
    assert not any(lines(losses, rates))


def test_clips_known_by_heart_are_noticed_once():
    advice = TrainingAdvice(10)
    for accuracy in (0.5, 1.0, 0.98, 1.0, 1.0, 1.0):
        advice.add_step({"loss": 0.1, "learning_rate": 1e-3, "accuracy": accuracy})
    assert advice.add_score("validation", 0.76) is None
    line = advice.add_score("validation", 0.31)
    assert "accuracy is 1.00 in training and 0.31 on validation" in line
    assert "configs/finetune.py" in line
    assert advice.add_score("validation", 0.31) is None


def test_a_training_that_has_not_fitted_its_clips_is_not():
    advice = TrainingAdvice(10)
    for accuracy in (1.0, 0.9, 1.0, 0.9, 1.0):
        advice.add_step({"loss": 0.1, "learning_rate": 1e-3, "accuracy": accuracy})
    assert advice.add_score("validation", 0.31) is None


def test_the_end_of_a_training(tmp_path, capsys):
    steps = [
        {"step": i, "split": "train", "loss": 0.1, "learning_rate": 1e-3, "accuracy": 1.0}
        for i in range(5)
    ]
    score = {"step": 4, "split": "train", "top1": 0.2}  # an evaluation, though of this split
    odd = {"step": 3, "split": "train"}  # of a damaged file, or of a logger of one's own
    text = "".join(json.dumps(entry) + "\n" for entry in [odd, *steps, score])
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics_logger.advise_after_training(str(tmp_path), 10, "test", 0.9)
    assert capsys.readouterr().out == ""
    metrics_logger.advise_after_training(str(tmp_path), 10, "test", 0.4)
    assert capsys.readouterr().out == ""  # the evaluation during the training had this advice
    (tmp_path / "metrics.jsonl").write_text(
        text.rpartition('{"step": 4, "split": "train", "top1"')[0]
    )
    assert capsys.readouterr().out == ""
    metrics_logger.advise_after_training(str(tmp_path), 10, "test", 0.4)
    assert capsys.readouterr().out.startswith("hint: accuracy is 1.00 in training and 0.40 on test")

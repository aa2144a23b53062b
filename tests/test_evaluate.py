"""Checks that an evaluation counts every video once, with fake logits of known accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpath_jax import evaluate
from dualpath_jax.training import sharding

CLASSES = 7


def make_fake_batches(labels, batch_size, views=2):
    """Yield batches of logits.

    Video i is a top-1 hit if i % 3 == 0, only a top-5 hit if i % 3 == 1, and otherwise wrong.
    """
    for start in range(0, len(labels), batch_size):
        label = np.zeros(batch_size, np.int32)
        logits = np.zeros((batch_size, views, CLASSES), np.float32)
        mask = np.zeros(batch_size, np.float32)
        for row, i in enumerate(range(start, min(start + batch_size, len(labels)))):
            label[row], mask[row] = labels[i], 1
            order = np.roll(np.arange(CLASSES), -(labels[i] - {0: 0, 1: 3, 2: 6}[i % 3]))
            logits[row, :, order] = np.linspace(4, 0, CLASSES)[:, None]
        # Padding would be a hit, but must not count.
        logits[mask == 0, :, 0] = 9
        yield {"logits": logits, "label": label, "mask": mask}


def evaluate_labels(labels, batch_size, step=None):
    """Return the scores of the fake batches on eight devices."""
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    jitted = jax.jit(
        step or (lambda b: evaluate.eval_step_sums(b["logits"], b["label"], b["mask"]))
    )
    return evaluate.evaluate_batches(
        lambda batch: jitted(jax.device_put(batch, sharding.batch_sharding(mesh))),
        make_fake_batches(labels, batch_size),
    )


def test_the_next_batch_is_started_before_a_result_is_read():
    order = []

    class Sums(dict):
        def items(self):
            order.append("read")
            return super().items()

    def step(batch):
        order.append("start")
        ones = {name: np.ones((), np.int64) for name in ("top1", "top5")}
        return Sums(ones | {name: np.ones(2) for name in ("class_correct", "class_count")})

    def on_batch(videos):
        order.append(videos)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_get", lambda sums: sums)
        evaluate.evaluate_batches(step, iter(range(3)), on_batch)
    assert order == ["start", "start", "read", 2, "start", "read", 4, "read", 6]


@pytest.mark.parametrize("batch_size", [8, 16, 40])
def test_exact_fraction_with_padding_on_eight_devices(batch_size):
    labels = np.arange(37) % CLASSES
    scores = evaluate_labels(labels, batch_size)
    hits = np.arange(37) % 3 == 0
    assert scores.num_videos == 37
    assert scores.top1 == 13 / 37
    assert scores.top5 == 25 / 37
    by_class = [hits[labels == c].mean() for c in range(CLASSES)]
    assert scores.mean_class_accuracy == pytest.approx(np.mean(by_class), abs=1e-12)


def test_counting_padding_would_be_wrong():
    labels = np.arange(37) % CLASSES
    scores = evaluate_labels(
        labels,
        16,
        lambda b: evaluate.eval_step_sums(b["logits"], b["label"], jnp.ones_like(b["mask"])),
    )
    assert scores.num_videos == 48
    assert scores.top1 != 13 / 37


def test_classes_that_do_not_occur_do_not_count():
    scores = evaluate_labels(np.array([0, 0, 0, 2]), 8)
    # Videos 0 and 3 are hits: 1 of 3 of class 0, 1 of 1 of class 2.
    assert scores.mean_class_accuracy == pytest.approx((1 / 3 + 1) / 2)


def test_probabilities_are_averaged_not_logits():
    # View 0 gives class 0 a very high probability; views 1 and 2 prefer class 1.
    logits = np.array([[[9.0, 0.0], [0.0, 1.0], [0.0, 1.0]]], np.float32)
    probability = np.asarray(jax.nn.softmax(logits)).mean(axis=1)[0]
    expected = int(np.argmax(probability))
    sums = evaluate.eval_step_sums(logits, jnp.array([expected]), jnp.ones(1))
    assert int(sums["top1"]) == 1
    # Here the two averages differ: the mean logit prefers class 0, the mean probability class 1.
    logits = np.array([[[5.0, 0.0], [0.0, 2.0], [0.0, 2.0]]], np.float32)
    assert logits.mean(axis=1)[0].argmax() == 0
    sums = evaluate.eval_step_sums(logits, jnp.array([1]), jnp.ones(1))
    assert int(sums["top1"]) == 1


def test_nan_is_not_a_hit():
    logits = np.full((2, 1, 8), np.nan, np.float32)
    logits[1] = np.eye(8)[0]
    sums = evaluate.eval_step_sums(logits, jnp.array([0, 0]), jnp.ones(2))
    assert (int(sums["top1"]), int(sums["top5"])) == (1, 1)
    assert sums["class_count"].tolist()[0] == 2


def test_fewer_than_five_classes():
    logits = np.array([[[1.0, 0.0]]], np.float32)
    sums = evaluate.eval_step_sums(logits, jnp.array([1]), jnp.ones(1))
    assert (int(sums["top1"]), int(sums["top5"])) == (0, 1)

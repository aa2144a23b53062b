"""Tests the training of a grid of settings at once, on made-up tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualpath_jax.config import schema
from dualpath_jax.data import index_sampler
from dualpath_jax.evaluate import Scores
from dualpath_jax.models.methods.probe import AttentiveProbe, LinearProbe, OrderedProbe
from dualpath_jax.probing import grid
from dualpath_jax.probing.features import Features
from dualpath_jax.training import sharding
from dualpath_jax.training.optimizer import make_optimizer, make_schedule
from tests.helpers.method_cases import TINY

FRAMES, TOKENS, CLASSES = 3, 5, 3


def make_features(num, views=1, seed=0, frames=FRAMES):
    """Return random features of `num` clips in shards of four."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(num, views, frames, TOKENS, TINY.width)).astype(jnp.bfloat16)
    shards = [tokens[i : i + 4] for i in range(0, num, 4)]
    return Features(rng.integers(CLASSES, size=num).astype(np.int32), shards)


def two_devices():
    return sharding.make_mesh(devices=jax.devices()[:2])


def probe_config(head="attentive"):
    config = schema.get_config()
    config.model.probe.head = head
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.label_smoothing = 0.1
    config.optimizer.clip_norm = 1.0
    return config


def train_alone(head, features, config, learning_rate, weight_decay, num_steps, batch_size):
    """Train one cell as an ordinary run does, without a grid."""
    config.optimizer.learning_rate, config.optimizer.weight_decay = learning_rate, weight_decay
    schedule = make_schedule(config.optimizer, num_steps, len(features) / batch_size)
    tokens = jnp.asarray(features.read([0])[:, 0])
    params = head.init(jax.random.key(config.seed), tokens)["params"]
    optimizer = make_optimizer(config.optimizer, schedule, jax.tree.map(lambda _: True, params))
    slots = optimizer.init(params)

    def loss(params, tokens, labels):
        target = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
        return optax.softmax_cross_entropy(head.apply({"params": params}, tokens), target).mean()

    @jax.jit
    def update(params, slots, tokens, labels):
        gradients = jax.grad(loss)(params, tokens, labels)
        updates, slots = optimizer.update(gradients, slots, params)
        return optax.apply_updates(params, updates), slots

    for step in range(num_steps):
        rows, _ = index_sampler.train_indices(config.seed, step, batch_size, len(features))
        batch = features.read(rows)[:, 0], features.labels[rows]
        params, slots = update(params, slots, *batch)
    return params


@pytest.mark.parametrize("kind", [LinearProbe, AttentiveProbe])
def test_a_grid_is_its_cells_trained_alone(kind):
    """Check two of four cells; twin: the cells differ. Two devices share a batch."""
    head, features = kind(TINY, CLASSES), make_features(10)
    cells = grid.make_cells([1e-3, 1e-2], [0.0, 1.0])
    assert list(zip(*(x.tolist() for x in cells), strict=True))[1] == (np.float32(1e-3), 1.0)
    mesh = two_devices()
    params = grid.train_grid(head, features, probe_config(), cells, 5, 8, mesh)
    for cell in (0, 3):
        rate, decay = (float(values[cell]) for values in cells)
        alone = train_alone(head, features, probe_config(), rate, decay, 5, 8)
        ours = jax.tree.map(lambda leaf, i=cell: leaf[i], params)
        for name, leaf in jax.tree_util.tree_leaves_with_path(ours):
            expected = dict(jax.tree_util.tree_leaves_with_path(alone))[name]
            np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=str(name))
    kernel = params["output"]["kernel"]
    assert all(np.abs(kernel[i] - kernel[j]).max() > 1e-4 for i in range(4) for j in range(i))


def test_scores_average_over_views_and_leave_out_padding():
    head, features = LinearProbe(TINY, CLASSES), make_features(10, views=2)
    rng = np.random.default_rng(1)
    shapes = {"kernel": (2, 2 * TINY.width, CLASSES), "bias": (2, CLASSES)}
    output = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    scores, losses = grid.score_cells(head, {"output": output}, features, 8, two_devices())
    x = features.read(range(10)).astype(np.float32)
    means = np.concatenate([x[:, :, :, 0].mean(2), x[:, :, :, 1:].mean((2, 3))], axis=-1)
    for cell in range(2):
        logits = means @ output["kernel"][cell] + output["bias"][cell]
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        mean = probabilities.mean(axis=1)
        assert scores[cell].num_videos == 10
        assert scores[cell].top1 == (mean.argmax(axis=1) == features.labels).mean()
        expected = -np.log(mean[np.arange(10), features.labels]).mean()
        assert losses[cell] == pytest.approx(expected, rel=1e-4)
        by_view = -np.log(probabilities[np.arange(10), :, features.labels]).mean()
        assert losses[cell] != pytest.approx(by_view, rel=1e-3)


def test_the_choice_is_by_top1_then_loss():
    scores = [Scores(top1, 1.0, top1, 10) for top1 in (0.5, 0.7, 0.7, 0.7, 0.6)]
    assert grid.choose_cell(scores, np.array([0.1, 0.9, 0.8, np.nan, 0.2])) == 2
    assert grid.choose_cell(scores, np.array([0.1, 0.9, 0.9, 0.9, 0.2])) == 1


def test_linear_probes_keep_means_only():
    features = make_features(6)
    head = LinearProbe(TINY, CLASSES)
    tokens, labels = grid.make_reader(head, features)(np.array([5, 1]))
    assert tokens.shape == (2, 1, 1, 2, TINY.width)
    assert np.array_equal(labels, features.labels[[5, 1]])
    run = jax.jit(head.init_with_output)
    whole, small = (run(jax.random.key(0), x[:, 0])[0] for x in (features.read([5, 1]), tokens))
    np.testing.assert_allclose(small, whole, atol=1e-5)
    tokens, _ = grid.make_reader(OrderedProbe(TINY, CLASSES), features)(np.array([5, 1]))
    assert np.array_equal(tokens, features.read([5, 1]))


def test_only_the_ordered_probe_separates_reversed_clips():
    """Check clips and their reversals, which are the two classes."""
    rng = np.random.default_rng(0)
    drift = rng.normal(size=(1, TOKENS, TINY.width)) * np.arange(4)[:, None, None] / 4
    tokens = 0.5 * rng.normal(size=(32, 1, 4, TOKENS, TINY.width)) + drift
    tokens = np.concatenate([tokens, tokens[:, :, ::-1]]).astype(jnp.bfloat16)
    features = Features(np.repeat(np.arange(2, dtype=np.int32), 32), [tokens])
    top1 = {}
    for kind in (LinearProbe, OrderedProbe):
        head, mesh = kind(TINY, 2), two_devices()
        cells = grid.make_cells([1e-2], [0.1])
        params = grid.train_grid(head, features, probe_config(), cells, 30, 32, mesh)
        (scores,), _ = grid.score_cells(head, params, features, 64, mesh)
        top1[kind] = scores.top1
    assert top1[OrderedProbe] == 1.0
    assert top1[LinearProbe] == pytest.approx(0.5, abs=0.1)

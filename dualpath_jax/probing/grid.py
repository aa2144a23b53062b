"""Trains a head with a grid of learning rates and weight decays at once, on stored features.

The trainings of a head, the cells of the grid, share batches and initial parameters; one compiled
step updates all of them. Axes: G cells, B batch, V views, T frames, N tokens, D width.
"""

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualpath_jax import evaluate
from dualpath_jax.data import index_sampler
from dualpath_jax.models.methods.probe import ProbeHead
from dualpath_jax.probing.features import Features
from dualpath_jax.runtime.progress_bar import ProgressBar
from dualpath_jax.training import sharding
from dualpath_jax.training.optimizer import make_optimizer, make_schedule
from dualpath_jax.training.step import cross_entropy, weigh_classes

# Rows -> tokens [B, V, T', N', D] and labels [B]; the tokens are those of `ProbeHead.compress`.
Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_READ_ROWS = 32  # that are compressed at once


def make_reader(head: ProbeHead, features: Features) -> Reader:
    """Return a function that reads rows of `features` as far as `head` needs them.

    If the head can do with fewer tokens, these are computed here and kept in memory.
    """
    shape = features.shards[0].shape[2:]
    compressed = jax.eval_shape(head.compress, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    if compressed.shape[1:] == shape:
        return lambda rows: (features.read(rows), features.labels[rows])
    compress = jax.jit(jax.vmap(head.compress, in_axes=1, out_axes=1))
    chunks = [range(len(features))[i : i + _READ_ROWS] for i in range(0, len(features), _READ_ROWS)]
    tokens = np.concatenate([compress(features.read(rows)) for rows in chunks])
    return lambda rows: (tokens[rows], features.labels[rows])


def make_cells(
    learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return learning rate and weight decay of each cell, float32 [G] each: all pairs."""
    pairs = np.array(list(itertools.product(learning_rates, weight_decays)), np.float32)
    return pairs[:, 0], pairs[:, 1]


def make_cell_optimizer(
    optimizer: Any,
    learning_rate: float | jax.Array,
    weight_decay: float | jax.Array,
    num_steps: int,
    steps_per_epoch: float,
) -> optax.GradientTransformation:
    """Return the optimizer of an ordinary run, with the values of a cell.

    Args:
      optimizer: `config.optimizer`, of which the other keys are taken.
      learning_rate: peak of the schedule.
      weight_decay: of kernels.
      num_steps: length of the training.
      steps_per_epoch: training clips / batch size.
    """
    values = {**optimizer, "learning_rate": learning_rate, "weight_decay": weight_decay}
    values = types.SimpleNamespace(**values)
    return make_optimizer(values, make_schedule(values, num_steps, steps_per_epoch), mask=True)


def make_cell_functions(
    head: ProbeHead,
    config: Any,
    num_steps: int,
    steps_per_epoch: float,
    class_weights: jax.Array | None = None,
) -> tuple[Callable, Callable]:
    """Return the functions that start and update the training of one cell.

    Args:
      head: the module.
      config: the whole configuration.
      num_steps: length of the training.
      steps_per_epoch: training clips / batch size.
      class_weights: see `step.loss_fn`.

    Returns:
      (learning rate, weight decay, tokens [1, T', N', D]) -> state, and (state, learning rate,
      weight decay, tokens [B, T', N', D], labels [B]) -> state. A state is (params, optimizer's).
    """

    def optimizer(learning_rate, weight_decay):
        values = (learning_rate, weight_decay, num_steps, steps_per_epoch)
        return make_cell_optimizer(config.optimizer, *values)

    def init(learning_rate, weight_decay, tokens):
        params = head.init(jax.random.key(config.seed), tokens)["params"]
        return params, optimizer(learning_rate, weight_decay).init(params)

    def step(state, learning_rate, weight_decay, tokens, labels):
        params, slots = state

        def loss(params):
            logits = head.apply({"params": params}, tokens)
            smoothing = config.optimizer.label_smoothing
            return cross_entropy(logits, labels, smoothing, class_weights)

        gradients = jax.grad(loss)(params)
        updates, slots = optimizer(learning_rate, weight_decay).update(gradients, slots, params)
        return optax.apply_updates(params, updates), slots

    return init, step


def train_grid(
    head: ProbeHead,
    features: Features,
    config: Any,
    cells: tuple[np.ndarray, np.ndarray],
    num_steps: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Any:
    """Train all cells of a head.

    Args:
      head: the module.
      features: of the training clips, with one view.
      config: the whole configuration; `seed` decides initial parameters and the order of clips.
      cells: of `make_cells`.
      num_steps: updates.
      batch_size: clips per step; a multiple of the number of devices.
      mesh: the devices, see `sharding.make_mesh`.

    Returns:
      The parameters of all cells, leaves [G, ...] float32.
    """
    read = make_reader(head, features)
    weights = weigh_classes(config, features.labels, head.num_classes)
    steps_per_epoch = len(features) / batch_size
    init, step = make_cell_functions(head, config, num_steps, steps_per_epoch, weights)
    replicated, by_rows = sharding.replicated_sharding(mesh), sharding.batch_sharding(mesh)
    first, _ = read(np.arange(1))
    state = jax.jit(jax.vmap(init, in_axes=(0, 0, None)))(*cells, jnp.asarray(first[:, 0]))
    state, cells = jax.device_put((state, cells), replicated)
    step = jax.jit(
        jax.vmap(step, in_axes=(0, 0, 0, None, None)), donate_argnums=0, out_shardings=replicated
    )
    with ProgressBar(num_steps, f"probe {config.model.probe.head}", "steps") as bar:
        for number in range(num_steps):
            rows, _ = index_sampler.train_indices(config.seed, number, batch_size, len(features))
            tokens, labels = read(rows)
            state = step(state, *cells, *jax.device_put((tokens[:, 0], labels), by_rows))
            bar.update()
    return state[0]


def score_cells(
    head: ProbeHead, params: Any, features: Features, batch_size: int, mesh: jax.sharding.Mesh
) -> tuple[list[evaluate.Scores], np.ndarray]:
    """Evaluate all cells of a head.

    Args:
      head: the module.
      params: leaves [G, ...], see `train_grid`.
      features: of the videos of a split, with the views of evaluation.
      batch_size: videos per step; a multiple of the number of devices.
      mesh: the devices.

    Returns:
      The scores of each cell, and its mean cross-entropy: float64 [G]. Probabilities are averaged
      over views, as in the evaluation of a run.
    """
    read = make_reader(head, features)

    def sums(params, tokens, labels, mask):
        views = tokens.reshape(-1, *tokens.shape[2:])
        logits = head.apply({"params": params}, views).reshape(*tokens.shape[:2], -1)
        probabilities = jax.nn.softmax(logits).mean(axis=1)
        chosen = jnp.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
        loss = -(jnp.log(jnp.maximum(chosen, 1e-30)) * mask).sum()
        return evaluate.eval_step_sums(logits, labels, mask), loss

    run = jax.jit(jax.vmap(sums, in_axes=(0, None, None, None)))
    results = []
    for start in range(0, len(features), batch_size):
        rows = np.arange(start, start + batch_size)
        mask = (rows < len(features)).astype(np.float32)
        batch = (*read(np.where(mask, rows, 0).astype(np.int64)), mask)
        results.append(
            jax.device_get(run(params, *jax.device_put(batch, sharding.batch_sharding(mesh))))
        )
    losses = np.sum([loss for _, loss in results], axis=0, dtype=np.float64) / len(features)
    scores = []
    for cell in range(len(losses)):
        of_cell = (jax.tree.map(lambda leaf, i=cell: leaf[i], sums) for sums, _ in results)
        scores.append(evaluate.evaluate_batches(lambda sums: sums, of_cell))
    return scores, losses


def choose_cell(scores: Sequence[evaluate.Scores], losses: np.ndarray) -> int:
    """Return the cell of the highest top-1; of several, the one of the lowest loss."""
    order = [
        (-score.top1, loss if np.isfinite(loss) else np.inf)
        for score, loss in zip(scores, losses, strict=True)
    ]
    return min(range(len(order)), key=order.__getitem__)

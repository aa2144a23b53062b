"""Evaluates a run with several views of each video; every video counts exactly once."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dualpath_jax.analysis.confidence import confidence_interval, format_accuracy
from dualpath_jax.config.values import format_views
from dualpath_jax.data import pipeline
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.data.video_source import VideoSource
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.forward import view_logits
from dualpath_jax.models.preprocess import Batch
from dualpath_jax.runtime import files
from dualpath_jax.runtime.progress_bar import ProgressBar
from dualpath_jax.training.experiment import Experiment
from dualpath_jax.training.metrics_logger import format_scores
from dualpath_jax.training.predictions import PredictionWriter, gather_local_rows, top_predictions
from dualpath_jax.training.sharding import (
    batch_sharding,
    replicated_sharding,
    round_up,
    shard_batch,
    with_mesh,
)
from dualpath_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Scores:
    """Holds the result on a split.

    Attributes:
      top1: fraction of videos whose label is the most probable class, 0..1.
      top5: fraction of videos whose label is among the five most probable classes, 0..1.
      mean_class_accuracy: top-1 of each class, averaged over the classes in the split, 0..1.
      num_videos: number of videos.
    """

    top1: float
    top5: float
    mean_class_accuracy: float
    num_videos: int


def eval_step_sums(logits: jax.Array, label: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Return the sums over a batch from which `Scores` follow.

    Args:
      logits: [B, V, classes] float32.
      label: [B] int32.
      mask: [B] float32, 0 for padding.

    Returns:
      `top1`, `top5`: number of videos whose label is the most probable class, or among the five
      most probable ones, by probabilities averaged over views; NaN counts as wrong.
      `class_correct`, `class_count`: [classes], number of such videos by top-1, and of all videos.
      All are int32 and leave out padding.
    """
    classes = logits.shape[-1]
    real = mask > 0
    probabilities, best = top_predictions(logits)
    hit = (best == label[:, None]) & real[:, None] & jnp.isfinite(probabilities)
    one_hot = jax.nn.one_hot(label, classes, dtype=jnp.int32)
    return {
        "top1": hit[:, 0].sum(dtype=jnp.int32),
        "top5": hit.any(axis=1).sum(dtype=jnp.int32),
        "class_correct": (one_hot * hit[:, :1]).sum(axis=0),
        "class_count": (one_hot * real[:, None]).sum(axis=0),
    }


def evaluate_batches(
    eval_step: Callable[[dict[str, Any]], dict[str, jax.Array]],
    batches: Iterator[dict[str, Any]],
    on_batch: Callable[[int], None] = lambda videos: None,
) -> Scores:
    """Return the scores over `batches`; a batch's sums are read while the next one computes.

    Args:
      eval_step: batch -> the sums of `eval_step_sums`, over all hosts.
      batches: one pass over a split, padded with mask 0.
      on_batch: called after each batch with the number of videos counted so far.
    """
    total: dict[str, np.ndarray] = {}
    for sums in _delay_by_one(map(eval_step, batches)):
        sums = jax.device_get(sums)
        total = {
            key: np.asarray(value, np.int64) + total.get(key, 0) for key, value in sums.items()
        }
        on_batch(int(total["class_count"].sum()))
    videos = int(total["class_count"].sum())
    seen = total["class_count"] > 0
    return Scores(
        top1=float(total["top1"] / videos),
        top5=float(total["top5"] / videos),
        mean_class_accuracy=float(
            np.mean(total["class_correct"][seen] / total["class_count"][seen])
        ),
        num_videos=videos,
    )


def _delay_by_one(results: Iterator[Any]) -> Iterator[Any]:
    """Yield each result after the next one has been requested from `results`."""
    waiting = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def make_eval_step(
    model: Any, config: Any
) -> Callable[[Any, Any, Batch], tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]]:
    """Return the pure function (trainable, frozen, batch) -> (sums, rows), to be jitted.

    The batch has views. `sums` are those of `eval_step_sums`; `rows` are the `top_predictions`, one
    row for each video.
    """

    def eval_step(trainable, frozen, batch):
        logits = view_logits(model, config, param_tree.merge(trainable, frozen), batch)
        return eval_step_sums(logits, batch["label"], batch["mask"]), top_predictions(logits)

    return eval_step


def eval_out_shardings(mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Return the shardings of (sums, rows): only sums are exchanged between devices."""
    return replicated_sharding(mesh), batch_sharding(mesh)


def jit_eval_step(model: Any, config: Any, mesh: jax.sharding.Mesh) -> Callable:
    """Return the jitted `make_eval_step`."""
    return jax.jit(make_eval_step(model, config), out_shardings=eval_out_shardings(mesh))


class Evaluator:
    """Evaluates states of a run on one split; the program is compiled once.

    A batch has `eval.batch_size` videos, or fewer if the split is smaller.

    Attributes:
      experiment: the run.
      dataset: the split.
    """

    def __init__(self, experiment: Experiment, dataset: VideoSource):
        self.experiment, self.dataset = experiment, dataset
        self._step = jit_eval_step(experiment.model, experiment.config, experiment.mesh)

    def evaluate(self, state: TrainState, predictions: PredictionWriter | None = None) -> Scores:
        """Return the scores of `state` on every video; `predictions` gets one row for each."""
        mesh, frozen = self.experiment.mesh, self.experiment.frozen
        waiting = collections.deque()  # (ids, labels, rows) of the batches in progress

        def step(batch: Batch) -> dict[str, jax.Array]:
            with with_mesh(mesh):
                sums, rows = self._step(state.trainable, frozen, shard_batch(batch, mesh))
            waiting.append((batch["example_id"], batch["label"], rows))
            return sums

        is_main = jax.process_index() == 0
        # As in training, the stream of batches is closed whatever happens.
        with (
            contextlib.closing(self._batches()) as batches,
            ProgressBar(len(self.dataset), "evaluate", "videos", shown=is_main) as bar,
        ):

            def on_batch(videos: int) -> None:
                bar.update_to(videos)
                ids, labels, rows = waiting.popleft()
                if predictions is not None:
                    probabilities, classes = map(gather_local_rows, rows)
                    predictions.add(ids, labels, classes, probabilities)

            return evaluate_batches(step, batches, on_batch)

    def _batches(self) -> Generator[Batch]:
        config, devices = self.experiment.config, self.experiment.mesh.size
        return pipeline.eval_batches(
            self.dataset,
            config.data,
            Views(config.eval.temporal_views, config.eval.spatial_crops),
            min(config.eval.batch_size, round_up(len(self.dataset), devices)),
            jax.process_index(),
            jax.process_count(),
            inputs=method_registry.clip_inputs(config),
        )


def evaluate_and_write(evaluator: Evaluator, state: TrainState) -> dict[str, Any]:
    """Evaluate `state`, print the scores and write results.json.

    The predictions for each video go to predictions/, see `training.predictions`.

    Returns:
      The content of results.json.
    """
    experiment = evaluator.experiment
    config, step = experiment.config, int(state.step)
    header = {
        "step": step,
        "split": config.eval.split,
        "views": format_views(config),
        "class_names": list(experiment.class_names),
    }
    predictions = PredictionWriter(experiment.workdir, header, evaluator.dataset.ids)
    scores = evaluator.evaluate(state, predictions)
    predictions.close()
    results = _write_results(experiment, step, scores)
    print(f"{config.eval.split}  {format_scores(scores)}  views {results['views']}")
    print(f"wrote {experiment.workdir}/results.json", flush=True)
    return results


def _write_results(experiment: Experiment, step: int, scores: Scores) -> dict[str, Any]:
    """Write results.json into the workdir and return its content.

    Args:
      experiment: the run.
      step: number of updates of the evaluated state.
      scores: of `config.eval.split`.
    """
    config = experiment.config
    results = {
        **dataclasses.asdict(scores),
        "top1_interval": list(confidence_interval(scores.top1, scores.num_videos)),
        "views": format_views(config),
        "total_params": experiment.total_params,
        "trainable_params": experiment.trainable_params,
        "step": step,
        "dataset": config.data.dir,
        "split": config.eval.split,
        "backbone": experiment.backbone.name,
        "backbone_sha256": experiment.backbone.sha256,
        "synthetic": config.data.synthetic,  # True: the scores mean nothing
    }
    _write_json(experiment.workdir, results)
    return results


def write_mean_results(workdir: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Write results.json of several splits: mean scores, and all results under "splits".

    The interval is as wide as that of one split, because splits may share videos.
    """
    scores = ("top1", "top5", "mean_class_accuracy")
    mean = {name: sum(result[name] for result in results) / len(results) for name in scores}
    videos = min(result["num_videos"] for result in results)
    interval = {"top1_interval": list(confidence_interval(mean["top1"], videos))}
    by_split = {"splits": {result["split"]: result for result in results}}
    _write_json(workdir, mean | interval | by_split)
    top1 = format_accuracy(mean["top1"], videos)
    print(f"mean of {len(results)} splits  top-1 {top1}  top-5 {mean['top5']:.4f}")
    print(f"wrote {workdir}/results.json", flush=True)
    return mean


def _write_json(workdir: str, results: dict[str, Any]) -> None:
    """Write results.json; only process 0 does."""
    if jax.process_index() == 0:
        files.write_text(epath.Path(workdir) / "results.json", json.dumps(results, indent=2) + "\n")

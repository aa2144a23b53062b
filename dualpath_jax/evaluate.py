"""Multi-view evaluation: every video counts once, whatever the batch and the number of devices.

Public: `Scores`, `eval_step_sums`, `clip_logits`, `flat_views`, `view_logits`, `make_eval_step`,
`jit_eval_step`, `eval_out_shardings`, `evaluate_batches`, `evaluate_run`, `evaluate_and_write`, `write_mean_results`.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dualpath_jax.config.values import format_views
from dualpath_jax.data import pipeline
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.forward import view_logits
from dualpath_jax.models.preprocess import Batch
from dualpath_jax.runtime.progress_bar import ProgressBar
from dualpath_jax.training.experiment import Experiment
from dualpath_jax.training.metrics_logger import format_scores
from dualpath_jax.training.predictions import PredictionWriter, gather_local_rows, top_predictions
from dualpath_jax.training.sharding import (
    batch_sharding,
    replicated_sharding,
    shard_batch,
    with_mesh,
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Result over a split. Accuracies are fractions in 0..1."""

    top1: float
    top5: float
    mean_class_accuracy: float  # over the classes that occur in the split
    num_videos: int


def eval_step_sums(logits: jax.Array, label: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch, from which `Scores` follow.

    Args:
      logits: [B, V, classes] float32.
      label: [B] int32.
      mask: [B] float32, 0 for padding.

    Returns:
      `top1`, `top5`: number of real videos whose label is (among the five) most probable, by the
      probabilities averaged over views, where those are numbers; `class_correct`, `class_count`:
      [classes]. All int32.
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
    """Scores over `batches`. The sums of one are waited for when the next one is under way.

    Args:
      eval_step: batch -> the sums of `eval_step_sums`, over all hosts.
      batches: one pass over a split, padded with mask 0.
      on_batch: told the number of videos counted so far, after each batch.
    """
    total: dict[str, np.ndarray] = {}
    for sums in _one_late(map(eval_step, batches)):
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


def _one_late(results: Iterator[Any]) -> Iterator[Any]:
    """Each result when there is the one after it."""
    before = collections.deque()
    for result in results:
        before.append(result)
        if len(before) > 1:
            yield before.popleft()
    yield from before


def make_eval_step(
    model: Any, config: Any
) -> Callable[[Any, Any, Batch], tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]]:
    """The pure evaluation (trainable, frozen, batch with views) -> (sums, rows), to be jitted.

    `sums` are those of `eval_step_sums`; `rows`, one for each video, of `top_predictions`.
    """

    def eval_step(trainable, frozen, batch):
        logits = view_logits(model, config, param_tree.merge(trainable, frozen), batch)
        return eval_step_sums(logits, batch["label"], batch["mask"]), top_predictions(logits)

    return eval_step


def eval_out_shardings(mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Of what the evaluation gives: rows stay where their videos are, sums alone cross devices."""
    return replicated_sharding(mesh), batch_sharding(mesh)


def jit_eval_step(model: Any, config: Any, mesh: jax.sharding.Mesh) -> Callable:
    """`make_eval_step`, jitted."""
    return jax.jit(make_eval_step(model, config), out_shardings=eval_out_shardings(mesh))


def evaluate_run(
    run: Experiment, dataset: VideoDataset, predictions: PredictionWriter | None = None
) -> Scores:
    """Scores of `run.state` on every video of `dataset`; each one's row goes to `predictions`.

    A batch has `eval.batch_size` videos, or fewer where they are not that many.
    """
    config, devices = run.config, run.mesh.size
    if run.eval_step is None:  # compiled once for all evaluations of a run
        run.eval_step = jit_eval_step(run.model, config, run.mesh)
    batches = pipeline.eval_batches(
        dataset,
        config.data,
        config.eval.temporal_views,
        config.eval.spatial_crops,
        min(config.eval.batch_size, -(-len(dataset) // devices) * devices),
        jax.process_index(),
        jax.process_count(),
        framesets=method_registry.uses_framesets(config.model.method),
    )

    waiting = collections.deque()  # of which video, and what was said of it

    def step(batch: Batch) -> dict[str, jax.Array]:
        with with_mesh(run.mesh):
            sums, top = run.eval_step(run.state.trainable, run.frozen, shard_batch(batch, run.mesh))
        waiting.append((batch["example_id"], batch["label"], top))
        return sums

    first = jax.process_index() == 0
    with ProgressBar(len(dataset), "evaluate", "videos", shown=first) as bar:

        def on_batch(videos: int) -> None:
            bar.update_to(videos)
            ids, labels, top = waiting.popleft()
            if predictions is not None:
                probabilities, classes = map(gather_local_rows, top)
                predictions.add(ids, labels, classes, probabilities)

        return evaluate_batches(step, batches, on_batch)


def evaluate_and_write(run: Experiment, dataset: VideoDataset) -> dict[str, Any]:
    """Score the run on `dataset`, print the scores, write results.json and return what it holds.

    What it said of each video is written to predictions/, see `predictions`.
    """
    header = {
        "step": int(run.state.step),
        "split": run.config.eval.split,
        "views": format_views(run.config),
        "class_names": list(run.class_names),
    }
    predictions = PredictionWriter(run.workdir, header, dataset.ids)
    scores = evaluate_run(run, dataset, predictions)
    predictions.close()
    results = write_results(run, scores)
    print(f"{run.config.eval.split}  {format_scores(scores)}  views {results['views']}")
    print(f"wrote {run.workdir}/results.json", flush=True)
    return results


def write_results(run: Experiment, scores: Scores) -> dict[str, Any]:
    """Write `results.json` into the workdir (atomically) and return what it holds."""
    config = run.config
    results = {
        **dataclasses.asdict(scores),
        "views": format_views(config),
        "total_params": run.total_params,
        "trainable_params": run.trainable_params,
        "step": int(run.state.step),
        "dataset": config.data.dir,
        "split": config.eval.split,
        "backbone": run.backbone.name,
        "backbone_sha256": run.backbone.sha256,
        "synthetic": config.data.synthetic,  # then the scores mean nothing
    }
    _write_json(run.workdir, results)
    return results


def write_mean_results(workdir: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `results.json` of several splits: their mean scores, and under "splits" each one's."""
    scores = ("top1", "top5", "mean_class_accuracy")
    mean = {name: sum(result[name] for result in results) / len(results) for name in scores}
    _write_json(workdir, {**mean, "splits": {result["split"]: result for result in results}})
    print(f"mean of {len(results)} splits  top-1 {mean['top1']:.4f}  top-5 {mean['top5']:.4f}")
    print(f"wrote {workdir}/results.json", flush=True)
    return mean


def _write_json(workdir: str, results: dict[str, Any]) -> None:
    if jax.process_index() != 0:
        return
    path = epath.Path(workdir) / "results.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(path)

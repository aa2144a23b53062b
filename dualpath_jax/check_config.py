"""Checks a configuration (`--mode=check`) without weights, data or training."""

import copy
import time
from collections.abc import Collection

import jax
from ml_collections import ConfigDict

from dualpath_jax import evaluate, train
from dualpath_jax.config import schema
from dualpath_jax.config.unread_keys import RecordedReads, check_unread_keys
from dualpath_jax.data import pipeline, synthetic
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.training import sharding
from dualpath_jax.training.experiment import build_abstract
from dualpath_jax.training.inputs import choose_train_batches
from dualpath_jax.training.step import choose_loss_fn, make_train_step
from dualpath_jax.weights.backbone_keys import fill_backbone_keys

# Keys that are read only in a run with parameters and data.
_READ_BY_RUNS = {
    *("init_from", "resume_changed", "eval.checkpoint", "eval.criterion"),
    *("data.keep_normalization", "data.shots"),
}


def check_config(config: ConfigDict, overrides: Collection[str] = ()) -> None:
    """Build the run of `config` by shapes, and run its pipeline on two synthetic clips.

    Of the backbone's file, at most the header is read. Prints the table of parameters and the
    shapes of both batches.

    Args:
      config: the whole configuration.
      overrides: dotted keys that the command line set, see `check_unread_keys`.

    Raises:
      ValueError: settings contradict each other, or a key is set that has no effect.
    """
    start = time.monotonic()
    schema.check_values(config)
    config, origin = _fill_backbone_keys(config)

    # A copy of the configuration, with batches of two clips, records which keys are read.
    small = copy.deepcopy(config)
    small.data.batch_size = small.eval.batch_size = 2
    small.optimizer.accumulation_steps = min(2, config.optimizer.accumulation_steps)
    log = RecordedReads(small)
    sharding.check_batch_sizes(RecordedReads(config, log.seen), jax.device_count())

    # Model, optimizer and schedule are built by shapes.
    videos = synthetic.make_synthetic_split(log.data, num_videos=2)
    steps_per_epoch = len(videos) / log.data.batch_size
    abstract = build_abstract(log, len(videos.class_names), steps_per_epoch)
    print(param_tree.parameter_table(abstract.model.params, abstract.model.mask))
    num_steps = max(1, abstract.num_train_steps)
    train.make_loop_schedule(log, num_steps, steps_per_epoch)

    # A batch of training and one of evaluation go through their steps.
    inputs = method_registry.clip_inputs(log)
    train_batches = choose_train_batches(log.data)
    batch = next(train_batches(videos, log.data, log.seed, 0, num_steps, inputs=inputs))
    _print_batch("training", batch)
    module = abstract.model.module
    loss_fn = choose_loss_fn(log, videos.labels, len(videos.class_names))
    train_step = make_train_step(module, log, abstract.optimizer, loss_fn=loss_fn)
    del batch["example_id"]
    state, _ = jax.eval_shape(train_step, abstract.state, abstract.frozen, batch)
    views = Views(log.eval.temporal_views, log.eval.spatial_crops)
    batch = next(pipeline.eval_batches(videos, log.data, views, log.eval.batch_size, inputs=inputs))
    _print_batch("evaluation", batch)
    eval_step = evaluate.make_eval_step(module, log)
    del batch["example_id"]
    jax.eval_shape(eval_step, state.trainable, abstract.frozen, batch)

    # Keys that were set and not read are errors.
    source = f"{log.data.dir} ({log.data.source}), {log.data.train_split} and {log.eval.split}"
    print(f"data: {source}; weights: {log.backbone.checkpoint}; neither was read{origin}")
    log.seen |= _READ_BY_RUNS
    if config.num_train_steps is not None:
        log.seen.add("num_epochs")  # num_train_steps is used instead
    check_unread_keys(config, log.seen, overrides)
    print(f"the configuration is consistent ({time.monotonic() - start:.1f} s)", flush=True)


def _fill_backbone_keys(config: ConfigDict) -> tuple[ConfigDict, str]:
    """Return a copy with the keys of `fill_backbone_keys`, and where its backbone is from."""
    config, unnamed = copy.deepcopy(config), config.backbone.name is None
    has_file = fill_backbone_keys(config)
    origin = "of the header of that file" if has_file else "by default, as there is no such file"
    return config, f"; backbone: {config.backbone.name}, {origin}" if unnamed else ""


def _print_batch(name: str, batch: pipeline.Batch) -> None:
    """Print dtypes and shapes of a batch."""
    arrays = (f"{key} {value.dtype} {list(value.shape)}" for key, value in batch.items())
    print(f"{name} batch of two clips: {', '.join(arrays)}")

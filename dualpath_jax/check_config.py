"""`--mode=check`: does a configuration hold together? Needs no weights, no data and no training.

Public: `check_config`, `RecordedReads`.
"""

import copy
import time
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from dualpath_jax import evaluate, train
from dualpath_jax.config import schema
from dualpath_jax.config.ranges import check_ranges
from dualpath_jax.config.values import flatten_config
from dualpath_jax.data import pipeline, synthetic
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.abstract import abstract_model
from dualpath_jax.training import sharding
from dualpath_jax.training.inputs import choose_train_batches
from dualpath_jax.training.optimizer import count_train_steps, make_optimizer, make_schedule
from dualpath_jax.training.state import abstract_state
from dualpath_jax.training.step import make_train_step


class RecordedReads:
    """A view of a ConfigDict that notes which keys are read.

    Attributes of a ConfigDict, items and iteration over names work as on the original.
    """

    def __init__(self, config: ConfigDict, seen: set[str] | None = None, prefix: str = ""):
        self._config, self._prefix = config, prefix
        self.seen = set() if seen is None else seen  # "data.grid", "seed", ...

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        path = self._prefix + name
        if isinstance(value, ConfigDict):
            return RecordedReads(value, self.seen, path + ".")
        self.seen.add(path)
        return value

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)


def check_unread_keys(config: ConfigDict, seen: set[str]) -> None:
    """ValueError for a key that is set away from its default and that nothing has read."""
    defaults, values = flatten_config(schema.get_config()), flatten_config(config)
    unread = [key for key in values if key not in seen and values[key] != defaults.get(key)]
    if unread:
        settings = ", ".join(f"{key}={values[key]}" for key in unread)
        raise ValueError(
            f"set, but without effect for model.method={config.model.method!r} and the rest of "
            f"this configuration: {settings}"
        )


# Read with values at hand alone.
_OF_A_RUN = {"init_from", "resume_changed", "eval.checkpoint"}


def check_config(config: ConfigDict) -> None:
    """Build everything that `config` names without values, and run its pipeline on two clips.

    Prints the parameter table. Raises ValueError for what does not go together, also for a key that
    is set and has no effect.
    """
    start = time.monotonic()
    check_ranges(config)
    small = copy.deepcopy(config)
    small.data.batch_size = small.eval.batch_size = 2
    small.optimizer.accumulation_steps = min(2, config.optimizer.accumulation_steps)
    log = RecordedReads(small)
    sharding.check_batch_sizes(RecordedReads(config, log.seen), jax.device_count())
    videos = synthetic.make_synthetic_split(log.data, num_videos=2)
    model = abstract_model(log, len(videos.class_names))
    print(param_tree.parameter_table(model.params, model.mask))
    steps_per_epoch = len(videos) / log.data.batch_size
    num_steps = max(1, count_train_steps(log, steps_per_epoch))
    train.make_loop_schedule(log, num_steps, steps_per_epoch)
    schedule = make_schedule(log.optimizer, num_steps, steps_per_epoch)
    optimizer = make_optimizer(log.optimizer, schedule, model.mask)
    state, frozen = abstract_state(model, optimizer)
    framesets = method_registry.uses_framesets(log.model.method)
    train_batches = choose_train_batches(log.data)
    batch = next(train_batches(videos, log.data, log.seed, 0, num_steps, framesets=framesets))
    _print_batch("training", batch)
    train_step = make_train_step(model.model, log, optimizer)
    del batch["example_id"]
    new, _ = jax.eval_shape(train_step, state, frozen, batch)
    views = (log.eval.temporal_views, log.eval.spatial_crops)
    batch = next(
        pipeline.eval_batches(videos, log.data, *views, log.eval.batch_size, framesets=framesets)
    )
    _print_batch("evaluation", batch)
    del batch["example_id"]
    jax.eval_shape(evaluate.make_eval_step(model.model, log), new.trainable, frozen, batch)
    source = f"{log.data.dir} ({log.data.source}), {log.data.train_split} and {log.eval.split}"
    print(f"data: {source}; weights: {log.backbone.checkpoint}; neither was looked at")
    log.seen |= _OF_A_RUN
    if config.num_train_steps is not None:
        log.seen.add("num_epochs")  # the recipe's, which it takes the place of
    check_unread_keys(config, log.seen)
    print(f"configuration holds together ({time.monotonic() - start:.1f} s)", flush=True)


def _print_batch(name: str, batch: pipeline.Batch) -> None:
    arrays = (f"{key} {value.dtype} {list(value.shape)}" for key, value in batch.items())
    print(f"{name} batch of two clips: {', '.join(arrays)}")

"""Trains a run: the loop over steps, with logs, checkpoints, evaluations and preemption."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from dualpath_jax.analysis import batch_figure
from dualpath_jax.config.values import score_origin
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.data.video_source import VideoSource
from dualpath_jax.evaluate import Evaluator, Scores
from dualpath_jax.models import registry as method_registry
from dualpath_jax.runtime import environment, files, progress_bar
from dualpath_jax.runtime.preemption import PreemptionGuard
from dualpath_jax.training import adapter_file, early_stopping, restore, sharding
from dualpath_jax.training.advice import TrainingAdvice
from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.experiment import Experiment
from dualpath_jax.training.inputs import choose_train_batches
from dualpath_jax.training.metrics_logger import (
    MetricsLogger,
    RunningMeans,
    advise_after_training,
)
from dualpath_jax.training.sharding import shard_batch
from dualpath_jax.training.state import TrainState
from dualpath_jax.training.step import choose_loss_fn, jit_train_step

_NUM_EVALUATIONS = 10  # of a training, the last one included, where eval.every_epochs is None
_DRAWN_CLIPS = 8  # of the first batch


@dataclasses.dataclass(frozen=True)
class LoopSchedule:
    """Decides after which steps the loop logs, saves and evaluates.

    A step is counted when it is done; the first one is step 1.

    Attributes:
      num_steps: length of the training.
      log_every, save_every: steps between two logs, and between two checkpoints.
      save_seconds: seconds after which a checkpoint is saved in any case.
      keep: number of newest checkpoints that are kept.
      eval_every: steps between two evaluations; 0: only at the end.
      profile_first: first profiled step, counted from the start of the process.
      profile_steps: number of profiled steps; 0: none.
    """

    num_steps: int
    log_every: int
    save_every: int
    save_seconds: float
    keep: int
    eval_every: int
    profile_first: int
    profile_steps: int

    def should_log(self, done: int) -> bool:
        """Return whether to log after `done` steps."""
        return done == self.num_steps or done % self.log_every == 0

    def should_save(self, done: int, seconds: float = 0.0) -> bool:
        """Return whether to save after `done` steps, `seconds` after the last checkpoint."""
        if done == self.num_steps or done % self.save_every == 0 or self.should_evaluate(done):
            return True
        return seconds >= self.save_seconds

    def should_evaluate(self, done: int) -> bool:
        """Return whether to evaluate after `done` steps; the end is not part of the loop."""
        return self.eval_every > 0 and done % self.eval_every == 0 and done < self.num_steps


def make_loop_schedule(config: Any, num_train_steps: int, steps_per_epoch: float) -> LoopSchedule:
    """Return the schedule of the loop that `config` asks for.

    Raises:
      ValueError: early stopping is on, and evaluations are off.
    """
    if config.data.synthetic:
        eval_every = 0  # its scores mean nothing
    elif config.eval.every_epochs is None:
        eval_every = num_train_steps / _NUM_EVALUATIONS
    else:
        eval_every = config.eval.every_epochs * steps_per_epoch
    if config.early_stopping_evaluations and not eval_every:
        raise ValueError(
            f"early_stopping_evaluations={config.early_stopping_evaluations} needs evaluations "
            "during training, and eval.every_epochs=0 has none: leave one of them out"
        )
    return LoopSchedule(
        num_steps=num_train_steps,
        log_every=config.log_every_steps,
        save_every=config.checkpoint.every_steps,
        save_seconds=60 * config.checkpoint.every_minutes,
        keep=config.checkpoint.keep,
        eval_every=max(1, round(eval_every)) if eval_every else 0,
        profile_first=config.profile.first_step if config.profile.num_steps else 0,
        profile_steps=config.profile.num_steps,
    )


def _check_finite(
    step: int, metrics: dict[str, float], max_skipped: int, checkpoints: Checkpoints
) -> None:
    """Check that loss and gradient are finite.

    Args:
      step: number of updates done.
      metrics: of the last step, with "loss" and "gradient_norm".
      max_skipped: number of steps that may be skipped because of values that are not finite.
      checkpoints: of the run, for the message.

    Raises:
      FloatingPointError: they are not finite, for the (max_skipped + 1)-th time.
    """
    loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    if np.isfinite(loss) and np.isfinite(norm):
        return
    problem = f"loss is {loss}, gradient norm {norm} at step {step}"
    if max_skipped:
        skipped = int(metrics["skipped_steps"])
        if skipped <= max_skipped:
            logging.warning("%s: skipped (%d of at most %d)", problem, skipped, max_skipped)
            return
        problem += f", more than optimizer.max_skipped_steps={max_skipped} times"
    checkpoints.wait()
    raise FloatingPointError(
        f"{problem}. Last good checkpoint: {checkpoints.path(checkpoints.latest_step())}. "
        "Lower optimizer.learning_rate, or set optimizer.clip_norm; running again resumes there"
    )


def train(
    experiment: Experiment, state: TrainState, dataset: VideoSource, evaluator: Evaluator
) -> TrainState:
    """Train to `experiment.num_train_steps`, resuming from the workdir's newest checkpoint.

    Args:
      experiment: of `build_experiment`.
      state: the initial state, used when the workdir has no checkpoint; donated.
      dataset: the training split.
      evaluator: evaluates the run during training.

    Returns:
      The state after the last step.

    Raises:
      Preempted: SIGTERM or SIGINT stopped the run; the state is saved.
      ValueError: the checkpoints are damaged, or of another run.
      FloatingPointError: loss or gradient is not finite.
      OSError: a checkpoint cannot be read or written.
    """
    config = experiment.config
    loop = make_loop_schedule(config, experiment.num_train_steps, experiment.steps_per_epoch)

    # The run begins at the newest checkpoint, at an adapter file, or at fresh parameters.
    checkpoints = Checkpoints(experiment.workdir, loop.keep)
    first_step, state = _first_state(experiment, state, checkpoints)

    # Each step needs the compiled program, a batch, and a record of its results.
    loss_fn = choose_loss_fn(config, dataset.labels, len(experiment.class_names))
    train_step = jit_train_step(
        experiment.model, config, experiment.optimizer, experiment.mesh, state, loss_fn
    )
    unreadable = UnreadableVideos(dataset.ids, config.data.max_broken_videos)
    batches = _train_batches(experiment, dataset, first_step, unreadable)
    recorder = _Recorder(experiment, loop, checkpoints, evaluator, unreadable, first_step)
    recorder.evaluate_if_missed(first_step, state)

    # Each step is checked, logged, saved and evaluated as the schedule demands. Without `closing`,
    # TensorFlow's threads could outlive an error, and Python would abort.
    profiled, done = profile_steps(loop, experiment.workdir), first_step
    with contextlib.closing(batches), PreemptionGuard() as guard, profiled as profile:
        for step in range(first_step, loop.num_steps):
            if recorder.stops_early():
                break
            profile(step - first_step)
            with recorder.logger.measure_data_wait():
                batch = next(batches)
                sharded = shard_batch(batch, experiment.mesh)
            if step == first_step:
                recorder.log_first_batch(step, batch)
            state, metrics = train_step(state, experiment.frozen, sharded)
            recorder.finish_step(done := step + 1, state, metrics, guard)
            if recorder.stopping:
                break
        checkpoints.close()
        recorder.logger.close()
        if done > first_step and (recorder.stopping or guard.stop_requested):
            raise guard.stop_exception(f"stopped; saved {checkpoints.path(done)}")
    return state


def _first_state(
    experiment: Experiment, state: TrainState, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """Return the step and the state that the run begins with, and describe it in the workdir."""
    first_step, state = restore.restore_for_training(experiment, state, checkpoints)
    if not first_step and experiment.config.init_from:
        state, _ = adapter_file.init_from_adapter(experiment, state, experiment.config.init_from)
    if jax.process_index() == 0:
        _describe_run(experiment, first_step)
    return first_step, state


def write_config(config: Any, workdir: epath.PathLike) -> None:
    """Write config.json into a workdir."""
    text = config.to_json_best_effort(indent=2) + "\n"
    files.write_text(epath.Path(workdir) / "config.json", text)


def _describe_run(experiment: Experiment, first_step: int) -> None:
    """Write config.json and environment.json into the workdir."""
    workdir = epath.Path(experiment.workdir)
    write_config(experiment.config, workdir)
    start = {"first_step": first_step, "num_train_steps": experiment.num_train_steps}
    description = json.dumps(environment.describe_environment() | start, indent=2)
    files.write_text(workdir / "environment.json", description + "\n")


def _train_batches(
    experiment: Experiment, dataset: VideoSource, first_step: int, unreadable: UnreadableVideos
) -> Generator[dict[str, Any]]:
    """Return this host's training batches from `first_step` to the last step, to be closed."""
    config = experiment.config
    return choose_train_batches(config.data)(
        dataset,
        config.data,
        config.seed,
        first_step,
        experiment.num_train_steps,
        jax.process_index(),
        jax.process_count(),
        inputs=method_registry.clip_inputs(config),
        unreadable=unreadable,
    )


class _Recorder:
    """Checks, logs, saves and evaluates the steps of one training run.

    Attributes:
      logger: progress lines, metrics.jsonl and TensorBoard.
      stopping: True once a signal asked to stop and the state is saved.
    """

    def __init__(
        self,
        experiment: Experiment,
        loop: LoopSchedule,
        checkpoints: Checkpoints,
        evaluator: Evaluator,
        unreadable: UnreadableVideos,
        first_step: int,
    ):
        self._experiment, self._loop = experiment, loop
        self._checkpoints, self._evaluator = checkpoints, evaluator
        self._unreadable, self._first_step = unreadable, first_step
        self._pending = None  # metrics of the last step, unless they have been read
        self._last_save = time.monotonic()
        self.stopping = False
        batch_size = experiment.config.data.batch_size
        made_up = experiment.config.data.synthetic  # there is nothing to learn
        advice = None if made_up else TrainingAdvice(len(experiment.class_names))
        self.logger = MetricsLogger(experiment.workdir, loop.num_steps, batch_size, advice)
        saved = checkpoints.read_metadata(first_step) if first_step else {}
        self._scores = self._restore_scores(saved)
        self._means = RunningMeans(saved.get("running_means"))
        self.logger.resume(first_step, checkpoints.has_scores(first_step))
        self.logger.start(first_step)

    def log_first_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Print that the first step compiles; draw its batch for TensorBoard when a run begins."""
        self.logger.log_compilation()
        config = self._experiment.config
        if step or config.data.synthetic or jax.process_index():
            return
        clips = {key: value[:_DRAWN_CLIPS] for key, value in batch.items()}
        image = batch_figure.draw_batch(clips, config.data, self._experiment.class_names)
        self.logger.write_image(step, "train/batch", np.asarray(image))

    def finish_step(
        self, done: int, state: TrainState, metrics: dict[str, Any], guard: PreemptionGuard
    ) -> None:
        """Check, log, save and evaluate step `done`; the device may still be computing it."""
        # The metrics of a step are read while the next one computes.
        if self._pending is not None:
            self.take_metrics(done - 1, jax.device_get(self._pending))
        self._pending = metrics
        self.logger.update_progress(done)
        if done == self._first_step + 1:
            self.logger.log_first_step(done, metrics)
            environment.keep_freed_memory()
        self.stopping = guard.should_stop(done)
        saving = self.stopping or self.should_save(done)
        if saving or self._loop.should_log(done):
            self._pending = None
            self.take_metrics(done, values := jax.device_get(metrics))
            if self._loop.should_log(done):
                self.log(done, values)
        if saving:
            self.save(done, state)
        if self._loop.should_evaluate(done) and not self.stopping:
            self.evaluate_saved(done, state, guard)

    def take_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Add the metrics of a step to the means; raise FloatingPointError as `_check_finite`."""
        max_skipped = self._experiment.config.optimizer.max_skipped_steps
        _check_finite(step, metrics, max_skipped, self._checkpoints)
        self._means.add(metrics)

    def should_save(self, done: int) -> bool:
        """Return whether to save after `done` steps; the clock is read only at logged steps."""
        seconds = 0.0
        if self._loop.should_log(done):
            seconds = synced_elapsed_seconds(self._last_save)
        return self._loop.should_save(done, seconds)

    def log(self, done: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of step `done`, of which some are means since the last log."""
        values = {key: float(value) for key, value in metrics.items()} | self._means.take()
        updates = done - 1 - values.get("skipped_steps", 0)  # as the optimizer counts
        values["learning_rate"] = float(self._experiment.schedule(updates))
        self.logger.log_step(done, values | {"broken_videos": len(self._unreadable.videos)})

    def save(self, done: int, state: TrainState) -> None:
        """Save the state after `done` steps in the background."""
        state = sharding.replicate(state, self._experiment.mesh)
        config = self._experiment.config
        metadata = self._experiment.metadata() | {"running_means": self._means.to_json()}
        metadata["earlier_scores"] = score_origin(config) | {"values": self._scores}
        self._checkpoints.save(done, state, metadata, self.logger.flush())
        self._last_save = time.monotonic()

    def evaluate_saved(self, done: int, state: TrainState, guard: PreemptionGuard) -> None:
        """Evaluate the state that was just saved; SIGTERM then ends the process at once."""
        self._checkpoints.wait()  # a signal may end the evaluation, but not a save
        is_saved = self._checkpoints.latest_step() == done  # False if the disk was full
        with guard.exit_on_sigterm() if is_saved else contextlib.nullcontext():
            self.evaluate(done, state)

    def evaluate_if_missed(self, done: int, state: TrainState) -> None:
        """Evaluate the restored checkpoint of step `done` if that was due and did not happen.

        The last process may have ended in between.
        """
        due = done and self._loop.should_evaluate(done)
        if due and not self._checkpoints.has_scores(done):
            self.evaluate(done, state)

    def evaluate(self, done: int, state: TrainState) -> None:
        """Evaluate the state after `done` steps, and add the scores to log and checkpoint."""
        config = self._experiment.config
        scores = self._evaluator.evaluate(state)
        self.logger.log_scores(done, config.eval.split, scores)
        self._scores.append(getattr(scores, config.eval.criterion))
        if self.stops_early() and jax.process_index() == 0:
            progress_bar.print_above_bar(
                f"early stopping: {config.eval.criterion} on {config.eval.split} has not risen "
                f"above {max(self._scores):.4f} for {config.early_stopping_evaluations} evaluations"
            )
        entry = dataclasses.asdict(scores) | score_origin(config)
        self._checkpoints.add_scores(done, entry, self.logger.flush())

    def stops_early(self) -> bool:
        """Return whether `early_stopping_evaluations` ends the training."""
        patience = self._experiment.config.early_stopping_evaluations
        return early_stopping.stops_early(self._scores, patience)

    def _restore_scores(self, saved: dict[str, Any]) -> list[float]:
        """Return the scores of evaluations up to a checkpoint by the criterion, from its metadata.

        Those of another split, other views or another criterion do not count.
        """
        config = self._experiment.config
        values: list[float] = []
        earlier, last = saved.get("earlier_scores"), saved.get("scores")
        if isinstance(earlier, dict) and score_origin(config).items() <= earlier.items():
            values += [float(value) for value in earlier["values"]]
        if isinstance(last, dict) and score_origin(config).items() <= last.items():
            values.append(last[config.eval.criterion])
        return values


def record_final_scores(experiment: Experiment, results: dict[str, Any]) -> None:
    """Add the results of a finished training to its log and checkpoint; give advice on a low score.

    Args:
      experiment: the run.
      results: of `evaluate.evaluate_and_write`.
    """
    config, step, split = experiment.config, results["step"], results["split"]
    if not config.data.synthetic:
        num_classes = len(experiment.class_names)
        advise_after_training(experiment.workdir, num_classes, split, results["top1"])
    scores = {field.name: results[field.name] for field in dataclasses.fields(Scores)}
    checkpoints = Checkpoints(experiment.workdir, config.checkpoint.keep)
    if not checkpoints.has_scores(step):
        logger = MetricsLogger(experiment.workdir, experiment.num_train_steps)
        logger.write_scores(step, split, scores)
        entry = scores | score_origin(config)
        checkpoints.add_scores(step, entry, logger.flush())
        logger.close()
    checkpoints.close()


def synced_elapsed_seconds(since: float) -> float:
    """Return the seconds since `since` (time.monotonic) by process 0's clock, on all processes."""
    seconds = time.monotonic() - since
    if jax.process_count() == 1:
        return seconds
    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


@contextlib.contextmanager
def profile_steps(loop: LoopSchedule, workdir: str) -> Iterator[Callable[[int], None]]:
    """Profile the scheduled steps with JAX's profiler.

    Yields:
      A function to call before each step, with the number of steps that this process has done.
    """
    tracing = False

    def stop() -> None:
        nonlocal tracing
        tracing = False
        jax.profiler.stop_trace()
        print(f"profiler trace written to {workdir}/profile", flush=True)

    def before_step(steps_done: int) -> None:
        nonlocal tracing
        if loop.profile_steps and steps_done == loop.profile_first:
            jax.profiler.start_trace(str(epath.Path(workdir) / "profile"))
            tracing = True
        if tracing and steps_done == loop.profile_first + loop.profile_steps:
            stop()

    try:
        yield before_step
    finally:
        if tracing:
            stop()

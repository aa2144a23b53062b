"""Training: the step and the loop.

Public: `make_train_step`, `jit_train_step`, `LoopSchedule`, `make_loop_schedule`, `train`, `record_final_scores`.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from dualpath_jax import evaluate
from dualpath_jax.config.values import format_views
from dualpath_jax.data.unreadable_videos import UnreadableVideos
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import registry as method_registry
from dualpath_jax.runtime import environment
from dualpath_jax.runtime.preemption import PreemptionGuard
from dualpath_jax.training import adapter_file, restore, sharding
from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.experiment import Experiment
from dualpath_jax.training.inputs import choose_train_batches
from dualpath_jax.training.metrics_logger import MetricsLogger, write_text_atomically
from dualpath_jax.training.sharding import shard_batch
from dualpath_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class LoopSchedule:
    """At which steps the loop does something besides training. Steps done, counted from 1."""

    num_steps: int
    log_every: int
    save_every: int
    save_seconds: float  # and when so much time has gone by since the last checkpoint
    keep: int
    eval_every: int  # 0: only at the end
    profile_first: int  # counted from the start of the process
    profile_steps: int

    def should_log(self, done: int) -> bool:
        return done == self.num_steps or done % self.log_every == 0

    def should_save(self, done: int, seconds: float = 0.0) -> bool:
        """`seconds`: since the last checkpoint."""
        if done == self.num_steps or done % self.save_every == 0 or self.should_evaluate(done):
            return True
        return seconds >= self.save_seconds

    def should_evaluate(self, done: int) -> bool:
        return self.eval_every > 0 and done % self.eval_every == 0 and done < self.num_steps


def make_loop_schedule(config: Any, num_train_steps: int, steps_per_epoch: float) -> LoopSchedule:
    """The plan of `config`."""
    eval_every = config.eval.every_epochs * steps_per_epoch
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


def check_finite(
    step: int, metrics: dict[str, float], max_skipped: int, checkpoints: Checkpoints
) -> None:
    """FloatingPointError, with what is saved, when loss or gradient of `step` is not finite.

    Or, where such steps are skipped, when there were more than `max_skipped` of them.
    """
    loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    if np.isfinite(loss) and np.isfinite(norm):
        return
    what = f"loss is {loss}, gradient norm {norm} at step {step}"
    if max_skipped:
        skipped = int(metrics["skipped_steps"])
        if skipped <= max_skipped:
            logging.warning("%s: skipped (%d of at most %d)", what, skipped, max_skipped)
            return
        what += f", more than optimizer.max_skipped_steps={max_skipped} times"
    checkpoints.wait()
    raise FloatingPointError(
        f"{what}. Last good checkpoint: {checkpoints.path(checkpoints.latest_step())}. "
        "Lower optimizer.learning_rate, or set optimizer.clip_norm; running again resumes there"
    )


def train(run: Experiment, dataset: VideoDataset, eval_dataset: VideoDataset) -> None:
    """Train to `run.num_train_steps`, resuming from the workdir's last checkpoint.

    Raises:
      Preempted: told to stop (SIGTERM, SIGINT); the state is saved.
      FloatingPointError: loss or gradient is not finite.
      OSError: the last checkpoint could not be written.
    """
    config = run.config
    plan = make_loop_schedule(config, run.num_train_steps, run.steps_per_epoch)
    checkpoints = Checkpoints(run.workdir, plan.keep)
    first_step = restore.restore_for_training(run, checkpoints)
    if not first_step and config.init_from:
        adapter_file.init_from_adapter(run, config.init_from)
    if jax.process_index() == 0:
        text = config.to_json_best_effort(indent=2) + "\n"
        write_text_atomically(epath.Path(run.workdir) / "config.json", text)
        start = {"first_step": first_step, "num_train_steps": plan.num_steps}
        text = json.dumps(environment.describe_environment() | start, indent=2) + "\n"
        write_text_atomically(epath.Path(run.workdir) / "environment.json", text)
    reporter = MetricsLogger(run.workdir, plan.num_steps, config.data.batch_size)
    train_step = jit_train_step(run.model, config, run.optimizer, run.mesh, run.state)
    broken = UnreadableVideos(dataset.ids, config.data.max_broken_videos)
    batches = choose_train_batches(config.data)(
        dataset,
        config.data,
        config.seed,
        first_step,
        run.num_train_steps,
        jax.process_index(),
        jax.process_count(),
        framesets=method_registry.uses_framesets(config.model.method),
        broken=broken,
    )
    max_skipped = config.optimizer.max_skipped_steps
    reporter.resume(first_step, checkpoints.has_scores(first_step))
    reporter.start(first_step)

    if first_step and plan.should_evaluate(first_step) and not checkpoints.has_scores(first_step):
        # Told to stop there, or ended while it was evaluated.
        scores = evaluate_and_log(run, eval_dataset, reporter, first_step)
        checkpoints.add_scores(first_step, scores, reporter.flush())
    pending = None  # metrics of the step before: read while the next one computes
    last_save = time.monotonic()
    with PreemptionGuard() as watch, profile_steps(plan, run.workdir) as profile:
        for step in range(first_step, plan.num_steps):
            profile(step - first_step)
            with reporter.measure_data_wait():
                batch = shard_batch(next(batches), run.mesh)
            run.state, metrics = train_step(run.state, run.frozen, batch)
            if pending is not None:
                check_finite(step, jax.device_get(pending), max_skipped, checkpoints)
            pending = metrics
            done = step + 1
            reporter.update_progress(done)
            if step == first_step:
                reporter.log_first_step(done, metrics)
                environment.keep_freed_memory()
            stops = watch.should_stop(done)
            saves = stops or plan.should_save(
                done, synced_elapsed_seconds(last_save) if plan.should_log(done) else 0.0
            )
            if saves or plan.should_log(done):
                values = {key: float(value) for key, value in jax.device_get(metrics).items()}
                check_finite(done, values, max_skipped, checkpoints)
                pending = None
            if plan.should_log(done):
                taken = step - values.get("skipped_steps", 0)  # as the optimizer counts
                values["learning_rate"] = float(run.schedule(taken))
                reporter.log_step(done, values | {"broken_videos": len(broken.videos)})
            if saves:
                state = sharding.replicate(run.state, run.mesh)
                checkpoints.save(done, state, run.metadata(), reporter.flush())
                last_save = time.monotonic()
            if plan.should_evaluate(done) and not stops:
                checkpoints.wait()  # it is on disk, whatever becomes of the evaluation
                kept = checkpoints.latest_step() == done  # or had no room there
                with watch.exit_on_sigterm() if kept else contextlib.nullcontext():
                    scores = evaluate_and_log(run, eval_dataset, reporter, done)
                checkpoints.add_scores(done, scores, reporter.flush())
            if stops:
                break
        checkpoints.close()
        reporter.close()
        if plan.num_steps > first_step and (stops or watch.stop_requested):
            raise watch.stop_exception(f"told to stop; saved {checkpoints.path(done)}")


def evaluate_and_log(
    run: Experiment, dataset: VideoDataset, reporter: MetricsLogger, done: int
) -> dict[str, Any]:
    """Scores after `done` steps, reported, for `Checkpoints.add_scores`."""
    scores = evaluate.evaluate_run(run, dataset)
    split = run.config.eval.split
    reporter.log_scores(done, split, scores)
    of = {"split": split, "views": format_views(run.config)}
    return dataclasses.asdict(scores) | of


def record_final_scores(run: Experiment, results: dict[str, Any]) -> None:
    """Note what `evaluate_and_write` says of a finished training in its checkpoint."""
    names = [field.name for field in dataclasses.fields(evaluate.Scores)] + ["split", "views"]
    checkpoints = Checkpoints(run.workdir, run.config.checkpoint.keep)
    checkpoints.add_scores(results["step"], {name: results[name] for name in names})
    checkpoints.close()


def synced_elapsed_seconds(since: float) -> float:
    """Seconds since `since` (of time.monotonic) by the clock of process 0, so that all agree."""
    seconds = time.monotonic() - since
    if jax.process_count() == 1:
        return seconds
    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


@contextlib.contextmanager
def profile_steps(plan: LoopSchedule, workdir: str) -> Iterator[Callable[[int], None]]:
    """JAX's profiler over the planned steps, as many of them as there are.

    Gives what is to be called before each step, with how many this process has done.
    """
    tracing = False

    def stop() -> None:
        nonlocal tracing
        tracing = False
        jax.profiler.stop_trace()
        print(f"profiler trace written to {workdir}/profile", flush=True)

    def before_step(steps_done: int) -> None:
        nonlocal tracing
        if plan.profile_steps and steps_done == plan.profile_first:
            jax.profiler.start_trace(str(epath.Path(workdir) / "profile"))
            tracing = True
        if tracing and steps_done == plan.profile_first + plan.profile_steps:
            stop()

    try:
        yield before_step
    finally:
        if tracing:
            stop()

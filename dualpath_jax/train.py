"""Training: the step and the loop.

Public: `make_train_step`, `jit_train_step`, `Plan`, `make_plan`, `train`, `keep_scores`.
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
from dualpath_jax.config.values import views_of
from dualpath_jax.data.unreadable_videos import BrokenVideos
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import registry as method_registry
from dualpath_jax.runtime import environment
from dualpath_jax.runtime.preemption import Watch
from dualpath_jax.training import adapter_file, restore, sharding
from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.experiment import Run
from dualpath_jax.training.inputs import train_batches_of
from dualpath_jax.training.metrics_logger import Reporter, write_whole
from dualpath_jax.training.sharding import shard_batch
from dualpath_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """At which steps the loop does something besides training. Steps done, counted from 1."""

    num_steps: int
    log_every: int
    save_every: int
    save_seconds: float  # and when so much time has gone by since the last checkpoint
    keep: int
    eval_every: int  # 0: only at the end
    profile_first: int  # counted from the start of the process
    profile_steps: int

    def logs(self, done: int) -> bool:
        return done == self.num_steps or done % self.log_every == 0

    def saves(self, done: int, seconds: float = 0.0) -> bool:
        """`seconds`: since the last checkpoint."""
        if done == self.num_steps or done % self.save_every == 0 or self.evaluates(done):
            return True
        return seconds >= self.save_seconds

    def evaluates(self, done: int) -> bool:
        return self.eval_every > 0 and done % self.eval_every == 0 and done < self.num_steps


def make_plan(config: Any, num_train_steps: int, steps_per_epoch: float) -> Plan:
    """The plan of `config`."""
    eval_every = config.eval.every_epochs * steps_per_epoch
    return Plan(
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


def train(run: Run, dataset: VideoDataset, eval_dataset: VideoDataset) -> None:
    """Train to `run.num_train_steps`, resuming from the workdir's last checkpoint.

    Raises:
      Preempted: told to stop (SIGTERM, SIGINT); the state is saved.
      FloatingPointError: loss or gradient is not finite.
      OSError: the last checkpoint could not be written.
    """
    config = run.config
    plan = make_plan(config, run.num_train_steps, run.steps_per_epoch)
    checkpoints = Checkpoints(run.workdir, plan.keep)
    first_step = restore.for_training(run, checkpoints)
    if not first_step and config.init_from:
        adapter_file.start_from(run, config.init_from)
    if jax.process_index() == 0:
        text = config.to_json_best_effort(indent=2) + "\n"
        write_whole(epath.Path(run.workdir) / "config.json", text)
        start = {"first_step": first_step, "num_train_steps": plan.num_steps}
        text = json.dumps(environment.describe() | start, indent=2) + "\n"
        write_whole(epath.Path(run.workdir) / "environment.json", text)
    reporter = Reporter(run.workdir, plan.num_steps, config.data.batch_size)
    train_step = jit_train_step(run.model, config, run.optimizer, run.mesh, run.state)
    broken = BrokenVideos(dataset.ids, config.data.max_broken_videos)
    batches = train_batches_of(config.data)(
        dataset,
        config.data,
        config.seed,
        first_step,
        run.num_train_steps,
        jax.process_index(),
        jax.process_count(),
        framesets=method_registry.takes_framesets(config.model.method),
        broken=broken,
    )
    max_skipped = config.optimizer.max_skipped_steps
    reporter.resume(first_step, checkpoints.has_scores(first_step))
    reporter.start(first_step)

    if first_step and plan.evaluates(first_step) and not checkpoints.has_scores(first_step):
        # Told to stop there, or ended while it was evaluated.
        scores = evaluate_now(run, eval_dataset, reporter, first_step)
        checkpoints.add_scores(first_step, scores, reporter.flush())
    pending = None  # metrics of the step before: read while the next one computes
    last_save = time.monotonic()
    with Watch() as watch, profiling(plan, run.workdir) as profile:
        for step in range(first_step, plan.num_steps):
            profile(step - first_step)
            with reporter.waiting_for_data():
                batch = shard_batch(next(batches), run.mesh)
            run.state, metrics = train_step(run.state, run.frozen, batch)
            if pending is not None:
                check_finite(step, jax.device_get(pending), max_skipped, checkpoints)
            pending = metrics
            done = step + 1
            reporter.step_done(done)
            if step == first_step:
                reporter.first_step_done(done, metrics)
                environment.keep_memory()
            stops = watch.should_stop(done)
            saves = stops or plan.saves(done, elapsed(last_save) if plan.logs(done) else 0.0)
            if saves or plan.logs(done):
                values = {key: float(value) for key, value in jax.device_get(metrics).items()}
                check_finite(done, values, max_skipped, checkpoints)
                pending = None
            if plan.logs(done):
                taken = step - values.get("skipped_steps", 0)  # as the optimizer counts
                values["learning_rate"] = float(run.schedule(taken))
                reporter.progress(done, values | {"broken_videos": len(broken.videos)})
            if saves:
                state = sharding.whole(run.state, run.mesh)
                checkpoints.save(done, state, run.metadata(), reporter.flush())
                last_save = time.monotonic()
            if plan.evaluates(done) and not stops:
                checkpoints.wait()  # it is on disk, whatever becomes of the evaluation
                kept = checkpoints.latest_step() == done  # or had no room there
                with watch.nothing_to_save() if kept else contextlib.nullcontext():
                    scores = evaluate_now(run, eval_dataset, reporter, done)
                checkpoints.add_scores(done, scores, reporter.flush())
            if stops:
                break
        checkpoints.close()
        reporter.close()
        if plan.num_steps > first_step and (stops or watch.told):
            raise watch.told_by(f"told to stop; saved {checkpoints.path(done)}")


def evaluate_now(run: Run, dataset: VideoDataset, reporter: Reporter, done: int) -> dict[str, Any]:
    """Scores after `done` steps, reported, for `Checkpoints.add_scores`."""
    scores = evaluate.evaluate_run(run, dataset)
    split = run.config.eval.split
    reporter.scores(done, split, scores)
    of = {"split": split, "views": views_of(run.config)}
    return dataclasses.asdict(scores) | of


def keep_scores(run: Run, results: dict[str, Any]) -> None:
    """Note what `evaluate_and_write` says of a finished training in its checkpoint."""
    names = [field.name for field in dataclasses.fields(evaluate.Scores)] + ["split", "views"]
    checkpoints = Checkpoints(run.workdir, run.config.checkpoint.keep)
    checkpoints.add_scores(results["step"], {name: results[name] for name in names})
    checkpoints.close()


def elapsed(since: float) -> float:
    """Seconds since `since` (of time.monotonic) by the clock of process 0, so that all agree."""
    seconds = time.monotonic() - since
    if jax.process_count() == 1:
        return seconds
    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


@contextlib.contextmanager
def profiling(plan: Plan, workdir: str) -> Iterator[Callable[[int], None]]:
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

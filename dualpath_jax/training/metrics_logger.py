"""Progress of a run: lines for people, metrics.jsonl and TensorBoard events for tools.

Public: `MetricsLogger`, `is_evaluation`, `PROCESS_METRICS`.
"""

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import tensorflow as tf
from absl import logging
from clu import metric_writers
from etils import epath

from dualpath_jax.runtime import files, gcs, progress_bar

# Keys of metrics.jsonl that tell of the process and not of learning.
PROCESS_METRICS = ("clips_per_second", "data_wait", "broken_videos")


class MetricsLogger:
    """Writes the progress of one training run; only process 0 does."""

    def __init__(self, workdir: str, num_train_steps: int, batch_size: int):
        self._num_train_steps = num_train_steps
        self._batch_size = batch_size
        self._writes = jax.process_index() == 0
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._workdir = workdir
        self._events: metric_writers.SummaryWriter | None = None
        self._data_seconds = 0.0
        self._unwritten: list[str] = []  # lines of metrics.jsonl
        self._bar: progress_bar.ProgressBar | None = None

    def resume(self, step: int, evaluated: bool) -> None:
        """Drop the entries of metrics.jsonl for what will be done again.

        That is all after `step`, and the evaluation of `step` unless it is `evaluated`.
        """
        if not self._writes or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the process died while it wrote this
                entry = json.loads(line)
                lost = entry["step"] == step and is_evaluation(entry) and not evaluated
                if entry["step"] <= step and not lost:
                    kept.append(line + "\n")
        files.write_text(self._path, "".join(kept))

    def start(self, step: int) -> None:
        """Begin timing at `step`."""
        self._last_step, self._last_time = step, time.perf_counter()
        self._data_seconds = 0.0
        if self._bar is None:
            total = self._num_train_steps
            self._bar = progress_bar.ProgressBar(
                total, "train", "steps", min(step, total), shown=self._writes
            )

    def update_progress(self, step: int) -> None:
        """`step` steps are done: moves the bar."""
        self._bar.update_to(step)

    def log_first_step(self, step: int, metrics: Any) -> None:
        """Tell how long the first step took, and leave its compilation out of what follows."""
        jax.block_until_ready(metrics)
        if self._writes:
            seconds = time.perf_counter() - self._last_time
            progress_bar.print_above_bar(f"first step, compilation included: {seconds:.1f} s")
        self.start(step)

    @contextlib.contextmanager
    def measure_data_wait(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - begin

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """A progress line and an entry for the steps since the last one."""
        line = (
            f"step {step}/{self._num_train_steps}  loss {metrics['loss']:.3f}  "
            f"lr {metrics['learning_rate']:.2e}"
        )
        if steps := step - self._last_step:  # the first step alone is not timed
            seconds = time.perf_counter() - self._last_time
            speed, wait = steps * self._batch_size / seconds, self._data_seconds / seconds
            left = progress_bar.format_duration((self._num_train_steps - step) * seconds / steps)
            line += f"  {speed:.1f} clips/s  data wait {wait:.0%}  ETA {left}"
            metrics = {**metrics, "clips_per_second": speed, "data_wait": wait}
        if self._writes:
            progress_bar.print_above_bar(line)
            self._bar.postpone_line()
        self._write(step, metrics, "train")
        self.start(step)

    def log_scores(self, step: int, split: str, scores: Any) -> None:
        """Scores of an evaluation, `evaluate.Scores`."""
        values = dataclasses.asdict(scores)
        if self._writes:
            progress_bar.print_above_bar(f"step {step}  {split}  {format_scores(scores)}")
        self._write(step, values, split)
        self.start(step)

    def _write(self, step: int, values: dict[str, float], prefix: str) -> None:
        if not self._writes:
            return
        self._unwritten.append(json.dumps({"step": step, "split": prefix, **values}) + "\n")
        if not self.flush():
            return  # nor is there room for events
        with self._losing_events(step):
            if self._events is None:
                self._events = metric_writers.SummaryWriter(self._workdir)
            self._events.write_scalars(step, {f"{prefix}/{key}": v for key, v in values.items()})

    @contextlib.contextmanager
    def _losing_events(self, step: int) -> Iterator[None]:
        """TensorBoard's events repeat metrics.jsonl: where the disk refuses them, they are lost."""
        try:
            yield
        except tf.errors.OpError as error:
            problem = " ".join(error.message.split())
            logging.warning("TensorBoard events of step %d are lost: %s", step, problem)
            self._events = None  # the next ones go to another file

    def flush(self) -> bool:
        """Is every entry in metrics.jsonl? Those that a full disk refused are tried again."""
        try:
            if self._unwritten:
                _append(self._path, "".join(self._unwritten))
                self._unwritten.clear()
        except OSError as error:
            entries = len(self._unwritten)
            logging.warning("%s: %s; %d entries wait in memory", self._path, error, entries)
        return not self._unwritten

    def close(self) -> None:
        if self._bar:
            self._bar.close()
        if self._events:
            with self._losing_events(self._num_train_steps):
                self._events.close()


def is_evaluation(entry: dict[str, Any]) -> bool:
    """Is an entry of metrics.jsonl that of an evaluation, maybe of the split that is trained on?"""
    return "top1" in entry


def _append(path: epath.Path, text: str) -> None:
    """Add `text` to a file, all of it or nothing."""
    if "://" in os.fspath(path):
        with gcs.gcs_errors(os.fspath(path)), path.open("a") as file:
            file.write(text)
        return
    content = text.encode()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(content) < len(content):  # the disk is full
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def format_scores(scores: Any) -> str:
    """`evaluate.Scores` for people."""
    return (
        f"top-1 {scores.top1:.4f}  top-5 {scores.top5:.4f}  "
        f"mean class accuracy {scores.mean_class_accuracy:.4f}  videos {scores.num_videos}"
    )

"""Logs the progress of a run: printed lines, metrics.jsonl and TensorBoard events."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from dualpath_jax.analysis.confidence import format_accuracy
from dualpath_jax.runtime import files, gcs, progress_bar
from dualpath_jax.runtime.safe_read import parse_json, read_lines
from dualpath_jax.training.advice import TrainingAdvice

# Keys of metrics.jsonl that describe the process, not what is learned.
PROCESS_METRICS = ("clips_per_second", "data_wait", "broken_videos")
# Metrics of a step that are logged as they are; the others are averaged over the steps.
_NOT_AVERAGED = ("gradient_norm", "skipped_steps")


class RunningMeans:
    """Averages the metrics of the training steps since the last log.

    A checkpoint holds the sums, so that a resumed run logs what an undisturbed one logs. Steps
    without a finite loss and gradient are left out.

    Args:
      saved: of `to_json`; None, or anything else that is not such sums, starts with no step.
    """

    def __init__(self, saved: Any = None):
        self._sums: dict[str, float] = {}
        self._steps = 0
        if isinstance(saved, dict) and isinstance(saved.get("sums"), dict):
            numbers = [saved.get("steps"), *saved["sums"].values()]
            if type(numbers[0]) is int and all(type(n) in (int, float) for n in numbers):
                self._sums, self._steps = dict(saved["sums"]), numbers[0]

    def add(self, metrics: dict[str, Any]) -> None:
        """Take the metrics of one step."""
        values = {key: float(value) for key, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            return
        self._steps += 1
        for key in values.keys() - set(_NOT_AVERAGED):
            self._sums[key] = self._sums.get(key, 0.0) + values[key]

    def take(self) -> dict[str, float]:
        """Return the means, and start again; {} if no step was finite."""
        means = {key: total / self._steps for key, total in self._sums.items() if self._steps}
        self._sums, self._steps = {}, 0
        return means

    def to_json(self) -> dict[str, Any]:
        """Return the sums and the number of steps, for the metadata of a checkpoint."""
        return {"sums": self._sums, "steps": self._steps}


class MetricsLogger:
    """Logs the progress of one training run; only process 0 writes.

    Args:
      workdir: of the run, local or gs://.
      num_train_steps: length of the training.
      batch_size: of the whole run, in clips; only `log_step` needs it.
      advice: watches the log and says what to try; None gives no advice.
    """

    def __init__(
        self,
        workdir: str,
        num_train_steps: int,
        batch_size: int = 0,
        advice: TrainingAdvice | None = None,
    ):
        self._num_train_steps = num_train_steps
        self._batch_size = batch_size
        self._advice = advice
        self._is_main = jax.process_index() == 0
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._workdir = workdir
        self._events: Any = None  # a tf.summary.SummaryWriter, from the first entry on
        self._data_seconds = 0.0
        self._unwritten: list[str] = []  # lines of metrics.jsonl
        self._bar: progress_bar.ProgressBar | None = None

    def resume(self, step: int, evaluated: bool) -> None:
        """Remove the entries of metrics.jsonl for steps and evaluations that will be repeated.

        Args:
          step: number of updates that the resumed state has done. Entries of later steps are
            removed.
          evaluated: False removes an evaluation of `step` too.
        """
        if not self._is_main or not self._path.exists():
            return
        kept = []
        for entry in read_entries(self._path):
            repeated = entry["step"] == step and is_evaluation(entry) and not evaluated
            if entry["step"] <= step and not repeated:
                kept.append(json.dumps(entry) + "\n")
        files.write_text(self._path, "".join(kept))

    def start(self, step: int) -> None:
        """Start timing at `step`, and the progress bar on the first call."""
        self._last_step, self._last_time = step, time.perf_counter()
        self._data_seconds = 0.0
        if self._bar is None:
            total = self._num_train_steps
            self._bar = progress_bar.ProgressBar(
                total, "train", "steps", min(step, total), shown=self._is_main
            )

    def update_progress(self, step: int) -> None:
        """Move the progress bar to `step` steps done."""
        self._bar.update_to(step)

    def log_compilation(self) -> None:
        """Print that the first step compiles, which can take minutes."""
        if self._is_main:
            progress_bar.print_above_bar("compiling the training step ...")

    def log_first_step(self, step: int, metrics: Any) -> None:
        """Print how long the first step took, and keep its compilation out of later timings."""
        jax.block_until_ready(metrics)
        if self._is_main:
            seconds = time.perf_counter() - self._last_time
            progress_bar.print_above_bar(f"first step, compilation included: {seconds:.1f} s")
        self.start(step)

    @contextlib.contextmanager
    def measure_data_wait(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - begin

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log a progress line and an entry for the steps since the last one.

        Args:
          step: number of updates done.
          metrics: with "loss" and "learning_rate"; loss and accuracy are means over these steps.
        """
        line = (
            f"step {step}/{self._num_train_steps}  loss {metrics['loss']:.3f}  "
            f"lr {metrics['learning_rate']:.2e}"
        )
        if steps := step - self._last_step:  # 0 right after the first step, which is not timed
            seconds = time.perf_counter() - self._last_time
            speed, wait = steps * self._batch_size / seconds, self._data_seconds / seconds
            shown = f"{speed:.1f} clips/s" if speed >= 1 else f"{seconds / steps:.1f} s per step"
            eta = progress_bar.format_duration((self._num_train_steps - step) * seconds / steps)
            line += f"  {shown}  data wait {wait:.0%}  ETA {eta}"
            metrics = {**metrics, "clips_per_second": speed, "data_wait": wait}
        if self._is_main:
            progress_bar.print_above_bar(line)
            self._bar.postpone_line()
        self._write(step, metrics, "train")
        if self._advice:
            self._print_advice(self._advice.add_step(metrics))
        self.start(step)

    def log_scores(self, step: int, split: str, scores: Any) -> None:
        """Log the scores of an evaluation of `split`, an `evaluate.Scores`."""
        if self._is_main:
            progress_bar.print_above_bar(f"step {step}  {split}  {format_scores(scores)}")
        self.write_scores(step, split, dataclasses.asdict(scores))
        if self._advice:
            self._print_advice(self._advice.add_score(split, scores.top1))
        self.start(step)

    def write_scores(self, step: int, split: str, scores: dict[str, Any]) -> None:
        """Write scores, the values of an `evaluate.Scores`, without printing them."""
        self._write(step, scores, split)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image, uint8 [H, W, 3], to the TensorBoard events."""
        if self._is_main:
            with self._tolerate_lost_events(step), self._open_events().as_default():
                tf.summary.image(name, image[None], step)

    def _print_advice(self, line: str | None) -> None:
        if line and self._is_main:
            progress_bar.print_above_bar(line)

    def _write(self, step: int, values: dict[str, float], split: str) -> None:
        """Write an entry of metrics.jsonl and the TensorBoard events of the same values."""
        if not self._is_main:
            return
        self._unwritten.append(json.dumps({"step": step, "split": split, **values}) + "\n")
        if not self.flush():
            return  # the disk is full, and has no room for events either
        with self._tolerate_lost_events(step), self._open_events().as_default():
            for key, value in values.items():
                tf.summary.scalar(f"{split}/{key}", value, step)

    def _open_events(self) -> Any:
        """Return the writer of TensorBoard events."""
        if self._events is None:
            self._events = tf.summary.create_file_writer(self._workdir)
        return self._events

    @contextlib.contextmanager
    def _tolerate_lost_events(self, step: int) -> Iterator[None]:
        """Log a warning if events cannot be written; metrics.jsonl has the same values."""
        try:
            yield
        except tf.errors.OpError as error:
            problem = " ".join(error.message.split())
            logging.warning("TensorBoard events of step %d are lost: %s", step, problem)
            self._events = None  # later events go to a new file

    def flush(self) -> bool:
        """Write the entries that are not on disk yet; return False if the disk refuses them."""
        try:
            if self._unwritten:
                _append(self._path, "".join(self._unwritten))
                self._unwritten.clear()
        except OSError as error:
            entries = len(self._unwritten)
            logging.warning("%s: %s; %d entries wait in memory", self._path, error, entries)
        return not self._unwritten

    def close(self) -> None:
        """Close the progress bar and the file of TensorBoard events."""
        if self._bar:
            self._bar.close()
        if self._events:
            with self._tolerate_lost_events(self._num_train_steps):
                self._events.close()


def read_entries(path: epath.Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; drop lines that are no entries, and log a warning about them.

    The last line may be incomplete, if the process died while it wrote it. It is dropped silently.

    Raises:
      ValueError: the file is too large, or not a regular file.
      OSError: it cannot be read.
    """
    *lines, rest = read_lines(path)
    entries, odd = [], []
    for number, line in enumerate([*lines, rest], 1):
        try:
            entry = parse_json(line, dict, path)
            _check_entry(entry)
            entries.append(entry)
        except ValueError:
            if number <= len(lines):
                odd.append(number)
    if odd:
        text = "%s: line %d and %d more are not entries of this program and were left out"
        logging.warning(text, path, odd[0], len(odd) - 1)
    return entries


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise ValueError unless an entry has a step, the name of a split, and numbers."""
    numbers = [value for key, value in entry.items() if key != "split"]
    valid = type(entry.get("step")) is int and entry["step"] >= 0
    valid &= isinstance(entry.get("split"), str)
    if not valid or not all(type(value) in (int, float) for value in numbers):
        raise ValueError("not an entry of metrics.jsonl")


def is_evaluation(entry: dict[str, Any]) -> bool:
    """Return whether an entry of metrics.jsonl is that of an evaluation.

    Its "split" does not decide: the training split may be evaluated too.
    """
    return "top1" in entry


def advise_after_training(workdir: str, num_classes: int, split: str, top1: float) -> None:
    """Print what to try if the final score is far below the accuracy in training.

    Args:
      workdir: of the run; its metrics.jsonl has the accuracies.
      num_classes: of the data set.
      split: that was evaluated.
      top1: its score, 0..1.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if jax.process_index() or not path.exists():
        return
    advice = TrainingAdvice(num_classes)
    for entry in read_entries(path):
        if is_evaluation(entry):
            advice.add_score(entry["split"], entry["top1"])  # its advice was given then
        else:
            advice.add_accuracy(entry)
    if line := advice.add_score(split, top1):
        progress_bar.print_above_bar(line)


def _append(path: epath.Path, text: str) -> None:
    """Append `text` to a file, all of it or nothing.

    Raises:
      OSError: the disk is full, or the file cannot be written.
      ValueError: it is a link.
    """
    if "://" in os.fspath(path):
        with gcs.gcs_errors(os.fspath(path)), path.open("a") as file:
            file.write(text)
        return
    content = text.encode()
    opened = files.open_in_place(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with open(opened, "ab", buffering=0) as file:
        if os.fstat(opened).st_nlink > 1:  # a backup made of hard links keeps what it has
            files.write_text(path, epath.Path(path).read_text() + text)
            return
        end = file.tell()
        if file.write(content) < len(content):  # the disk is full
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def format_scores(scores: Any) -> str:
    """Format an `evaluate.Scores` as one line."""
    return (
        f"top-1 {format_accuracy(scores.top1, scores.num_videos)}  top-5 {scores.top5:.4f}  "
        f"mean class accuracy {scores.mean_class_accuracy:.4f}  videos {scores.num_videos}"
    )

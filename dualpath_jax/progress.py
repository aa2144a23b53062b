"""Progress of a run: lines for people, metrics.jsonl and TensorBoard events for tools.

Public: `Reporter`.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
from clu import metric_writers
from etils import epath


class Reporter:
    """Writes the progress of one training run; only process 0 does."""

    def __init__(self, workdir: str, num_train_steps: int, batch_size: int):
        self._num_train_steps = num_train_steps
        self._batch_size = batch_size
        self._writes = jax.process_index() == 0
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._events = metric_writers.SummaryWriter(workdir) if self._writes else None
        self._data_seconds = 0.0

    def resume(self, step: int) -> None:
        """Drop the entries of metrics.jsonl after `step`, whose steps will be done again."""
        if not self._writes or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the process died while it wrote this
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)

    def start(self, step: int) -> None:
        """Begin timing at `step`."""
        self._last_step, self._last_time = step, time.perf_counter()
        self._data_seconds = 0.0

    def first_step_done(self, step: int, metrics: Any) -> None:
        """Tell how long the first step took, and leave its compilation out of what follows."""
        jax.block_until_ready(metrics)
        if self._writes:
            seconds = time.perf_counter() - self._last_time
            print(f"first step, compilation included: {seconds:.1f} s", flush=True)
        self.start(step)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - begin

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        """A progress line and an entry for the steps since the last one."""
        seconds = time.perf_counter() - self._last_time
        steps = max(step - self._last_step, 1)  # the first step alone is not timed
        speed = steps * self._batch_size / seconds
        wait = self._data_seconds / seconds
        left = round((self._num_train_steps - step) * seconds / steps)
        if self._writes:
            print(
                f"step {step}/{self._num_train_steps}  loss {metrics['loss']:.3f}  "
                f"lr {metrics['learning_rate']:.2e}  {speed:.1f} clips/s  data wait {wait:.0%}  "
                f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}",
                flush=True,
            )
        self._write(step, {**metrics, "clips_per_second": speed, "data_wait": wait}, "train")
        self.start(step)

    def scores(self, step: int, split: str, scores: Any) -> None:
        """Scores of an evaluation, `evaluate.Scores`."""
        values = dataclasses.asdict(scores)
        if self._writes:
            print(f"step {step}  {split}  {format_scores(scores)}", flush=True)
        self._write(step, values, split)
        self.start(step)

    def _write(self, step: int, values: dict[str, float], prefix: str) -> None:
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "split": prefix, **values}) + "\n")
        self._events.write_scalars(step, {f"{prefix}/{key}": v for key, v in values.items()})

    def close(self) -> None:
        if self._events:
            self._events.close()


def format_scores(scores: Any) -> str:
    """`evaluate.Scores` for people."""
    return (
        f"top-1 {scores.top1:.4f}  top-5 {scores.top5:.4f}  "
        f"mean class accuracy {scores.mean_class_accuracy:.4f}  videos {scores.num_videos}"
    )

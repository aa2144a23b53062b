"""Shows the progress of a long task: a bar on a terminal, an occasional line in a log.

Bars go to standard error, so that results can be redirected. `set_quiet` switches all progress off
in this process, for `--quiet`. This module imports little, because video decoding processes load
it.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import tqdm

from dualpath_jax.runtime import terminal

_LINE_INTERVAL_SECONDS = 30.0  # between two lines in a log
_Item = TypeVar("_Item")
_quiet = False


def set_quiet(quiet: bool = True) -> None:
    """Switch bars and `print_above_bar` off in this process, or on again."""
    global _quiet
    _quiet = quiet


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet`, which every script with progress has."""
    help_ = (
        "show no progress (default: a bar on a terminal, otherwise a line every "
        f"{_LINE_INTERVAL_SECONDS:g} s)"
    )
    parser.add_argument("--quiet", action="store_true", help=help_)


def print_above_bar(line: str) -> None:
    """Print a line above the bars; ignore errors, such as a full disk under the log file."""
    if not _quiet:
        with contextlib.suppress(OSError):
            tqdm.tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


class ProgressBar:
    """Counts `unit`s up to `total`; used in a `with` statement.

    Args:
      total: the number of units.
      task: the name of the work, such as "prepare".
      unit: what is counted, such as "videos".
      done: the number of units that were done before.
      shown: False for a bar that is never displayed, as in all processes but the first.
      clock: returns the time in seconds; tests pass their own.

    Attributes:
      done: the number of units done, including those from before.
    """

    def __init__(
        self,
        total: int,
        task: str,
        unit: str,
        done: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        shown = shown and not _quiet
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            desc=task,
            unit=f" {unit}",
            disable=not on_terminal,
            file=terminal.raw_stderr(),
            dynamic_ncols=True,
        )
        self._total, self._task, self._unit = total, task, unit
        self._first = self.done = done
        self._prints_lines, self._clock = shown and not on_terminal, clock
        self._start_time = self._last_line_time = clock()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar and leave its last state on the terminal."""
        self._bar.close()

    def update(self, number: int = 1) -> None:
        """Count `number` more units as done."""
        self._bar.update(number)
        self.done += number
        now = self._clock()
        if self._prints_lines and now - self._last_line_time >= _LINE_INTERVAL_SECONDS:
            self._last_line_time = now
            remaining, done_here = self._total - self.done, self.done - self._first
            left = format_duration((now - self._start_time) * remaining / (done_here or 1))
            with contextlib.suppress(OSError):
                print(f"{self._format_count()}, {left} left", file=sys.stderr, flush=True)

    def postpone_line(self) -> None:
        """Delay the next log line, because the caller has just printed one of its own."""
        self._last_line_time = self._clock()

    def update_to(self, done: int) -> None:
        """Set the number of units done, including those from before."""
        self.update(done - self.done)

    def _format_count(self) -> str:
        """Return the current count, such as "prepare: 70 of 100 videos (70%)"."""
        part = self.done / max(self._total, 1)
        return f"{self._task}: {self.done:,} of {self._total:,} {self._unit} ({part:.0%})"


def iterate_with_bar(items: Collection[_Item], task: str, unit: str) -> Iterator[_Item]:
    """Yield the items and show a progress bar."""
    with ProgressBar(len(items), task, unit) as bar:
        for item in items:
            yield item
            bar.update()


def format_duration(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: 3725.4 -> "1:02:05"."""
    rounded = round(seconds)
    return f"{rounded // 3600}:{rounded // 60 % 60:02}:{rounded % 60:02}"

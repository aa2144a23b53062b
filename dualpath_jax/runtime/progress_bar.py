"""How far a long piece of work is: a bar on a terminal, in a log a line now and then.

Public: `ProgressBar`, `iterate_with_bar`, `print_above_bar`, `set_quiet`, `add_quiet_option`.

Bars go to standard error, so that results can be sent elsewhere. `set_quiet` switches all of it off
in this process, for `--quiet`. Light: decoding processes import what imports this.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import tqdm

SECONDS = 30.0  # between two lines in a log
_Item = TypeVar("_Item")
_quiet = False


def set_quiet(quiet: bool = True) -> None:
    """No bars and no `print_above_bar` in this process from here on (or all of them again)."""
    global _quiet
    _quiet = quiet


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    """The option of every script that shows progress."""
    help_ = f"no progress; without a terminal it is a line every {SECONDS:g} s"
    parser.add_argument("--quiet", action="store_true", help=help_)


def print_above_bar(line: str) -> None:
    """Print a line above the bars; no work ends because it goes to a file on a full disk."""
    if not _quiet:
        with contextlib.suppress(OSError):
            tqdm.tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


class ProgressBar:
    """Counts `unit`s up to `total`; use it in a `with` statement.

    Args:
      total: how many there are.
      what: the work, such as "prepare".
      unit: what is counted, such as "videos".
      done: how many were done before.
      shown: False for a bar that is never seen, as in all processes but the first.
      clock: seconds; for tests.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str,
        done: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        shown = shown and not _quiet
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=f" {unit}",
            disable=not terminal,
            dynamic_ncols=True,
        )
        self._total, self._what, self._unit = total, what, unit
        self._first = self.done = done
        self._lines, self._clock = shown and not terminal, clock
        self._begin = self._told = clock()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def update(self, number: int = 1) -> None:
        """So many more are done."""
        self._bar.update(number)
        self.done += number
        now = self._clock()
        if self._lines and now - self._told >= SECONDS:
            self._told = now
            left = (now - self._begin) * (self._total - self.done) / (self.done - self._first or 1)
            with contextlib.suppress(OSError):
                print(
                    f"{self._so_far()}, {format_duration(left)} left", file=sys.stderr, flush=True
                )

    def postpone_line(self) -> None:
        """Another line told how far it is: a log needs none of this bar for a while."""
        self._told = self._clock()

    def update_to(self, done: int) -> None:
        """`done` are done, those from before included."""
        self.update(done - self.done)

    def _so_far(self) -> str:
        part = self.done / max(self._total, 1)
        return f"{self._what}: {self.done:,} of {self._total:,} {self._unit} ({part:.0%})"


def iterate_with_bar(items: Collection[_Item], what: str, unit: str) -> Iterator[_Item]:
    """`items`, under a bar."""
    with ProgressBar(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.update()


def format_duration(seconds: float) -> str:
    """3725.4 -> "1:02:05"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"

"""Handles requests to stop: SIGTERM, which a preempted machine sends first, and Ctrl-C (SIGINT)."""

import collections
import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL: run the same command again


class Preempted(Exception):
    """Reports that the run was stopped by SIGTERM and has saved its state."""

    exit_code = EXIT_CODE


class Interrupted(Preempted):
    """Reports that the run was stopped by Ctrl-C and is not meant to be started again."""

    exit_code = 128 + signal.SIGINT  # the status that a shell reports


def exit_at_once(*_) -> None:
    """End the process at once; handles SIGTERM while there is nothing to save."""
    os.write(2, b"stopped by SIGTERM; the same command resumes from the last checkpoint\n")
    os._exit(EXIT_CODE)


def install_sigterm_handler() -> None:
    """Install `exit_at_once`, which then also runs while a program computes or compiles.

    The main thread calls Python's signal handlers only when it executes Python code again, perhaps
    minutes later. Python writes a signal's number to a pipe at once, and a thread reads it. The
    thread ends the process if `exit_at_once` is installed, or when a signal comes a second time.
    """
    signal.signal(signal.SIGTERM, exit_at_once)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch_signal_pipe, args=(read_end,), daemon=True).start()


def _watch_signal_pipe(pipe: int) -> None:
    """Read signal numbers from `pipe` and end the process where it must not wait."""
    counts = collections.Counter()
    while numbers := os.read(pipe, 1):
        number = numbers[0]
        counts[number] += 1
        if number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is exit_at_once:
                exit_at_once()
            elif counts[number] > 1:
                os._exit(128 + number)  # the status that a shell reports


class PreemptionGuard:
    """Records SIGTERM and SIGINT inside its `with` block; all hosts learn of them at one step.

    With a single process, a second signal ends it at once. With several processes, JAX's preemption
    service handles SIGTERM on any of them, however often it comes, and agrees on the step; SIGINT
    ends them.

    Attributes:
      stop_exception: the exception class to raise once the state is saved.
      stop_requested: True once a signal has come. It is set only with a single process.
    """

    def __init__(self):
        self.stop_exception = Preempted
        self.stop_requested = False
        self._previous_handlers = {}

    def __enter__(self) -> "PreemptionGuard":
        # Only the main thread may set handlers; with several processes JAX's service has its own.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._record_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def exit_on_sigterm(self) -> Iterator[None]:
        """Restore the SIGTERM handler from before the guard was entered while the block runs."""
        previous = self._previous_handlers.get(signal.SIGTERM)
        if previous is None or self.stop_requested:
            yield
            return
        signal.signal(signal.SIGTERM, previous)
        try:
            yield
        finally:
            handler = signal.SIG_DFL if self.stop_requested else self._record_signal
            signal.signal(signal.SIGTERM, handler)

    def _record_signal(self, number: int, frame: object) -> None:
        """Request a stop; the next signal ends the process."""
        del frame
        self.stop_requested = True
        for each in self._previous_handlers:
            signal.signal(each, signal.SIG_DFL)
        if number == signal.SIGINT:
            self.stop_exception = Interrupted
            os.write(
                2, b"\nsaving after this step; press Ctrl-C again to end the process at once\n"
            )

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after `step`; to be called on every host, for every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.stop_requested

"""Being told to stop: a machine that is taken away sends SIGTERM first, Ctrl-C is SIGINT.

Public: `EXIT_CODE`, `Preempted`, `Interrupted`, `PreemptionGuard`, `exit_at_once`, `install_sigterm_handler`.
"""

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
    """The run was told to stop, and has saved where it is."""

    exit_code = EXIT_CODE


class Interrupted(Preempted):
    """By Ctrl-C: it is not meant to be started again."""

    exit_code = 128 + signal.SIGINT  # as a shell has it


def exit_at_once(*_) -> None:
    """A handler of SIGTERM for when there is nothing to save: ends the process at once."""
    os.write(2, b"told to stop; the same command goes on from the last checkpoint\n")
    os._exit(EXIT_CODE)


def install_sigterm_handler() -> None:
    """Install `exit_at_once`, also for while Python waits for a compiled program or for a compiler.

    Python's handlers are called in the main thread when that executes Python again, minutes later
    perhaps. The number of a signal is written to a pipe at once, which a thread reads: it leaves
    where `exit_at_once` is installed, and ends the process when a signal comes for the second time.
    """
    signal.signal(signal.SIGTERM, exit_at_once)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    threading.Thread(target=_watch_signal_pipe, args=(ours,), daemon=True).start()


def _watch_signal_pipe(pipe: int) -> None:
    told = collections.Counter()
    while numbers := os.read(pipe, 1):
        number = numbers[0]
        told[number] += 1
        if number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is exit_at_once:
                exit_at_once()
            elif told[number] > 1:
                os._exit(128 + number)  # as a shell has it


class PreemptionGuard:
    """Notes SIGTERM and SIGINT while it is entered; all hosts hear of it at one step.

    Alone, a second signal ends the process at once. With several processes JAX's preemption service
    takes SIGTERM, on any of them and however often, and agrees on the step; SIGINT ends them.

    Attributes:
      told_by: what to raise when the state is saved.
      told: has a signal come? Of one process alone.
    """

    def __init__(self):
        self.stop_exception = Preempted
        self.stop_requested = False
        self._before = {}

    def __enter__(self) -> "PreemptionGuard":
        # Signals are the main thread's; with several processes JAX's service has its own handler.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def exit_on_sigterm(self) -> Iterator[None]:
        """SIGTERM does inside what it did before `PreemptionGuard` was entered."""
        before = self._before.get(signal.SIGTERM)
        if before is None or self.stop_requested:
            yield
            return
        signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self.stop_requested else self._note)

    def _note(self, number: int, frame: object) -> None:
        del frame
        self.stop_requested = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if number == signal.SIGINT:
            self.stop_exception = Interrupted
            os.write(2, b"\nsaving after this step; once more ends the process at once\n")

    def should_stop(self, step: int) -> bool:
        """Is `step` the one to stop after? To be asked on every host, for every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.stop_requested

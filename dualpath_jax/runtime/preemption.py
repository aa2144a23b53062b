"""Handles requests to stop: SIGTERM (preempted machines), SIGHUP (closed terminals) and Ctrl-C.

JAX is imported only where it is used, so that a program can install the handler first.
"""

import collections
import contextlib
import os
import signal
import threading
from collections.abc import Iterator

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL: run the same command again


class Preempted(Exception):
    """Reports that the run was stopped by SIGTERM or SIGHUP and has saved its state."""

    exit_code = EXIT_CODE


class Interrupted(Preempted):
    """Reports that the run was stopped by Ctrl-C and is not meant to be started again."""

    exit_code = 128 + signal.SIGINT  # the status that a shell reports


def exit_at_once(number: int = signal.SIGTERM, *_) -> None:
    """End the process at once; handles SIGTERM and SIGHUP while there is nothing to save."""
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(
            2, f"stopped by {name}; the same command resumes from the last checkpoint\n".encode()
        )
    os._exit(EXIT_CODE)


def install_sigterm_handler() -> None:
    """Install `exit_at_once`, which then also runs while a program computes or compiles.

    A SIGHUP that is ignored, as under nohup, stays ignored. The second call does nothing.

    The main thread calls Python's signal handlers only when it executes Python code again, perhaps
    minutes later. Python writes a signal's number to a pipe at once, and a thread reads it. The
    thread ends the process if `exit_at_once` is installed, or when a signal comes a second time.
    """
    if signal.getsignal(signal.SIGTERM) is exit_at_once:
        return
    signal.signal(signal.SIGTERM, exit_at_once)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, exit_at_once)
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
        if signal.getsignal(number) is exit_at_once:
            exit_at_once(number)
        elif number in (signal.SIGTERM, signal.SIGINT) and counts[number] > 1:
            os._exit(128 + number)  # the status that a shell reports


class PreemptionGuard:
    """Records SIGTERM, SIGHUP and SIGINT in its `with` block; all hosts stop at the same step.

    With a single process, a second SIGTERM or SIGINT ends it at once; a closed terminal may send
    SIGHUP several times. With several processes, JAX's preemption service handles SIGTERM on any of
    them, however often it comes, and agrees on the step; SIGHUP is passed on as SIGTERM, and SIGINT
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
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers
        handlers = dict.fromkeys(
            (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._record_signal
        )
        if _num_processes() > 1:  # JAX's service handles SIGTERM
            handlers = {signal.SIGHUP: _pass_on_as_sigterm}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
            del handlers[signal.SIGHUP]
        for number, handler in handlers.items():
            self._previous_handlers[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def exit_on_sigterm(self) -> Iterator[None]:
        """Restore the handlers from before the guard, except SIGINT's, while the block runs."""
        if signal.SIGTERM not in self._previous_handlers or self.stop_requested:
            yield
            return
        own = {}
        for number in (signal.SIGTERM, signal.SIGHUP):
            if number in self._previous_handlers:
                own[number] = signal.signal(number, self._previous_handlers[number])
        try:
            yield
        finally:
            if self.stop_requested:  # by SIGINT
                own[signal.SIGTERM] = signal.SIG_DFL
            for number, handler in own.items():
                signal.signal(number, handler)

    def _record_signal(self, number: int, frame: object) -> None:
        """Request a stop; after SIGTERM or SIGINT the next of them ends the process."""
        del frame
        self.stop_requested = True
        if number != signal.SIGHUP:  # SIGTERM may follow when a session ends
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_DFL)
        if number == signal.SIGINT:
            self.stop_exception = Interrupted
            with contextlib.suppress(OSError):
                os.write(
                    2, b"\nsaving after this step; press Ctrl-C again to end the process at once\n"
                )

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after `step`; to be called on every host, for every step."""
        if _num_processes() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.stop_requested


def _num_processes() -> int:
    import jax

    return jax.process_count()


def _pass_on_as_sigterm(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)

"""Being told to stop: a machine that is taken away sends SIGTERM first.

Public: `EXIT_CODE`, `Preempted`, `Watch`, `leave`.
"""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL: run the same command again


class Preempted(Exception):
    """The run was told to stop, and has saved where it is."""


def leave(*_) -> None:
    """A handler of SIGTERM for when there is nothing to save: ends the process at once."""
    os.write(2, b"told to stop; the same command goes on from the last checkpoint\n")
    os._exit(EXIT_CODE)


class Watch:
    """Notes SIGTERM while it is entered; all hosts hear of it at one step.

    Alone, a second SIGTERM ends the process at once. With several processes JAX's preemption
    service takes the signal, on any of them and however often, and agrees on the step.
    """

    def __init__(self):
        self._told = False
        self._before = None

    def __enter__(self) -> "Watch":
        # Signals are the main thread's; with several processes JAX's service has its own handler.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_) -> None:
        self._told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def should_stop(self, step: int) -> bool:
        """Is `step` the one to stop after? To be asked on every host, for every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

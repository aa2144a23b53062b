"""Functions that the tests of `beam_runner` call in other processes."""

import contextlib
import errno
import os
import pathlib
import signal
import time


def record_call(work: str, number: int) -> None:
    """Write a file for the call; end as the file fate-NUMBER next to `work` says.

    The fates are "killed" and "raises", each once, and "always killed".
    """
    folder = pathlib.Path(work).parent
    (folder / f"called-{number}-{os.getpid()}").touch()
    with contextlib.suppress(FileNotFoundError):
        fate = (folder / f"fate-{number}").read_text()
        if fate != "always killed":
            (folder / f"fate-{number}").unlink()
        if "killed" in fate:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sleep(work: str, seconds: int) -> None:
    """Sleep; `work` is not read."""
    time.sleep(seconds)

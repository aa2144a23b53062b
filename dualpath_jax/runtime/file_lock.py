"""One program at a time in a folder: `exclusive_lock`, `waiting_lock`."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def exclusive_lock(folder: str, option: str) -> Iterator[None]:
    """Hold `folder` (on a local disk) against a second program; its owner's death frees it.

    Args:
      folder: an existing folder. On storage without files ("gs://...") nothing is held.
      option: what names the folder on the command line, for the message.

    Raises:
      ValueError: another program holds it; says which.
    """
    if "://" in folder:
        yield
        return
    with open(os.path.join(folder, ".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{option}={folder} is in use by {file.read().strip() or 'another program'}; wait "
                "for it, stop it, or choose another folder"
            ) from None
        owner = f"process {os.getpid()} on {socket.gethostname()}\n"
        with contextlib.suppress(OSError):  # of a full disk; then the message names nobody
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), owner.encode())
        yield


@contextlib.contextmanager
def waiting_lock(folder: str) -> Iterator[None]:
    """Hold `folder`, made if it is not there, as soon as nobody else does: waits.

    On storage without files ("gs://...") nothing is held.
    """
    if "://" in folder:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

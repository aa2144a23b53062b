"""Locks a folder, so that only one program works in it at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def exclusive_lock(folder: str, option: str) -> Iterator[None]:
    """Lock a local folder against a second program while the block runs.

    The operating system releases the lock when its owner dies.

    Args:
      folder: an existing folder. Storage without files ("gs://...") is not locked.
      option: the command line option that names the folder, for the message.

    Raises:
      ValueError: another program holds the lock; the message names it.
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
        with contextlib.suppress(OSError):  # on a full disk; then the message names no owner
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), owner.encode())
        yield


@contextlib.contextmanager
def waiting_lock(folder: str) -> Iterator[None]:
    """Lock a folder while the block runs; wait until no other program holds the lock.

    Args:
      folder: created if it does not exist. Storage without files ("gs://...") is not locked.
    """
    if "://" in folder:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    # Not the file of `exclusive_lock`: the folder may also be the program's workdir.
    with open(os.path.join(folder, ".setup.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

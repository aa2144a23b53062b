"""Locks folders, so that programs do not change what others write or read."""

import contextlib
import fcntl
import gc
import os
import socket
import weakref
from collections.abc import Iterator
from typing import Any

from dualpath_jax.runtime import files


@contextlib.contextmanager
def exclusive_lock(folder: str, option: str) -> Iterator[None]:
    """Lock a local folder against a second program while the block runs.

    The operating system releases the lock when its owner dies.

    Args:
      folder: an existing folder. Storage without files ("gs://...") is not locked.
      option: the command line option that names the folder, for the message.

    Raises:
      ValueError: another program holds the lock, and the message names it; or FOLDER/.lock is a
        link.
    """
    if "://" in folder:
        yield
        return
    opened = files.open_in_place(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT)
    with open(opened, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{option}={folder} is in use by {file.read().strip() or 'another program'}; wait "
                "for it, stop it, or choose another folder"
            ) from None
        owner = f"process {os.getpid()} on {socket.gethostname()}\n"
        # A backup made of hard links shares the file. The message then names no owner, as on a full
        # disk.
        if os.fstat(opened).st_nlink == 1:
            with contextlib.suppress(OSError):
                os.ftruncate(opened, 0)
                os.write(opened, owner.encode())
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
    opened = files.open_in_place(os.path.join(folder, ".setup.lock"), os.O_RDWR | os.O_CREAT)
    with open(opened, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_while_reading(folder: str, reader: Any) -> None:
    """Hold a lock that readers share on a local folder, until `reader` is garbage-collected.

    It needs no file and no right to write. Where the file system has no locks, nothing is locked.

    Args:
      folder: a path; anything but a local folder, such as "gs://...", is not locked.
      reader: any object that can be weakly referenced.

    Raises:
      ValueError: a program is writing there (`lock_against_readers`); the message names it.
    """
    if not os.path.isdir(folder):
        return
    file = os.open(folder, os.O_RDONLY)
    weakref.finalize(reader, os.close, file)
    _lock_folder(file, fcntl.LOCK_SH, f"{folder} is being prepared by")


@contextlib.contextmanager
def lock_against_readers(folder: str) -> Iterator[None]:
    """Lock a local folder against `lock_while_reading` while the block runs.

    Raises:
      ValueError: programs are reading there; the message names them.
    """
    file = os.open(folder, os.O_RDONLY)
    try:
        _lock_folder(file, fcntl.LOCK_EX, f"{folder} is being read by")
        yield
    finally:
        os.close(file)


def _lock_folder(file: int, kind: int, problem: str) -> None:
    """Lock an open folder; ValueError with the holders' names if others hold a lock."""
    try:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            gc.collect()  # a reader of this process may be garbage that was not collected yet
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{problem} {_name_holders(os.fstat(file).st_ino)}; wait for it, or stop it"
        ) from None
    except OSError:
        pass  # a file system without locks


def _name_holders(inode: int) -> str:
    """Return the names of the processes that lock a file, or "another program"."""
    holders = []
    with contextlib.suppress(OSError), open("/proc/locks") as table:
        for line in table:
            fields = line.split()  # 1: FLOCK ADVISORY READ 1234 fe:00:5678 0 EOF
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                holders.append(f"process {fields[4]}")
    return " and ".join(dict.fromkeys(holders)) or "another program"

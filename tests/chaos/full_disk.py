"""Simulates a disk that is full, or has no inodes left for new files."""

import contextlib
import pathlib
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator

_DISK_BYTES, _DISK_INODES = 128 * 2**20, 4000
LARGEST_FILE = 400_000  # bytes; the limit on file sizes if no disk can be mounted


class LimitedDisk:
    """Provides a folder on a small tmpfs, and fills it on demand.

    Mounting needs a privilege. Without it the folder is an ordinary one, and instead of a full disk
    there is a limit on the size of the files that a process writes: enough for metrics, but too
    little for the arrays of a checkpoint.

    As a context manager it unmounts at the end, and leaves the files in the folder.

    Attributes:
      folder: the folder to write to.
      mounted: whether it is a tmpfs.

    Args:
      folder: the folder to create.
      mount: whether to try to mount a tmpfs.
    """

    def __init__(self, folder: pathlib.Path, mount: bool = True):
        self.folder = folder
        folder.mkdir()
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size={_DISK_BYTES},nr_inodes={_DISK_INODES}",
            "tmpfs",
            str(folder),
        ]
        self.mounted = mount and _succeeds(command)

    def __enter__(self) -> "LimitedDisk":
        return self

    def __exit__(self, *_) -> None:
        if self.mounted:
            copy = self.folder.with_name(self.folder.name + ".copy")
            shutil.copytree(self.folder, copy)
            subprocess.run(["umount", str(self.folder)], check=True)
            self.folder.rmdir()
            copy.rename(self.folder)

    @contextlib.contextmanager
    def full(self, pid: int, inodes: bool = False) -> Iterator[None]:
        """Make the disk full for process `pid` while the block runs.

        Args:
          pid: of the process.
          inodes: use up the inodes instead of the bytes, if the disk is mounted.
        """
        if not self.mounted:
            self.limit(pid)
            yield
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                _limit_files(pid, resource.RLIM_INFINITY)
            return
        filler, filled, stop = self.folder / "filler", threading.Event(), threading.Event()
        fill = _use_up_inodes if inodes else _fill_disk
        thread = threading.Thread(target=fill, args=(filler, filled, stop))
        thread.start()
        filled.wait()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            shutil.rmtree(filler) if inodes else filler.unlink()

    def limit(self, pid: int) -> None:
        """Make the full disk full for process `pid` too, which was started in the block."""
        if not self.mounted:
            with contextlib.suppress(ProcessLookupError):
                _limit_files(pid, LARGEST_FILE)


def _succeeds(command: list[str]) -> bool:
    """Run a command; return whether it succeeds."""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _limit_files(pid: int, size: int) -> None:
    """Limit the files that a process writes to `size` bytes."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def _fill_disk(path: pathlib.Path, filled: threading.Event, stop: threading.Event) -> None:
    """Take all space and set `filled`; also takes space freed later, until `stop` is set."""
    with path.open("wb", buffering=0) as file:
        while not stop.is_set():
            try:
                file.write(bytes(2**20))
            except OSError:
                filled.set()
                stop.wait(0.005)


def _use_up_inodes(path: pathlib.Path, filled: threading.Event, stop: threading.Event) -> None:
    """Make empty files until there is no inode left; otherwise as `_fill_disk`."""
    path.mkdir()
    number = 0
    while not stop.is_set():
        try:
            (path / str(number)).touch()
            number += 1
        except OSError:
            filled.set()
            stop.wait(0.005)

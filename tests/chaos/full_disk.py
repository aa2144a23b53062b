"""A disk that can be full at will.

Public: `LimitedDisk`.
"""

import contextlib
import pathlib
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator

SIZE = 128 * 2**20  # bytes of the disk
LARGEST_FILE = 400_000  # bytes, of what is written where no disk can be mounted


class LimitedDisk:
    """A folder on a small tmpfs, which is filled when it shall be full.

    Mounting needs a right that not everybody has. Without it the folder is an ordinary one, and
    instead of a full disk there is a limit on the size of the files that a process writes: enough
    for metrics, too little for the arrays of a checkpoint.

    As a context manager it unmounts at the end, with what it held left in the folder.

    Attributes:
      folder: to write to.
      mounted: is it a tmpfs?

    Args:
      folder: to be made.
      mount: try to?
    """

    def __init__(self, folder: pathlib.Path, mount: bool = True):
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        self.mounted = mount and _succeeds(command)

    def __enter__(self) -> "LimitedDisk":
        return self

    def __exit__(self, *_) -> None:
        if self.mounted:
            kept = self.folder.with_name(self.folder.name + ".kept")
            shutil.copytree(self.folder, kept)
            subprocess.run(["umount", str(self.folder)], check=True)
            self.folder.rmdir()
            kept.rename(self.folder)

    @contextlib.contextmanager
    def full(self, pid: int) -> Iterator[None]:
        """No room, as long as it is entered, for what process `pid` wants to write."""
        if not self.mounted:
            self.limit(pid)
            yield
            with contextlib.suppress(ProcessLookupError):  # it may be dead
                _limit_files(pid, resource.RLIM_INFINITY)
            return
        filler, filled, over = self.folder / "filler", threading.Event(), threading.Event()
        thread = threading.Thread(target=_fill, args=(filler, filled, over))
        thread.start()
        filled.wait()
        try:
            yield
        finally:
            over.set()
            thread.join()
            filler.unlink()

    def limit(self, pid: int) -> None:
        """The disk is full for process `pid` too, which was started meanwhile."""
        if not self.mounted:
            with contextlib.suppress(ProcessLookupError):
                _limit_files(pid, LARGEST_FILE)


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _limit_files(pid: int, size: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def _fill(path: pathlib.Path, filled: threading.Event, over: threading.Event) -> None:
    """Take all room, and set `filled`; also what becomes free later, until `over` is set."""
    with path.open("wb", buffering=0) as file:
        while not over.is_set():
            try:
                file.write(bytes(2**20))
            except OSError:
                filled.set()
                over.wait(0.005)

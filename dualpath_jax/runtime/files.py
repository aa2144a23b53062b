"""Writes files atomically, and checks output paths before any work."""

import contextlib
import errno
import os
import pathlib
import stat
from collections.abc import Iterator

from etils import epath

from dualpath_jax.runtime import gcs


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], unique: bool = False) -> Iterator[epath.Path]:
    """Yield a temporary path whose file replaces `path` when the block ends without an error.

    The temporary file is in the same folder and has the same suffix. It is removed when the block
    fails. A local file is on the disk, not only in the page cache, before it replaces `path`.

    Args:
      path: of the final file, local or gs://.
      unique: name the temporary file after this process, for a file that several programs may
        write at the same time. Otherwise the next writer replaces what a killed one left.

    Raises:
      OSError: the file cannot be written; `path` is as it was. The error names it, and has a remedy
        and the `errno` of the failure.
    """
    final = epath.Path(path)
    mark = f"incomplete-{os.getpid()}" if unique else "incomplete"
    temporary = final.with_name(f"{final.stem}.{mark}{final.suffix}")
    try:
        with gcs.gcs_errors(os.fspath(path)):
            yield temporary
            if "://" not in os.fspath(path):
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())  # some file systems report a full disk only here
            temporary.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        named = getattr(error, "filename", None)  # None where only a write failed
        if is_disk_error(error) and named in (None, os.fspath(temporary)):
            raise explain_write_error(path, error) from None
        raise


def is_disk_error(error: BaseException) -> bool:
    """Return whether an error is the system's refusal to write, perhaps in a library's words."""
    if isinstance(error, OSError):
        return error.errno is not None
    return any(
        text in str(error) for text in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    )


def explain_write_error(path: str | os.PathLike[str], error: BaseException) -> OSError:
    """Return an error that names the file that cannot be written, with a remedy."""
    remedy = "make room there, or make it writable, and run the same command again"
    explained = OSError(f"cannot write {os.fspath(path)}: {error}; {remedy}")
    explained.errno = getattr(error, "errno", None)
    return explained


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 atomically.

    File names in the text may hold bytes outside UTF-8, which Python represents as surrogates; they
    are written unchanged.

    Raises:
      OSError: the file cannot be written, see `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))


def check_readable(path: str | os.PathLike[str]) -> None:
    """Check that a file, or all files below a folder, can be read, by reading them.

    Args:
      path: local or gs://. Pipes and devices, which could be read without end, are left out.

    Raises:
      FileNotFoundError: there is no such file or folder.
      OSError: a file cannot be read.
    """
    path = epath.Path(path)
    with gcs.gcs_errors(str(path)):
        if path.is_dir():
            for entry in path.iterdir():
                check_readable(entry)
        elif "://" in str(path):
            path.read_bytes()
        elif stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                while file.read(2**20):
                    pass


def check_output_file(option: str, name: str) -> None:
    """Check that the file that a command line option names can be written.

    Args:
      option: the option, such as "--out", for the message.
      name: path of the file.

    Raises:
      ValueError: the file cannot be written.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        raise ValueError(f"{option}={name} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{option}={name}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}={name}: {path.parent} cannot be written; choose another folder")

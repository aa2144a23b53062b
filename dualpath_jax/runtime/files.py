"""Writes files atomically, and checks output paths before any work."""

import contextlib
import errno
import fnmatch
import os
import pathlib
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator

from etils import epath

from dualpath_jax.runtime import gcs

_TEMPORARY_NAME = re.compile(r".+\.incomplete-[0-9a-f]{16}(\..*)?")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Yield a temporary path whose file replaces `path` when the block ends without an error.

    The temporary file is in the same folder, has the same suffix and a random name, and is not a
    link. It is removed when the block fails. A local file is on the disk, not only in the page
    cache, before it replaces `path`.

    Args:
      path: of the final file, local or gs://.

    Raises:
      OSError: the file cannot be written; `path` is as it was. The error names it, and has a remedy
        and the `errno` of the failure.
      ValueError: `path` is a link.
    """
    final = epath.Path(path)
    name = f"{final.stem}.incomplete-{secrets.token_hex(8)}{final.suffix}"
    temporary, is_remote = final.with_name(name), "://" in os.fspath(path)
    if not is_remote:
        _check_not_link(path)
    try:
        with gcs.gcs_errors(os.fspath(path)):
            if not is_remote and final.parent.is_dir():  # otherwise writing reports the problem
                os.close(open_in_place(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            yield temporary
            if not is_remote:
                file = open_in_place(temporary, os.O_RDONLY)
                try:
                    os.fsync(file)  # some file systems report a full disk only here
                finally:
                    os.close(file)
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


def open_in_place(path: str | os.PathLike[str], flags: int) -> int:
    """Open a local file to change it in place, such as a lock; return its descriptor.

    Args:
      path: of the file.
      flags: as for `os.open`; links are not followed, and a pipe is not waited for.

    Raises:
      ValueError: `path` is a link, or not a regular file.
      OSError: it cannot be opened.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:
        _check_not_link(path)
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{os.fspath(path)!r} is not a regular file; choose another path")
    return file


def _check_not_link(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if `path` is a link."""
    if os.path.islink(path):
        target = os.readlink(path)
        raise ValueError(
            f"{os.fspath(path)!r} is a link to {target!r}, which would be changed; remove the link"
        )


def check_no_links(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Check that nothing that is about to be written below a folder is a link.

    The folder itself may be a link. A folder from others may contain links to files outside of it.

    Args:
      folder: a local folder, which need not exist; gs:// has no links.
      names: of the files and folders that are written in it, as patterns of `fnmatch`; the folders
        are searched at every depth.

    Raises:
      ValueError: there is a link; the message names it.
    """
    if "://" in os.fspath(folder) or not os.path.isdir(folder):
        return
    for name in sorted(os.listdir(folder)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
            path = os.path.join(folder, name)
            _check_not_link(path)
            if os.path.isdir(path):
                check_no_links(path, ("*",))


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Create a folder, unless it exists, and check that files can be written in it.

    Raises:
      OSError: they cannot.
    """
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if "://" not in os.fspath(folder):
        with tempfile.TemporaryFile(dir=folder):
            return
    (path / ".writable").write_text("")
    (path / ".writable").unlink()


def remove_incomplete(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers left in a local folder, or one level below.

    Call it only where no other program may be writing: the folder is locked.
    """
    if "://" not in os.fspath(folder):
        for pattern in ("*.incomplete-*", "*/*.incomplete-*"):
            for path in pathlib.Path(folder).glob(pattern):
                if _TEMPORARY_NAME.fullmatch(path.name) and path.is_file():
                    with contextlib.suppress(OSError):
                        path.unlink()


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
    _check_not_link(path)
    if path.is_dir():
        raise ValueError(f"{option}={name} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{option}={name}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}={name}: {path.parent} cannot be written; choose another folder")

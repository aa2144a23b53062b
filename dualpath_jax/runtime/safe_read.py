"""Opens files that a user names, and reads untrusted text and JSON, within limits.

Opening a file never waits for a pipe and never reads without end: ValueError refuses such files.
"""

import contextlib
import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO

MAX_TEXT_BYTES = 512 * 2**20  # Kinetics-700's lists have 40 MB, Something-Something-v2's JSON 60
# In Python, JSON may need 30 times the memory of its text. Lists of videos, which are larger, are
# read entry by entry. The largest others are names of classes and headers of safetensors.
MAX_JSON_BYTES = 8 * 2**20
_ENTRY_CHARS = 2**16  # that are read ahead for an entry of a list of videos
_DECODER, _SPACES = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
_MAX_JSON_DEPTH = 50  # deeper nesting is an attack on code that walks the tree
_MAX_REPR_CHARS = 200  # characters of a value in a message

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: str | os.PathLike[str], status: os.stat_result | None = None) -> None:
    """Check that a local path is a regular file, for libraries that open the path themselves.

    A reader would wait forever for a pipe, and read without end from a device.

    Args:
      path: of the file.
      status: of the opened file; None asks the system about the path.

    Raises:
      ValueError: it is something else.
      OSError: there is no such file, or its links lead to themselves.
    """
    mode = (status or os.stat(path)).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise ValueError(f"{os.fspath(path)} is not a regular file, but {kind}")


def check_regular_files(folder: str | os.PathLike[str]) -> None:
    """Check that a local folder, and those below it, hold only folders and regular files.

    Raises:
      ValueError: there is another kind of file, or a link to a folder; the message names it.
      OSError: a link leads to itself.
    """
    for below, folders, names in os.walk(folder):
        for path in (os.path.join(below, name) for name in folders):
            if os.path.islink(path):
                raise ValueError(f"{path} is a link to a folder, which is not followed")
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a program may delete it meanwhile
                check_regular(os.path.join(below, name))


def check_size(path: str | os.PathLike[str], limit: int) -> None:
    """Check that `path`, local or gs://, is a regular file of at most `limit` bytes.

    Raises:
      ValueError: the file is larger, or not a regular file.
    """
    if _is_remote(path):
        size = _remote(path).stat().length
    else:
        status = os.stat(path)
        check_regular(path, status)
        size = status.st_size
    if size > limit:
        raise ValueError(
            f"{path} has {size:,} bytes, more than the limit of {limit:,} for such a file; "
            "check that it is the right one"
        )


def open_binary(path: str | os.PathLike[str], limit: int) -> BinaryIO:
    """Open a local regular file of at most `limit` bytes for reading.

    Raises:
      ValueError: the file is larger, or not a regular file.
      OSError: it cannot be opened.
    """
    check_size(path, limit)
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = open(number, "rb")  # noqa: SIM115 (the caller closes it)
    try:
        check_regular(path, os.fstat(number))  # it may have been replaced since
    except ValueError:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes, local or gs://; raises as `open_binary`."""
    if _is_remote(path):
        check_size(path, limit)
        return _remote(path).read_bytes()
    with open_binary(path, limit) as file:
        return file.read()


def read_lines(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> list[str]:
    """Read the lines of a text file of at most `limit` bytes in UTF-8, local or gs://.

    Characters that are not UTF-8 become U+FFFD, so that they spoil only their own line.

    Raises:
      ValueError: the file is too large, or not a regular file.
      OSError: it cannot be read.
    """
    return read_bytes(path, limit).decode(errors="replace").split("\n")


@contextlib.contextmanager
def open_text(
    path: str | os.PathLike[str], errors: str = "strict", newline: str | None = None
) -> Iterator[TextIO]:
    """Open a UTF-8 text file for reading, with or without a byte order mark.

    Args:
      path: a local file.
      errors: as for `open`.
      newline: as for `open`.

    Yields:
      The open file.

    Raises:
      ValueError: the file is too large or not a regular file. Reading inside the block also raises
        it where the file is not UTF-8, or where the csv module refuses it.
    """
    binary = open_binary(path, MAX_TEXT_BYTES)
    try:
        with io.TextIOWrapper(binary, "utf-8-sig", errors, newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); download it again") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV ({error}); download it again") from None


def read_json(path: str | os.PathLike[str], expected_type: type) -> Any:
    """Read a JSON file whose top level is an `expected_type`.

    Raises:
      ValueError: the file is too large, not JSON, nested too deep, or of another type.
    """
    if _is_remote(path):
        return parse_json(read_bytes(path, MAX_JSON_BYTES), expected_type, path)
    check_size(path, MAX_JSON_BYTES)
    with open_text(path) as file:
        return parse_json(file.read(), expected_type, path)


def iterate_json_list(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the entries of a local JSON file that holds a list, without keeping all of them.

    Raises:
      ValueError: the file is too large, not a list in JSON, or nested too deep; or an entry is much
        longer than those of any data set.
    """
    with open_text(path) as file:
        text, position, expected = "", 0, "["  # the character before an entry
        while True:
            if len(text) - position < _ENTRY_CHARS:
                text, position = text[position:] + file.read(8 * _ENTRY_CHARS), 0
            position = _skip_spaces(text, position)
            mark = text[position : position + 1]
            if mark != expected:
                break
            position = _skip_spaces(text, position + 1)
            if expected == "[" and text[position : position + 1] == "]":
                mark = "]"
                break
            with _json_errors(path):
                entry, position = _DECODER.raw_decode(text, position)
            _check_depth(entry, path)
            yield entry
            expected = ","
        if (mark, expected) == ("{", "["):
            raise ValueError(f"{path} holds a dict, not a list")
        if mark != "]":
            wanted = "a list" if expected == "[" else "',' or ']' after an entry"
            raise ValueError(
                f"{path} is not valid JSON (expected {wanted}, not {mark!r}); download it again"
            )
        if text[position + 1 :].strip() or file.read(_ENTRY_CHARS).strip():
            raise ValueError(f"{path} is not valid JSON (data after its end); download it again")


def _skip_spaces(text: str, position: int) -> int:
    """Return the position of the next character that is not white space."""
    return _SPACES.match(text, position).end()


def check_safetensors_header(path: str | os.PathLike[str], start: bytes | None = None) -> None:
    """Check that the header of a safetensors file, local or gs://, is not larger than any can be.

    Args:
      path: of the file.
      start: its first bytes, at least 8, if they have been read; None reads them.

    Raises:
      ValueError: it is larger.
    """
    if start is None:
        with _remote(path).open("rb") as file:
            start = file.read(8)
    size = int.from_bytes(start[:8], "little")
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} is not a readable safetensors file: its header claims {size:,} bytes, more "
            f"than the limit of {MAX_JSON_BYTES:,}"
        )


def _is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is in Cloud Storage."""
    return "://" in os.fspath(path)


def _remote(path: str | os.PathLike[str]) -> Any:
    from etils import epath  # here, because decoding processes import this module

    return epath.Path(path)


def parse_json(text: str | bytes, expected_type: type, source: str | os.PathLike[str]) -> Any:
    """Parse a JSON text whose top level is an `expected_type`.

    Args:
      text: the JSON text.
      expected_type: `dict` or `list`.
      source: where the text comes from, for messages.

    Raises:
      ValueError: the text is too long, not JSON, nested too deep, or of another type.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{source} is JSON of more than {MAX_JSON_BYTES:,} bytes")
    with _json_errors(source):
        content = json.loads(text)
    _check_depth(content, source)
    if not isinstance(content, expected_type):
        raise ValueError(
            f"{source} holds a {type(content).__name__}, not a {expected_type.__name__}"
        )
    return content


@contextlib.contextmanager
def _json_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Name the source in errors of the json module."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{source} is JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); download it again") from None


def _check_depth(content: Any, source: str | os.PathLike[str]) -> None:
    """Raise ValueError if JSON is nested too deep for code that walks it."""
    level = [content]
    for _ in range(_MAX_JSON_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise ValueError(f"{source} is JSON nested deeper than {_MAX_JSON_DEPTH} levels")


def _children(node: Any) -> Any:
    """Return the values directly below a JSON node."""
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def truncated_repr(value: Any) -> str:
    """Return `repr(value)`, cut to a length that fits in a message."""
    text = repr(value)
    return text if len(text) <= _MAX_REPR_CHARS else f"{text[:_MAX_REPR_CHARS]}..."

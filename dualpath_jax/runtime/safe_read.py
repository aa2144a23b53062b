"""Reads untrusted text and JSON within limits; raises ValueError for anything else."""

import contextlib
import csv
import json
import os
import stat
from collections.abc import Iterator
from typing import Any, TextIO

from etils import epath

MAX_TEXT_BYTES = 512 * 2**20  # Kinetics-700's lists have 40 MB, Something-Something-v2's JSON 60
_MAX_JSON_DEPTH = 50  # deeper nesting is an attack on code that walks the tree
_MAX_REPR_CHARS = 200  # characters of a value in a message


def check_size(path: str | os.PathLike[str], limit: int) -> None:
    """Check that `path` is a regular file of at most `limit` bytes.

    A reader would wait forever for a pipe, and read without end from a device.

    Raises:
      ValueError: the file is larger, or not a regular file.
    """
    if _is_remote(path):
        size = epath.Path(path).stat().length
    else:
        status = os.stat(path)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
    if size > limit:
        raise ValueError(
            f"{path} has {size:,} bytes, more than the limit of {limit:,} for such a file; "
            "check that it is the right one"
        )


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
    check_size(path, MAX_TEXT_BYTES)
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline=newline) as file:
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
        check_size(path, MAX_TEXT_BYTES)
        return parse_json(epath.Path(path).read_bytes(), expected_type, path)
    with open_text(path) as file:
        return parse_json(file.read(), expected_type, path)


def _is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is in Cloud Storage."""
    return "://" in os.fspath(path)


def parse_json(text: str | bytes, expected_type: type, source: str | os.PathLike[str]) -> Any:
    """Parse a JSON text whose top level is an `expected_type`.

    Args:
      text: the JSON text.
      expected_type: `dict` or `list`.
      source: where the text comes from, for messages.

    Raises:
      ValueError: the text is not JSON, nested too deep, or of another type.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source} is JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); download it again") from None
    level = [content]
    for _ in range(_MAX_JSON_DEPTH):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ValueError(f"{source} is JSON nested deeper than {_MAX_JSON_DEPTH} levels")
    if not isinstance(content, expected_type):
        raise ValueError(
            f"{source} holds a {type(content).__name__}, not a {expected_type.__name__}"
        )
    return content


def _children(node: Any) -> Any:
    """Return the values directly below a JSON node."""
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def truncated_repr(value: Any) -> str:
    """Return `repr(value)`, cut to a length that fits in a message."""
    text = repr(value)
    return text if len(text) <= _MAX_REPR_CHARS else f"{text[:_MAX_REPR_CHARS]}..."

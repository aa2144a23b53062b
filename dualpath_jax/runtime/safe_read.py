"""Text and JSON that others wrote: read within limits, refused with ValueError.

Public: `open_text`, `read_json`, `parse_json`, `check_size`, `truncated_repr`, `MAX_TEXT_BYTES`.
"""

import contextlib
import csv
import json
import os
import stat
from collections.abc import Iterator
from typing import Any, TextIO

from etils import epath

MAX_TEXT_BYTES = 512 * 2**20  # Kinetics-700's lists have 40 MB, Something-Something-v2's JSON 60
MAX_JSON_DEPTH = 50  # deeper nesting is an attack on whatever walks it
_SHOWN = 200  # characters of a value in a message


def check_size(path: str | os.PathLike[str], limit: int) -> None:
    """ValueError unless `path` is a regular file of at most `limit` bytes.

    A pipe would let its reader wait for ever, a device feed it without end.
    """
    if _is_remote(path):
        size = epath.Path(path).stat().length
    else:
        found = os.stat(path)
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is no regular file")
    if size > limit:
        raise ValueError(
            f"{path} has {size:,} bytes, more than the {limit:,} that are read of such a "
            "file; is it the right one?"
        )


@contextlib.contextmanager
def open_text(
    path: str | os.PathLike[str], errors: str = "strict", newline: str | None = None
) -> Iterator[TextIO]:
    """A text file in UTF-8, with or without a byte order mark, for reading.

    Args:
      path: a local file.
      errors, newline: as for `open`.

    Raises:
      ValueError: the file is too large or none; also, from reading inside the block, it is not
        UTF-8, or what the csv module refuses.
    """
    check_size(path, MAX_TEXT_BYTES)
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); download it again") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no valid CSV ({error}); download it again") from None


def read_json(path: str | os.PathLike[str], kind: type) -> Any:
    """The content of a JSON file; ValueError if it is not JSON or no `kind` at its top."""
    if _is_remote(path):
        check_size(path, MAX_TEXT_BYTES)
        return parse_json(epath.Path(path).read_bytes(), kind, path)
    with open_text(path) as file:
        return parse_json(file.read(), kind, path)


def _is_remote(path: str | os.PathLike[str]) -> bool:
    """Is it in Cloud Storage?"""
    return "://" in os.fspath(path)


def parse_json(text: str | bytes, kind: type, where: str | os.PathLike[str]) -> Any:
    """The content of a JSON text, as `read_json`; `where` it stands is for messages."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is no valid JSON ({error}); download it again") from None
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ValueError(f"{where} is JSON nested deeper than {MAX_JSON_DEPTH} levels")
    if not isinstance(content, kind):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def _children(node: Any) -> Any:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def truncated_repr(value: Any) -> str:
    """`repr`, cut to what fits in a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

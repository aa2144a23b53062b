"""Makes text from other sources, such as names of files and classes, safe to print.

A terminal obeys control characters: they clear the screen, change its title, or hide what was
printed before. A line break forges lines of output.
"""

import os
import sys
import unicodedata
from typing import Any, TextIO

# Control characters; marks of direction, which reorder a line; separators of lines; halves of
# surrogate pairs are left to the stream's error handler, because file names may hold any bytes.
_UNSAFE_CATEGORIES = ("Cc", "Zl", "Zp")
_DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_LAYOUT = "\n\t"  # control characters in messages of this package


class _Escapes(dict):
    """Maps code points to their escapes for `str.translate`, and remembers them."""

    def __init__(self, kept: str):
        super().__init__((ord(character), character) for character in kept)

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_unsafe = unicodedata.category(character) in _UNSAFE_CATEGORIES
        is_unsafe = is_unsafe or character in _DIRECTION_MARKS
        self[code] = f"\\u{code:04x}" if is_unsafe else character  # also an escape of JSON
        return self[code]


_NAME_ESCAPES, _TEXT_ESCAPES = _Escapes(""), _Escapes(_LAYOUT)


def escape_name(name: str) -> str:
    """Return a name of a file or class for a line of output, with control characters escaped."""
    return str(name).translate(_NAME_ESCAPES)


class SafeStream:
    """Wraps a text stream; escapes control characters, except for line breaks and tabs.

    Attributes:
      stream: the wrapped stream, for programs that control a terminal themselves.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text with control characters escaped; return its length."""
        self.stream.write(text.translate(_TEXT_ESCAPES))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write the lines as `write` does."""
        for line in lines:
            self.write(line)

    def __eq__(self, other: object) -> bool:  # tqdm looks for the stream of its bars
        return other is self or other is self.stream

    def __hash__(self) -> int:
        return hash(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def protect_terminal() -> None:
    """Make everything that this program prints, tracebacks too, go through `SafeStream`."""
    os.environ.setdefault("PYTHON_COLORS", "0")  # colors of tracebacks would be escaped
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))
    if logging := sys.modules.get("absl.logging"):  # imported later, it takes sys.stderr itself
        logging.get_absl_handler().python_handler.setStream(sys.stderr)


def unwrap(stream: Any) -> Any:
    """Return a stream without its `SafeStream`."""
    return stream.stream if isinstance(stream, SafeStream) else stream


def raw_stderr() -> TextIO:
    """Return standard error without `SafeStream`, for bars, which move the cursor."""
    return unwrap(sys.stderr)

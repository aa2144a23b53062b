"""Runs a program whose standard streams may be closed, broken, full or unable to show a character.

It imports only the standard library, so that a program can begin with it.
"""

import codecs
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_STATUS_OF_BROKEN_PIPE = 128 + signal.SIGPIPE  # what a shell reports for programs that die of it
_ERRORS = "dualpath_console"  # name of an error handler of codecs


def _replace_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write the bytes of a file name outside UTF-8 unchanged, other characters as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


class _Output(io.FileIO):
    """Writes to a standard stream that may refuse it.

    Args:
      number: file descriptor.
      is_log: drop what is refused. Otherwise the program ends: quietly if nobody reads any more,
        as in `| head -1`, and with OSError for another reason.
    """

    def __init__(self, number: int, is_log: bool):
        super().__init__(number, "w", closefd=False)
        self.is_log = is_log

    def write(self, data: Any) -> int:
        """Write all of `data`, or drop the rest of it."""
        size, start = memoryview(data).nbytes, 0
        try:
            while start < size:
                start += super().write(memoryview(data).cast("B")[start:]) or size
        except OSError as error:
            if not self.is_log:
                self.is_log = True  # what Python still has to write at the end is dropped
                if isinstance(error, BrokenPipeError):
                    raise SystemExit(_STATUS_OF_BROKEN_PIPE) from None
                raise OSError(error.errno, f"standard output: {error.strerror}") from None
        return size


def protect_streams(is_log: bool = False) -> None:
    """Make sure that printing cannot end the program; replaces sys.stdout and sys.stderr.

    A closed stream is opened on the null device, as the next file to be opened would take its
    place otherwise. Streams that a caller has replaced, as tests do, stay.

    Args:
      is_log: True if standard output is only a log, and the results are in files. See `_Output`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    codecs.register_error(_ERRORS, _replace_unencodable)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Output):
            stream.buffer.raw.is_log |= is_log
        elif stream is getattr(sys, f"__{name}__"):
            raw = _Output(number, is_log or name == "stderr")
            encoding = stream.encoding if stream else "utf-8"
            setattr(sys, name, _wrap(raw, encoding))


def _wrap(raw: _Output, encoding: str) -> io.TextIOWrapper:
    """Return a text stream that writes each line at once on a terminal, as Python's do."""
    lines = raw.isatty() or raw.fileno() == 2
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors=_ERRORS, line_buffering=lines
    )


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a command and exit with the status that it returns.

    Ctrl-C prints one line; the process then ends by SIGINT, so that a shell script stops too.
    """
    protect_streams()
    try:
        status = _call(main)
        sys.stdout.flush()
    except KeyboardInterrupt:
        end_by_interrupt()
    except OSError as error:
        if not str(error.strerror).startswith("standard output"):
            raise
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _call(main: Callable[[], Any]) -> Any:
    """Return what `main` returns, or the status by which it exits."""
    try:
        return main()
    except SystemExit as end:
        return end.code


def end_by_interrupt() -> NoReturn:
    """Print one line and end the process by SIGINT; for a `KeyboardInterrupt` that nobody caught.

    Exit handlers are not run, but `with` blocks and `finally` clauses have been.
    """
    print("interrupted by Ctrl-C", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # where the signal is blocked

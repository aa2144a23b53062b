"""Runs a program whose standard streams may be closed, broken, full or unable to show a character.

It imports only the standard library, so that a program can begin with it.
"""

import codecs
import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from dualpath_jax.runtime import terminal

_STATUS_OF_BROKEN_PIPE = 128 + signal.SIGPIPE  # what a shell reports for programs that die of it
_ERRORS = "dualpath_console"  # name of an error handler of codecs


def _replace_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write the bytes of a file name outside UTF-8 unchanged, other characters as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


class OutputRefusedError(OSError):
    """Reports that standard output could not be written, for another reason than a lost reader."""


class _Output(io.FileIO):
    """Writes to a standard stream that may refuse it.

    Args:
      number: file descriptor.
      is_log: drop what is refused. Otherwise the program ends: quietly if nobody reads any more,
        as in `| head -1`, and with OutputRefusedError for another reason.
    """

    def __init__(self, number: int, is_log: bool):
        super().__init__(number, "w", closefd=False)
        self.is_log = is_log
        self.refusal: OutputRefusedError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, or drop the rest of it."""
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # a pipe that is not waited for is full
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except BrokenPipeError:
            if not self.is_log:
                self.is_log = True  # what Python still has to write at the end is dropped
                raise SystemExit(_STATUS_OF_BROKEN_PIPE) from None
        except OSError as error:
            self.refusal = OutputRefusedError(error.errno, f"standard output: {error.strerror}")
            if not self.is_log:
                self.is_log = True
                raise self.refusal from None
        return size


def protect_streams(is_log: bool = False) -> None:
    """Make sure that printing cannot end the program; replaces sys.stdout and sys.stderr.

    A closed stream is opened on the null device. Otherwise, the next file to be opened would take
    its place. Control characters (see `terminal`) and characters that the encoding lacks are
    escaped. Streams that a caller has replaced, as tests do, only get these escapes.

    Args:
      is_log: True if the program continues when standard output is refused, because it also
        writes files. See `_Output`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    codecs.register_error(_ERRORS, _replace_unencodable)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = terminal.unwrap(getattr(sys, name))
        if output := _find_output(stream):
            output.is_log |= is_log
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _wrap(_Output(number, is_log or name == "stderr"), stream))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    terminal.protect_terminal()


def _find_output(stream: Any) -> _Output | None:
    """Return the `_Output` below a text stream, if it has one."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Output) else None


def _wrap(raw: _Output, stream: Any) -> io.TextIOWrapper:
    """Return a text stream that replaces `stream` and buffers like it; None is a closed one."""
    unbuffered = getattr(stream, "write_through", False)  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors=_ERRORS,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )


def check_output() -> None:
    """Raise OutputRefusedError if a part of standard output is lost that a reader waits for."""
    sys.stdout.flush()
    output = _find_output(terminal.unwrap(sys.stdout))
    if output and output.refusal:
        raise output.refusal


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
    except OutputRefusedError as error:
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
    print("interrupted by Ctrl-C", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, SystemExit):  # nobody reads any more, or the disk is full
        sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # where the signal is blocked

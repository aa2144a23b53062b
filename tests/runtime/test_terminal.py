"""Tests that names of files and classes never reach a terminal with control characters."""

import contextlib
import io
import json
import subprocess
import sys
import types

import pytest
import tqdm
from absl import logging

from dualpath_jax import cli
from dualpath_jax.data.preparation import summary
from dualpath_jax.inference import predict_files
from dualpath_jax.runtime import terminal

# It clears the screen, forges a line, hides the rest, and turns the direction of writing.
EVIL = "a\x1b[2J\r\nok\x9b8m\u202e\x07\x7f.mp4"
SHOWN = r"a\u001b[2J\u000d\u000aok\u009b8m\u202e\u0007\u007f.mp4"


def test_escaped_names_stay_on_their_line():
    assert terminal.escape_name(EVIL) == SHOWN
    plain = "Füße 手 😀 'a\\b' e\u0301 \udcff"  # the last is a byte outside UTF-8
    assert terminal.escape_name(plain) == plain


def test_predictions_and_ledger_lines():
    result = predict_files.VideoResult(EVIL, [EVIL], [0.5])
    assert predict_files.format_result(result) == f"{SHOWN}  0.500 {SHOWN}"
    unreadable = predict_files.VideoResult(EVIL, [], [], note="no")
    assert predict_files.format_result(unreadable) == f"{SHOWN}  cannot be read: no"
    line = summary.format_json_line({"id": EVIL})
    assert json.loads(line) == {"id": EVIL}
    assert not set(line[:-1]) & set(EVIL[1:2] + "\r\n\x9b\u202e\x07\x7f")


@contextlib.contextmanager
def _protected_streams():
    """Replace the streams of this process by protected ones; yield the wrapped ones."""
    raw = types.SimpleNamespace(out=io.StringIO(), err=io.StringIO())
    handler = logging.get_absl_handler().python_handler
    before = handler.stream
    with contextlib.redirect_stdout(raw.out), contextlib.redirect_stderr(raw.err):
        terminal.protect_terminal()
        terminal.protect_terminal()  # wraps once
        yield raw
    handler.setStream(before)


def test_everything_printed_is_escaped():
    """Check prints, errors, and log lines; line breaks and tabs of messages stay."""
    with _protected_streams() as streams:
        print(f"first {EVIL}\n\tsecond")
        with pytest.raises(SystemExit), cli.user_errors():
            raise ValueError(f"cannot read {EVIL}")
        record = logging.get_absl_logger().makeRecord("", 30, "", 0, f"damaged: {EVIL}", (), None)
        logging.get_absl_handler().python_handler.emit(record)
    escaped = SHOWN.replace(r"\u000a", "\n")
    assert streams.out.getvalue() == f"first {escaped}\n\tsecond\n"
    assert streams.err.getvalue().startswith(f"error: cannot read {escaped}\n")
    assert f"damaged: {escaped}\n" in streams.err.getvalue()


def test_bars_move_the_cursor_and_lines_above_them_do_not():
    with _protected_streams() as streams:
        with tqdm.tqdm(total=3, desc="prepare", file=terminal.raw_stderr()) as bar:
            bar.update()
            tqdm.tqdm.write(EVIL, file=sys.stdout)
        assert sys.stderr == streams.err  # tqdm clears a bar before a line only if these are equal
    assert "\rprepare:" in streams.err.getvalue()
    assert "\x1b" not in streams.out.getvalue()


def test_commands_protect_the_terminal(tmp_path):
    """Check a command's error in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dualpath_jax", "convert", f"--checkpoint={EVIL}", "--out=o"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"\x1b" not in done.stderr
    assert rb"a\u001b[2J\u000d" in done.stderr

"""Tests programs whose standard streams are closed, broken, full, or cannot show a character."""

import concurrent.futures
import os
import signal
import subprocess
import sys

import pytest

from dualpath_jax.training.checkpoint import Checkpoints
from tests.helpers.processes import ROOT, make_environment

PRINTS = """
import sys
from dualpath_jax.runtime import console
def main():
    console.protect_streams(is_log=sys.argv[1] == "log")
    for _ in range(20_000):
        print("a line")
    print("to standard error", file=sys.stderr, flush=True)
    open(sys.argv[2], "w").write("result")
    return 3
console.run(main)
"""


def run_program(program, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **variables):
    """Run a program to its end; a stream that is "closed" is closed when it starts."""
    closed = [f"{i}>&-" for i, stream in ((1, stdout), (2, stderr)) if stream == "closed"]
    shell = ["bash", "-c", f'exec "$0" "$@" {" ".join(closed)}']
    return subprocess.run(
        [*shell, sys.executable, "-c", program, *map(str, args)],
        stdout=None if stdout == "closed" else stdout,
        stderr=None if stderr == "closed" else stderr,
        env={**make_environment(), **variables},
        cwd=ROOT,
    )


def broken_pipe():
    """Return the end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("fault", ["closed", "broken pipe", "full disk"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_log_may_be_lost(fault, stream, tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    broken = {"closed": "closed", "broken pipe": broken_pipe(), "full disk": full}[fault]
    result = run_program(PRINTS, "log", tmp_path / "file", **{stream: broken})
    assert result.returncode == 3
    assert (tmp_path / "file").read_text() == "result"  # no line of the log is in it
    assert result.stdout is None or result.stdout.count(b"a line\n") == 20_000
    assert result.stderr in (None, b"to standard error\n")


def test_a_result_is_not_lost_silently(tmp_path):
    nobody_reads = run_program(PRINTS, "result", tmp_path / "file", stdout=broken_pipe())
    assert (nobody_reads.returncode, nobody_reads.stderr) == (128 + signal.SIGPIPE, b"")
    with open("/dev/full", "w") as full:
        for program in (PRINTS, PRINTS.replace("20_000", "1")):  # noticed at once, or at the end
            no_room = run_program(program, "result", tmp_path / "file", stdout=full)
            assert no_room.returncode == 2
            error = b"error: [Errno 28] standard output: No space left on device\n"
            assert no_room.stderr.endswith(error)


def test_a_full_disk_is_reported_at_the_end_where_files_are_written():
    program = PRINTS.replace("    return 3", "    console.check_output()\n    return 3")
    with open("/dev/full", "w") as full:
        no_room = run_program(program, "log", os.devnull, stdout=full)
        assert no_room.returncode == 2
        assert no_room.stderr.startswith(b"to standard error\nerror: [Errno 28] standard output: ")
        assert run_program(program, "log", os.devnull, stdout=broken_pipe()).returncode == 3


def test_a_pipe_that_does_not_wait_gets_every_line(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading) as lines, concurrent.futures.ThreadPoolExecutor() as pool:
        result = pool.submit(run_program, PRINTS, "result", tmp_path / "file", stdout=writing)
        result.add_done_callback(lambda _: os.close(writing))
        assert sum(line == "a line\n" for line in lines) == 20_000
    assert result.result().returncode == 3


def test_unbuffered_output_arrives_at_once():
    program = """
import sys
from dualpath_jax.runtime import console
console.run(lambda: (print("first"), sys.stdin.read(), None)[2])
"""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=make_environment(),
        cwd=ROOT,
    )
    assert process.stdout.readline() == b"first\n"  # waits forever where it is buffered
    process.communicate()
    assert process.returncode == 0


def test_streams_are_protected_in_any_order(tmp_path):
    program = PRINTS.replace(
        "console.run(main)",
        "from dualpath_jax.runtime import terminal\nterminal.protect_terminal()\nconsole.run(main)",
    )
    result = run_program(program, "result", tmp_path / "file", stdout=broken_pipe())
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_characters_that_the_encoding_lacks():
    program = (
        "from dualpath_jax.runtime import console\n"
        "console.run(lambda: print('caf\\xe9 \\u2713 bytes \\udcff', flush=True))"
    )
    ascii_only = run_program(program, PYTHONIOENCODING="ascii")
    assert ascii_only.stdout == rb"caf\xe9 \u2713 bytes " + b"\xff\n"
    utf8 = run_program(program, PYTHONIOENCODING="utf-8")
    assert utf8.stdout == "café ✓ bytes ".encode() + b"\xff\n"


@pytest.fixture
def heeded_interrupts():
    """Let child processes heed SIGINT, which a shell makes its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
def test_ctrl_c_is_one_line():
    program = """
import signal, time
from dualpath_jax.runtime import console
def main():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print("cleaned up")
console.run(main)
"""
    result = run_program(program)
    assert result.returncode == -signal.SIGINT  # a shell reports 130, and stops a script
    assert (result.stdout, result.stderr) == (b"cleaned up\n", b"interrupted by Ctrl-C\n")
    with open("/dev/full", "w") as full:
        for lost in (full, broken_pipe()):
            result = run_program(program, stdout=lost, PYTHONUNBUFFERED="")
            assert result.returncode == -signal.SIGINT
            assert result.stderr == b"interrupted by Ctrl-C\n"


def test_every_script_ends_by_one_line():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    programs = [path for path in scripts if "__main__" in path.read_text()]
    assert len(programs) > 20
    assert [path.name for path in programs if "console.run(" not in path.read_text()] == []


@pytest.mark.parametrize("module", ["dualpath_jax.main", "dualpath_jax"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_while_libraries_are_imported(module, number):
    """Send a signal when the first third-party module has been imported, before main runs."""
    before = signal.signal(number, lambda *_: None)  # under nohup it would be ignored there too
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", module, *["demo"] * (module == "dualpath_jax")],
        stderr=subprocess.PIPE,
        env=make_environment(),
        cwd=ROOT,
        text=True,
    )
    signal.signal(number, before)
    next(line for line in process.stderr if "absl" in line)  # the marker
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == 75
    assert f"stopped by {number.name}; the same command resumes from the last checkpoint" in rest


@pytest.mark.slow
def test_training_goes_on_without_a_log(tmp_path):
    """Check training, results and kept scores where nobody reads and the other log is full."""
    settings = {
        "data.synthetic": True,
        "data.batch_size": 4,
        "data.image_size": 32,
        "eval.batch_size": 4,
        "num_train_steps": 2,
        "model.scan_blocks": True,
        "log_every_steps": 1,
    }
    program = "import runpy; runpy.run_module('dualpath_jax.main', run_name='__main__')"
    options = [f"--config.{key}={value}" for key, value in settings.items()]
    workdir = f"--workdir={tmp_path}"
    with open("/dev/full", "w") as full:
        result = run_program(
            program,
            *("--config=configs/demo.py", workdir, *options),
            stdout=broken_pipe(),
            stderr=full,
            PYTHONIOENCODING="ascii",
        )
    assert result.returncode == 0
    assert (tmp_path / "results.json").exists()
    assert Checkpoints(str(tmp_path), read_only=True).has_scores(2)

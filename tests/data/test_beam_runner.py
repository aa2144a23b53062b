"""Tests preparation through Apache Beam; what needs Beam is skipped where it is not installed."""

import dataclasses
import errno
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from unittest import mock

import pytest

from dualpath_jax.commands import prepare as command
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation import beam_runner
from dualpath_jax.data.preparation.beam_runner import call_in_process, map_shards, new_pipeline
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset, store_shard
from tests.helpers import shard_calls
from tests.helpers.video_files import write_video

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = PrepareOptions(
    short_side=24, videos_per_shard=2, num_workers=2, max_missing=0.5, progress=False
)
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed"
)


@pytest.fixture
def work(tmp_path):
    path = tmp_path / "work"
    path.touch()
    return str(path)


def count_calls(work):
    names = sorted(path.name.split("-")[1] for path in pathlib.Path(work).parent.glob("called-*"))
    return {int(number): names.count(number) for number in names}


def call(number, work):
    call_in_process(number, module=shard_calls.__name__, name="record_call", work=work)


@pytest.fixture
def videos(tmp_path):
    """Make seven listed videos in two splits; one is broken, one is missing."""
    folder, lists = tmp_path / "videos", tmp_path / "lists"
    lists.mkdir()
    for i in range(7):
        write_video(folder / f"{i}.mp4", 3 + i)
    (folder / "1.mp4").write_bytes(b"no video")
    (folder / "3.mp4").unlink()
    (lists / "train.csv").write_text("".join(f"{i}.mp4,{'ab'[i % 2]}\n" for i in range(5)))
    (lists / "validation.csv").write_text("5.mp4,a\n6.mp4,b\n")
    return folder


def run(videos, out, **changes):
    index = list_videos("csv", str(videos), str(videos.parent / "lists"))
    return prepare_dataset(index, str(videos), str(out), dataclasses.replace(OPTIONS, **changes))


def read_files(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture
def without_beam(monkeypatch):
    """Replace the pipeline by a loop, in which shard 1 comes twice and the last one first."""

    def map_in_loop(pipeline, function, work, count):
        assert function is store_shard
        for number in [*reversed(range(count)), 1]:
            function(work, number)
        os.remove(work)

    monkeypatch.setattr(beam_runner, "new_pipeline", lambda *_: "pipeline")
    monkeypatch.setattr(beam_runner, "map_shards", map_in_loop)


# ----- without Beam


def test_runner_that_is_not_installed(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    out = tmp_path / "out"
    lists = videos.parent / "lists"
    arguments = ["--dataset=csv", f"--videos={videos}", f"--annotations={lists}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments, "--runner=direct"])
    with pytest.raises(SystemExit) as info:
        command.main()
    assert info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --runner=direct needs Apache Beam (")
    assert line.endswith('): pip install ".[beam]"')
    assert not out.exists()


def test_options_without_a_runner(videos, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="--beam_options='--region=x' needs a --runner other than"):
        run(videos, tmp_path / "out", beam_options="--region=x")
    with pytest.raises(ValueError, match="runner is 'spark'; choose one of local, direct, data"):
        run(videos, tmp_path / "out", runner="spark")
    assert not (tmp_path / "out").exists()
    more = ["--dataset=csv", "--videos=x", "--check", "--runner=direct"]
    monkeypatch.setattr(sys, "argv", ["prepare", *more])
    with pytest.raises(SystemExit):
        command.parse_arguments()
    assert "--runner and --beam_options exclude --check" in capsys.readouterr().err


def test_same_bytes_in_any_order(videos, tmp_path, without_beam, capsys, monkeypatch):
    counts = run(videos, tmp_path / "local")
    printed = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert run(pathlib.Path("videos"), pathlib.Path("out"), runner="direct") == counts
    assert capsys.readouterr().out == printed
    assert read_files(tmp_path / "out") == read_files(tmp_path / "local")


def test_only_unfinished_shards_are_repeated(videos, tmp_path, without_beam, capsys):
    run(videos, tmp_path / "local")
    run(videos, tmp_path / "out", runner="direct")
    assert "note: --runner=direct stores 4 shards" in capsys.readouterr().err
    for i in (0, 2):
        (tmp_path / "out" / "prepare" / f"train-{i:05d}-of-00003.json").unlink()
    kept = tmp_path / "out" / "frames" / "frames-train.array_record-00001-of-00003"
    before = kept.stat()
    run(videos, tmp_path / "out", runner="direct")
    assert "note: --runner=direct stores 2 shards" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    assert read_files(tmp_path / "out") == read_files(tmp_path / "local")


def test_retry_bad(videos, tmp_path, without_beam):
    run(videos, tmp_path / "out", runner="direct")
    for name in ("1.mp4", "3.mp4"):
        (videos / name).write_bytes((videos / "4.mp4").read_bytes())
    counts = run(videos, tmp_path / "out", runner="direct", retry_bad=True)
    assert (counts["total"].stored, counts["total"].bad) == (7, 0)
    run(videos, tmp_path / "fresh")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")


def test_worker_that_does_not_see_the_videos(videos, tmp_path, monkeypatch, without_beam):
    def map_elsewhere(pipeline, function, work, count):
        videos.rename(tmp_path / "not mounted")
        function(work, 0)

    monkeypatch.setattr(beam_runner, "map_shards", map_elsewhere)
    with pytest.raises(OSError, match=r"the worker .* cannot read .*0.mp4 \(No such file .* all "):
        run(videos, tmp_path / "out", runner="direct")


def test_killed_process_is_repeated(work):
    pathlib.Path(work).with_name("fate-3").write_text("killed")
    call(3, work)
    call(4, work)
    assert count_calls(work) == {3: 2, 4: 1}


def test_process_that_is_always_killed(work):
    pathlib.Path(work).with_name("fate-3").write_text("always killed")
    with pytest.raises(RuntimeError, match=r"3: its process was killed every time \(signal 9\)"):
        call(3, work)
    assert count_calls(work) == {3: 3}


def test_call_that_raises_is_not_repeated(work):
    pathlib.Path(work).with_name("fate-3").write_text("raises")
    with pytest.raises(RuntimeError, match="shard 3: OSError: .*No space left on device"):
        call(3, work)
    assert count_calls(work) == {3: 1}


def test_process_ends_with_its_parent():
    code = (
        "from dualpath_jax.data.preparation import beam_runner\n"
        "beam_runner.call_in_process(60, 'tests.helpers.shard_calls', 'sleep', 'work')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    children = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        parent.kill()
        pytest.skip("children of a process are listed on Linux only")
    wait_until(lambda: children.read_text().split())
    (child,) = children.read_text().split()
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_running(child))


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, None])
def test_a_job_that_is_interrupted_is_canceled(end, work, monkeypatch):
    """Check that job and processes end with the command; in the twin the job has ended."""
    monkeypatch.setitem(sys.modules, "apache_beam", mock.MagicMock())
    pipeline = mock.MagicMock()
    result = pipeline.run.return_value
    result.cancel.side_effect = OSError("has ended")
    errors = []

    def sleep():
        try:
            call_in_process(60, module=shard_calls.__name__, name="sleep", work=work)
        except RuntimeError as error:
            errors.append(str(error))

    caller = threading.Thread(target=sleep)

    def wait_until_finish():
        caller.start()
        wait_until(lambda: beam_runner._running)
        if end:
            raise end("stopped")

    result.wait_until_finish = wait_until_finish
    starts = mock.Mock(wraps=subprocess.Popen)
    monkeypatch.setattr(beam_runner.subprocess, "Popen", starts)
    with pytest.raises(OSError if end is RuntimeError else end) if end else nullcontext():
        map_shards(pipeline, shard_calls.sleep, work, 3)
    assert not beam_runner._running  # they have been waited for
    caller.join()
    assert errors == ["shard 60: the job was stopped"]
    assert starts.call_count == 1  # a killed process is not started again
    assert result.cancel.call_count == (end is not None)
    with pytest.raises(RuntimeError, match="shard 1: the job was stopped"):
        call(1, work)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] != "Z"


# ----- with Beam


@needs_beam
def test_direct_runner_with_a_killed_worker(videos, tmp_path, capsys):
    """Check that the output is equal to the local one, byte for byte, and so are the counts."""
    shards = {"videos_per_shard": 4}
    counts = run(videos, tmp_path / "local", **shards)
    printed = capsys.readouterr().out
    killed = []

    def kill_one():
        wait_until(lambda: beam_runner._running)
        time.sleep(0.3)
        killed.append(next(iter(beam_runner._running)).pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert run(videos, tmp_path / "out", runner="direct", **shards) == counts
    killer.join()
    assert len(killed) == 1
    assert capsys.readouterr().out == printed
    assert read_files(tmp_path / "out") == read_files(tmp_path / "local")


@needs_beam
def test_full_disk_of_a_worker(work):
    pathlib.Path(work).with_name("fate-1").write_text("raises")
    with pytest.raises(OSError, match=r"shard 1: OSError: \[Errno 28\] No space left") as info:
        map_shards(new_pipeline("direct", "", 2), shard_calls.record_call, work, 3)
    assert info.value.errno == errno.ENOSPC
    assert not os.path.exists(work)
    assert not beam_runner._running


@needs_beam
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--foo=1 --direct_num_workers=2",
            "'--foo=1 --direct_num_workers=2': Beam has no option foo",
        ),
        ("--direct_num_workers=x", "argument --direct_num_workers: invalid int value: 'x'"),
        ("--runner=FlinkRunner", "it sets runner=FlinkRunner; --runner=direct has done so"),
        ("--job_name='x", "No closing quotation"),
        ("--help", "--beam_options='--help': it asks for help instead of naming options"),
    ],
)
def test_wrong_beam_options(options, message, capsys):
    with pytest.raises(ValueError, match=message):
        new_pipeline("direct", options, 1)
    assert capsys.readouterr().out == ""

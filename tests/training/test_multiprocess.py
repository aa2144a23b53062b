"""Several real processes on this machine: the same run as one, and what happens when one dies."""

import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dualpath_jax.data import index_sampler
from dualpath_jax.runtime.preemption import EXIT_CODE
from scripts import export_adapter
from tests.helpers.processes import ROOT, make_environment
from tests.helpers.several_processes import make_six_step_config, train_and_evaluate

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # relative; sums over devices are taken in another order
TESTS = pathlib.Path(__file__).parent
# `main`, with less patience, so that the test is quicker.
QUICK_MAIN = """
import sys
from absl import app, flags
from dualpath_jax import main
from dualpath_jax.runtime import distributed
distributed.HEARTBEAT_SECONDS = 10
flags.mark_flag_as_required("config")
app.run(main.run)
"""


class Job:
    """`number` processes; `command(address, process)` is what they run, `devices` each one's."""

    def __init__(self, number, folder, command, devices=1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = [folder / f"log{i}.txt" for i in range(number)]
        self.processes = []
        for i, log in enumerate(self._logs):
            with log.open("w") as file, log.with_suffix(".err").open("w") as errors:
                process = subprocess.Popen(
                    command(address, i),
                    stdout=file,
                    stderr=errors,
                    cwd=ROOT,
                    env=make_environment(devices),
                )
            self.processes.append(process)

    def out(self, i):
        return self._logs[i].read_text()

    def err(self, i):
        return self._logs[i].with_suffix(".err").read_text()

    def wait(self, seconds=900):
        """Exit codes; whoever is left after so many seconds is killed and gives "hangs"."""
        end = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append("hangs")
        return codes


@contextlib.contextmanager
def job(*args, **kwargs):
    started = Job(*args, **kwargs)
    try:
        yield started
    finally:
        started.wait(0)


def run_scenarios(what, number, folder, config, devices=1):
    """What tests/helpers/several_processes.py does, to its end."""
    script = [sys.executable, str(TESTS / "several_processes.py"), what]
    rest = [str(folder), config.data.dir, config.backbone.checkpoint]

    def command(address, i):
        return [*script, address, str(number), str(i), *rest]

    with job(number, folder, command, devices) as running:
        codes = running.wait()
        assert codes == [0] * number, [running.err(i)[-3000:] for i in range(number)]
    return folder


def entries(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def values(workdir, key):
    return [entry[key] for entry in entries(workdir)]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def examples(workdir, number):
    """(training, testing): by step, the examples of all processes in order."""
    seen = [json.loads((workdir / f"seen{i}.json").read_text()) for i in range(number)]
    return [
        [sum(rows, []) for rows in zip(*(one[name] for one in seen), strict=True)]
        for name in ("train", "test")
    ]


@pytest.fixture(scope="module")
def settings(demo_data, demo_backbone):
    return make_six_step_config(demo_data, demo_backbone)


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """The run in this process alone, on eight devices: its folder."""
    folder = tmp_path_factory.mktemp("one")
    train_and_evaluate(settings, folder)
    return folder


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    """All that two processes do."""
    what = "apart,straight,stopped,damaged,skipped,timed"
    return run_scenarios(what, 2, tmp_path_factory.mktemp("two"), settings, devices=2)


@pytest.fixture(scope="module")
def four(settings, two, tmp_path_factory):
    """Four processes go on where two stopped."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two / "stopped", folder / "straight")
    return run_scenarios("straight", 4, folder, settings)


def test_two_processes_do_what_one_does(settings, one, two, tmp_path):
    workdir = two / "straight"
    training, testing = examples(workdir, 2)
    assert training == [
        index_sampler.train_indices(0, step, 8, 40)[0].tolist() for step in range(6)
    ]
    assert [i for batch in testing for i in batch if i >= 0] == list(range(21))
    assert values(workdir, "step") == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "gradient_norm", "accuracy"):
        assert values(workdir, key) == pytest.approx(values(one, key), rel=TOLERANCE), key
    assert results(workdir) == results(one)
    assert results(one)["num_videos"] == 21
    # Twin: another seed is another run.
    settings = settings.copy_and_resolve_references()
    settings.seed = 1
    train_and_evaluate(settings, tmp_path, evaluation=False)
    assert values(tmp_path, "loss") != pytest.approx(values(one, "loss"), rel=0.01)


def test_only_process_0_writes(two, four):
    """And a workdir that is not shared is refused: see `apart` in several_processes.py."""
    assert "2 processes, 4 devices: 0 on " in (two / "log0.txt").read_text()
    assert "step 6/6  loss " in (two / "log0.txt").read_text()
    for log in [two / "log1.txt", *(four / f"log{i}.txt" for i in (1, 2, 3))]:
        lines = log.read_text().splitlines()
        # Gloo's own, of which threads write parts between each other's.
        own = [line for line in lines if "[Gloo]" not in line and "peer ranks" not in line]
        assert own == []
    assert len(list((two / "straight").glob("events.out.tfevents.*"))) == 1


def test_runs_go_on_with_another_number_of_processes(settings, one, two, four, tmp_path):
    """Two stopped after three steps; four, and one, do the rest."""
    workdir = four / "straight"
    training, testing = examples(workdir, 4)
    assert training == [
        index_sampler.train_indices(0, step, 8, 40)[0].tolist() for step in (3, 4, 5)
    ]
    assert [i for batch in testing for i in batch if i >= 0] == list(range(21))
    seen = [json.loads((workdir / f"seen{i}.json").read_text())["test"] for i in range(4)]
    shares = [sum(i >= 0 for batch in batches for i in batch) for batches in seen]
    assert shares == [6, 6, 5, 4]  # uneven
    shutil.copytree(two / "stopped", tmp_path / "one")
    train_and_evaluate(settings, tmp_path / "one")
    for resumed in (workdir, tmp_path / "one"):
        assert values(resumed, "step") == [1, 2, 3, 4, 5, 6]
        for key in ("loss", "gradient_norm"):
            assert values(resumed, key) == pytest.approx(values(one, key), rel=TOLERANCE), key
        assert results(resumed) == results(one)


def test_what_four_processes_saved_is_exported_by_one(four, tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    assert "at step 6" in export_adapter.export(str(four / "straight"), path, "latest")


def test_a_checkpoint_that_one_process_cannot_read(two):
    """6 was damaged, 4 unreadable for process 1: both set aside by both, and the same again."""
    kept = sorted(path.name for path in (two / "damaged" / "damaged_checkpoints").iterdir())
    assert kept == ["4-0", "6-0"]
    errors = (two / "log0.err").read_text()
    assert "another host cannot read checkpoint" in errors
    assert values(two / "damaged", "loss") == values(two / "straight", "loss")


def test_a_step_that_is_not_finite_for_one_process(two):
    assert values(two / "skipped", "skipped_steps") == [0, 1, 1, 1, 1, 1]
    losses = values(two / "skipped", "loss")
    assert [np.isfinite(loss) for loss in losses] == [True, False, True, True, True, True]
    for i in (0, 1):
        assert "loss is nan, gradient norm nan at step 2" in (two / f"log{i}.err").read_text()


def test_the_clock_of_process_0_decides(two):
    saved = sorted(int(path.name) for path in (two / "timed" / "checkpoints").iterdir())
    assert saved == [1, 2, 3, 4, 5, 6]


def main_of(config, workdir, number):
    """The command line of each process."""
    keys = ("data.source", "data.dir", "data.batch_size", "data.image_size", "eval.batch_size")
    command = [sys.executable, "-c", QUICK_MAIN, "--config=configs/demo.py"]
    for key in (*keys, "backbone.checkpoint", "model.scan_blocks"):
        command.append(f"--config.{key}={config[key.split('.')[0]][key.split('.')[1]]}")
    command += [
        f"--workdir={workdir}",
        "--config.model.temporal_path=False",
        "--config.num_train_steps=4000",
        "--config.checkpoint.every_steps=5",
        f"--num_processes={number}",
    ]
    return lambda address, i: [*command, f"--coordinator_address={address}", f"--process_id={i}"]


def steps(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def wait_for(reached, running):
    end = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < end
        for i, process in enumerate(running.processes):
            assert process.poll() is None, running.err(i)
        time.sleep(0.1)


def test_one_of_two_is_killed_then_told_to_stop(settings, tmp_path):
    workdir = tmp_path / "run"
    command = main_of(settings, workdir, 2)
    with job(2, tmp_path / "killed", command) as running:
        wait_for(lambda: len(steps(workdir)) >= 2, running)
        running.processes[1].kill()
        assert running.wait(60) == [-signal.SIGABRT, -signal.SIGKILL]
        errors = running.err(0)
        assert "process 0 of 2: another process is gone" in errors
        assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in errors
    for told in ((1,), (0, 1)):  # one of them; both at once, as a scheduler does
        before = max(steps(workdir))
        with job(2, tmp_path / f"told{len(told)}", command) as running:
            wait_for(lambda before=before: max(steps(workdir)) > before, running)
            for i in told:
                running.processes[i].send_signal(signal.SIGTERM)
            assert running.wait(120) == [EXIT_CODE, EXIT_CODE]
            assert f"resumed from {workdir}/checkpoints/{before}" in running.out(0)
            for i in (0, 1):
                message = f"process {i} of 2: told to stop; saved {workdir}/checkpoints/"
                assert f"{message}{steps(workdir)[-1]};" in running.err(i)


def test_one_of_two_cannot_start(settings, tmp_path):
    """It says why and leaves; the other does not wait for it for ever."""
    command = main_of(settings, tmp_path / "run", 2)

    def without_data(address, i):
        return [*command(address, i), *(["--config.data.dir=nowhere"] if i == 1 else [])]

    with job(2, tmp_path / "logs", without_data) as running:
        assert running.wait(150) == [-signal.SIGABRT, 2]
        assert "process 1 of 2: error: no prepared data in nowhere" in running.err(1)
        assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in running.err(0)

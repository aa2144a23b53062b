"""Trains in several real processes: the same run as in one process, also after one dies."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dualpath_jax.commands import export_adapter
from dualpath_jax.data import index_sampler
from dualpath_jax.runtime.preemption import EXIT_CODE
from tests.helpers.processes import ROOT, make_environment
from tests.helpers.several_processes import make_six_step_config, train_and_evaluate

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # relative; sums over devices are computed in another order
# Runs `main` with frequent heartbeats, which makes the tests quicker.
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
    """Starts processes that write their output to files.

    Args:
      number: number of processes.
      folder: folder of the output.
      make_command: (address of process 0, index of a process) -> its command line.
      devices: number of devices of each process.
    """

    def __init__(self, number, folder, make_command, devices=1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = [folder / f"log{i}.txt" for i in range(number)]
        self.processes = []
        for i, log in enumerate(self._logs):
            with log.open("w") as file, log.with_suffix(".err").open("w") as errors:
                process = subprocess.Popen(
                    make_command(address, i),
                    stdout=file,
                    stderr=errors,
                    cwd=ROOT,
                    env=make_environment(devices),
                )
            self.processes.append(process)

    def stdout(self, i):
        """Return the standard output of process `i`."""
        return self._logs[i].read_text()

    def stderr(self, i):
        """Return the standard error of process `i`."""
        return self._logs[i].with_suffix(".err").read_text()

    def wait(self, seconds=900):
        """Return the exit codes; kills processes that are left then, with "hangs" as the code."""
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
def start_job(*args, **kwargs):
    """Yield a `Job`, whose processes are killed at the end."""
    job = Job(*args, **kwargs)
    try:
        yield job
    finally:
        job.wait(0)


def run_scenarios(names, number, folder, config, devices=1):
    """Run scenarios of tests/helpers/several_processes.py to their end; return `folder`."""
    script = [sys.executable, str(ROOT / "tests/helpers/several_processes.py"), names]
    rest = [str(folder), config.data.dir, config.backbone.checkpoint]

    def make_command(address, i):
        return [*script, address, str(number), str(i), *rest]

    with start_job(number, folder, make_command, devices) as job:
        codes = job.wait()
        assert codes == [0] * number, [job.stderr(i)[-3000:] for i in range(number)]
    return folder


def read_metric(workdir, key):
    """Return the values of a metric from metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def read_results(workdir):
    return json.loads((workdir / "results.json").read_text())


def read_example_ids(workdir, number):
    """Return (training, testing): by step, the examples of all processes in order."""
    seen = [json.loads((workdir / f"seen{i}.json").read_text()) for i in range(number)]
    return [
        [sum(rows, []) for rows in zip(*(ids[name] for ids in seen), strict=True)]
        for name in ("train", "test")
    ]


@pytest.fixture(scope="module")
def settings(demo_data, demo_backbone):
    """Return the configuration of all runs."""
    return make_six_step_config(demo_data, demo_backbone)


@pytest.fixture(scope="module")
def single(settings, tmp_path_factory):
    """Train in this process on eight devices; return the workdir."""
    folder = tmp_path_factory.mktemp("single")
    train_and_evaluate(settings, folder)
    return folder


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    """Run all scenarios in two processes; return the folder of their workdirs."""
    names = "apart,straight,stopped,damaged,skipped,timed"
    return run_scenarios(names, 2, tmp_path_factory.mktemp("two"), settings, devices=2)


@pytest.fixture(scope="module")
def four(settings, two, tmp_path_factory):
    """Resume in four processes where two stopped; return the folder of the workdir."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two / "stopped", folder / "straight")
    return run_scenarios("straight", 4, folder, settings)


def test_two_processes_train_as_one_does(settings, single, two, tmp_path):
    workdir = two / "straight"
    training, testing = read_example_ids(workdir, 2)
    assert training == [
        index_sampler.train_indices(0, step, 8, 40)[0].tolist() for step in range(6)
    ]
    assert [i for batch in testing for i in batch if i >= 0] == list(range(21))
    assert read_metric(workdir, "step") == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "gradient_norm", "accuracy"):
        assert read_metric(workdir, key) == pytest.approx(
            read_metric(single, key), rel=TOLERANCE
        ), key
    assert read_results(workdir) == read_results(single)
    assert read_results(single)["num_videos"] == 21
    # Twin: another seed is another run.
    settings = settings.copy_and_resolve_references()
    settings.seed = 1
    train_and_evaluate(settings, tmp_path, evaluation=False)
    assert read_metric(tmp_path, "loss") != pytest.approx(read_metric(single, "loss"), rel=0.01)


def test_only_process_0_writes(two, four):
    """Check outputs and events; `apart` of several_processes.py checks unshared workdirs."""
    assert "2 processes, 4 devices: 0 on " in (two / "log0.txt").read_text()
    assert "step 6/6  loss " in (two / "log0.txt").read_text()
    for log in [two / "log1.txt", *(four / f"log{i}.txt" for i in (1, 2, 3))]:
        lines = log.read_text().splitlines()
        # Lines of Gloo, whose threads write parts between each other's.
        own = [line for line in lines if "[Gloo]" not in line and "peer ranks" not in line]
        assert own == []
    assert len(list((two / "straight").glob("events.out.tfevents.*"))) == 1


def test_runs_resume_with_another_number_of_processes(settings, single, two, four, tmp_path):
    """Check that four processes, and one, finish what two left after three steps."""
    workdir = four / "straight"
    training, testing = read_example_ids(workdir, 4)
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
        assert read_metric(resumed, "step") == [1, 2, 3, 4, 5, 6]
        for key in ("loss", "gradient_norm"):
            assert read_metric(resumed, key) == pytest.approx(
                read_metric(single, key), rel=TOLERANCE
            ), key
        assert read_results(resumed) == read_results(single)


def test_what_four_processes_saved_is_exported_by_one(four, tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    assert "at step 6" in export_adapter.export(str(four / "straight"), path, "latest")


def test_a_checkpoint_that_one_process_cannot_read(two):
    """Check that both processes moved checkpoints 6 (damaged) and 4 (unreadable for process 1).

    They then trained these steps again, with the same result.
    """
    kept = sorted(path.name for path in (two / "damaged" / "damaged_checkpoints").iterdir())
    assert kept == ["4-0", "6-0"]
    errors = (two / "log0.err").read_text()
    assert "another host cannot read checkpoint" in errors
    assert read_metric(two / "damaged", "loss") == read_metric(two / "straight", "loss")


def test_a_step_that_is_not_finite_for_one_process(two):
    assert read_metric(two / "skipped", "skipped_steps") == [0, 1, 1, 1, 1, 1]
    losses = read_metric(two / "skipped", "loss")
    assert [np.isfinite(loss) for loss in losses] == [True, False, True, True, True, True]
    for i in (0, 1):
        assert "loss is nan, gradient norm nan at step 2" in (two / f"log{i}.err").read_text()


def test_the_clock_of_process_0_decides(two):
    saved = sorted(int(path.name) for path in (two / "timed" / "checkpoints").iterdir())
    assert saved == [1, 2, 3, 4, 5, 6]


def make_main_command(config, workdir, number):
    """Return a function (address, index) -> command line of a process that trains for long."""
    keys = ("data.source", "data.dir", "data.batch_size", "data.image_size", "eval.batch_size")
    command = [sys.executable, "-c", QUICK_MAIN, "--config=configs/demo.py"]
    for key in (*keys, "backbone.checkpoint", "model.scan_blocks"):
        command.append(f"--config.{key}={config[key.split('.')[0]][key.split('.')[1]]}")
    command += [
        f"--workdir={workdir}",
        "--config.model.temporal_path=False",
        "--config.num_train_steps=4000",
        "--config.checkpoint.every_steps=5",
        "--config.log_every_steps=1",
        f"--num_processes={number}",
    ]
    return lambda address, i: [*command, f"--coordinator_address={address}", f"--process_id={i}"]


def read_learning(workdir):
    """Return the (loss, gradient norm) of each step in metrics.jsonl."""
    return dict(
        zip(
            read_metric(workdir, "step"),
            zip(read_metric(workdir, "loss"), read_metric(workdir, "gradient_norm"), strict=True),
            strict=True,
        )
    )


def unfinished_checkpoints(workdir):
    """Return the checkpoints that are being written, or were when the program died."""
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def saved_steps(workdir):
    """Return the steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def wait_for(is_reached, job, pause=0.1):
    """Wait until `is_reached()`, asked every `pause` seconds; fail if a process ends before."""
    end = time.monotonic() + 300
    while not is_reached():
        assert time.monotonic() < end
        for i, process in enumerate(job.processes):
            assert process.poll() is None, job.stderr(i)
        time.sleep(pause)


def test_one_of_two_is_killed_then_stopped(settings, tmp_path):
    workdir = tmp_path / "run"
    command = make_main_command(settings, workdir, 2)
    first = {}
    for killed in (1, 0):  # process 0 writes most of a checkpoint
        before = max(saved_steps(workdir), default=0)
        with start_job(2, tmp_path / f"killed{killed}", command) as job:
            wait_for(lambda before=before: max(saved_steps(workdir), default=0) > before, job)
            wait_for(lambda: unfinished_checkpoints(workdir), job, pause=0.001)
            job.processes[killed].kill()
            codes = [-signal.SIGABRT, -signal.SIGABRT]
            codes[killed] = -signal.SIGKILL
            assert job.wait(60) == codes
            errors = job.stderr(1 - killed)
            assert "Fatal Python error" not in errors  # stack traces would bury the cause
            if killed == 1:
                assert "process 0 of 2: another process is gone" in errors
                assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in errors
            else:  # JAX may end process 1 before that one prints a line of its own
                assert "Either the leader task was preempted/died" in errors
        first |= {step: x for step, x in read_learning(workdir).items() if step not in first}
    assert unfinished_checkpoints(workdir)
    assert max(first) > max(saved_steps(workdir))
    for stopped in ((1,), (0, 1)):  # one of them; both at once, as a scheduler does
        before = max(saved_steps(workdir))
        with start_job(2, tmp_path / f"stopped{len(stopped)}", command) as job:
            wait_for(lambda before=before: max(saved_steps(workdir)) > before, job)
            for i in stopped:
                job.processes[i].send_signal(signal.SIGTERM)
            assert job.wait(120) == [EXIT_CODE, EXIT_CODE]
            assert f"resumed from {workdir}/checkpoints/{before}" in job.stdout(0)
            for i in (0, 1):
                message = f"process {i} of 2: stopped; saved {workdir}/checkpoints/"
                assert f"{message}{saved_steps(workdir)[-1]};" in job.stderr(i)
    again = read_learning(workdir)  # steps after the checkpoint were done again
    assert {step: again[step] for step in first} == first
    assert not unfinished_checkpoints(workdir)
    assert not (workdir / "damaged_checkpoints").exists()


def test_one_of_two_cannot_start(settings, tmp_path):
    """Check that it reports why and ends, and that the other one ends as well."""
    command = make_main_command(settings, tmp_path / "run", 2)

    def without_data(address, i):
        return [*command(address, i), *(["--config.data.dir=nowhere"] if i == 1 else [])]

    with start_job(2, tmp_path / "logs", without_data) as job:
        assert job.wait(150) == [-signal.SIGABRT, 2]
        assert "process 1 of 2: error: no prepared data in nowhere" in job.stderr(1)
        assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in job.stderr(0)

"""Trains under random faults and restarts the program until it is done; see scripts/chaos.py.

The run is compared with an undisturbed one, so both must see the same batches. The videos that
`TrainingFixture` damages are damaged in both runs, and their replacements must not depend on when
the damage is found. Training would also continue around further damage to stored records, but with
other batches. This fault therefore damages more videos than `data.max_broken_videos` allows: the
program must stop before it trains on them, and the records are repaired before the next start.
"""

import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np

from dualpath_jax.runtime.preemption import EXIT_CODE
from tests.chaos.full_disk import LimitedDisk
from tests.chaos.training_fixture import (
    CLOSED_PIPES,
    DAMAGED,
    FAILING_DISK,
    NO_PRIVILEGE,
    SIZES,
    WRONG_CLOCK,
    ChaosError,
    TrainingFixture,
    TrainingProcess,
)

STEPS_PER_FAULT = 12
_USER_ERROR = 2  # exit status of `cli.user_errors`
_LOST_CHECKPOINT = "could not be written"  # part of the program's warning


class FaultedRun:
    """Runs the disturbed training: a series of processes in one workdir.

    Attributes:
      fixture: starts the processes.
      disk: the disk of the workdir.
      workdir: the workdir of all processes.
      num_starts: number of processes started so far.
      training: the process started last.
    """

    def __init__(self, fixture: TrainingFixture, disk: LimitedDisk):
        self.fixture, self.disk = fixture, disk
        self.workdir = disk.folder / "workdir"
        self.num_starts = 0
        self.training = self.start()

    def start(self, before: str = "") -> TrainingProcess:
        """Start the next process, see `TrainingFixture.start`."""
        self.num_starts += 1
        log = f"process{self.num_starts:03}.txt"
        self.training = self.fixture.start(self.workdir, log, before)
        return self.training

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` is done."""
        if not self.training.wait_until(lambda: self.training.last_step() >= step):
            raise self.exit_error()

    def restart(self, before: str = "") -> str:
        """Start the same command after a death; return where it resumed, in words."""
        training = self.start(before)
        if not training.wait_for_first_step() and training.wait_for_exit() != 0:
            status = training.process.returncode
            raise training.make_error(f"did not start again: status {status}")
        lines = training.read_log().splitlines()
        resumed = [line for line in lines if line.startswith("resumed from")]
        return f"resumed from step {resumed[0].rsplit('/', 1)[1]}" if resumed else "began again"

    def exit_error(self, where: str = "") -> ChaosError:
        """Return an error with the exit status of the last process."""
        status = self.training.process.returncode
        return self.training.make_error(f"ended with status {status}{where}")

    def saved_steps(self) -> list[int]:
        """Return the steps of the finished checkpoints."""
        folders = (self.workdir / "checkpoints").glob("*")
        return sorted(int(path.name) for path in folders if path.name.isdigit())

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, or 0."""
        return max(self.saved_steps(), default=0)

    def unfinished_checkpoints(self) -> list[pathlib.Path]:
        """Return checkpoints that are being written, or were when the program died."""
        return list((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    def count_damaged_checkpoints(self) -> int:
        """Return the number of checkpoints that the program has set aside as damaged."""
        return len(list((self.workdir / "damaged_checkpoints").glob("*")))


def _kill(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    time.sleep(rng.uniform(0, 0.3))
    run.training.kill()
    return "resumed", run.restart()


def _kill_starting(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.kill()
    training = run.start()
    seconds = rng.uniform(0, 10)
    time.sleep(seconds)
    training.kill()
    return "resumed", f"after {seconds:.1f} s; {run.restart()}"


def _kill_saving(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    if not run.training.wait_until(run.unfinished_checkpoints, pause=0.001):
        raise run.training.make_error("saved nothing more")
    time.sleep(rng.uniform(0, 0.05))
    run.training.kill()
    steps = [path.name.split(".")[0] for path in run.unfinished_checkpoints()]
    where = f"checkpoint {steps[0]} unfinished" if steps else "it had just been finished"
    outcome = "resumed, ignored an unfinished checkpoint" if steps else "resumed"
    return outcome, f"{where}; {run.restart()}"


def _sigterm(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.wait_for_first_step()
    time.sleep(rng.uniform(0, 0.3))
    run.training.process.send_signal(signal.SIGTERM)
    if run.training.wait_for_exit() != EXIT_CODE:
        raise run.exit_error(" on SIGTERM")
    newest = max(run.saved_steps())
    where = run.restart()
    if where != f"resumed from step {newest}":
        raise run.training.make_error(f"had saved step {newest} on SIGTERM and {where}")
    return f"saved, status {EXIT_CODE}, resumed there", where


def _sigterm_starting(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.kill()
    training = run.start()
    seconds = rng.uniform(0, 10)
    time.sleep(seconds)
    training.process.send_signal(signal.SIGTERM)
    status = training.wait_for_exit()
    if status not in (EXIT_CODE, -signal.SIGTERM):
        raise run.exit_error(" on SIGTERM")
    outcome = f"status {status}" if status > 0 else "ended by the signal"
    return f"{outcome}, resumed", f"after {seconds:.1f} s; {run.restart()}"


def _torn_checkpoint(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.wait_until(lambda: len(run.saved_steps()) > 1)  # without one, step 0 is refused
    run.training.kill()
    newest = run.workdir / "checkpoints" / str(max(run.saved_steps()))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    chances = sizes / sizes.sum() if rng.random() < 0.7 else None  # many small files are not read
    path = files[rng.choice(len(files), p=chances)]
    damage = ("cut", "flipped bit in", "removed")[rng.integers(3)]
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: rng.integers(len(content))])
    else:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
    before = run.count_damaged_checkpoints()
    details = f"{damage} {path.relative_to(newest.parent)}; {run.restart()}"
    if run.count_damaged_checkpoints() > before:
        return "set aside, resumed from an older one", details
    return "not needed for restoring, resumed", details


def _full_disk(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.wait_for_first_step()
    with run.disk.full(run.training.process.pid):
        _wait_for_lost_checkpoint(run)
    return "warned, continued", f"without the checkpoint; newest {run.newest_step()}"


def _no_inodes(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.wait_for_first_step()
    with run.disk.full(run.training.process.pid, inodes=True):
        _wait_for_lost_checkpoint(run)
    return "warned, continued", f"without the checkpoint; newest {run.newest_step()}"


def _full_disk_and_kill(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.wait_for_first_step()
    with run.disk.full(run.training.process.pid):
        _wait_for_lost_checkpoint(run)
        run.training.kill()
        training = run.start()
        run.disk.limit(training.process.pid)
        if training.wait_for_first_step():
            outcome = "trained on the full disk"
            training.kill()
        elif training.wait_for_exit() == _USER_ERROR:
            outcome = f"status {_USER_ERROR} on the full disk"
        else:
            raise run.exit_error(" on a full disk")
    return f"{outcome}, then resumed", run.restart()


def _wait_for_lost_checkpoint(run: FaultedRun) -> None:
    """Wait until the program warns that it could not write a checkpoint."""
    training = run.training
    before = training.read_log().count(_LOST_CHECKPOINT)
    if not training.wait_until(lambda: training.read_log().count(_LOST_CHECKPOINT) > before):
        raise run.exit_error(" on a full disk")


def _corrupt_records(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.kill()
    intact = run.fixture.shard.read_bytes()
    run.fixture.damage_videos(i for i in range(SIZES["train"]) if i not in DAMAGED)
    training = run.start()
    status = training.wait_for_exit()
    run.fixture.shard.write_bytes(intact)
    if status != _USER_ERROR or "training videos cannot be read" not in training.read_log():
        raise run.exit_error(" on records that cannot be read")
    return f"status {_USER_ERROR}, named the videos; resumed when repaired", run.restart()


def _data_prepared_anew(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    """Try to prepare other videos there while the program reads; then replace them by force."""
    run.training.wait_for_first_step()
    (part,) = pathlib.Path(run.fixture.data, "prepare").glob("train-*.json")
    entries = part.read_bytes()
    part.unlink()
    preparing = run.fixture.prepare_again(f"prepare{run.num_starts:03}.txt")
    status = preparing.wait_for_exit()
    part.write_bytes(entries)
    holder = f"is being read by process {run.training.process.pid}"
    if status != _USER_ERROR or holder not in preparing.read_log():
        raise preparing.make_error(f"ended with status {status} while its data are being read")
    run.training.kill()
    intact = run.fixture.shard.read_bytes()
    run.fixture.shard.write_bytes(intact[: rng.integers(len(intact))])
    training = run.start()
    status = training.wait_for_exit()
    run.fixture.shard.write_bytes(intact)
    if status != _USER_ERROR or "cut off or replaced" not in training.read_log():
        raise run.exit_error(" on data that were replaced")
    outcome = "prepare was refused; replaced files were refused too, resumed with the old ones"
    return outcome, run.restart()


def _wait_until_unreadable(run: FaultedRun, before: str) -> None:
    """Start the program where it cannot read its newest checkpoint; it must leave all in place."""
    steps, damaged = run.saved_steps(), run.count_damaged_checkpoints()
    training = run.start(before)
    status = training.wait_for_exit()
    if status != _USER_ERROR or "cannot be read at present" not in training.read_log():
        raise run.exit_error(" on a checkpoint that cannot be read")
    if (run.saved_steps(), run.count_damaged_checkpoints()) != (steps, damaged):
        raise training.make_error("moved a checkpoint that it could not read")


def _no_permission(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.wait_until(run.saved_steps)
    run.training.kill()
    newest = run.workdir / "checkpoints" / str(run.newest_step())
    for path in (newest / "metadata" / "metadata", newest / "state" / "_METADATA"):
        path.chmod(0)
        _wait_until_unreadable(run, NO_PRIVILEGE)
        path.chmod(0o644)
    return f"status {_USER_ERROR}, moved nothing; resumed with the permission", _resume_there(run)


def _failing_disk(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.wait_until(run.saved_steps)
    run.training.kill()
    _wait_until_unreadable(run, FAILING_DISK)
    return f"status {_USER_ERROR}, moved nothing; resumed when it could read", _resume_there(run)


def _resume_there(run: FaultedRun) -> str:
    """Restart, which must resume from the newest checkpoint."""
    newest, where = run.newest_step(), run.restart()
    if where != f"resumed from step {newest}":
        raise run.training.make_error(f"had saved step {newest} and {where}")
    return where


def _closed_pipes(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.kill()
    newest = run.newest_step()
    training = run.start(CLOSED_PIPES)
    if not training.wait_until(lambda: run.newest_step() > newest):
        raise run.exit_error(" although only its output is lost")
    training.process.send_signal(signal.SIGHUP)
    if training.wait_for_exit() != EXIT_CODE:
        raise run.exit_error(" on SIGHUP")
    return f"continued and saved; status {EXIT_CODE} on SIGHUP, resumed there", _resume_there(run)


def _second_program(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    first = run.training.process
    first.send_signal(signal.SIGSTOP)  # otherwise it would be done before the other starts
    second = run.fixture.start(run.workdir, f"second{run.num_starts:03}.txt")
    status = second.wait_for_exit()
    first.send_signal(signal.SIGCONT)
    if status != _USER_ERROR or f"in use by process {first.pid}" not in second.read_log():
        raise second.make_error(f"ended with status {status} in a workdir that is in use")
    return f"status {_USER_ERROR}, the first continued", "it named the first one"


def _wrong_clock(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.training.kill()
    for path in run.workdir.rglob("*"):
        os.utime(path, (rng.uniform(0, 4e9),) * 2)  # files from 1970 to 2096
    where = run.restart(WRONG_CLOCK)
    newest = run.newest_step()
    run.training.wait_until(lambda: run.newest_step() > newest)
    return "resumed, continued and saved", where


# A fault receives the run with a living process and leaves one. It returns what the program did,
# for the table, and details.
FAULTS: dict[str, Callable[[FaultedRun, np.random.Generator], tuple[str, str]]] = {
    "kill -9": _kill,
    "kill -9 while starting": _kill_starting,
    "kill -9 while saving": _kill_saving,
    "SIGTERM": _sigterm,
    "SIGTERM while starting": _sigterm_starting,
    "torn checkpoint": _torn_checkpoint,
    "full disk": _full_disk,
    "full disk, kill -9": _full_disk_and_kill,
    "corrupt records": _corrupt_records,
    "second program": _second_program,
    "jumping clock": _wrong_clock,
    "data prepared anew": _data_prepared_anew,
    "permission removed": _no_permission,
    "failing disk": _failing_disk,
    "no inodes": _no_inodes,
    "closed pipes, SIGHUP": _closed_pipes,
}


def plan_faults(seed: int, count: int) -> list[tuple[str, int]]:
    """Draw `count` faults, each kind equally often.

    Returns:
      For each fault its kind, a key of `FAULTS`, and the step after which it happens.
    """
    rng = np.random.default_rng(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += rng.permutation(list(FAULTS)).tolist()
    steps = STEPS_PER_FAULT * np.arange(count) + rng.integers(1, STEPS_PER_FAULT, count)
    return list(zip(kinds[:count], steps.tolist(), strict=True))


def num_steps(count: int) -> int:
    """Return a number of training steps that leaves room for `count` faults."""
    return STEPS_PER_FAULT * (count + 5)


@dataclasses.dataclass(frozen=True)
class FaultRecord:
    """Describes a fault that happened.

    Attributes:
      kind: a key of `FAULTS`.
      step: the last step that the program had printed.
      outcome: what the program did.
      details: the circumstances.
    """

    kind: str
    step: int
    outcome: str
    details: str


def run_with_faults(
    fixture: TrainingFixture, disk: LimitedDisk, plan: list[tuple[str, int]], seed: int
) -> Iterator[FaultRecord]:
    """Train to the end under the faults of `plan`; yields a record after each of them.

    Raises:
      ChaosError: the program hung, ended with a wrong status, or did not start again.
    """
    run = FaultedRun(fixture, disk)
    try:
        for number, (kind, target) in enumerate(plan):
            run.wait_for_step(target)
            step = run.training.last_step()
            outcome, details = FAULTS[kind](run, np.random.default_rng([seed, number]))
            yield FaultRecord(kind, step, outcome, details)
        if run.training.wait_for_exit() != 0:
            raise run.exit_error()
    finally:
        run.training.kill()

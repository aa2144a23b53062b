"""A training under faults that a seed draws, restarted until it is done. See scripts/chaos.py.

Public: `FAULTS`, `FaultRecord`, `plan_faults`, `num_steps`, `run_with_faults`.

What is compared with an undisturbed run must have had the same batches. The videos that `trial`
damages are so in both runs: what takes their place must not depend on when the damage is found.
Further damage to stored records would be trained round as well, and so change the batches; it
therefore comes as more damaged videos than `data.max_broken_videos` allows, which must stop the
program before it trains on, and is mended before the next start.
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
from tests.chaos.trial import DAMAGED, SIZES, TrainingFixture, TrainingProcess

STEPS_PER_FAULT = 12
REFUSED = 2  # exit status of `command.user_errors`


class FaultedRun:
    """The disturbed run: one life after the other in one workdir."""

    def __init__(self, trial: TrainingFixture, disk: LimitedDisk):
        self.trial, self.disk = trial, disk
        self.workdir = disk.folder / "workdir"
        self.lives = 0
        self.life = self.start()

    def start(self, wrong_clock: bool = False) -> TrainingProcess:
        """Begin another life."""
        self.lives += 1
        self.life = self.trial.start(self.workdir, f"life{self.lives:03}.txt", wrong_clock)
        return self.life

    def reach(self, step: int) -> None:
        """Wait until `step` is done."""
        if not self.life.until(lambda: self.life.step() >= step):
            raise self.life.wrong(f"ended with status {self.life.process.returncode}")

    def recover(self, wrong_clock: bool = False) -> str:
        """Start again after a death, the same command; tells where it resumed."""
        life = self.start(wrong_clock)
        if not life.trains() and life.end() != 0:
            raise life.wrong(f"did not start again: status {life.process.returncode}")
        marks = [line for line in life.text().splitlines() if line.startswith("resumed from")]
        return f"resumed from step {marks[0].rsplit('/', 1)[1]}" if marks else "began again"

    def saved(self) -> list[int]:
        """Steps of the checkpoints that are there."""
        folders = (self.workdir / "checkpoints").glob("*")
        return sorted(int(path.name) for path in folders if path.name.isdigit())

    def half_written(self) -> list[pathlib.Path]:
        """Checkpoints that are being written, or were when the program died."""
        return list((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    def set_aside(self) -> int:
        """Number of checkpoints that were found damaged."""
        return len(list((self.workdir / "damaged_checkpoints").glob("*")))


def _kill(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    time.sleep(rng.uniform(0, 0.3))
    run.life.kill()
    return "resumed", run.recover()


def _kill_starting(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.kill()
    life = run.start()
    seconds = rng.uniform(0, 10)
    time.sleep(seconds)
    life.kill()
    return "resumed", f"after {seconds:.1f} s; {run.recover()}"


def _kill_saving(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    if not run.life.until(run.half_written, pause=0.001):
        raise run.life.wrong("saved nothing more")
    time.sleep(rng.uniform(0, 0.05))
    run.life.kill()
    left = [path.name.split(".")[0] for path in run.half_written()]
    where = f"checkpoint {left[0]} half written" if left else "it had just been finished"
    did = "resumed, half a checkpoint left unread" if left else "resumed"
    return did, f"{where}; {run.recover()}"


def _sigterm(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.trains()
    time.sleep(rng.uniform(0, 0.3))
    run.life.process.send_signal(signal.SIGTERM)
    if run.life.end() != EXIT_CODE:
        raise run.life.wrong(f"ended with status {run.life.process.returncode} on SIGTERM")
    newest = max(run.saved())
    where = run.recover()
    if where != f"resumed from step {newest}":
        raise run.life.wrong(f"had saved step {newest} on SIGTERM and {where}")
    return f"saved, status {EXIT_CODE}, resumed there", where


def _sigterm_starting(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.kill()
    life = run.start()
    seconds = rng.uniform(0, 10)
    time.sleep(seconds)
    life.process.send_signal(signal.SIGTERM)
    status = life.end()
    if status not in (EXIT_CODE, -signal.SIGTERM):
        raise life.wrong(f"ended with status {status} on SIGTERM")
    what = f"status {status}" if status > 0 else "ended by the signal"
    return f"{what}, resumed", f"after {seconds:.1f} s; {run.recover()}"


def _torn_checkpoint(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.until(run.saved)
    run.life.kill()
    newest = run.workdir / "checkpoints" / str(max(run.saved()))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    chances = sizes / sizes.sum() if rng.random() < 0.7 else None  # many small ones are not read
    path = files[rng.choice(len(files), p=chances)]
    how = ("cut", "flipped bit in", "removed")[rng.integers(3)]
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: rng.integers(len(content))])
    else:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
    before = run.set_aside()
    where = f"{how} {path.relative_to(newest.parent)}; {run.recover()}"
    if run.set_aside() > before:
        return "set aside, resumed from an older one", where
    return "not needed for restoring, resumed", where


def _full_disk(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.trains()
    with run.disk.full(run.life.process.pid):
        _wait_for_lost_checkpoint(run)
    return "warned, trained on", f"without the checkpoint; newest {max(run.saved(), default=0)}"


def _full_disk_and_death(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.trains()
    with run.disk.full(run.life.process.pid):
        _wait_for_lost_checkpoint(run)
        run.life.kill()
        life = run.start()
        run.disk.limit(life.process.pid)
        if life.trains():
            what = "trained on the full disk"
            life.kill()
        elif life.end() == REFUSED:
            what = f"status {REFUSED} on the full disk"
        else:
            raise life.wrong(f"ended with status {life.process.returncode} on a full disk")
    return f"{what}, then resumed", run.recover()


def _wait_for_lost_checkpoint(run: FaultedRun) -> None:
    told = run.life.text().count("could not be written")
    if not run.life.until(lambda: run.life.text().count("could not be written") > told):
        raise run.life.wrong(f"ended with status {run.life.process.returncode} on a full disk")


def _corrupt_records(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.kill()
    before = run.trial.shard.read_bytes()
    run.trial.damage_videos(i for i in range(SIZES["train"]) if i not in DAMAGED)
    life = run.start()
    status = life.end()
    run.trial.shard.write_bytes(before)
    if status != REFUSED or "training videos cannot be read" not in life.text():
        raise life.wrong(f"ended with status {status} on records that cannot be read")
    return f"status {REFUSED}, named the videos; resumed when mended", run.recover()


def _second_program(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.process.send_signal(signal.SIGSTOP)  # or it would be done before the other starts
    second = run.trial.start(run.workdir, f"second{run.lives:03}.txt")
    status = second.end()
    run.life.process.send_signal(signal.SIGCONT)
    if status != REFUSED or f"in use by process {run.life.process.pid}" not in second.text():
        raise second.wrong(f"ended with status {status} in a workdir that is in use")
    return f"status {REFUSED}, the first went on", "it named the first one"


def _wrong_clock(run: FaultedRun, rng: np.random.Generator) -> tuple[str, str]:
    run.life.kill()
    for path in run.workdir.rglob("*"):
        os.utime(path, (rng.uniform(0, 4e9),) * 2)  # files from 1970 to 2096
    where = run.recover(wrong_clock=True)
    newest = max(run.saved(), default=0)
    run.life.until(lambda: max(run.saved(), default=0) > newest)
    if "could not be written" in run.life.text():
        raise run.life.wrong("lost a checkpoint to the clock")
    return "resumed, trained on and saved", where


# A fault gets the run, alive, and leaves it alive. It returns what the program did, in words for
# the table, and details.
FAULTS: dict[str, Callable[[FaultedRun, np.random.Generator], tuple[str, str]]] = {
    "kill -9": _kill,
    "kill -9 while starting": _kill_starting,
    "kill -9 while saving": _kill_saving,
    "SIGTERM": _sigterm,
    "SIGTERM while starting": _sigterm_starting,
    "torn checkpoint": _torn_checkpoint,
    "full disk": _full_disk,
    "full disk, kill -9": _full_disk_and_death,
    "corrupt records": _corrupt_records,
    "second program": _second_program,
    "jumping clock": _wrong_clock,
}


def plan_faults(seed: int, count: int) -> list[tuple[str, int]]:
    """`count` faults: their kind, each as often as the others, and the step that they wait for."""
    rng = np.random.default_rng(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += rng.permutation(list(FAULTS)).tolist()
    steps = STEPS_PER_FAULT * np.arange(count) + rng.integers(1, STEPS_PER_FAULT, count)
    return list(zip(kinds[:count], steps.tolist(), strict=True))


def num_steps(count: int) -> int:
    """Steps that leave room for `count` faults."""
    return STEPS_PER_FAULT * (count + 5)


@dataclasses.dataclass(frozen=True)
class FaultRecord:
    """A fault that happened, at `step` by the program's own words, and what the program did."""

    kind: str
    step: int
    did: str
    details: str


def run_with_faults(
    trial: TrainingFixture, disk: LimitedDisk, plan: list[tuple[str, int]], seed: int
) -> Iterator[FaultRecord]:
    """Train to the end under the faults of `plan`; yields each when it is over.

    Raises:
      Chaos: the program hung, ended otherwise than it should, or did not start again.
    """
    run = FaultedRun(trial, disk)
    try:
        for number, (kind, target) in enumerate(plan):
            run.reach(target)
            step = run.life.step()
            did, details = FAULTS[kind](run, np.random.default_rng([seed, number]))
            yield FaultRecord(kind, step, did, details)
        if run.life.end() != 0:
            raise run.life.wrong(f"ended with status {run.life.process.returncode}")
    finally:
        run.life.kill()

"""Runs damaged files through the readers and counts what became of them.

Public: `fuzz_target`, `TargetReport`, `share_inputs`, `format_table`.

Each target reads in a process of its own. One that crashes or hangs is a finding like any other:
the next case goes to a new process.
"""

import collections
import dataclasses
import multiprocessing
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping

from dualpath_jax.runtime.progress_bar import ProgressBar
from tests.fuzz.sandbox import (
    ACCEPTED,
    FINDING,
    REFUSED,
    Outcome,
    Target,
    make_case,
    serve,
    write_case,
)

_START_SECONDS = 600.0  # for a process to import everything and read the seeds


@dataclasses.dataclass
class TargetReport:
    """What became of the inputs of one target; `findings` by the number of the input."""

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    findings: dict[int, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    reasons: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class _Reader:
    """The reading process of a target, and our end of its pipe. ValueError if a seed is refused."""

    def __init__(self, target: type[Target], work: pathlib.Path, seed: int):
        self._work, self._seconds = work, target.seconds
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, target, str(work), seed))
        self._process.start()
        theirs.close()
        answer = self._receive(_START_SECONDS)
        if answer != "ready":
            self.stop()
            raise ValueError(f"{target.__name__} does not read its own seeds: {answer}")

    def _receive(self, seconds: float):
        """The next message; a text that says what happened if there is none."""
        if not self._connection.poll(seconds):
            return f"hangs: no answer within {seconds:g} s"
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(30)
            log = (self._work / "log").read_text(errors="replace")[-2000:]
            return f"the reading process died (exit code {self._process.exitcode}):\n{log}"

    def give(self, first: int, end: int) -> None:
        """Hands it the cases first ... end - 1."""
        self._connection.send((first, end))

    def outcomes(self) -> list[Outcome] | str:
        """Of its next batch, or the text of how it failed."""
        return self._receive(self._seconds)

    def stop(self, grace: float = 0.0) -> None:
        """Ends the process, by force after `grace` seconds."""
        self._connection.close()  # which ends it, if it is well
        self._process.join(grace)
        self._process.kill()
        self._process.join()


def fuzz_target(
    name: str,
    target: type[Target],
    first: int,
    end: int,
    seed: int,
    kept: pathlib.Path,
) -> TargetReport:
    """Reads the cases first ... end - 1 of a target.

    Args:
      name: of the target.
      target: its class, which can be imported from where it is defined.
      first, end: which cases.
      seed: of the damages.
      kept: folder that gets the files of every finding, made when there is one.

    Raises:
      ValueError: the target refuses its own valid files.
    """
    row = TargetReport(name)
    began = time.monotonic()
    shown = ProgressBar(end - first, name, "inputs")
    with shown, tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        work = pathlib.Path(temporary) / name
        while first < end:
            reader = _Reader(target, work, seed)
            reader.give(first, end)
            while first < end:
                size = min(target.batch, end - first)
                answer = reader.outcomes()
                failed = isinstance(answer, str)
                outcomes = [Outcome(FINDING, answer)] * size if failed else answer
                for index, outcome in enumerate(outcomes, first):
                    _count(row, index, outcome)
                first += size
                shown.update(size)
                if failed:
                    break
            reader.stop(grace=0.0 if failed else 10.0)
        if row.findings:
            (work / "again").mkdir()
            _keep(row, target(work / "again"), seed, kept)
    row.seconds = time.monotonic() - began
    return row


def _count(row: TargetReport, index: int, outcome: Outcome) -> None:
    row.inputs += 1
    row.accepted += outcome.kind == ACCEPTED
    row.refused += outcome.kind == REFUSED
    if outcome.kind == REFUSED:
        row.reasons[outcome.text.partition(":")[0]] += 1
    if outcome.kind == FINDING:
        row.findings[index] = outcome.text


def _keep(row: TargetReport, target: Target, seed: int, kept: pathlib.Path) -> None:
    """Writes the files of each finding, what happened, and the command that does it again."""
    for index, text in row.findings.items():
        folder = kept / f"{row.target}-{seed}-{index}"
        shutil.rmtree(folder, ignore_errors=True)
        write_case(make_case(target, seed, index), folder / "files")
        command = f"python scripts/fuzz.py --targets {row.target} --seed={seed} --only={index}"
        (folder / "finding.txt").write_text(f"{command}\n\n{text}\n", errors="replace")


def share_inputs(inputs: int, shares: Mapping[str, float]) -> dict[str, int]:
    """How many of `inputs` each target gets, at least one."""
    total = sum(shares.values())
    counts = {name: max(1, int(inputs * share / total)) for name, share in shares.items()}
    largest = max(shares, key=shares.get)
    counts[largest] = max(1, counts[largest] + inputs - sum(counts.values()))
    return counts


def format_table(rows: list[TargetReport]) -> str:
    """The rows as a table in Markdown, with a last row of sums."""
    lines = ["| target | inputs | accepted | refused with a named error | findings | seconds |"]
    lines.append("|---|---|---|---|---|---|")
    total = TargetReport("total")
    for row in rows:
        total.inputs += row.inputs
        total.accepted += row.accepted
        total.refused += row.refused
        total.findings |= {(row.target, i): text for i, text in row.findings.items()}
        total.seconds += row.seconds
    for row in [*rows, total]:
        lines.append(
            f"| {row.target} | {row.inputs:,} | {row.accepted:,} | {row.refused:,} | "
            f"{len(row.findings)} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)

"""Runs damaged files through the readers and counts the outcomes.

Each target reads in its own process. A crash or a hang is a finding like any other: the next case
goes to a new process.
"""

import collections
import dataclasses
import math
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
    make_case_of_genome,
    serve,
    write_case,
)

_START_SECONDS = 600.0  # for a process to import everything and read the seeds


@dataclasses.dataclass
class TargetReport:
    """Counts the outcomes of the inputs of one target.

    Attributes:
      target: its name.
      inputs: number of inputs.
      accepted: number of inputs that were read.
      refused: number of inputs that were refused with a named error.
      findings: descriptions of wrong outcomes, by the number of the input or by its genome.
      seconds: time for all inputs.
      reasons: number of refusals by the first words of the error.
    """

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    findings: dict[int | str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    reasons: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class _Reader:
    """Runs the reading process of a target, and talks to it through a pipe.

    Raises:
      ValueError: the target refuses a seed.
    """

    def __init__(self, target: type[Target], work: pathlib.Path, seed: int):
        self._work, self._seconds = work, target.seconds
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self._connection, reader_end = context.Pipe()
        self._process = context.Process(target=serve, args=(reader_end, target, str(work), seed))
        self._process.start()
        reader_end.close()
        answer = self._receive(_START_SECONDS)
        if answer != "ready":
            self.stop()
            raise ValueError(f"{target.__name__} does not read its own seeds: {answer}")

    def _receive(self, seconds: float):
        """Return the next message, or the reason why there is none."""
        if not self._connection.poll(seconds):
            return f"hangs: no answer within {seconds:g} s"
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(30)
            log = (self._work / "log").read_text(errors="replace")[-2000:]
            return f"the reading process died (exit code {self._process.exitcode}):\n{log}"

    def send_cases(self, first: int, end: int) -> None:
        """Make the process read the cases first ... end - 1."""
        self._connection.send((first, end))

    def send_genome(self, genome: bytes) -> None:
        """Make the process read the case of a genome."""
        self._connection.send(genome)

    def receive_outcomes(self) -> list[Outcome] | str:
        """Return the outcomes of the next batch, or the reason why the process failed."""
        return self._receive(self._seconds)

    def stop(self, grace: float = 0.0) -> None:
        """End the process, by force after `grace` seconds."""
        self._connection.close()  # this ends the process, unless it hangs
        self._process.join(grace)
        self._process.kill()
        self._process.join()


def fuzz_target(
    name: str,
    target: type[Target],
    first: int,
    end: int,
    seed: int,
    findings_dir: pathlib.Path,
    seconds: float = math.inf,
) -> TargetReport:
    """Read the cases first ... end - 1 of a target, or those that there is time for.

    Args:
      name: name of the target.
      target: its class, which other processes can import.
      first: number of the first case.
      end: number after the last case.
      seed: random seed of the damages.
      findings_dir: folder for the files of every finding, created for the first one.
      seconds: after which no more cases are read.

    Raises:
      ValueError: the target refuses its own valid files.
    """
    report = TargetReport(name)
    start_time = time.monotonic()
    bar = ProgressBar(end - first, name, "inputs")
    with bar, tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        work = pathlib.Path(temporary) / name
        while first < end:
            reader = _Reader(target, work, seed)
            reader.send_cases(first, end)
            while first < end:
                size = min(target.batch, end - first)
                answer = reader.receive_outcomes()
                failed = isinstance(answer, str)
                outcomes = [Outcome(FINDING, answer)] * size if failed else answer
                for index, outcome in enumerate(outcomes, first):
                    count_outcome(report, index, outcome)
                first += size
                bar.update(size)
                if time.monotonic() - start_time >= seconds:
                    end = first
                if failed:
                    break
            reader.stop(grace=0.0 if failed else 10.0)
        if report.findings:
            (work / "again").mkdir()
            write_findings(report, target(work / "again"), seed, findings_dir)
    report.seconds = time.monotonic() - start_time
    return report


def read_genome(name: str, target: type[Target], genome: bytes) -> TargetReport:
    """Read the case of one genome again."""
    report = TargetReport(name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        reader = _Reader(target, pathlib.Path(temporary) / name, 0)
        reader.send_genome(genome)
        answer = reader.receive_outcomes()
        failed = isinstance(answer, str)
        (outcome,) = [Outcome(FINDING, answer)] if failed else answer
        count_outcome(report, genome.hex(), outcome)
        reader.stop(grace=0.0 if failed else 10.0)
    return report


def count_outcome(report: TargetReport, key: int | str, outcome: Outcome) -> None:
    """Add the outcome of the input with this number or genome to the report."""
    report.inputs += 1
    report.accepted += outcome.kind == ACCEPTED
    report.refused += outcome.kind == REFUSED
    if outcome.kind == REFUSED:
        report.reasons[outcome.text.partition(":")[0]] += 1
    if outcome.kind == FINDING:
        report.findings[key] = outcome.text


def write_findings(
    report: TargetReport, target: Target, seed: int, findings_dir: pathlib.Path
) -> None:
    """Write the files of each finding, its description, and the command that repeats it."""
    for key, text in report.findings.items():
        if isinstance(key, str):
            case, option = make_case_of_genome(target, bytes.fromhex(key)), f"--genome={key}"
        else:
            case, option = make_case(target, seed, key), f"--seed={seed} --only={key}"
        folder = findings_dir / f"{report.target}-{seed}-{key}"
        shutil.rmtree(folder, ignore_errors=True)
        write_case(case, folder / "files")
        command = f"python scripts/fuzz.py --targets {report.target} {option}"
        (folder / "finding.txt").write_text(f"{command}\n\n{text}\n", errors="replace")


def share_inputs(inputs: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide `inputs` among the targets in proportion to `shares`, at least one for each."""
    total = sum(shares.values())
    counts = {name: max(1, int(inputs * share / total)) for name, share in shares.items()}
    largest = max(shares, key=shares.get)
    counts[largest] = max(1, counts[largest] + inputs - sum(counts.values()))
    return counts


def format_table(reports: list[TargetReport]) -> str:
    """Return the reports as a table in Markdown, with a last row of sums."""
    lines = ["| target | inputs | accepted | refused with a named error | findings | seconds |"]
    lines.append("|---|---|---|---|---|---|")
    total = TargetReport("total")
    for report in reports:
        total.inputs += report.inputs
        total.accepted += report.accepted
        total.refused += report.refused
        total.findings |= {(report.target, i): text for i, text in report.findings.items()}
        total.seconds += report.seconds
    for report in [*reports, total]:
        lines.append(
            f"| {report.target} | {report.inputs:,} | {report.accepted:,} | {report.refused:,} | "
            f"{len(report.findings)} | {report.seconds:.0f} |"
        )
    return "\n".join(lines)

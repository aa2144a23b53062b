"""Lets libFuzzer (atheris) choose the damages by the code that they reach.

libFuzzer changes genomes, see `sandbox.make_case_of_genome`. It keeps those whose files reach new
code of `dualpath_jax`, and adds further damages to them. `explore_target` starts this module as a
process, because the package must be imported under atheris.
"""

import importlib
import json
import mmap
import pathlib
import struct
import subprocess
import sys
import tempfile
import time

from tests.fuzz import harness, sandbox

MAX_GENOME = 16  # bytes: a seed and seven damages
_COUNTS_FORMAT = "<QQQ"  # inputs, accepted, refused
# In the folder of the process.
_CORPUS = "corpus"  # genomes that reach new code
_COUNTS = "counts"
_FINDINGS = "findings.jsonl"  # one line for each kind of finding
_ARTIFACTS = "artifacts"  # the genome of a crash or a hang


def explore_target(
    name: str,
    target: type[sandbox.Target],
    inputs: int,
    seed: int,
    findings_dir: pathlib.Path,
    seconds: float,
) -> harness.TargetReport:
    """Read cases that libFuzzer chooses.

    Args:
      name: name of the target.
      target: its class, which other processes can import.
      inputs: number of cases.
      seed: of libFuzzer.
      findings_dir: folder for the files of every finding, created for the first one.
      seconds: after which no more cases are read; a second or less reads none.

    Raises:
      ValueError: the process ends without a finding and before its time.
    """
    report, start = harness.TargetReport(name), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        work = pathlib.Path(temporary)
        for folder in (_CORPUS, _ARTIFACTS, "own"):
            (work / folder).mkdir()
        own = target(work / "own")
        for index in range(len(own.seeds())):
            (work / _CORPUS / f"seed{index}").write_bytes(index.to_bytes(2, "little"))
        (work / _COUNTS).write_bytes(bytes(struct.calcsize(_COUNTS_FORMAT)))
        while report.inputs < inputs and time.monotonic() - start < seconds - 1:
            # Another seed after a crash, which would come again.
            own_seed = seed + len(report.findings)
            _run_process(report, target, work, own_seed, inputs - report.inputs, start + seconds)
        harness.write_findings(report, own, seed, findings_dir)
    report.seconds = time.monotonic() - start
    return report


def _run_process(
    report: harness.TargetReport,
    target: type[sandbox.Target],
    work: pathlib.Path,
    seed: int,
    inputs: int,
    end: float,
) -> None:
    """Run the reading process until it ends, and set what it found in `report`.

    Args:
      report, target, work, seed, inputs: see `explore_target`.
      end: `time.monotonic()` at which it ends.
    """
    reading = pathlib.Path(tempfile.mkdtemp(dir=work))
    options = {"module": target.__module__, "name": target.__qualname__, "work": str(work)}
    options |= {"reading": str(reading), "seed": seed, "inputs": inputs, "end": min(end, 1e9)}
    command = [sys.executable, "-m", __name__, json.dumps(options)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if not _add_results(report, work) and process.returncode:
        log = reading / "log"
        text = log.read_text(errors="replace") if log.exists() else ""
        raise ValueError(f"{report.target}: the process failed: {process.stderr}{text}")


def _add_results(report: harness.TargetReport, work: pathlib.Path) -> bool:
    """Set what the process wrote in `report`; return whether it crashed or hung."""
    counts = (work / _COUNTS).read_bytes()
    report.inputs, report.accepted, report.refused = struct.unpack(_COUNTS_FORMAT, counts)
    if (work / _FINDINGS).exists():
        for line in (work / _FINDINGS).read_text().splitlines():
            finding = json.loads(line)
            report.findings[finding["genome"]] = finding["text"]
    artifacts = list((work / _ARTIFACTS).iterdir())
    for artifact in artifacts:
        kind = artifact.name.partition("-")[0]  # crash or timeout
        report.findings[artifact.read_bytes().hex()] = f"the reading process ended: {kind}"
        artifact.unlink()
    return bool(artifacts)


def _serve(
    module: str, name: str, work: str, reading: str, seed: int, inputs: int, end: float
) -> None:
    """Read cases until the end, or so many of them; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["dualpath_jax"]):
        target = getattr(importlib.import_module(module), name)
    reader = sandbox.CaseReader(target, reading)
    if (answer := reader.read_seeds()) != "ready":
        sys.exit(f"it does not read its own seeds: {answer}")
    with open(pathlib.Path(work) / _COUNTS, "r+b") as file:
        memory = mmap.mmap(file.fileno(), struct.calcsize(_COUNTS_FORMAT))
    known = set()

    def read(genome: bytes) -> None:
        (outcome,) = reader.read([sandbox.make_case_of_genome(reader.target, genome)])
        read_before, accepted, refused = struct.unpack(_COUNTS_FORMAT, memory)
        accepted += outcome.kind == sandbox.ACCEPTED
        refused += outcome.kind == sandbox.REFUSED
        memory[:] = struct.pack(_COUNTS_FORMAT, read_before + 1, accepted, refused)
        if outcome.kind == sandbox.FINDING and outcome.text[-300:] not in known:
            known.add(outcome.text[-300:])
            with open(pathlib.Path(work) / _FINDINGS, "a") as file:
                file.write(json.dumps({"genome": genome.hex(), "text": outcome.text}) + "\n")

    options = [
        f"-seed={seed + 1}",  # libFuzzer takes 0 for a random one
        f"-runs={inputs}",
        f"-max_total_time={max(1, int(end - time.monotonic()))}",
        f"-max_len={MAX_GENOME}",
        f"-timeout={reader.target.seconds:.0f}",
        "-rss_limit_mb=0",  # the reader limits its address space
        f"-artifact_prefix={work}/{_ARTIFACTS}/",
        f"{work}/{_CORPUS}",
    ]
    atheris.Setup([sys.argv[0], *options], read)
    atheris.Fuzz()


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))

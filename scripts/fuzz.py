"""Reads damaged annotations, weights, prepared data and videos, and reports misbehaving readers.

    python scripts/fuzz.py --inputs=20000
    python scripts/fuzz.py --guided --minutes=60

Each input is a valid file with damages drawn from --seed, or with damages that reach new code of
the package (--guided). It must be read, or refused with a named
error (ValueError, OSError; for a video, an entry in bad_videos.jsonl). Another exception, a crash,
a hang, too much memory, a file changed outside the output folder, or executed code is a finding:
its files are saved in --findings, with the command that repeats it.

Exit status: 0 no findings; 1 findings; 2 an error.
"""

import argparse
import importlib.util
import math
import os
import pathlib
import sys

# The reading processes import this file again, so `main` must stay guarded.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dualpath_jax.runtime.environment import quiet_tensorflow  # noqa: E402

quiet_tensorflow()

from dualpath_jax.cli import build_parser, positive  # noqa: E402
from dualpath_jax.runtime import console, progress_bar  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = build_parser(__doc__)
    add = made.add_argument
    add(
        "--inputs",
        type=positive(int),
        default=20_000,
        help="total number of inputs (20000)",
    )
    add(
        "--minutes",
        type=positive(float),
        help="end after this time, divided among the targets like the inputs (all inputs)",
    )
    add("--seed", type=int, default=0, help="random seed of the damages (0)")
    add("--targets", nargs="+", metavar="NAME", help="only these targets (all)")
    add(
        "--only",
        type=int,
        metavar="NUMBER",
        help="only this input of one target, as named by a finding",
    )
    add(
        "--guided",
        action="store_true",
        help="choose damages by the code that they reach; needs `pip install atheris` (at random)",
    )
    add("--genome", metavar="HEX", help="only this input of one target, as named by a finding")
    add("--findings", default="runs/fuzz", metavar="DIR", help="folder for findings (runs/fuzz)")
    progress_bar.add_quiet_option(made)
    return made


def fuzz(arguments: argparse.Namespace) -> bool:
    """Read the inputs and print the table; return whether there are no findings."""
    from tests.fuzz import guided, harness
    from tests.fuzz.targets import SHARES, TARGETS

    names = arguments.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise ValueError(f"unknown target {unknown[0]!r}: known are {', '.join(TARGETS)}")
    if (arguments.only is not None or arguments.genome is not None) and len(names) != 1:
        raise ValueError("--only and --genome need one target, --targets NAME")
    if arguments.guided and importlib.util.find_spec("atheris") is None:
        raise ValueError("--guided needs atheris: pip install atheris")
    if "torch" in names and importlib.util.find_spec("torch") is None:
        print("note: torch is not installed; its files are left out", file=sys.stderr)
        names = [name for name in names if name != "torch"]
    findings_dir, reports = pathlib.Path(arguments.findings), []
    counts = harness.share_inputs(arguments.inputs, {name: SHARES[name] for name in names})
    for name, count in counts.items():
        target, seconds = TARGETS[name], math.inf
        if arguments.minutes is not None:
            seconds = 60 * arguments.minutes * SHARES[name] / sum(SHARES[n] for n in counts)
        if arguments.genome is not None:
            report = harness.read_genome(name, target, bytes.fromhex(arguments.genome))
        elif arguments.guided:
            report = guided.explore_target(
                name, target, count, arguments.seed, findings_dir, seconds
            )
        else:
            only = arguments.only
            first, end = (0, count) if only is None else (only, only + 1)
            report = harness.fuzz_target(
                name, target, first, end, arguments.seed, findings_dir, seconds
            )
        reports.append(report)
        print(f"{name}: {report.inputs} inputs, {len(report.findings)} findings", file=sys.stderr)
        for index, text in list(report.findings.items())[:5]:
            print(f"input {index}: {text}", file=sys.stderr)
    print(harness.format_table(reports))
    num_findings = sum(len(report.findings) for report in reports)
    if num_findings:
        print(f"{num_findings} findings; their files are in {findings_dir}")
    return not num_findings


def main() -> None:
    """Run the command line."""
    arguments = parser().parse_args()
    progress_bar.set_quiet(arguments.quiet)
    try:
        sys.exit(0 if fuzz(arguments) else 1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    console.run(main)

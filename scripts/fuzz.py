"""Reads damaged annotations, weights, prepared data and videos, and tells what ends badly.

    python scripts/fuzz.py --inputs=20000

Each input is a valid file with damages drawn from --seed. It must be read, or refused with an error
that says so (ValueError, OSError; of a video, an entry in the ledger). Another exception, a crash,
a hang, too much memory, a file changed outside the output folder, or code run is a finding: its
files are kept in --findings with the command that does it again.

Exit status: 0 nothing found; 1 findings; 2 an error.
"""

import argparse
import importlib.util
import os
import pathlib
import sys

# Reading processes import this file again: keep its main guarded.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from dualpath_jax.cli import build_parser, positive  # noqa: E402
from dualpath_jax.runtime import progress_bar  # noqa: E402


def parser() -> argparse.ArgumentParser:
    made = build_parser(__doc__)
    add = made.add_argument
    add(
        "--inputs",
        type=positive(int),
        default=20_000,
        help="number of inputs of all targets together (20000)",
    )
    add("--seed", type=int, default=0, help="of the damages (0)")
    add("--targets", nargs="+", metavar="NAME", help="these alone (all)")
    add("--only", type=int, metavar="NUMBER", help="one input of one target, as a finding names it")
    add("--findings", default="runs/fuzz", metavar="DIR", help="where findings go (runs/fuzz)")
    progress_bar.add_quiet_option(made)
    return made


def fuzz(arguments: argparse.Namespace) -> bool:
    """Prints the table; is all well?"""
    from tests.fuzz import harness
    from tests.fuzz.targets import SHARES, TARGETS

    names = arguments.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise ValueError(f"unknown target {unknown[0]!r}: known are {', '.join(TARGETS)}")
    if arguments.only is not None and len(names) != 1:
        raise ValueError("--only needs one target, --targets NAME")
    if "torch" in names and importlib.util.find_spec("torch") is None:
        print("note: torch is not installed, its files are left out", file=sys.stderr)
        names = [name for name in names if name != "torch"]
    kept, rows = pathlib.Path(arguments.findings), []
    counts = harness.share_inputs(arguments.inputs, {name: SHARES[name] for name in names})
    for name, count in counts.items():
        first, end = (0, count) if arguments.only is None else (arguments.only, arguments.only + 1)
        row = harness.fuzz_target(name, TARGETS[name], first, end, arguments.seed, kept)
        rows.append(row)
        print(f"{name}: {row.inputs} inputs, {len(row.findings)} findings", file=sys.stderr)
        for index, text in list(row.findings.items())[:5]:
            print(f"input {index}: {text}", file=sys.stderr)
    print(harness.format_table(rows))
    if found := sum(len(row.findings) for row in rows):
        print(f"{found} findings, their files are in {kept}")
    return not found


def main() -> None:
    arguments = parser().parse_args()
    progress_bar.set_quiet(arguments.quiet)
    try:
        sys.exit(0 if fuzz(arguments) else 1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

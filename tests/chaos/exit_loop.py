"""Ends trainings by an error many times, with empty caches, two at a time; exits must be clean.

    python -m tests.chaos.exit_loop --runs=50

A learning rate that is far too high makes the loss NaN. The program must then end with its message
and status 2, and never abort because a thread of TensorFlow is still running. The fault that this
loop looks for is a matter of timing, so that one run proves little.

Exit status: 0 if every run ended with status 2; 1 otherwise.
"""

import argparse
import collections
import pathlib
import shutil
import tempfile
from concurrent import futures

from dualpath_jax.cli import build_parser, positive
from dualpath_jax.runtime import console
from tests.chaos.training_fixture import TrainingFixture

_AT_A_TIME = 2
_MESSAGE = "error: loss is "


def end_by_error(fixture: TrainingFixture, number: int) -> str:
    """Run a training with an empty cache until its error; return "clean", or what was wrong."""
    folder = fixture.folder / f"run{number:03}"
    training = fixture.start(
        folder / "workdir",
        f"run{number:03}.txt",
        settings={"optimizer.learning_rate": 1e30},
        cache=folder / "compiled",
    )
    status = training.wait_for_exit()
    shutil.rmtree(folder)
    if status == 2 and _MESSAGE in training.read_log():
        return "clean"
    return f"status {status}: {training.read_log().splitlines()[-1:]}"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument("--runs", type=positive(int), default=50, help="number of runs (50)")
    return arg_parser


def main() -> int:
    """Run the command line; return the exit status."""
    runs = parser().parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        fixture = TrainingFixture(pathlib.Path(name), num_steps=20)
        fixture.make_inputs()
        with futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
            counts = collections.Counter()
            for outcome in pool.map(lambda i: end_by_error(fixture, i), range(runs)):
                counts[outcome] += 1
                print(f"{counts.total()}/{runs}  {outcome}", flush=True)
    print(f"{runs - counts['clean']} of {runs} exits were not clean")
    return 0 if counts["clean"] == runs else 1


if __name__ == "__main__":
    console.run(main)

"""Trains under faults, restarts until it is done, and compares with an undisturbed run.

    python scripts/chaos.py --minutes=2.5

It renders a small demo set and trains the program on it twice: once undisturbed, and once under
kill -9, SIGTERM, SIGHUP, torn and unreadable checkpoints, a full disk, corrupt and replaced
records, a second program in its workdir, broken pipes, and a jumping clock. A seed draws the time
and kind of each fault. Trainable parameters, optimizer state, metrics and results of both runs must
be equal bit for bit.

Exit status: 0 equal; 1 otherwise.
"""

import argparse
import collections
import os
import pathlib
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser  # noqa: E402
from dualpath_jax.runtime import console  # noqa: E402

_FAULTS_PER_MINUTE = 4  # approximately


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = build_parser(__doc__)
    add = made.add_argument
    add(
        "--minutes",
        type=float,
        default=2.5,
        help="approximate time on an idle machine with two cores (2.5)",
    )
    add("--faults", type=int, help="number of faults, instead of --minutes")
    add("--seed", type=int, default=0, help="random seed of the faults (0)")
    add("--workdir", help="new folder for inputs, runs and logs (a temporary one)")
    add("--no_mount", action="store_true", help="do not mount a tmpfs; limit file sizes instead")
    return made


def main() -> int:
    """Run the command line; return the exit status."""
    arguments = parser().parse_args()
    from dualpath_jax.runtime.environment import quiet_tensorflow

    quiet_tensorflow()
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleans up on SIGTERM
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup; the program would inherit it
        signal.signal(signal.SIGHUP, lambda *_: None)
    if arguments.workdir:
        pathlib.Path(arguments.workdir).mkdir(parents=True)
        return run_chaos(arguments, pathlib.Path(arguments.workdir).resolve())
    with tempfile.TemporaryDirectory() as folder:
        return run_chaos(arguments, pathlib.Path(folder))


def run_chaos(arguments: argparse.Namespace, folder: pathlib.Path) -> int:
    """Make both runs and compare them; return the exit status."""
    from tests.chaos import chaos, full_disk, same_run
    from tests.chaos.training_fixture import ChaosError, TrainingFixture

    start_time = time.monotonic()
    count = arguments.faults or round(_FAULTS_PER_MINUTE * arguments.minutes)
    plan = chaos.plan_faults(arguments.seed, count)
    fixture = TrainingFixture(folder, chaos.num_steps(count))
    fixture.make_inputs()
    undisturbed = fixture.start(folder / "undisturbed", "undisturbed.txt")
    if undisturbed.wait_for_exit() != 0:
        raise SystemExit(str(undisturbed.make_error("failed without any fault")))
    seconds = time.monotonic() - start_time
    print(f"undisturbed: {fixture.num_steps} steps ({seconds:.0f} s with the inputs)", flush=True)
    records = []
    with full_disk.LimitedDisk(folder / "disturbed", not arguments.no_mount) as disk:
        if not disk.mounted:
            print("no tmpfs is mounted; a limit on file sizes replaces the full disk")
        try:
            for record in chaos.run_with_faults(fixture, disk, plan, arguments.seed):
                records.append(record)
                text = f"{record.kind}: {record.outcome} ({record.details})"
                print(f"{len(records)}/{count}  step {record.step}  {text}", flush=True)
            differences = same_run.find_run_differences(
                folder / "undisturbed", disk.folder / "workdir"
            )
        except ChaosError as error:
            differences = [str(error)]
    print_table(records)
    seconds = time.monotonic() - start_time
    print(f"{len(records)} faults, {fixture.num_steps} steps, {seconds:.0f} s")
    print("\n".join(differences[:20]) or "bit for bit equal to the undisturbed run")
    return 1 if differences else 0


def print_table(records: list) -> None:
    """Print how often each kind of fault happened, and what the program did."""
    counts = collections.Counter((record.kind, record.outcome) for record in records)
    print("| fault | number | what the program did |\n|---|---|---|")
    for (kind, outcome), number in sorted(counts.items()):
        print(f"| {kind} | {number} | {outcome} |")


if __name__ == "__main__":
    console.run(main)

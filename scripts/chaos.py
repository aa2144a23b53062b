"""Trains under faults, restarts until it is done, and compares with an undisturbed run.

    python scripts/chaos.py --minutes=2.5

A small demo set is rendered; the program is trained on it once in peace, and once under kill -9,
SIGTERM, torn checkpoints, a full disk, corrupt records, a second program in its workdir, and a
jumping clock. A seed draws which fault comes when. Trainables, optimizer state, metrics and results
of both must be equal bit for bit: exit status 0, otherwise 1.
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

FAULTS_PER_MINUTE = 4  # about, on two idle cores


def parser() -> argparse.ArgumentParser:
    made = build_parser(__doc__)
    add = made.add_argument
    add(
        "--minutes",
        type=float,
        default=2.5,
        help="about how long, on an idle machine (2.5)",
    )
    add("--faults", type=int, help="how many, instead")
    add("--seed", type=int, default=0, help="of the plan (0)")
    add("--workdir", help="new folder for inputs, runs and logs; default: one that is removed")
    add("--no_mount", action="store_true", help="never mount a tmpfs: limit file sizes instead")
    return made


def main() -> int:
    arguments = parser().parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is cleaned up
    if arguments.workdir:
        pathlib.Path(arguments.workdir).mkdir(parents=True)
        return run_chaos(arguments, pathlib.Path(arguments.workdir).resolve())
    with tempfile.TemporaryDirectory() as folder:
        return run_chaos(arguments, pathlib.Path(folder))


def run_chaos(arguments: argparse.Namespace, folder: pathlib.Path) -> int:
    """Both runs and their comparison; exit status."""
    from tests.chaos import chaos, full_disk, same_run
    from tests.chaos.trial import ChaosError, TrainingFixture

    begin = time.monotonic()
    count = arguments.faults or round(FAULTS_PER_MINUTE * arguments.minutes)
    plan = chaos.plan_faults(arguments.seed, count)
    trial = TrainingFixture(folder, chaos.num_steps(count))
    trial.make_inputs()
    calm = trial.start(folder / "undisturbed", "undisturbed.txt")
    if calm.end() != 0:
        raise SystemExit(str(calm.wrong("failed without any fault")))
    seconds = time.monotonic() - begin
    print(f"undisturbed: {trial.num_steps} steps ({seconds:.0f} s with the inputs)", flush=True)
    struck = []
    with full_disk.LimitedDisk(folder / "disturbed", not arguments.no_mount) as disk:
        if not disk.mounted:
            print("no tmpfs is mounted: a limit on file sizes stands in for the full disk")
        try:
            for fault in chaos.run_with_faults(trial, disk, plan, arguments.seed):
                struck.append(fault)
                told = f"{fault.kind}: {fault.did} ({fault.details})"
                print(f"{len(struck)}/{count}  step {fault.step}  {told}", flush=True)
            differing = same_run.find_run_differences(
                folder / "undisturbed", disk.folder / "workdir"
            )
        except ChaosError as error:
            differing = [str(error)]
    print_table(struck)
    print(f"{len(struck)} faults, {trial.num_steps} steps, {time.monotonic() - begin:.0f} s")
    print("\n".join(differing[:20]) if differing else "bit for bit equal to the undisturbed run")
    return 1 if differing else 0


def print_table(struck: list) -> None:
    """How often each kind of fault happened, and what the program did."""
    counts = collections.Counter((fault.kind, fault.did) for fault in struck)
    print("| fault | number | what the program did |\n|---|---|---|")
    for (kind, did), number in sorted(counts.items()):
        print(f"| {kind} | {number} | {did} |")


if __name__ == "__main__":
    sys.exit(main())

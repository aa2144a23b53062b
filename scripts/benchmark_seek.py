"""How much longer the first training batch takes when a run begins at a far step.

    python scripts/benchmark_seek.py --prepared=data/demo

Times, in turns, the first batch of a pipeline that begins at step 0, 1, 2, ... and of one that
begins so much later (--step); prints the medians and the median of the ratios.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive  # noqa: E402


def parser() -> argparse.ArgumentParser:
    made = build_parser(__doc__)
    add = made.add_argument
    add("--prepared", required=True, help="folder that scripts/prepare_dataset.py wrote")
    add("--split", default="train", help="split of it (train)")
    add("--step", type=int, default=1_000_000, help="the far step (1,000,000)")
    add("--frames", type=positive(int), default=16, help="frames per clip (16)")
    add("--batch_size", type=positive(int), default=16, help="clips per batch (16)")
    add("--rounds", type=positive(int), default=31, help="times each is measured (31)")
    return made


def seconds_to_first_batch(dataset, data, step: int) -> float:
    """Of a pipeline made for this, which makes no batch but this one."""
    from dualpath_jax.data import pipeline

    begin = time.perf_counter()
    next(pipeline.train_batches(dataset, data, 0, step, step + 1))
    return time.perf_counter() - begin


def compare(dataset, data, far: int, rounds: int) -> tuple[float, float, float]:
    """(median seconds near, median seconds far, median of far / near within a round)."""
    pairs = []
    seconds_to_first_batch(dataset, data, 0)  # starts threads, reads files into memory
    for number in range(rounds):
        steps = [number, far + number]
        order = steps if number % 2 == 0 else steps[::-1]
        taken = {step: seconds_to_first_batch(dataset, data, step) for step in order}
        pairs.append([taken[step] for step in steps])
    near, later = zip(*pairs, strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(near), statistics.median(later), ratio


def main() -> None:
    arguments = parser().parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from benchmark_pipeline import benchmark_data

    from dualpath_jax.data.video_dataset import VideoDataset

    try:
        dataset = VideoDataset(arguments.prepared, arguments.split)
        data = benchmark_data(arguments.frames, arguments.batch_size)
        data.flip = False  # classes may be called left and right
        near, far, ratio = compare(dataset, data, arguments.step, arguments.rounds)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"first batch at step 0: {near:.3f} s, at step {arguments.step:,}: {far:.3f} s, ratio "
        f"{ratio:.2f} (medians of {arguments.rounds} rounds)"
    )


if __name__ == "__main__":
    main()

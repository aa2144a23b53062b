"""Measures how much longer the first training batch takes if a run begins at a late step.

    python scripts/benchmark_seek.py --prepared=data/demo

Times in turns the first batch of a pipeline that begins at step 0, 1, 2, ... and of one that begins
--step steps later. Prints the medians and the median of the ratios.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive  # noqa: E402
from dualpath_jax.runtime import console  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = build_parser(__doc__)
    add = result.add_argument
    add("--prepared", required=True, help="folder that scripts/prepare_dataset.py wrote")
    add("--split", default="train", help="split of the prepared data (train)")
    add("--step", type=int, default=1_000_000, help="late step to compare with step 0 (1,000,000)")
    add("--frames", type=positive(int), default=16, help="frames per clip (16)")
    add("--batch_size", type=positive(int), default=16, help="clips per batch (16)")
    add("--rounds", type=positive(int), default=31, help="measurements of each step (31)")
    return result


def measure_first_batch(dataset, data_config, step: int) -> float:
    """Return the seconds in which a new pipeline that begins at `step` makes its only batch."""
    from dualpath_jax.data import pipeline

    begin = time.perf_counter()
    next(pipeline.train_batches(dataset, data_config, 0, step, step + 1))
    return time.perf_counter() - begin


def compare_start_steps(
    dataset, data_config, late_step: int, rounds: int
) -> tuple[float, float, float]:
    """Time the first batch of early and late steps in turns.

    Returns:
      (median seconds early, median seconds late, median of the ratio late / early within a round).
    """
    pairs = []
    measure_first_batch(dataset, data_config, 0)  # starts threads, reads files into memory
    for number in range(rounds):
        steps = [number, late_step + number]
        order = steps if number % 2 == 0 else steps[::-1]
        seconds = {step: measure_first_batch(dataset, data_config, step) for step in order}
        pairs.append([seconds[step] for step in steps])
    early, late = zip(*pairs, strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(early), statistics.median(late), ratio


def main() -> None:
    arguments = parser().parse_args()
    from dualpath_jax.runtime.environment import quiet_tensorflow

    quiet_tensorflow()
    from benchmark_pipeline import make_data_config

    from dualpath_jax.data.video_dataset import VideoDataset

    try:
        dataset = VideoDataset(arguments.prepared, arguments.split)
        data_config = make_data_config(arguments.frames, arguments.batch_size)
        data_config.flip = False  # class names may contain left and right
        early, late, ratio = compare_start_steps(
            dataset, data_config, arguments.step, arguments.rounds
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"first batch at step 0: {early:.3f} s, at step {arguments.step:,}: {late:.3f} s, ratio "
        f"{ratio:.2f} (medians of {arguments.rounds} rounds)"
    )


if __name__ == "__main__":
    console.run(main)

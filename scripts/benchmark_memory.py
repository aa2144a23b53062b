"""Reads a small prepared data set in a loop and checks that resident memory stays flat.

    python scripts/benchmark_memory.py --videos=FOLDER
    python scripts/benchmark_memory.py --prepared=data/mine --split=validation --mode=test

Prints a sample of resident memory every --interval seconds. The exit code is 1 if a sample after
the first minutes (--warm_up) differs from the median of these samples by more than 5%.
"""

import argparse
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive  # noqa: E402
from dualpath_jax.runtime import console  # noqa: E402

WARM_UP = 2.0  # minutes
MAX_DEVIATION = 0.05  # from the median, as a fraction


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = build_parser(__doc__)
    add = result.add_argument
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", nargs="+", help="folder of video files, or the files")
    source.add_argument("--prepared", help="folder that scripts/prepare_dataset.py wrote")
    add("--split", default="train", help="split of --prepared (train)")
    help_ = "batches to read (training)"
    add("--mode", default="training", choices=["training", "test"], help=help_)
    add("--frames", type=positive(int), default=16, help="frames per clip (16)")
    add("--batch_size", type=positive(int), default=16, help="clips per batch (16)")
    add("--minutes", type=float, default=30, help="minutes to read (30)")
    add("--interval", type=float, default=5, help="seconds between samples (5)")
    add(
        "--warm_up", type=float, default=WARM_UP, help=f"minutes that are not checked ({WARM_UP:g})"
    )
    return result


def main() -> None:
    arguments = parser().parse_args()
    from dualpath_jax.runtime.environment import quiet_tensorflow

    quiet_tensorflow()
    from benchmark_pipeline import find_video_files, make_data_config

    from dualpath_jax.data.video_dataset import VideoDataset
    from scripts.benchmarks import pipeline

    def report(minutes: float, mib: float, clips: int) -> None:
        print(f"{minutes:6.2f} min  {mib:8.1f} MiB  {clips} clips", flush=True)

    data_config = make_data_config(arguments.frames, arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if arguments.prepared:
                dataset = VideoDataset(arguments.prepared, arguments.split)
            else:
                dataset = pipeline.prepare_files(find_video_files(arguments.videos), folder)
            samples = pipeline.sample_memory(
                *(dataset, data_config, arguments.mode == "training"),
                *(arguments.minutes, arguments.interval, report),
            )
            median, deviation = pipeline.memory_deviation(samples, arguments.warm_up)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    flat = deviation <= MAX_DEVIATION
    print(
        f"after {arguments.warm_up:g} minutes: median {median:.1f} MiB, largest deviation "
        f"{deviation:.1%}, allowed {MAX_DEVIATION:.0%}: {'flat' if flat else 'NOT FLAT'}"
    )
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    console.run(main)

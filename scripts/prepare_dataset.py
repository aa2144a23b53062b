"""Checks and decodes videos once and stores their frames for training.

    python scripts/prepare_dataset.py --dataset=ssv2 --videos=DIR --annotations=DIR --out=OUT

A run that was stopped goes on with the same command. Videos that cannot be used are listed with the
reason in OUT/bad_videos.jsonl; the last lines printed say how many were listed, found and stored.
"""

import argparse
import pathlib
import sys

# Worker processes import this file again: keep its imports light and its main guarded.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.data.datasets import DATASETS, list_videos  # noqa: E402
from dualpath_jax.data.decode import DecodeLimits  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    limits = DecodeLimits()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=list(DATASETS), help="kind of data set")
    add("--videos", required=True, metavar="DIR", help="folder of the video files")
    add("--annotations", metavar="PATH", help="folder or file of the annotations, as downloaded")
    add("--out", required=True, metavar="OUT", help="folder to write")
    add("--short_side", type=_positive(int), default=256, help="pixels of the shorter side (256)")
    add("--quality", type=_positive(int), default=90, help="JPEG quality (90)")
    add("--num_workers", type=_positive(int), help="decoding processes (one per core)")
    add("--max_missing", type=float, default=0.1, help="part of a split that may be missing (0.1)")
    add("--validation_fraction", type=float, default=0.2, help="if there is no validation split")
    add("--max_seconds", type=_positive(float), default=limits.seconds, help="time for one video")
    add(
        "--max_memory_mb",
        type=_positive(int),
        default=limits.memory_mb,
        help="memory for one video",
    )
    add("--max_pixels", type=_positive(int), default=limits.max_pixels, help="width x height")
    return parser.parse_args()


def _positive(kind: type):
    """An argparse type: a number above 0."""

    def number(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{value} is not positive")
        return value

    return number


def main() -> None:
    arguments = parse_arguments()
    limits = DecodeLimits(
        seconds=arguments.max_seconds,
        memory_mb=arguments.max_memory_mb,
        max_pixels=arguments.max_pixels,
    )
    try:
        listing = list_videos(
            arguments.dataset,
            arguments.videos,
            arguments.annotations,
            arguments.validation_fraction,
        )
        for notice in listing.notices:
            print(f"note: {notice}", file=sys.stderr)
        from dualpath_jax.data.prepare import prepare  # imports TensorFlow

        prepare(
            listing,
            arguments.videos,
            arguments.out,
            short_side=arguments.short_side,
            quality=arguments.quality,
            num_workers=arguments.num_workers,
            limits=limits,
            max_missing=arguments.max_missing,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""Checks and decodes videos once and stores their frames for training.

    python scripts/prepare_dataset.py --dataset=ssv2 --videos=DIR --annotations=DIR --out=OUT

A run that was stopped goes on with the same command. Videos that cannot be used are listed with the
reason in OUT/bad_videos.jsonl, those stored in part in OUT/truncated_videos.jsonl; the last lines
printed say how many were listed, found and stored. Where files were missing and are there now, or
limits were too tight, the same command with --retry_bad decodes the bad videos again.

With --check every video is decoded and nothing stored: bad and truncated videos are printed, a line
of JSON each, and the last lines say what would be stored and how many bytes it would take.

Exit status: 0 done; 1 only with --check: some videos are bad; 2 an error; 130 interrupted.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive  # noqa: E402
from dualpath_jax.data.datasets.registry import DATASETS, list_videos  # noqa: E402
from dualpath_jax.data.preparation.dry_run import check_videos  # noqa: E402
from dualpath_jax.data.preparation.video_decoder import DecodeLimits  # noqa: E402
from dualpath_jax.runtime import progress_bar  # noqa: E402


def parser() -> argparse.ArgumentParser:
    limits = DecodeLimits()
    made = build_parser(__doc__)
    add = made.add_argument
    add("--dataset", required=True, choices=list(DATASETS), help="kind of data set")
    add("--videos", required=True, metavar="DIR", help="folder of the video files")
    add("--annotations", metavar="PATH", help="folder or file of the annotations, as downloaded")
    add("--out", metavar="OUT", help="folder to write; not touched with --check")
    add("--check", action="store_true", help="decode everything, store nothing")
    add("--bad_videos", metavar="FILE", help="with --check: list them there, not on the terminal")
    add("--short_side", type=positive(int), default=256, help="pixels of the shorter side (256)")
    add("--quality", type=positive(int), default=90, help="JPEG quality, 1 to 95 (90)")
    add("--fps", type=positive(float), help="frames per second to store of faster videos (all)")
    add("--num_workers", type=positive(int), help="decoding processes (one per core)")
    help_ = "decode the bad videos of an earlier run again; limits may be others"
    add("--retry_bad", action="store_true", help=help_)
    add("--max_missing", type=float, default=0.1, help="part of a split that may be missing (0.1)")
    add(
        "--validation_fraction",
        type=float,
        default=0.2,
        help="part of each class, if there is no such split (0.2)",
    )
    for name, default, what in (
        ("seconds", limits.seconds, "seconds of decoding"),
        ("memory_mb", limits.memory_mb, "MiB of memory"),
        ("pixels", limits.max_pixels, "width x height, pixels"),
        ("frames", limits.max_frames, "frames to store"),
    ):
        help_ = f"most {what} for one video ({default:,})"
        add(f"--max_{name}", type=positive(type(default)), default=default, help=help_)
    progress_bar.add_quiet_option(made)
    return made


def parse_arguments() -> argparse.Namespace:
    arguments = parser().parse_args()
    if not arguments.out and not arguments.check:
        parser().error("--out is missing (or --check, which stores nothing)")
    if arguments.bad_videos and not arguments.check:
        parser().error("--bad_videos goes with --check; otherwise OUT/bad_videos.jsonl is the list")
    if arguments.retry_bad and arguments.check:
        parser().error("--retry_bad goes without --check, which decodes every video anyway")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    progress_bar.set_quiet(arguments.quiet)
    sys.stdout.reconfigure(errors="surrogateescape")  # file names may hold any bytes
    try:
        listing = list_videos(
            arguments.dataset,
            arguments.videos,
            arguments.annotations,
            arguments.validation_fraction,
        )
        for notice in listing.notices:
            print(f"note: {notice}", file=sys.stderr)
        options = {
            "short_side": arguments.short_side,
            "quality": arguments.quality,
            "fps": arguments.fps,
            "num_workers": arguments.num_workers,
            "limits": DecodeLimits(
                seconds=arguments.max_seconds,
                memory_mb=arguments.max_memory_mb,
                max_pixels=arguments.max_pixels,
                max_frames=arguments.max_frames,
            ),
            "max_missing": arguments.max_missing,
        }
        if arguments.check:
            options["bad_videos"] = arguments.bad_videos
            counts = check_videos(listing, arguments.videos, **options)
            sys.exit(1 if counts["total"].bad else 0)
        from dualpath_jax.data.preparation.prepare import prepare_dataset  # imports TensorFlow

        options["retry_bad"] = arguments.retry_bad
        prepare_dataset(listing, arguments.videos, arguments.out, **options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        again = "" if arguments.check else "; the same command goes on from here"
        print(f"stopped{again}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

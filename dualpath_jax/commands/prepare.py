"""Checks and decodes videos once and stores their frames for training.

    dualpath prepare --dataset=ssv2 --videos=DIR --annotations=DIR --out=OUT

The same command resumes an interrupted run. OUT/bad_videos.jsonl lists the videos that cannot be
used, with the reasons, and OUT/truncated_videos.jsonl those stored in part. The last lines printed
report how many videos were listed, found and stored. If missing files have arrived since, or limits
were too tight, the same command with --retry_bad decodes the bad videos again.

With --runner the shards are stored through Apache Beam, on this machine or on a cluster.

With --check every video is decoded and nothing is stored. Bad and truncated videos are printed, one
line of JSON each, and the last lines report what would be stored and how much disk it would take.

Exit status: 0 success, 1 some videos are bad (only with --check), 2 an error, 130 interrupted.

In a checkout, python scripts/prepare_dataset.py is the same command.
"""

import argparse
import sys

from dualpath_jax.cli import build_parser, positive
from dualpath_jax.data.datasets.class_folders import CLASS_LEVEL_HELP
from dualpath_jax.data.datasets.registry import DATASETS, list_videos
from dualpath_jax.data.datasets.validation_split import GroupBy
from dualpath_jax.data.preparation import beam_runner
from dualpath_jax.data.preparation.dry_run import check_videos
from dualpath_jax.data.preparation.video_decoder import DecodeLimits
from dualpath_jax.data.preparation.video_names import FRAME_RATE_HELP, check_frame_rate
from dualpath_jax.runtime import environment, progress_bar


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    limits = DecodeLimits()
    arg_parser = build_parser(__doc__)
    add = arg_parser.add_argument
    add("--dataset", required=True, choices=list(DATASETS), help="kind of data set")
    add("--videos", required=True, metavar="DIR", help="folder of the video files")
    add("--annotations", metavar="PATH", help="folder or file of the annotations, as downloaded")
    add("--out", metavar="OUT", help="folder to write; not needed with --check")
    add("--check", action="store_true", help="decode every video and store nothing")
    add(
        "--bad_videos",
        metavar="FILE",
        help="with --check: file for the list of bad videos, instead of printing it",
    )
    add("--short_side", type=positive(int), default=256, help="pixels of the shorter side (256)")
    add("--quality", type=positive(int), default=90, help="JPEG quality, 1 to 95 (90)")
    add("--fps", type=positive(float), help="store at most so many frames per second (all)")
    add("--frame_rate", type=positive(float), help=FRAME_RATE_HELP)
    add("--class_level", type=positive(int), default=1, help=CLASS_LEVEL_HELP)
    add("--num_workers", type=positive(int), help="number of decoding processes (one per core)")
    help_ = (
        "where shards are decoded and stored: by this program (local), or through Apache Beam, on "
        "this machine (direct) or a cluster; see docs/preparing.md (local)"
    )
    add("--runner", choices=beam_runner.RUNNERS, default=beam_runner.LOCAL, help=help_)
    help_ = "options of Beam, such as '--project=P --region=R', with a --runner other than local"
    add("--beam_options", metavar="OPTIONS", default="", help=help_)
    help_ = "decode the bad videos of an earlier run again; limits may differ from that run"
    add("--retry_bad", action="store_true", help=help_)
    help_ = "fraction of the videos of a split that may be missing, 0 to 1 (0.1)"
    add("--max_missing", type=float, default=0.1, help=help_)
    help_ = "fraction of each class for validation, if the annotations have no such split (0.2)"
    add("--validation_fraction", type=float, default=0.2, help=help_)
    help_ = (
        "how to recognize the videos of one recording, which stay together in train or validation. "
        "folder:LEVEL: their folders have the same name; level 1 holds the file, level 2 is the "
        "folder above. name:REGEX: in their file names without extension, the expression (or its "
        "first group) matches the same text; 'name:(.+)_' compares names up to the last "
        "underscore. column:NAME: they have the same entry in this column of the list, whose first "
        "line names path, label and NAME. (each video by itself)"
    )
    add("--group_by", metavar="folder:LEVEL|name:REGEX|column:NAME", help=help_)
    for name, default, what in (
        ("seconds", limits.seconds, "seconds of decoding"),
        ("memory_mb", limits.memory_mb, "MiB of memory"),
        ("pixels", limits.max_pixels, "pixels of a frame, width x height"),
        ("frames", limits.max_frames, "stored frames"),
    ):
        help_ = f"limit for one video: {what} ({default:,})"
        add(f"--max_{name}", type=positive(type(default)), default=default, help=help_)
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with status 2 if options contradict each other."""
    arg_parser = parser()
    arguments = arg_parser.parse_args()
    if not arguments.out and not arguments.check:
        arg_parser.error("--out is missing; only --check, which stores nothing, does not need it")
    if arguments.bad_videos and not arguments.check:
        arg_parser.error("--bad_videos needs --check; otherwise OUT/bad_videos.jsonl is the list")
    if arguments.retry_bad and arguments.check:
        arg_parser.error("--retry_bad excludes --check, which decodes every video anyway")
    if arguments.check and (arguments.runner != beam_runner.LOCAL or arguments.beam_options):
        arg_parser.error("--runner and --beam_options exclude --check, which stores no shards")
    return arguments


def main() -> None:
    """Check or prepare the videos that the command line names."""
    environment.configure_environment()
    arguments = parse_arguments()
    progress_bar.set_quiet(arguments.quiet)
    try:
        if problem := environment.find_memory_problem():
            raise ValueError(problem)
        index = list_videos(
            arguments.dataset,
            arguments.videos,
            arguments.annotations,
            arguments.validation_fraction,
            arguments.group_by and GroupBy.parse(arguments.group_by),
            arguments.class_level,
        )
        check_frame_rate(arguments.frame_rate, index.file_paths(arguments.videos))
        for notice in index.notices:
            print(f"note: {notice}", file=sys.stderr)
        options = {
            "short_side": arguments.short_side,
            "quality": arguments.quality,
            "fps": arguments.fps,
            "frame_rate": arguments.frame_rate,
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
            bad_videos = arguments.bad_videos
            counts = check_videos(index, arguments.videos, bad_videos=bad_videos, **options)
            sys.exit(1 if counts["total"].bad else 0)
        # Imported here, because it imports TensorFlow.
        from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset

        prepare_options = PrepareOptions(
            retry_bad=arguments.retry_bad,
            runner=arguments.runner,
            beam_options=arguments.beam_options,
            **options,
        )
        prepare_dataset(index, arguments.videos, arguments.out, prepare_options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        remedy = "" if arguments.check else "; run the same command again to resume"
        print(f"stopped{remedy}", file=sys.stderr)
        sys.exit(130)

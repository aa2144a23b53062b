"""Predicts the most probable classes of videos with a trained model.

    dualpath predict --workdir=runs/demo data/demo/raw/videos
    dualpath predict --adapter=mine.safetensors --backbone=clip.safetensors clip.mp4 --json
    dualpath predict --workdir=runs/demo --window=2 --stride=1 --pictures=DIR long.mp4

Each video is sampled, cropped and averaged over views as in evaluation. With --window a video is
cut into windows; each window is treated like a video and gets its own line. --pictures draws some
frames of each video above its most probable classes, or above their probabilities over time. An
unreadable video is reported, the others are still predicted, and the exit status is 1.

In a checkout, python scripts/predict.py is the same command.
"""

import argparse
import dataclasses
import json
import sys

from dualpath_jax import cli
from dualpath_jax.data.preparation.video_decoder import DecodeLimits
from dualpath_jax.data.preparation.video_names import FRAME_RATE_HELP, check_frame_rate
from dualpath_jax.runtime import console, environment


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = cli.build_parser(__doc__)
    add = arg_parser.add_argument
    cli.add_model_options(arg_parser)
    add("videos", nargs="+", help="video files, folders of images, or folders of such videos")
    add("--top_k", type=int, default=5, help="number of classes to print (5)")
    add("--window", type=float, help="length of a window of a long video, seconds (no windows)")
    add("--stride", type=float, help="seconds from one window to the next (half a window)")
    help_ = ".npz file for the logits of every view and, for dualpath, the features y_SP and y_TP"
    add("--features", help=help_)
    add("--pictures", metavar="DIR", help="folder for an image of each video, VIDEO.png")
    limits, positive = DecodeLimits(), cli.positive
    add("--frame_rate", type=positive(float), help=FRAME_RATE_HELP)
    for name, default, description in (
        ("seconds", limits.seconds, "seconds for decoding a video, or a window of one"),
        ("frames", limits.max_frames, "frames of a whole video"),
    ):
        help_ = f"maximum {description} ({default:,})"
        add(f"--max_{name}", type=positive(type(default)), default=default, help=help_)
    add("--json", action="store_true", help="print a line of JSON for each video or window")
    add("--quiet", action="store_true", help="show no progress, as without a terminal")
    return arg_parser


def main() -> None:
    """Predict the videos and print the results; exit with status 1 if some cannot be read."""
    environment.configure_environment()
    arguments = parser().parse_args()
    # If files are written too, the command continues when nobody reads its output any more.
    console.protect_streams(is_log=bool(arguments.features or arguments.pictures))
    with cli.user_errors():
        from dualpath_jax.inference import predict_files

        def print_result(result: predict_files.VideoResult) -> None:
            if arguments.json:
                print(json.dumps(dataclasses.asdict(result)), flush=True)
            else:
                print(predict_files.format_result(result), flush=True)

        videos = predict_files.find_videos(arguments.videos)
        check_frame_rate(arguments.frame_rate, videos)
        num_unreadable = predict_files.predict_videos(
            cli.load_model(arguments),
            videos,
            print_result,
            top_k=arguments.top_k,
            window=arguments.window,
            stride=arguments.stride,
            features=arguments.features,
            pictures=arguments.pictures,
            limits=DecodeLimits(seconds=arguments.max_seconds, max_frames=arguments.max_frames),
            frame_rate=arguments.frame_rate,
            progress=sys.stderr.isatty() and not arguments.quiet,
        )
    console.check_output()
    sys.exit(1 if num_unreadable else 0)

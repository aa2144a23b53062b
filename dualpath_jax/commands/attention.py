"""Draws heat maps of the class token's attention over videos.

    dualpath attention --workdir=runs/demo --out=attention VIDEO...

Writes DIR/<video>.png (frames, framesets, and the framesets' frames; without and with adaptation)
and DIR/<video>.gif (the clip with both paths' maps). The clip is the middle view of evaluation.

In a checkout, python scripts/visualize_attention.py is the same command.
"""

import argparse
import pathlib
import sys

from dualpath_jax.cli import add_backbone_option, build_parser, user_errors
from dualpath_jax.runtime import environment


def draw_videos(args: argparse.Namespace) -> int:
    """Write the images of each video; return the number of videos that cannot be read."""
    from dualpath_jax.analysis import attention_figures, image_grid
    from dualpath_jax.data.preparation.video_decoder import VideoError
    from dualpath_jax.inference import trained_model

    model = trained_model.load(args.workdir, backbone=args.backbone)
    folder, used_paths, num_unreadable = pathlib.Path(args.out), set(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for video in args.videos:
        try:
            clips = attention_figures.middle_view_clips(model.clips(video), model.config)
        except VideoError as error:
            print(f"error: {error}", file=sys.stderr)
            num_unreadable += 1
            continue
        view = attention_figures.analyze_clip(model, clips, args.rollout)
        path = image_grid.unused_path(folder, video, used_paths)
        kind = "rollout" if args.rollout else "last block"
        grid = attention_figures.draw_grid(view, f"{path.name}, {kind}")
        image_grid.write_png(f"{path}.png", grid)
        image_grid.write_gif(f"{path}.gif", attention_figures.draw_animation(view))
        print(f"wrote {path}.png and {path.name}.gif", flush=True)
    return num_unreadable


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    arg_parser.add_argument("--workdir", required=True, help="folder of the run, local or gs://")
    add_backbone_option(arg_parser)
    arg_parser.add_argument("--out", required=True, metavar="DIR", help="folder for the images")
    arg_parser.add_argument(
        "--rollout",
        action="store_true",
        help="draw attention rolled out over all blocks, not that of the last one",
    )
    return arg_parser


def main() -> None:
    """Draw the videos; exit with status 1 if some cannot be read."""
    environment.configure_environment()
    args = parser().parse_args()
    with user_errors():
        num_unreadable = draw_videos(args)
    sys.exit(1 if num_unreadable else 0)

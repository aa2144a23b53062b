"""Writes a training run as one HTML page: curves, scores, confusions, mistakes, settings.

    dualpath report --workdir=runs/demo --out=report.html
    dualpath report --workdir runs/demo runs/demo1 --out=comparison.html

The page is one file that loads nothing else. It lists what the run does not have yet, with the
command that creates it. Several runs are compared: curves in the same charts, scores in columns
next to each other, and the settings that differ.

In a checkout, python scripts/report.py is the same command.
"""

import argparse

from dualpath_jax import cli
from dualpath_jax.runtime import environment, files, progress_bar


def make_report(args: argparse.Namespace) -> None:
    """Read the runs, draw the page and write it."""
    if args.mistakes < 0:
        raise ValueError(f"--mistakes={args.mistakes} must be at least 0")
    files.check_output_file("--out", args.out)
    from absl import logging

    from dualpath_jax.data.preparation.summary import format_bytes
    from dualpath_jax.report import mistake_images, page, run_reader, statistics

    logging.set_verbosity(logging.ERROR)  # orbax warns that it only reads, which is intended
    runs = run_reader.read_runs(args.workdir)
    rows, strips = [], {}
    predictions = runs[0].predictions
    if len(runs) == 1 and predictions is not None:
        confidence = predictions.probabilities[:, 0]
        rows = statistics.confident_mistakes(confidence, predictions.correct, args.mistakes)
        ids = [predictions.ids[row] for row in rows]
        strips = mistake_images.mistake_strips(runs[0], ids, args.data_dir, args.backbone)
    html = page.render_page(runs, rows, strips)
    files.write_text(args.out, html)
    missing = sum(len(run.missing) for run in runs)
    note = f"; it lists what is missing ({missing})" if missing else ""
    print(f"wrote {args.out}, {format_bytes(len(html))}{note}", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = cli.build_parser(__doc__)
    add = arg_parser.add_argument
    add(
        "--workdir",
        nargs="+",
        required=True,
        help="workdir of a run, or of several runs to compare",
    )
    add("--out", required=True, metavar="FILE", help="HTML file to write, such as report.html")
    add("--mistakes", type=int, default=12, help="number of most confident mistakes to show (12)")
    add("--data_dir", help="folder of the prepared data, for images, if it was moved")
    add("--backbone", help="file of the converted backbone, for attention maps, if it was moved")
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def main() -> None:
    """Write the page of the runs that the command line names."""
    environment.configure_environment()
    args = parser().parse_args()
    progress_bar.set_quiet(args.quiet)
    with cli.user_errors():
        make_report(args)

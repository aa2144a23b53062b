"""A training run as one HTML page: curves, figures, confusions, mistakes, calibration, settings.

    python scripts/report.py --workdir=runs/demo --out=report.html
    python scripts/report.py --workdir runs/demo runs/demo1 --out=comparison.html

The page is one file that loads nothing. What the run does not have yet is named on it, with the
command that makes it. Several runs are compared: curves in one chart, figures side by side, and the
settings that differ.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax import cli
from dualpath_jax.runtime import environment, progress_bar


def make_report(args: argparse.Namespace) -> None:
    """Read, draw, write."""
    if args.mistakes < 0:
        raise ValueError(f"--mistakes={args.mistakes} must be at least 0")
    cli.check_output_file("--out", args.out)
    from absl import logging
    from etils import epath

    from dualpath_jax.data.preparation.summary import format_counts
    from dualpath_jax.report import mistake_images, page, run_reader, statistics
    from dualpath_jax.training.metrics_logger import write_text_atomically

    logging.set_verbosity(logging.ERROR)  # orbax warns of what is meant so: it only reads
    found = run_reader.read_runs(args.workdir)
    rows, pictures = [], {}
    predictions = found[0].predictions
    if len(found) == 1 and predictions is not None:
        confidence = predictions.probabilities[:, 0]
        rows = statistics.confident_mistakes(confidence, predictions.correct, args.mistakes)
        ids = [predictions.ids[row] for row in rows]
        pictures = mistake_images.mistake_strips(found[0], ids, args.data_dir, args.backbone)
    html = page.render_page(found, rows, pictures)
    write_text_atomically(epath.Path(args.out), html)
    missing = sum(len(run.missing) for run in found)
    told = f"; what is missing is named on it ({missing})" if missing else ""
    print(f"wrote {args.out}, {format_counts(len(html))}{told}", flush=True)


def parser() -> argparse.ArgumentParser:
    made = cli.build_parser(__doc__)
    add = made.add_argument
    add("--workdir", nargs="+", required=True, help="of a run; of several runs to compare them")
    add("--out", required=True, metavar="FILE", help="the page, such as report.html")
    add("--mistakes", type=int, default=12, help="most confident mistakes to show (12)")
    add("--data_dir", help="prepared data, if not where the run had them; for pictures")
    add("--backbone", help="converted backbone, if not where the run had it; for attention")
    progress_bar.add_quiet_option(made)
    return made


def main() -> None:
    args = parser().parse_args()
    progress_bar.set_quiet(args.quiet)
    with cli.user_errors():
        make_report(args)


if __name__ == "__main__":
    environment.configure_environment()
    main()

"""Counts parameters and multiply-accumulates of configurations, next to the paper's numbers.

    dualpath efficiency
    dualpath efficiency --config=ssv2_vitb:32 --json
    dualpath efficiency --figure=figure1.png

Without --config, all rows of the paper's tables are counted. Neither data nor weights are needed.

In a checkout, python scripts/efficiency.py is the same command.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from dualpath_jax.cli import build_parser, parse_with_overrides, user_errors
from dualpath_jax.config.loading import load_config
from dualpath_jax.runtime import environment, progress_bar


def build_row(name: str, overrides: Sequence[str] = ()) -> dict:
    """Count one configuration with overrides and return the counts and the paper's numbers."""
    from dualpath_jax.analysis import efficiency  # imports JAX

    counted = dataclasses.asdict(efficiency.measure_efficiency(load_config(name, overrides)))
    paper = efficiency.PAPER_ROWS.get(name)
    return {"config": name, **counted, "paper": dataclasses.asdict(paper) if paper else None}


def format_markdown(rows: list[dict]) -> str:
    """Format the rows as a Markdown table."""

    def format_paper_value(row, key, unit=""):
        """Return a number that the paper prints; "" if it prints none."""
        value = (row["paper"] or {}).get(key)
        return "" if value is None else f"{value:g}{unit}"

    lines = [
        "| config | trainable | `paper` | total | `paper` | GMAC per view, plain | executed "
        "| views | GMAC per video, plain | executed | GFLOPs, `paper` |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"`{row['config']}`",
            *(f"{row['trainable_params']:,}", format_paper_value(row, "trainable_params", "M")),
            *(f"{row['total_params']:,}", format_paper_value(row, "total_params", "M")),
            *(f"{row['plain_gmacs_per_view']:.1f}", f"{row['gmacs_per_view']:.1f}", row["views"]),
            *(f"{row['plain_gmacs_per_video']:.0f}", f"{row['gmacs_per_video']:.0f}"),
            format_paper_value(row, "gflops"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(rows: list[dict], path: str) -> None:
    """Draw Fig. 1: top-1 (paper) over trainable parameters (counted), area by GFLOPs (paper)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2, figsize=(13, 6.5), constrained_layout=True)
    for axis, data in zip(axes, ("K400", "SSv2"), strict=True):
        points = [row for row in rows if _belongs_in_figure(row, data)]
        points.sort(key=lambda row: -row["paper"]["top1"])
        for number, row in enumerate(points, start=1):
            paper, millions = row["paper"], row["trainable_params"] / 1e6
            label = f"{number}  {paper['label']}, {paper['gflops']:g} GFLOPs, {paper['top1']:g}"
            ours = paper["label"].startswith("DualPath")
            axis.scatter(
                *(millions, paper["top1"]),
                s=paper["gflops"] / 6,
                color="tab:red" if ours else "tab:blue",
                alpha=0.4,
                label=label,
            )
            side = 9 if number % 2 else -9
            axis.annotate(
                str(number),
                (millions, paper["top1"]),
                xytext=(side, 0),
                textcoords="offset points",
                fontsize=8,
                ha="center",
                va="center",
            )
        axis.set_xscale("log")
        ticks = (5, 10, 20, 50, 100, 200, 400)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(5, 450)
        axis.margins(y=0.15)
        axis.set_xlabel("trainable parameters (millions, counted here)")
        axis.set_ylabel("top-1 (%), as printed in the paper")
        axis.set_title(f"{data}: figures of the paper, not reproduced here", fontsize=10)
        handles, labels = axis.get_legend_handles_labels()
        marks = [pyplot.Line2D([], [], linestyle="")] * len(handles)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2}
        axis.legend(marks, labels, fontsize=7, handlelength=0, handletextpad=0, **below)
    drawing.savefig(path, dpi=120)
    print(f"wrote {path}")


def _belongs_in_figure(row: dict, data: str) -> bool:
    """Check whether a row is of the data set, has the paper's numbers and is not an ablation."""
    paper, argument = row["paper"], row["config"].partition(":")[2]
    if not paper or paper["data"] != data or not (paper["top1"] and paper["gflops"]):
        return False
    return not argument or argument.isdigit()  # no ablations


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument(
        "--config",
        nargs="*",
        help="config files, NAME or NAME:VARIANT; --config.KEY=VALUE sets their keys (all rows of "
        "the paper's tables)",
    )
    arg_parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    arg_parser.add_argument(
        "--figure", metavar="FILE", help="PNG or SVG of Fig. 1 to write, instead of printing"
    )
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def main() -> None:
    """Count the configurations and print a table or JSON, or write the figure."""
    environment.configure_environment()
    args, overrides = parse_with_overrides(parser())
    progress_bar.set_quiet(args.quiet)
    with user_errors():
        from dualpath_jax.analysis import efficiency  # imports JAX

        names = args.config or list(efficiency.PAPER_ROWS)
        rows = [
            build_row(name, overrides)
            for name in progress_bar.iterate_with_bar(names, "count", "configurations")
        ]
        if args.figure:
            draw_figure(rows, args.figure)
            return
    print(json.dumps(rows, indent=1) if args.json else format_markdown(rows))

"""Shows the results of scripts/compare_methods.py: tables in Markdown, or plots.

    python scripts/show_comparison.py
    python scripts/show_comparison.py --figure=docs/images/comparison.png

Without --figure it prints the tables of docs/comparison.md. Intervals are of 95%. They come from
10,000 bootstrap samples, which draw videos and seeds, the same videos for both methods of a
difference; top-1 of a single seed has Wilson's interval.
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dualpath_jax.analysis.confidence import confidence_interval
from dualpath_jax.cli import build_parser, user_errors
from dualpath_jax.runtime import console
from scripts.compare_methods import RESULTS, Results

REFERENCE = "dualpath"


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the results of `compare_methods`.

    Raises:
      ValueError: there are none.
    """
    if results := Results(path, path.parent).read():
        return results
    raise ValueError(f"no results in {path}: scripts/compare_methods.py makes them")


def select(results: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the results that have the values `wanted`."""
    return [row for row in results if wanted.items() <= row.items()]


def correct_matrix(rows: list[dict[str, Any]]) -> np.ndarray:
    """Return float64 [seeds, videos], 1 where a video is classified correctly."""
    rows = sorted(rows, key=lambda row: row["seed"])
    return np.array([[int(mark) for mark in row["correct"]] for row in rows], float)


def bootstrap_interval(
    correct: np.ndarray, reference: np.ndarray | None = None, samples: int = 10_000
) -> tuple[float, float]:
    """Return the 95% interval of the mean of `correct`, or of its difference from `reference`.

    Args:
      correct: [seeds, videos], see `correct_matrix`.
      reference: [seeds, videos] of the same videos, or None.
      samples: number of bootstrap samples.
    """
    rng = np.random.default_rng(0)
    videos = correct.shape[1]
    # The weights of the videos stand for copies; both methods get the same ones.
    weights = rng.multinomial(videos, np.full(videos, 1 / videos), size=samples) / videos

    def draw_means(matrix: np.ndarray) -> np.ndarray:
        seeds = rng.integers(len(matrix), size=(len(matrix), samples))
        return np.take_along_axis(matrix @ weights.T, seeds, axis=0).mean(axis=0)

    means = draw_means(correct)
    if reference is not None:
        means = means - draw_means(reference)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarize(results: list[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """Return a summary of each contestant of a set, the best test top-1 first.

    Each has contestant, runs (number of seeds), learning_rate, steps, trainable_params, train,
    test, interval, and difference with difference_interval (test top-1 minus the reference's; None
    for the reference itself and where the reference is missing).
    """
    names = dict.fromkeys(row["contestant"] for row in select(results, data=data, split="test"))
    tests = {name: select(results, data=data, contestant=name, split="test") for name in names}
    matrices = {name: correct_matrix(rows) for name, rows in tests.items()}
    reference = matrices.get(REFERENCE)
    summaries = []
    for name, rows in tests.items():
        matrix, first = matrices[name], rows[0]
        one_seed = confidence_interval(matrix.mean(), matrix.shape[1])
        compared = reference is not None and name != REFERENCE
        summaries.append(
            {
                "contestant": name,
                "runs": len(rows),
                **{key: first[key] for key in ("learning_rate", "steps", "trainable_params")},
                "train": np.mean(
                    [r["top1"] for r in select(results, data=data, contestant=name, split="train")]
                ),
                "test": matrix.mean(),
                "interval": bootstrap_interval(matrix) if len(rows) > 1 else one_seed,
                "difference": matrix.mean() - reference.mean() if compared else None,
                "difference_interval": bootstrap_interval(matrix, reference) if compared else None,
            }
        )
    return sorted(summaries, key=lambda summary: -summary["test"])


def costs_of(results: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Return gmacs and step_time of a contestant; NaN where they were not measured."""
    found = select(results, contestant=name, split="costs")
    return found[0] if found else {"gmacs": float("nan"), "step_time": float("nan")}


def format_table(results: list[dict[str, Any]], data: str) -> str:
    """Format the results of a set as a Markdown table, best method first."""
    lines = [
        "| method | trainable parameters | GMAC a clip | step time / `dualpath`'s | learning rate "
        "| steps | seeds | training top-1 | test top-1 | minus `dualpath`'s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summarize(results, data):
        costs = costs_of(results, row["contestant"])
        low, high = row["interval"]
        difference = ""
        if row["difference"] is not None:
            below, above = row["difference_interval"]
            difference = f"{row['difference']:+.3f} ({below:+.3f} to {above:+.3f})"
        cells = [
            f"`{row['contestant']}`",
            f"{row['trainable_params']:,}",
            *(
                "not measured" if np.isnan(costs[key]) else f"{costs[key]:{digits}}"
                for key, digits in (("gmacs", ".3f"), ("step_time", ".2f"))
            ),
            f"{row['learning_rate']:g}",
            f"{row['steps']:,}",
            str(row["runs"]),
            f"{row['train']:.3f}",
            f"{row['test']:.3f} ({low:.3f} - {high:.3f})",
            difference,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: list[dict[str, Any]], data: str, path: str) -> None:
    """Plot test top-1 of a set over multiply-accumulates and over trainable parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = summarize(results, data)
    macs = [costs_of(results, row["contestant"])["gmacs"] for row in rows]
    params = [row["trainable_params"] / 1000 for row in rows]
    drawing, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, constrained_layout=True)
    for axis, values, label in zip(
        axes, (macs, params), ("GMAC a clip", "trainable parameters, thousands"), strict=True
    ):
        for value, row in zip(values, rows, strict=True):
            low, high = row["interval"]
            color = "tab:red" if row["contestant"] == REFERENCE else "tab:blue"
            errors = [[row["test"] - low], [high - row["test"]]]
            axis.errorbar(value, row["test"], errors, fmt="o", color=color, capsize=3)
            on_the_left = value > (min(values) + max(values)) / 2  # of the point, inside the axes
            axis.annotate(
                row["contestant"],
                (value, row["test"]),
                xytext=(-6 if on_the_left else 6, 4),
                textcoords="offset points",
                ha="right" if on_the_left else "left",
                fontsize=8,
            )
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"top-1, test videos of {data}")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    add = arg_parser.add_argument
    add("--results", help="file of results (docs/comparison.jsonl)")
    add("--set", default="paths", help="set of videos that --figure plots (paths)")
    add("--figure", help="PNG to write instead of printing tables")
    return arg_parser


def main() -> None:
    args = parser().parse_args()
    with user_errors():
        path = pathlib.Path(args.results or RESULTS)
        results = read_results(path)
        sets = list(dict.fromkeys(row["data"] for row in select(results, split="test")))
        if args.figure:
            if args.set not in sets:
                raise ValueError(f"no test results of {args.set} in {path}: it has {sets}")
            draw_figure(results, args.set, args.figure)
            print(f"wrote {args.figure}")
            return
        for data in sets:
            print(f"{data}\n\n{format_table(results, data)}\n")


if __name__ == "__main__":
    console.run(main)

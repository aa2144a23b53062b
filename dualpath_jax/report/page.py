"""Renders the report of one or several runs as one HTML file that loads nothing else."""

import base64
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from flax import traverse_util

from dualpath_jax.analysis.confidence import confidence_interval
from dualpath_jax.config import schema
from dualpath_jax.config.values import flatten_config
from dualpath_jax.report import line_charts, statistics
from dualpath_jax.report.line_charts import Series, format_number, format_percent, line_chart
from dualpath_jax.report.mistake_images import Strip
from dualpath_jax.report.run_reader import RunRecord, format_value, metric_points

_FOLDER = pathlib.Path(__file__).parent
_NUM_WORST_PAIRS = 20
_CURVES = (  # (title, key of metrics.jsonl, label formatter, True if the scale is 0..1)
    ("Loss", "loss", format_number, False),
    ("Learning rate", "learning_rate", format_number, False),
    ("Accuracy", "accuracy", format_percent, True),
    ("Share of time spent waiting for data", "data_wait", format_percent, False),
)


def render_page(
    runs: Sequence[RunRecord], mistakes: Sequence[int], strips: dict[str, list[Strip]]
) -> str:
    """Render the page of one run, or the comparison of several.

    Args:
      runs: at least one run.
      mistakes: rows of the predictions to show as mistakes; used for a single run only.
      strips: the images of these videos, by id.

    Returns:
      The HTML text.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": format_percent,
        "number": format_number,
        "text": format_value,
    }
    script, style = (_read_asset(name) for name in ("page.js", "page.css"))
    context = {
        "runs": runs,
        "script": script,
        "style": style,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "missing": [(run, missing) for run in runs for missing in run.missing],
        "figures": _summary_rows(runs),
        "charts": [chart for chart in _curve_charts(runs) if chart],
        "size": (
            line_charts.WIDTH,
            line_charts.HEIGHT,
            line_charts.LEFT,
            line_charts.RIGHT,
            line_charts.TOP,
            line_charts.BOTTOM,
        ),
        "parameters": _parameter_tables(runs),
        "settings": _setting_differences(runs),
        "environments": _environment_rows(runs),
    }
    if len(runs) == 1:
        context |= _single_run_context(runs[0], mistakes, strips)
        context |= {"has_top5": _has_top5(runs[0]), "left_out": {}}
    else:
        context |= _class_comparison(runs)
    html = environment.get_template("page.html").render(context)
    return html.encode("utf-8", "replace").decode()  # video ids may contain any bytes


def _read_asset(name: str) -> markupsafe.Markup:
    """Read a file of this package as markup, which the template does not escape."""
    return markupsafe.Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _curve_charts(runs: Sequence[RunRecord]) -> list[line_charts.Chart | None]:
    """Draw the training curves, one chart per metric; None for a metric that no run has."""
    charts = []
    for title, key, formatter, unit_scale in _CURVES:
        series = []
        for color, run in enumerate(runs):
            prefix = "" if len(runs) == 1 else f"{run.name}, "
            name = f"{prefix}training" if key == "accuracy" else run.name
            series.append(Series(name, color, list(metric_points(run.training, key))))
            if key == "accuracy":
                color = color + 1 if len(runs) == 1 else color
                series.append(Series(f"{prefix}evaluation", color, _top1_points(run), dots=True))
        charts.append(line_chart(title, series, formatter, unit_scale))
    return charts


def _top1_points(run: RunRecord) -> list[tuple[float, float]]:
    """Return (step, top-1) of the evaluations during training and of the final one."""
    points = dict(metric_points(run.evaluations, "top1"))
    if run.results:
        points[float(run.results["step"])] = float(run.results["top1"])
    return sorted(points.items())


def _calibration_bins(run: RunRecord) -> statistics.CalibrationBins | None:
    """Return the calibration of a run; None without predictions."""
    if run.predictions is None:
        return None
    return statistics.calibration_bins(run.predictions.probabilities[:, 0], run.predictions.correct)


def _summary_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return (name, value in each run) for each quantity that at least one run has."""
    columns = [_summarize_run(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def _summarize_run(run: RunRecord) -> dict[str, str]:
    """Return the scores and sizes of a run as text, by name."""
    results, summary = run.results, {}
    if results:
        videos = results["num_videos"]
        for name, key in (("top-1", "top1"), ("top-5", "top5")):
            if key == "top5" and not _has_top5(run):
                continue
            correct = round(results[key] * videos)
            summary[name] = f"{format_percent(results[key], 2)} ({correct:,} of {videos:,})"
        if videos:
            low, high = confidence_interval(results["top1"], videos)
            summary["top-1, 95% interval"] = f"{format_percent(low)} to {format_percent(high)}"
        summary["mean class accuracy"] = format_percent(results["mean_class_accuracy"], 2)
    for row in run.probe.heads if run.probe else ():
        scores = row.final
        low, high = (format_percent(value) for value in scores.interval)
        split = "" if scores.split == results.get("split") else f", split {scores.split}"
        summary[f"top-1 of the {row.head} probe, without tuning"] = (
            f"{format_percent(scores.top1, 2)} (95% interval {low} to {high}{split})"
        )
    if bins := _calibration_bins(run):
        summary["calibration error (ECE)"] = f"{bins.ece:.3f}"
    if results:
        summary["videos"] = f"{videos:,}"
        summary["views (frames x clips x crops)"] = format_value(results.get("views"))
        summary["split"] = format_value(results.get("split"))
        summary["data set"] = format_value(results.get("dataset"))
        summary["after step"] = f"{results['step']:,}"
    if run.training:
        summary["trained steps"] = f"{run.training[-1]['step']:,}"
    if run.num_train_steps is not None:
        summary["planned steps"] = f"{run.num_train_steps:,}"
    broken = list(metric_points(run.training, "broken_videos"))
    if broken and broken[-1][1]:
        summary["broken videos replaced in training"] = f"{broken[-1][1]:,.0f}"
    if run.parameters:
        total, trainable, _ = run.parameters["total"]
        summary["trainable parameters"] = f"{trainable:,} of {total:,}"
    if run.config:
        summary["method"] = format_value(run.settings.get("model.method"))
        summary["backbone"] = format_value(run.settings.get("backbone.name"))
    if results:
        summary["SHA-256 of the backbone"] = format_value(results.get("backbone_sha256"))
    return summary


def _has_top5(run: RunRecord) -> bool:
    """Return whether top-5 can be wrong: the run has more than five classes, or unknown ones."""
    return not 0 < len(run.class_names) <= 5


def _parameter_tables(runs: Sequence[RunRecord]) -> list[tuple[str, dict[str, list[int]]]]:
    """Return the distinct tables of parameters, each with the names of the runs that have it."""
    tables: list[tuple[list[str], dict[str, list[int]]]] = []
    for run in runs:
        names = next((names for names, table in tables if table == run.parameters), None)
        if names is not None:
            names.append(run.name)
        elif run.parameters:
            tables.append(([run.name], run.parameters))
    return [(", ".join(names), table) for names, table in tables]


def _setting_differences(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Compare one run with the defaults of config/schema.py, or several with each other."""
    known = [run for run in runs if run.config]
    if not known:
        return None
    if len(runs) == 1:
        names = ["dualpath_jax/config/schema.py", runs[0].name]
        columns = [flatten_config(schema.get_config()), runs[0].settings]
    else:
        names, columns = [run.name for run in known], [run.settings for run in known]
    return {"names": names, "rows": statistics.pairwise_differences(columns)}


def _environment_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return (name, value in each run) for each entry of environment.json."""
    columns = [traverse_util.flatten_dict(run.environment, sep=", ") for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [
        (
            key.replace("_", " "),
            [format_value(column[key]) if key in column else "–" for column in columns],
        )
        for key in keys
    ]


def _single_run_context(
    run: RunRecord, mistakes: Sequence[int], strips: dict[str, list[Strip]]
) -> dict[str, Any]:
    """Return the template's variables that only the page of a single run has."""
    predictions, names = run.predictions, run.class_names
    if predictions is None:
        return {"classes": [], "confusion": None, "mistakes": [], "bins": None}
    matrix = statistics.confusion_matrix(predictions.labels, predictions.classes[:, 0], len(names))
    videos, correct = statistics.class_counts(matrix)
    wrong = matrix - np.diag(np.diag(matrix))
    classes = [
        {
            "name": names[i],
            "videos": int(videos[i]),
            "correct": int(correct[i]),
            "accuracy": float(correct[i] / videos[i]),
            "taken_for": names[int(wrong[i].argmax())] if wrong[i].any() else "–",
        }
        for i in np.flatnonzero(videos)
    ]
    rows, columns = np.nonzero(matrix)
    cells = np.stack([rows, columns, matrix[rows, columns]], axis=1)
    bins = _calibration_bins(run)
    return {
        "classes": sorted(classes, key=lambda row: row["accuracy"]),
        "confusion": {
            "names": names,
            "videos": videos.tolist(),
            "cells": cells.tolist(),
            "orders": {
                "similar": statistics.order_by_similarity(matrix),
                "data": list(range(len(names))),
            },
        },
        "pairs": [
            {"label": i, "predicted": j, "count": count, "share": count / int(videos[i])}
            for i, j, count in statistics.worst_pairs(matrix, _NUM_WORST_PAIRS)
        ],
        "names": names,
        "mistakes": [
            {
                "id": predictions.ids[row],
                "label": names[int(predictions.labels[row])],
                "guesses": _top_guesses(run, row),
                "strips": strips.get(predictions.ids[row], []),
            }
            for row in mistakes
        ],
        "bins": bins,
        "calibration": line_charts.calibration_chart(bins),
    }


def _top_guesses(run: RunRecord, row: int) -> list[tuple[str, float]]:
    """Return the three most probable classes of a video, and its label if it follows later.

    The label follows only if it is among the stored classes (the K most probable).
    """
    label, names = run.predictions.labels[row], run.class_names
    guesses = zip(run.predictions.classes[row], run.predictions.probabilities[row], strict=True)
    return [
        (names[int(number)], float(probability))
        for rank, (number, probability) in enumerate(guesses)
        if rank < 3 or number == label
    ]


def _class_comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the accuracy of each class in each run, the largest difference first.

    Runs with other classes than the first one, or without predictions, are left out and named. The
    table is empty unless two runs remain.
    """
    have_predictions = [run for run in runs if run.predictions is not None]
    known = [r for r in have_predictions if r.class_names == have_predictions[0].class_names]
    left_out = {
        run.name: "other classes" if run in have_predictions else "no predictions"
        for run in runs
        if run not in known
    }
    if len(known) < 2:
        return {"compared": [], "classes": [], "left_out": left_out}
    columns = []
    for run in known:
        predictions, num_classes = run.predictions, len(run.class_names)
        matrix = statistics.confusion_matrix(
            predictions.labels, predictions.classes[:, 0], num_classes
        )
        columns.append(statistics.class_counts(matrix))
    rows = []
    for i, name in enumerate(known[0].class_names):
        accuracies = [int(ok[i]) / int(n[i]) if n[i] else None for n, ok in columns]
        known_accuracies = [accuracy for accuracy in accuracies if accuracy is not None]
        if known_accuracies:
            spread = max(known_accuracies) - min(known_accuracies)
            rows.append({"name": name, "accuracies": accuracies, "spread": spread})
    rows.sort(key=lambda row: -row["spread"])
    return {"compared": [run.name for run in known], "classes": rows, "left_out": left_out}

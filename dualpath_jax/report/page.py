"""The page: what the template needs, put together, and rendered. One file, no network.

Public: `render_page`.
"""

import base64
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from flax import traverse_util

from dualpath_jax.config import schema
from dualpath_jax.config.values import flatten_config
from dualpath_jax.report import line_charts, statistics
from dualpath_jax.report.line_charts import Series, format_number, format_percent, line_chart
from dualpath_jax.report.mistake_images import Strip
from dualpath_jax.report.run_reader import RunRecord, format_value, metric_points

_FOLDER = pathlib.Path(__file__).parent
WORST_PAIRS = 20
_CURVES = (  # title, key of metrics.jsonl, form, is the scale 0..1?
    ("Loss", "loss", format_number, False),
    ("Learning rate", "learning_rate", format_number, False),
    ("Accuracy", "accuracy", format_percent, True),
    ("Waiting for data, share of the time", "data_wait", format_percent, False),
)


def render_page(
    runs: Sequence[RunRecord], mistakes: Sequence[int], strips: dict[str, list[Strip]]
) -> str:
    """The page of one run, or the comparison of several.

    Args:
      runs: at least one.
      mistakes: of one run: the videos to show, rows of its predictions.
      strips: their pictures, by id.
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
    script, style = (_own(name) for name in ("page.js", "page.css"))
    context = {
        "runs": runs,
        "script": script,
        "style": style,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "missing": [(run, missing) for run in runs for missing in run.missing],
        "figures": _figure_rows(runs),
        "charts": [chart for chart in _curves(runs) if chart],
        "size": (
            line_charts.WIDTH,
            line_charts.HEIGHT,
            line_charts.LEFT,
            line_charts.RIGHT,
            line_charts.TOP,
            line_charts.BOTTOM,
        ),
        "parameters": _parameters(runs),
        "settings": _settings(runs),
        "environments": _environments(runs),
    }
    if len(runs) == 1:
        context |= _of_one(runs[0], mistakes, strips)
    else:
        context |= _classes_side_by_side(runs)
    html = environment.get_template("page.html").render(context)
    return html.encode("utf-8", "replace").decode()  # ids of videos may hold any bytes


def _own(name: str) -> markupsafe.Markup:
    """A file of this package, to be put into the page as it is."""
    return markupsafe.Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _curves(runs: Sequence[RunRecord]) -> list[line_charts.Chart | None]:
    found = []
    for title, key, form, whole in _CURVES:
        series = []
        for colour, run in enumerate(runs):
            prefix = "" if len(runs) == 1 else f"{run.name}, "
            name = f"{prefix}training" if key == "accuracy" else run.name
            series.append(Series(name, colour, list(metric_points(run.training, key))))
            if key == "accuracy":
                colour = colour + 1 if len(runs) == 1 else colour
                series.append(Series(f"{prefix}evaluation", colour, _top1(run), dots=True))
        found.append(line_chart(title, series, form, whole))
    return found


def _top1(run: RunRecord) -> list[tuple[float, float]]:
    """Of the evaluations on the way and of the last one."""
    found = dict(metric_points(run.evaluations, "top1"))
    if run.results:
        found[float(run.results["step"])] = float(run.results["top1"])
    return sorted(found.items())


def _calibration(run: RunRecord) -> statistics.CalibrationBins | None:
    if run.predictions is None:
        return None
    return statistics.calibration(run.predictions.probabilities[:, 0], run.predictions.correct)


def _figure_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Name of a figure, and its value in each run; rows that no run has are left out."""
    columns = [_figures(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def _figures(run: RunRecord) -> dict[str, str]:
    results, found = run.results, {}
    if results:
        videos = results["num_videos"]
        for name, key in (("top-1", "top1"), ("top-5", "top5")):
            right = round(results[key] * videos)
            found[name] = f"{format_percent(results[key], 2)} ({right:,} of {videos:,})"
        if videos:
            low, high = statistics.confidence_interval(results["top1"], videos)
            found["top-1, 95% interval"] = f"{format_percent(low)} to {format_percent(high)}"
        found["mean class accuracy"] = format_percent(results["mean_class_accuracy"], 2)
    if bins := _calibration(run):
        found["calibration error (ECE)"] = f"{bins.ece:.3f}"
    if results:
        found["videos"] = f"{videos:,}"
        found["views (frames x clips x crops)"] = format_value(results.get("views"))
        found["split"] = format_value(results.get("split"))
        found["data set"] = format_value(results.get("dataset"))
        found["after step"] = f"{results['step']:,}"
    if run.training:
        found["trained steps"] = f"{run.training[-1]['step']:,}"
    if run.num_train_steps is not None:
        found["planned steps"] = f"{run.num_train_steps:,}"
    broken = list(metric_points(run.training, "broken_videos"))
    if broken and broken[-1][1]:
        found["broken videos replaced in training"] = f"{broken[-1][1]:,.0f}"
    if run.parameters:
        total, trainable, _ = run.parameters["total"]
        found["trainable parameters"] = f"{trainable:,} of {total:,}"
    if run.config:
        found["method"] = format_value(run.settings.get("model.method"))
        found["backbone"] = format_value(run.settings.get("backbone.name"))
    if results:
        found["SHA-256 of the backbone"] = format_value(results.get("backbone_sha256"))
    return found


def _parameters(runs: Sequence[RunRecord]) -> list[tuple[str, dict[str, list[int]]]]:
    """Tables of parameters, each with the names of the runs that have it."""
    tables: list[tuple[list[str], dict[str, list[int]]]] = []
    for run in runs:
        names = next((names for names, table in tables if table == run.parameters), None)
        if names is not None:
            names.append(run.name)
        elif run.parameters:
            tables.append(([run.name], run.parameters))
    return [(", ".join(names), table) for names, table in tables]


def _settings(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """One run against dualpath_jax/config/schema.py, several against each other."""
    known = [run for run in runs if run.config]
    if not known:
        return None
    if len(runs) == 1:
        names = ["dualpath_jax/config/schema.py", runs[0].name]
        columns = [flatten_config(schema.get_config()), runs[0].settings]
    else:
        names, columns = [run.name for run in known], [run.settings for run in known]
    return {"names": names, "rows": statistics.pairwise_differences(columns)}


def _environments(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    facts = [traverse_util.flatten_dict(run.environment, sep=", ") for run in runs]
    keys = list(dict.fromkeys(key for one in facts for key in one))
    return [
        (key.replace("_", " "), [format_value(one[key]) if key in one else "–" for one in facts])
        for key in keys
    ]


def _of_one(
    run: RunRecord, mistakes: Sequence[int], strips: dict[str, list[Strip]]
) -> dict[str, Any]:
    """What only the page of a single run has."""
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
    bins = _calibration(run)
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
            for i, j, count in statistics.worst_pairs(matrix, WORST_PAIRS)
        ],
        "names": names,
        "mistakes": [
            {
                "id": predictions.ids[row],
                "label": names[int(predictions.labels[row])],
                "guesses": _guesses(run, row),
                "strips": strips.get(predictions.ids[row], []),
            }
            for row in mistakes
        ],
        "bins": bins,
        "calibration": line_charts.calibration_chart(bins),
    }


def _guesses(run: RunRecord, row: int) -> list[tuple[str, float]]:
    """The three most probable classes of a video, and its label where it comes next."""
    label, names = run.predictions.labels[row], run.class_names
    both = zip(run.predictions.classes[row], run.predictions.probabilities[row], strict=True)
    return [
        (names[int(number)], float(probability))
        for place, (number, probability) in enumerate(both)
        if place < 3 or number == label
    ]


def _classes_side_by_side(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Accuracy of each class by run, those that differ most first; of runs with equal classes."""
    known = [run for run in runs if run.predictions is not None]
    if len(known) < 2 or any(run.class_names != known[0].class_names for run in known):
        return {"compared": [], "classes": []}
    columns = []
    for run in known:
        found, names = run.predictions, run.class_names
        matrix = statistics.confusion_matrix(found.labels, found.classes[:, 0], len(names))
        columns.append(statistics.class_counts(matrix))
    rows = []
    for i, name in enumerate(known[0].class_names):
        accuracies = [int(ok[i]) / int(n[i]) if n[i] else None for n, ok in columns]
        there = [accuracy for accuracy in accuracies if accuracy is not None]
        if there:
            spread = max(there) - min(there)
            rows.append({"name": name, "accuracies": accuracies, "spread": spread})
    rows.sort(key=lambda row: -row["spread"])
    return {"compared": [run.name for run in known], "classes": rows}

"""Draws a learning curve: accuracy against the number of training videos of each class.

    dualpath curve --data=runs/mine/data --backbone=ViT-B-16.pt --out=runs/curve
    dualpath curve --data=paths_large --backbone=demo --out=runs/curve --short

--data is a prepared folder (dualpath prepare; that of dualpath finetune is RUN/data), or a
generated set: demo, paths or paths_large. Each method is trained on 2, 4, 8, 16 and 64 videos of
each class and on all, with the settings that dualpath finetune chooses for so many videos, and its
last state is evaluated on the test split, or on the validation split where there is none. probe is
the best head of dualpath probe. The videos of a number of shots are always the same, and among
those of a larger number; seeds change parameters and batches.

OUT/curve.jsonl gets a line of JSON for each result, OUT/curve.png the plot; a table is printed.
Interrupted, the same command continues. --config.KEY=VALUE changes a setting of all trainings.

In a checkout, python scripts/learning_curve.py is the same command.
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dualpath_jax import cli
from dualpath_jax.config import loading, schema, small_sets
from dualpath_jax.runtime import environment, files, progress_bar
from dualpath_jax.runtime.safe_read import parse_json, read_json, read_lines, truncated_repr

RESULTS, FIGURE = "curve.jsonl", "curve.png"
METHODS = ("probe", "dualpath", "st_adapter")
SHOTS = ("2", "4", "8", "16", "64", "all")
SHORT_SHOTS = ("2", "8")
_SHORT_STEPS = 100  # of a training, at most
_GENERATED = ("demo", "paths", "paths_large")
_CHOSEN_BY_VALIDATION = (
    "there is no test split: all methods are evaluated on the validation videos, by which the "
    "probe is also chosen; its accuracy is then too high"
)
# Keys that the command sets, and the option that does.
_OWN_KEYS = {
    "data.dir": "--data",
    "data.source": "--data",
    "data.shots": "--shots",
    "model.method": "--methods",
    "seed": "--seeds",
    "backbone.checkpoint": "--backbone",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """Names one training of a curve.

    Attributes:
      method: `model.method`.
      shots: videos of each class; None: all.
      seed: of parameters and batches.
      num_clips: number of training videos.
      uneven: some classes have many times more videos than others, see `small_sets.UNEVEN`.
    """

    method: str
    shots: int | None
    seed: int
    num_clips: int
    uneven: bool = False

    def key(self) -> dict[str, Any]:
        """Return the entries of a result that name it."""
        shots = "all" if self.shots is None else self.shots
        return {"method": self.method, "shots": shots, "seed": self.seed}

    @property
    def folder(self) -> str:
        """Return the folder of the training, relative to that of the curve."""
        return "{method}/shots_{shots}_seed{seed}".format(**self.key())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = cli.build_parser(__doc__)
    add = arg_parser.add_argument
    add("--data", required=True, help=f"prepared folder, or one of {', '.join(_GENERATED)}")
    add("--backbone", required=True, metavar="FILE|demo", help="backbone, as of dualpath finetune")
    add("--out", default="runs/curve", help="folder to write (runs/curve)")
    methods = schema.choices("model.method")
    help_ = f"methods to compare ({' '.join(METHODS)})"
    add("--methods", nargs="+", choices=methods, default=METHODS, metavar="METHOD", help=help_)
    help_ = (
        f"videos of each class, and all ({' '.join(SHOTS)}; with --short {' '.join(SHORT_SHOTS)})"
    )
    add("--shots", nargs="+", metavar="K", help=help_)
    add("--seeds", type=cli.positive(int), default=1, help="trainings of each point (1)")
    help_ = f"fewer points, and at most {_SHORT_STEPS} steps each: a first look within minutes"
    add("--short", action="store_true", help=help_)
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def main() -> None:
    """Run the command line."""
    cli.run_resumable(parser(), draw_curve)


def draw_curve(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Train what is missing, print the table and draw the plot.

    Raises:
      ValueError, OSError: the user can fix the problem; the message has the remedy.
      Preempted: a signal stopped a training; its state is saved.
    """
    from absl import logging

    from dualpath_jax.data.video_dataset import VideoDataset
    from dualpath_jax.training.inputs import lock_workdir

    logging.set_verbosity(logging.ERROR)
    environment.disable_async_dispatch()
    overridden = loading.find_overridden_keys(overrides)
    for key in overridden:
        if key in _OWN_KEYS:
            raise ValueError(f"--config.{key} is set by the command: use {_OWN_KEYS[key]}")
    shots = _parse_shots(arguments.shots or (SHORT_SHOTS if arguments.short else SHOTS))
    with lock_workdir(arguments.out, "--out"):
        first = make_config(Point(arguments.methods[0], None, 0, 1), arguments, overrides)
        dataset = VideoDataset(first.data.dir, first.data.train_split)
        points = list(make_points(dataset, arguments.methods, shots, arguments.seeds))
        settings = {
            "data": first.data.dir,
            "backbone": arguments.backbone,
            "short": arguments.short,
            "overrides": sorted(overrides),
            "inputs": _input_digests(first),
        }
        results = read_results(arguments.out)
        _check_same_settings(results, settings, arguments.out)
        if first.eval.split == "validation" and "probe" in arguments.methods:
            print(f"note: {_CHOSEN_BY_VALIDATION}", flush=True)
        done = sum(bool(find(results, **point.key())) for point in points)
        print(f"{len(points)} trainings, of which {done} are finished", flush=True)
        for number, point in enumerate(points, 1):
            if find(results, **point.key()):
                continue
            print(f"training {number} of {len(points)}: {point.folder}", flush=True)
            config = make_config(point, arguments, overrides)
            if "optimizer.accumulation_steps" not in overridden and point.method != "probe":
                _fit_memory(config, len(dataset.class_names))
            scores = train(point, config, arguments.out, arguments.short)
            results.append(point.key() | {"clips": point.num_clips} | scores | settings)
            text = "".join(json.dumps(row) + "\n" for row in results)
            files.write_text(os.path.join(arguments.out, RESULTS), text)
    shown = [row for point in points for row in find(results, **point.key())]
    print(format_table(shown))
    path = os.path.join(arguments.out, FIGURE)
    draw_figure(shown, len(dataset.class_names), path)
    print(f"wrote {path}", flush=True)


def _parse_shots(texts: Sequence[str]) -> list[int | None]:
    """Return numbers of shots, ascending; None stands for "all" and comes last.

    Raises:
      ValueError: a text is neither "all" nor a number above 0.
    """
    for text in texts:
        if text != "all" and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"--shots {text} is neither a number of videos above 0 nor all")
    numbers = sorted({int(text) for text in texts if text != "all"})
    return [*numbers, *([None] if "all" in texts else [])]


def make_points(
    dataset: Any, methods: Sequence[str], shots: Sequence[int | None], num_seeds: int
) -> Iterator[Point]:
    """Yield the trainings of a curve, those with few videos first.

    Numbers of shots that no class has are left out with a note.

    Args:
      dataset: the training split, a `VideoSource`.
      methods: values of `model.method`.
      shots: videos of each class, ascending; None: all.
      num_seeds: seeds 0, 1, ... of each.

    Raises:
      ValueError: no number of shots is left.
    """
    from dualpath_jax.data.few_shots import choose_shots

    largest = int(np.bincount(dataset.labels).max())
    usable = [number for number in shots if number is None or number < largest]
    if left_out := [str(number) for number in shots if number not in usable]:
        reason = f"the largest class has {largest} training videos"
        if not usable:
            raise ValueError(f"--shots {' '.join(left_out)}: {reason}; choose fewer, or all")
        print(f"note: --shots {' '.join(left_out)} are left out: {reason}", flush=True)
    for number in usable:
        rows = choose_shots(dataset.ids, dataset.labels, largest if number is None else number)
        counts = np.unique(dataset.labels[rows], return_counts=True)[1]
        uneven = bool(counts.max() >= small_sets.UNEVEN * counts.min())
        for seed in range(num_seeds):
            for method in methods:
                yield Point(method, number, seed, len(rows), uneven)


def make_config(point: Point, arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """Return the configuration of a point; render the videos of a generated set.

    Raises:
      ValueError, OSError: data or backbone cannot be read, or an override is wrong.
    """
    from dualpath_jax.commands import finetune
    from dualpath_jax.data import dataset_metadata
    from dualpath_jax.demo import setup
    from dualpath_jax.training.inputs import check_inputs
    from dualpath_jax.training.optimizer import count_train_steps

    options = argparse.Namespace(backbone=arguments.backbone, method=point.method)
    config = finetune.make_config(
        options, list(overrides), point.num_clips, arguments.out, point.uneven
    )
    is_generated = arguments.data in _GENERATED
    config.data.source = arguments.data if is_generated else "folder"
    config.data.dir = os.path.abspath(f"data/{arguments.data}" if is_generated else arguments.data)
    config.data.shots, config.seed = point.shots, point.seed
    if is_generated:
        setup.ensure_generated(config)
    check_inputs(config)
    splits = dataset_metadata.read_splits(config.data.dir)
    if config.data.train_split not in splits or len(splits) < 2:
        raise ValueError(
            f"{config.data.dir} has the splits {', '.join(splits)}: a learning curve needs one to "
            "train on and one to evaluate"
        )
    if "eval.split" not in loading.find_overridden_keys(overrides):
        config.eval.split = "test" if "test" in splits else "validation"
    config.eval.checkpoint, config.eval.every_epochs = "latest", 0
    config.early_stopping_evaluations = 0
    if arguments.short:
        steps = max(1, count_train_steps(config, point.num_clips / config.data.batch_size))
        config.num_train_steps = min(steps, _SHORT_STEPS)
        config.optimizer.warmup_epochs *= config.num_train_steps / steps
    return config


def _input_digests(config: Any) -> dict[str, str]:
    """Return digests of the backbone and of the splits that trainings and probes read."""
    from dualpath_jax.data import dataset_metadata
    from dualpath_jax.training.inputs import input_digests

    used = [config.data.train_split, config.eval.split, "validation"]
    splits = dataset_metadata.read_splits(config.data.dir)
    return input_digests(config, [split for split in used if split in splits])


def _fit_memory(config: Any, num_classes: int) -> None:
    """Set `optimizer.accumulation_steps` as dualpath finetune does."""
    from dualpath_jax.analysis import cost_estimate

    cost = cost_estimate.estimate_cost(config, num_classes)
    cost_estimate.fit_accumulation(config, cost, cost_estimate.available_memory())


def train(point: Point, config: Any, out: str, short: bool) -> dict[str, Any]:
    """Train a point, or continue its training, and return what its result says of it."""
    import jax

    from dualpath_jax import launch
    from dualpath_jax.probing.options import ProbeOptions
    from dualpath_jax.probing.run import run_probe
    from dualpath_jax.training.inputs import lock_workdir
    from dualpath_jax.training.optimizer import count_train_steps

    if point.method == "probe":
        # One folder for all, which has the features of evaluated videos once.
        workdir = os.path.join(out, "probe")
        options = ProbeOptions(num_steps=_SHORT_STEPS if short else None)
        with lock_workdir(workdir, "--out"):
            probe = run_probe(config, workdir, options)
        best = probe.best
        return {
            "split": best.final.split,
            "top1": best.final.top1,
            "num_videos": best.final.num_videos,
            "trainable_params": best.trainable_params,
            "learning_rate": best.learning_rate,
            "steps": probe.num_steps,
            "head": best.head,
        }
    workdir = os.path.join(out, point.folder)
    launch.train_and_evaluate(config, workdir, training=True)
    jax.clear_caches()
    results = read_json(os.path.join(workdir, "results.json"), dict)
    keys = ("split", "top1", "num_videos", "trainable_params")
    return {key: results[key] for key in keys} | {
        "learning_rate": config.optimizer.learning_rate,
        "steps": count_train_steps(config, point.num_clips / config.data.batch_size),
    }


def read_results(out: str) -> list[dict[str, Any]]:
    """Return the results in a folder, in the order in which they were made.

    Raises:
      ValueError: a line is not a result.
    """
    path = os.path.join(out, RESULTS)
    if not os.path.exists(path):
        return []
    results = [parse_json(line, dict, path) for line in read_lines(path) if line]
    for row in results:
        numbers = [row.get(key) for key in ("top1", "num_videos", "clips", "seed")]
        is_result = "shots" in row and isinstance(row.get("inputs", {}), dict)
        if not all(type(number) in (int, float) for number in numbers) or not is_result:
            raise ValueError(f"{path} has a line that is not a result: {truncated_repr(row)}")
    return results


def find(results: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the results that have the values `wanted`."""
    return [row for row in results if wanted.items() <= row.items()]


def _check_same_settings(
    results: Sequence[dict[str, Any]], settings: dict[str, Any], out: str
) -> None:
    """Raise ValueError if a result was made with other settings or inputs."""
    from dualpath_jax.training.inputs import changed_inputs

    for row in results:
        changes = [
            f"{key} {row.get(key)!r}, now {value!r}"
            for key, value in settings.items()
            if key != "inputs" and row.get(key) != value
        ]
        if names := changed_inputs(row.get("inputs", {}), settings["inputs"]):
            changes.append(f"changed: {', '.join(names)}")
        if changes:
            raise ValueError(
                f"{out} has results of other settings ({', '.join(changes)}): choose another --out"
            )


def _points_of(results: Sequence[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Return the results of all seeds by (method, shots)."""
    points: dict[tuple, list[dict[str, Any]]] = {}
    for row in results:
        points.setdefault((row["method"], row["shots"]), []).append(row)
    return points


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of top-1: a row for each number of shots, a column for each method.

    A cell has the mean over seeds and Wilson's 95% interval for the choice of the test videos.
    """
    from dualpath_jax.analysis.confidence import format_accuracy

    points = _points_of(results)
    methods = list(dict.fromkeys(row["method"] for row in results))
    splits = ", ".join(dict.fromkeys(row["split"] for row in results))
    lines = [
        f"| videos of each class | training videos | {' | '.join(methods)} |",
        "|---" * (2 + len(methods)) + "|",
    ]
    for shots in dict.fromkeys(row["shots"] for row in results):
        cells = []
        for method in methods:
            rows = points.get((method, shots), [])
            top1 = statistics.mean(row["top1"] for row in rows) if rows else None
            cells.append(format_accuracy(top1, rows[0]["num_videos"]) if rows else "")
        clips = find(results, shots=shots)[0]["clips"]
        lines.append(f"| {shots} | {clips:,} | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in results})
    return "\n".join(["", *lines, "", f"top-1 on {splits} videos, {seeds} seed{'s' * (seeds > 1)}"])


def draw_figure(results: Sequence[dict[str, Any]], num_classes: int, path: str) -> None:
    """Draw top-1 against the mean number of training videos of a class, a line for each method.

    Bars are Wilson's 95% intervals; the dotted line is the accuracy of a guess.
    """
    import matplotlib

    from dualpath_jax.analysis.confidence import confidence_interval

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = _points_of(results)
    drawing, axis = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for method in dict.fromkeys(row["method"] for row in results):
        rows = [rows for (name, _), rows in points.items() if name == method]
        clips = [row[0]["clips"] / num_classes for row in rows]
        top1 = [statistics.mean(entry["top1"] for entry in row) for row in rows]
        bounds = [
            confidence_interval(mean, row[0]["num_videos"])
            for mean, row in zip(top1, rows, strict=True)
        ]
        errors = np.array([(mean - a, b - mean) for mean, (a, b) in zip(top1, bounds, strict=True)])
        axis.errorbar(clips, top1, errors.T.clip(0), marker="o", capsize=3, label=method)
    axis.axhline(1 / num_classes, linestyle=":", color="gray")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.set_xlabel("training videos of a class")
    axis.set_ylabel(f"top-1, {results[0]['split']} videos")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend()
    with files.atomic_path(path) as temporary, temporary.open("wb") as file:
        drawing.savefig(file, dpi=110, format="png")
    pyplot.close(drawing)

"""Reads the results of runs from their workdirs for a report.

A missing or damaged file is not an error: it is listed in `RunRecord.missing`.
"""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from dualpath_jax.config.values import INVALID_CONFIG_ERRORS, flatten_config, restore_config
from dualpath_jax.data import dataset_metadata
from dualpath_jax.models import abstract, param_tree
from dualpath_jax.probing.results import ProbeResults
from dualpath_jax.probing.results import read_results as read_probe
from dualpath_jax.runtime.safe_read import parse_json, read_json, read_lines, truncated_repr
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from dualpath_jax.training.early_stopping import stops_early
from dualpath_jax.training.metrics_logger import is_evaluation
from dualpath_jax.training.predictions import read_predictions

_PROGRAM = "python -m dualpath_jax.main"
# A workdir has at least one of these files.
_RUN_FILES = ("config.json", "metrics.jsonl", "results.json", "environment.json", "probe.json")
_MAX_METRICS_BYTES = 64 * 2**20  # an entry of metrics.jsonl has about 200
_SCORE_KEYS = ("top1", "top5", "mean_class_accuracy")  # keys of results.json, values in 0..1
_COUNT_KEYS = ("num_videos", "step")  # keys of results.json, whole numbers


@dataclasses.dataclass(frozen=True)
class MissingResult:
    """Describes something that the report cannot show.

    Attributes:
      what: short description.
      command: command line that creates it; "" if no command does.
    """

    what: str
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Holds the K most probable classes of n evaluated videos, most probable first.

    Attributes:
      ids: names of the videos.
      labels: int64 [n].
      classes: int64 [n, K].
      probabilities: float64 [n, K] in 0..1.
    """

    ids: list[str]
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Return bool [n]: True where the most probable class is the label."""
        return self.classes[:, 0] == self.labels


@dataclasses.dataclass
class RunRecord:
    """Holds the results of a run. Anything unreadable is empty here and listed in `missing`.

    Attributes:
      workdir: folder of the run.
      name: short name, different for each run of a report.
      config: config.json as nested dicts, with defaults for keys added since; {} if unknown.
      training: entries of metrics.jsonl about training steps.
      evaluations: entries of metrics.jsonl about evaluations during training.
      results: content of results.json.
      probe: content of probe.json; None without a probe.
      environment: content of environment.json.
      class_names: one per class; "class 3" if the name of class 3 is unknown.
      predictions: the predictions for every evaluated video; None if unknown.
      parameters: table of parameter counts, see `param_tree.parameter_groups`.
      num_train_steps: planned number of training steps; None if unknown.
      missing: what could not be read.
    """

    workdir: str
    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    probe: ProbeResults | None = None
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: list[str] = dataclasses.field(default_factory=list)
    predictions: Predictions | None = None
    parameters: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    num_train_steps: int | None = None
    missing: list[MissingResult] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the configuration by dotted key."""
        return flatten_config(self.config)

    def command(self, mode: str = "train") -> str:
        """Return the command line that trains or evaluates this run.

        The config file is written as CONFIG if the recorded command is unknown.

        Args:
          mode: "train" or "eval".
        """
        words = [*_PROGRAM.split(), "--config=configs/CONFIG.py"]
        recorded = self.environment.get("command")
        if isinstance(recorded, str) and recorded.startswith(f"{_PROGRAM} "):
            kept = shlex.split(recorded)
            words = [word for word in kept if not word.startswith(("--workdir=", "--mode="))]
        words.append(f"--workdir={self.workdir}")
        return shlex.join([*words, "--mode=eval"] if mode == "eval" else words)

    def report_missing(self, what: str, command: str = "") -> None:
        """Add an entry to `missing`."""
        self.missing.append(MissingResult(what, command))


def read_runs(workdirs: Sequence[str]) -> list[RunRecord]:
    """Read the runs of some workdirs.

    A workdir that holds several splits (HMDB51's "all") counts as several runs.

    Raises:
      ValueError: a folder is not a workdir, or it is named twice; the message names it.
    """
    folders = [folder for workdir in workdirs for folder in _find_run_folders(workdir)]
    resolved = [os.path.realpath(folder) for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ValueError(f"--workdir names {folder} twice; name each run once")
    names = [pathlib.Path(path).name for path in resolved]
    if len(set(names)) < len(names):
        names = folders
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _find_run_folders(workdir: str) -> list[str]:
    """Return `workdir`, or the workdirs of its splits.

    Raises:
      ValueError: it is not a local workdir.
    """
    if "://" in workdir:
        raise ValueError(
            f"--workdir={workdir} is in Cloud Storage, but a report reads local folders: copy it "
            "with gcloud storage rsync --recursive"
        )
    path = pathlib.Path(workdir)
    if not path.is_dir():
        raise ValueError(f"there is no folder --workdir={workdir}; give that of a training run")
    splits = sorted(str(split) for split in path.glob("split[0-9]") if _is_workdir(split))
    if _is_workdir(path) and (path / "config.json").exists() or not splits:
        if not _is_workdir(path):
            raise ValueError(
                f"--workdir={workdir} is not the folder of a training run: it has none of "
                f"{', '.join(_RUN_FILES)}; give the --workdir of dualpath_jax.main"
            )
        return [workdir]
    return splits


def _is_workdir(path: pathlib.Path) -> bool:
    return any((path / name).exists() for name in _RUN_FILES)


def _read_run(workdir: str, name: str) -> RunRecord:
    """Read one workdir."""
    run = RunRecord(workdir, name)
    run.environment = _read_json_file(
        run, "environment.json", "train", "versions, devices and command"
    )
    run.config = _read_config(run)
    _read_metrics(run)
    _read_results(run)
    try:
        run.probe = read_probe(workdir)
    except (OSError, ValueError) as problem:
        run.report_missing(f"the probe cannot be read: {problem}; run it again")
    if run.results:
        try:
            names, rows = read_predictions(workdir, run.results)
            run.predictions = _parse_predictions(rows)
            run.class_names = _parse_class_names(names)
        except (ValueError, OSError) as problem:
            run.predictions = None
            run.report_missing(
                f"no per-class accuracy, confusions, mistakes and calibration: {problem}",
                run.command("eval"),
            )
    _read_class_names(run)
    _count_parameters(run)
    return run


def _read_json_file(run: RunRecord, name: str, mode: str, content: str) -> dict[str, Any]:
    """Read a JSON file of the workdir; return {} and report it if it is missing or damaged.

    Args:
      run: the run; gets an entry in `missing`.
      name: name of the file.
      mode: --mode of the command that writes the file, "train" or "eval".
      content: what the file holds, in the plural, for the report.
    """
    path = pathlib.Path(run.workdir) / name
    try:
        return read_json(path, dict)
    except FileNotFoundError:
        run.report_missing(f"no {name}: the {content} are unknown", run.command(mode))
    except (ValueError, OSError) as problem:
        run.report_missing(f"{name} cannot be read: {problem}", run.command(mode))
    return {}


def _read_config(run: RunRecord) -> dict[str, Any]:
    """Read `RunRecord.config`."""
    saved = _read_json_file(run, "config.json", "train", "settings")
    try:
        return restore_config(saved).to_dict() if saved else {}
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        run.report_missing(
            f"config.json is not a valid configuration ({reason})", run.command("train")
        )
        return {}


def _is_number(value: Any) -> bool:
    """Return True for a finite number of a magnitude that charts can draw."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -1e18 < value < 1e18


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 0


def _read_metrics(run: RunRecord) -> None:
    """Read metrics.jsonl and the planned number of steps."""
    path = epath.Path(run.workdir) / "metrics.jsonl"
    entries, bad = [], 0
    try:
        lines = read_lines(path, _MAX_METRICS_BYTES)
    except FileNotFoundError:
        lines = []
    except (ValueError, OSError) as problem:
        lines = []
        run.report_missing(f"metrics.jsonl cannot be read: {problem}", run.command())
    for line in filter(None, lines):
        try:
            entry = parse_json(line, dict, path)
        except ValueError:
            bad += 1  # the process died while writing this line, or the file is damaged
            continue
        if _is_count(entry.get("step")) and isinstance(entry.get("split"), str):
            entries.append({k: v for k, v in entry.items() if isinstance(v, int | float | str)})
        else:
            bad += 1
    run.training = [entry for entry in entries if not is_evaluation(entry)]
    run.evaluations = [entry for entry in entries if is_evaluation(entry)]
    if bad:
        run.report_missing(f"metrics.jsonl has unreadable lines, which are left out: {bad}")
    total = run.config.get("num_train_steps") or run.environment.get("num_train_steps")
    run.num_train_steps = total if _is_count(total) else None
    if not run.training:
        run.report_missing(
            "no entries about training in metrics.jsonl: there are no curves", run.command()
        )
        return
    last = run.training[-1]["step"]
    if run.num_train_steps is not None and last < run.num_train_steps and not _ended_early(run):
        what = f"the training is not finished: step {last:,} of {run.num_train_steps:,}"
        run.report_missing(f"{what}; the same command resumes it", run.command())


def _ended_early(run: RunRecord) -> bool:
    """Return whether early stopping has ended the training of a run."""
    patience = run.config.get("early_stopping_evaluations")
    criterion = run.settings.get("eval.criterion")
    by_split: dict[str, list[float]] = {}
    for entry in run.evaluations:
        score = entry["top1"]
        if criterion == "mean_class_accuracy":
            score = entry.get(criterion, score)
        by_split.setdefault(entry["split"], []).append(score)
    return _is_count(patience) and any(stops_early(s, patience) for s in by_split.values())


def _read_results(run: RunRecord) -> None:
    """Read results.json and check its values."""
    name = "results.json"
    if not (pathlib.Path(run.workdir) / name).exists():
        run.report_missing("no evaluation: there are no final scores", run.command("eval"))
        return
    results = _read_json_file(run, name, "eval", "final scores")
    if not results:
        return
    wrong = [key for key in _SCORE_KEYS if not _is_fraction(results.get(key))]
    wrong += [key for key in _COUNT_KEYS if not _is_count(results.get(key))]
    if wrong:
        values = ", ".join(f"{key}={truncated_repr(results.get(key))}" for key in wrong)
        run.report_missing(f"{name} is damaged ({values})", run.command("eval"))
        return
    run.results = results
    is_best = run.settings.get("eval.checkpoint") == "best"
    if run.training and results["step"] < run.training[-1]["step"] and not is_best:
        run.report_missing(
            f"the evaluation is of step {results['step']:,}, but the training has continued",
            run.command("eval"),
        )


def _parse_predictions(rows: list[dict[str, Any]]) -> Predictions:
    """Convert rows of predictions to arrays.

    Raises:
      ValueError: a row is damaged.
    """
    try:
        predictions = Predictions(
            ids=[str(row["id"]) for row in rows],
            labels=np.array([row["label"] for row in rows], np.int64),
            classes=np.array([row["classes"] for row in rows], np.int64),
            probabilities=np.array([row["probabilities"] for row in rows], np.float64),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise ValueError(f"the predictions are damaged ({problem})") from None
    shape = predictions.classes.shape
    probabilities = predictions.probabilities
    if (
        len(shape) != 2
        or 0 in shape
        or probabilities.shape != shape
        # Rounded float32 values may exceed 1 slightly.
        or not ((probabilities >= 0) & (probabilities <= 1.001)).all()
        or min(predictions.labels.min(), predictions.classes.min()) < 0
    ):
        raise ValueError("the predictions are damaged (these are not classes and probabilities)")
    return predictions


def _parse_class_names(names: Any) -> list[str]:
    """Return class names from a file as text; [] if they are not a list."""
    return [str(name) for name in names] if isinstance(names, list) else []


def _read_class_names(run: RunRecord) -> None:
    """Complete `run.class_names`, which may hold names from the predictions.

    Without any it takes them from a checkpoint, otherwise from the data set. Classes that still
    lack a name are numbered.
    """
    sources = iter([_class_names_from_checkpoint, _class_names_from_data])
    while not run.class_names and (source := next(sources, None)):
        run.class_names = _parse_class_names(source(run))
    needed = 0
    if run.predictions is not None:
        needed = 1 + int(max(run.predictions.labels.max(), run.predictions.classes.max()))
    if needed > 100_000:
        run.predictions = None
        run.report_missing(
            f"the predictions are damaged (they have a class {needed - 1:,})", run.command("eval")
        )
    elif needed > len(run.class_names):
        known = len(run.class_names)
        run.report_missing(f"classes {known} to {needed - 1} have no names", run.command("eval"))
        run.class_names += [f"class {number}" for number in range(known, needed)]


def _class_names_from_checkpoint(run: RunRecord) -> Any:
    """Return the class names in the newest checkpoint; [] without one."""
    if not (pathlib.Path(run.workdir) / "checkpoints").is_dir():
        return []
    try:
        checkpoints = Checkpoints(run.workdir, read_only=True)
        step = checkpoints.latest_step()
        return [] if step is None else checkpoints.read_metadata(step)["class_names"]
    except (DamagedCheckpoint, ValueError, OSError):
        return []


def _class_names_from_data(run: RunRecord) -> Any:
    """Return the class names of the prepared data; [] if it is not there."""
    folder = run.settings.get("data.dir")
    try:
        return dataset_metadata.read_class_names(folder) if folder else []
    except (ValueError, OSError):
        return []


def _count_parameters(run: RunRecord) -> None:
    """Set `run.parameters` from the model that the run's configuration describes."""
    if not run.config or not run.class_names:
        unknown = "configuration" if not run.config else "number of classes"
        run.report_missing(f"no table of parameters: the {unknown} is unknown", run.command("eval"))
        return
    try:
        config = ml_collections.ConfigDict(run.config)
        model = abstract.abstract_model(config, len(run.class_names))
    except INVALID_CONFIG_ERRORS as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        run.report_missing(
            f"no table of parameters: config.json does not describe a model ({reason})"
        )
        return
    run.parameters = param_tree.parameter_groups(model.params, model.mask)


def metric_points(entries: list[dict[str, Any]], key: str) -> Iterator[tuple[float, float]]:
    """Yield (step, value) of the entries that have a finite number under `key`."""
    for entry in entries:
        if _is_number(entry.get(key)):
            yield float(entry["step"]), float(entry[key])


def format_value(value: Any) -> str:
    """Format a value for the page: text as it is, anything else as Python writes it."""
    return value if isinstance(value, str) else repr(value)

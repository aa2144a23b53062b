"""What runs left in their workdirs, read for a report. What is not there is told, not an error.

Public: `RunRecord`, `MissingResult`, `Predictions`, `read_runs`.
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
from dualpath_jax.runtime.safe_read import parse_json, read_json, truncated_repr
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from dualpath_jax.training.metrics_logger import is_evaluation
from dualpath_jax.training.predictions import read_predictions

_PROGRAM = "python -m dualpath_jax.main"
_LEFT = ("config.json", "metrics.jsonl", "results.json", "environment.json")  # any of these
_SCORES = ("top1", "top5", "mean_class_accuracy")  # of results.json, in 0..1
_COUNTS = ("num_videos", "step")  # likewise


@dataclasses.dataclass(frozen=True)
class MissingResult:
    """Something that the report would show, and the command that makes it ("" where none does)."""

    what: str
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the evaluation said of n videos; most probable class first, K of them.

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
        """bool [n]: is the most probable class the label?"""
        return self.classes[:, 0] == self.labels


@dataclasses.dataclass
class RunRecord:
    """What is known of a run. Whatever could not be read is empty, and listed in `missing`.

    Attributes:
      workdir: its folder.
      name: short, different for each run of a report.
      config: of config.json, nested, with defaults for keys that are younger; {} if not known.
      training, evaluations: entries of metrics.jsonl: of steps, and of evaluations on the way.
      results: of results.json.
      environment: of environment.json.
      class_names: one per class; "class 3" where a name is unknown.
      predictions: of every evaluated video.
      parameters: see `params.parameter_groups`.
      num_train_steps: that the run is to have; None where nothing tells.
    """

    workdir: str
    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: list[str] = dataclasses.field(default_factory=list)
    predictions: Predictions | None = None
    parameters: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    num_train_steps: int | None = None
    missing: list[MissingResult] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted key."""
        return flatten_config(self.config)

    def command(self, mode: str = "train") -> str:
        """The command line that trains or evaluates this run; CONFIG where it is not known."""
        words = [*_PROGRAM.split(), "--config=configs/CONFIG.py"]
        recorded = self.environment.get("command")
        if isinstance(recorded, str) and recorded.startswith(f"{_PROGRAM} "):
            kept = shlex.split(recorded)
            words = [word for word in kept if not word.startswith(("--workdir=", "--mode="))]
        words.append(f"--workdir={self.workdir}")
        return shlex.join([*words, "--mode=eval"] if mode == "eval" else words)

    def report_missing(self, what: str, command: str = "") -> None:
        """Something is missing."""
        self.missing.append(MissingResult(what, command))


def read_runs(workdirs: Sequence[str]) -> list[RunRecord]:
    """The runs of some workdirs; one that holds several splits (HMDB51's "all") is several runs.

    Raises:
      ValueError: not a workdir, or one that is named twice; says which.
    """
    folders = [folder for workdir in workdirs for folder in _folders(workdir)]
    resolved = [os.path.realpath(folder) for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ValueError(f"--workdir names {folder} twice; name each run once")
    names = [pathlib.Path(path).name for path in resolved]
    if len(set(names)) < len(names):
        names = folders
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _folders(workdir: str) -> list[str]:
    """`workdir`, or the workdirs of its splits; ValueError if it is none."""
    if "://" in workdir:
        raise ValueError(
            f"--workdir={workdir} is in Cloud Storage, and reports are made of local folders: copy "
            "it with gcloud storage rsync --recursive"
        )
    path = pathlib.Path(workdir)
    if not path.is_dir():
        raise ValueError(f"there is no folder --workdir={workdir}; give that of a training run")
    splits = sorted(str(split) for split in path.glob("split[0-9]") if _is_workdir(split))
    if _is_workdir(path) and (path / "config.json").exists() or not splits:
        if not _is_workdir(path):
            raise ValueError(
                f"--workdir={workdir} is not that of a training run: it has none of "
                f"{', '.join(_LEFT)}; give the --workdir of dualpath_jax.main"
            )
        return [workdir]
    return splits


def _is_workdir(path: pathlib.Path) -> bool:
    return any((path / name).exists() for name in _LEFT)


def _read_run(workdir: str, name: str) -> RunRecord:
    run = RunRecord(workdir, name)
    run.environment = _read(run, "environment.json", "train", "versions, devices and command")
    run.config = _config(run)
    _read_metrics(run)
    _read_results(run)
    if run.results:
        try:
            names, rows = read_predictions(workdir, run.results)
            run.predictions = _predictions(rows)
            run.class_names = _checked_names(names)
        except ValueError as problem:
            run.predictions = None
            run.report_missing(
                f"no per-class accuracy, confusions, mistakes and calibration: {problem}",
                run.command("eval"),
            )
    _read_class_names(run)
    _count_parameters(run)
    return run


def _read(run: RunRecord, name: str, mode: str, what: str) -> dict[str, Any]:
    """A JSON file of the workdir; empty where it is not there or damaged."""
    path = pathlib.Path(run.workdir) / name
    try:
        return read_json(path, dict)
    except FileNotFoundError:
        run.report_missing(f"no {name}: {what} are not known", run.command(mode))
    except (ValueError, OSError) as problem:
        run.report_missing(f"{name} cannot be read: {problem}", run.command(mode))
    return {}


def _config(run: RunRecord) -> dict[str, Any]:
    """`Run.config`."""
    saved = _read(run, "config.json", "train", "settings")
    try:
        return restore_config(saved).to_dict() if saved else {}
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        run.report_missing(f"config.json is no configuration ({reason})", run.command("train"))
        return {}


def _is_number(value: Any) -> bool:
    """A finite number that can be drawn."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -1e18 < value < 1e18


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 0


def _read_metrics(run: RunRecord) -> None:
    path = epath.Path(run.workdir) / "metrics.jsonl"
    entries, bad = [], 0
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = parse_json(line, dict, path)
        except ValueError:
            bad += 1  # the process died while it wrote this, or the file is damaged
            continue
        if _is_count(entry.get("step")) and isinstance(entry.get("split"), str):
            entries.append(entry)
        else:
            bad += 1
    run.training = [entry for entry in entries if not is_evaluation(entry)]
    run.evaluations = [entry for entry in entries if is_evaluation(entry)]
    if bad:
        run.report_missing(f"lines of metrics.jsonl that cannot be read, and are left out: {bad}")
    total = run.config.get("num_train_steps") or run.environment.get("num_train_steps")
    run.num_train_steps = total if _is_count(total) else None
    if not run.training:
        run.report_missing(
            "no entries of training in metrics.jsonl: there are no curves", run.command()
        )
        return
    last = run.training[-1]["step"]
    if run.num_train_steps is not None and last < run.num_train_steps:
        what = f"the training is not finished: step {last:,} of {run.num_train_steps:,}"
        run.report_missing(f"{what}; the same command goes on", run.command())


def _read_results(run: RunRecord) -> None:
    name = "results.json"
    if not (pathlib.Path(run.workdir) / name).exists():
        run.report_missing("no evaluation: there are no final figures", run.command("eval"))
        return
    results = _read(run, name, "eval", "final figures")
    if not results:
        return
    wrong = [key for key in _SCORES if not _is_fraction(results.get(key))]
    wrong += [key for key in _COUNTS if not _is_count(results.get(key))]
    if wrong:
        values = ", ".join(f"{key}={truncated_repr(results.get(key))}" for key in wrong)
        run.report_missing(f"{name} is damaged ({values})", run.command("eval"))
        return
    run.results = results
    if run.training and results["step"] < run.training[-1]["step"]:
        run.report_missing(
            f"the evaluation is of step {results['step']:,}, and the training is further",
            run.command("eval"),
        )


def _predictions(rows: list[dict[str, Any]]) -> Predictions:
    """ValueError where a row is damaged."""
    try:
        found = Predictions(
            ids=[str(row["id"]) for row in rows],
            labels=np.array([row["label"] for row in rows], np.int64),
            classes=np.array([row["classes"] for row in rows], np.int64),
            probabilities=np.array([row["probabilities"] for row in rows], np.float64),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise ValueError(f"the predictions are damaged ({problem})") from None
    shape = found.classes.shape
    probable = found.probabilities
    if (
        len(shape) != 2
        or 0 in shape
        or probable.shape != shape
        or not ((probable >= 0) & (probable <= 1.001)).all()  # rounded, of float32
        or min(found.labels.min(), found.classes.min()) < 0
    ):
        raise ValueError("the predictions are damaged (not of classes and probabilities)")
    return found


def _checked_names(names: Any) -> list[str]:
    return [str(name) for name in names] if isinstance(names, list) else []


def _read_class_names(run: RunRecord) -> None:
    """Names from the predictions, else of a checkpoint, else of the data set; numbers at last."""
    sources = iter([_names_of_checkpoint, _names_of_data])
    while not run.class_names and (source := next(sources, None)):
        run.class_names = _checked_names(source(run))
    needed = 0
    if run.predictions is not None:
        needed = 1 + int(max(run.predictions.labels.max(), run.predictions.classes.max()))
    if needed > 100_000:
        run.predictions = None
        run.report_missing(
            f"the predictions are damaged (a class {needed - 1:,})", run.command("eval")
        )
    elif needed > len(run.class_names):
        known = len(run.class_names)
        run.report_missing(f"classes {known} to {needed - 1} have no names", run.command("eval"))
        run.class_names += [f"class {number}" for number in range(known, needed)]


def _names_of_checkpoint(run: RunRecord) -> Any:
    if not (pathlib.Path(run.workdir) / "checkpoints").is_dir():
        return []
    checkpoints = Checkpoints(run.workdir, read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        return []
    try:
        return checkpoints.read_metadata(step)["class_names"]
    except DamagedCheckpoint:
        return []


def _names_of_data(run: RunRecord) -> Any:
    folder = run.settings.get("data.dir")
    try:
        return dataset_metadata.read_class_names(folder) if folder else []
    except (ValueError, OSError):
        return []


def _count_parameters(run: RunRecord) -> None:
    if not run.config or not run.class_names:
        what = "settings" if not run.config else "number of classes"
        run.report_missing(f"no table of parameters: the {what} is not known", run.command("eval"))
        return
    try:
        config = ml_collections.ConfigDict(run.config)
        outline = abstract.abstract_model(config, len(run.class_names))
    except INVALID_CONFIG_ERRORS as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        run.report_missing(
            f"no table of parameters: config.json does not describe a model ({reason})"
        )
        return
    run.parameters = param_tree.parameter_groups(outline.params, outline.mask)


def metric_points(entries: list[dict[str, Any]], key: str) -> Iterator[tuple[float, float]]:
    """(step, value) of the entries that have a finite number under `key`."""
    for entry in entries:
        if _is_number(entry.get(key)):
            yield float(entry["step"]), float(entry[key])


def format_value(value: Any) -> str:
    """A setting or a fact for people; a text without its quotes."""
    return value if isinstance(value, str) else repr(value)

"""Chooses the learning rate of `dualpath finetune --tune` by short trainings.

Each try trains for a fifth of the steps, with a schedule of its own, and is evaluated once on the
validation split; the test split is not opened. The rate of the table in `config.small_sets`, a
third of it and three times of it are tried, then one more in the direction of the best if that is
the lowest or the highest. A try whose loss or gradient is not finite is never chosen.

    RUN/tune.json       the scores of all finished tries, written after each of them
    RUN/tune/lr0.001    the workdir of a try, from which an interrupted one continues
"""

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dualpath_jax import launch
from dualpath_jax.analysis.confidence import format_accuracy
from dualpath_jax.config.values import config_changes, score_origin
from dualpath_jax.runtime import files
from dualpath_jax.runtime.safe_read import read_json, truncated_repr
from dualpath_jax.training.inputs import changed_inputs, input_digests
from dualpath_jax.training.optimizer import count_train_steps

FILE = "tune.json"
FACTOR = 3  # between neighboring rates
MAX_TRIES = 4
_SHARE = 0.2  # of the steps of the training that a try takes
_MIN_STEPS = 100  # of a try, unless the training has fewer


@dataclasses.dataclass(frozen=True)
class Try:
    """Holds the result of a try.

    Attributes:
      learning_rate: peak learning rate.
      steps: length of the training.
      top1: fraction of correct validation videos, 0..1; None if the training diverged.
      mean_class_accuracy: of the same videos, 0..1, or None.
      num_videos: number of validation videos, or None.
    """

    learning_rate: float
    steps: int
    top1: float | None
    mean_class_accuracy: float | None
    num_videos: int | None

    @property
    def diverged(self) -> bool:
        """Return whether loss or gradient were not finite."""
        return self.top1 is None


def count_try_steps(config: Any, num_clips: int) -> int:
    """Return the steps of a try for the training of `config` on `num_clips` clips."""
    steps = count_train_steps(config, num_clips / config.data.batch_size)
    return min(steps, max(_MIN_STEPS, round(_SHARE * steps)))


def describe_plan(config: Any, num_clips: int) -> str:
    """Return a line that says what will be tried."""
    rates = ", ".join(f"{rate:g}" for rate in _first_rates(config))
    return (
        f"tuning: trainings of {count_try_steps(config, num_clips):,} steps with learning rates "
        f"{rates}, then one more beyond the best if that is an outer one; validation "
        f"{config.eval.criterion} decides"
    )


def choose_learning_rate(config: Any, run: str, num_clips: int) -> None:
    """Try learning rates, print a table, and set the best one in `config`.

    Args:
      config: of the training; its learning rate is the one in the middle.
      run: local folder of the run.
      num_clips: training clips.

    Raises:
      ValueError, OSError: a try cannot be trained, all tries diverged, or tune.json is of other
        settings or inputs, or damaged.
      Preempted: a signal stopped a try; its state is saved.
    """
    base = make_try_config(config, config.optimizer.learning_rate, num_clips)
    origin = {key: value for key, value in score_origin(base).items() if key != "criterion"}
    inputs = input_digests(base, (base.data.train_split, base.eval.split))
    record = {"config": json.loads(base.to_json_best_effort()), "origin": origin, "inputs": inputs}
    path = os.path.join(run, FILE)
    tries = _read_tries(path, record)

    def score(rate: float) -> Try:
        done = next((entry for entry in tries if entry.learning_rate == rate), None)
        if done is None:
            done = _train(config, rate, run, num_clips)
            tries.append(done)
            content = {
                "criterion": config.eval.criterion,
                "tries": list(map(dataclasses.asdict, tries)),
                **record,
            }
            files.write_text(path, json.dumps(content, indent=2) + "\n")
        return done

    results = search(score, _first_rates(config), config.eval.criterion)
    config.optimizer.learning_rate = choose(
        results, config.optimizer.learning_rate, config.eval.criterion
    ).learning_rate
    lines = format_table(results, config.optimizer.learning_rate, config.eval.criterion)
    print("\n".join(["tuning", *(f"  {line}" for line in lines)]), flush=True)


def make_try_config(config: Any, rate: float, num_clips: int) -> Any:
    """Return the configuration of a try: a short training, evaluated once, at its end."""
    steps = max(1, count_train_steps(config, num_clips / config.data.batch_size))
    tried = copy.deepcopy(config)
    tried.num_train_steps = count_try_steps(config, num_clips)
    tried.optimizer.warmup_epochs *= tried.num_train_steps / steps
    tried.optimizer.learning_rate = rate
    tried.early_stopping_evaluations = 0
    tried.eval.every_epochs = 0
    tried.eval.checkpoint, tried.eval.split = "latest", "validation"
    return tried


def search(score: Callable[[float], Try], rates: Sequence[float], criterion: str) -> list[Try]:
    """Return the results of `rates`, and of one more beyond the best if that is an outer one.

    Args:
      score: learning rate -> its result.
      rates: three rates; that of the table is in the middle.
      criterion: "top1" or "mean_class_accuracy".

    Raises:
      ValueError: all of `rates` diverged.
    """
    results = [score(rate) for rate in rates]
    best = choose(results, rates[1], criterion).learning_rate
    if best == rates[0]:
        results.append(score(_round(best / FACTOR)))
    elif best == rates[-1]:
        results.append(score(_round(best * FACTOR)))
    return sorted(results, key=lambda result: result.learning_rate)


def choose(results: Sequence[Try], usual: float, criterion: str) -> Try:
    """Return the best result; of equal ones, that whose rate is nearest to the `usual` one.

    Raises:
      ValueError: all diverged.
    """
    finite = [result for result in results if not result.diverged]
    if not finite:
        rates = ", ".join(f"{result.learning_rate:g}" for result in results)
        raise ValueError(
            f"the trainings with learning rates {rates} all diverged: set a lower "
            "--config.optimizer.learning_rate"
        )

    def rank(result: Try) -> tuple[float, float]:
        ratio = result.learning_rate / usual
        return getattr(result, criterion), -max(ratio, 1 / ratio)

    return max(finite, key=rank)


def format_table(results: Sequence[Try], chosen: float, criterion: str) -> list[str]:
    """Return the lines of a table of results, and one that names the chosen rate."""
    lines = [f"{'learning rate':<15}{'steps':<8}{'validation top-1':<33}mean class accuracy"]
    for result in results:
        start = f"{result.learning_rate:<15g}{result.steps:<8}"
        if result.diverged:
            lines.append(f"{start}diverged")
            continue
        top1 = format_accuracy(result.top1, result.num_videos)
        mark = "  chosen" if result.learning_rate == chosen else ""
        lines.append(f"{start}{top1:<33}{result.mean_class_accuracy:.4f}{mark}")
    return [*lines, f"learning rate {chosen:g} has the best {criterion}; the training uses it"]


def _first_rates(config: Any) -> tuple[float, float, float]:
    rate = config.optimizer.learning_rate
    return _round(rate / FACTOR), rate, _round(rate * FACTOR)


def _round(rate: float) -> float:
    """Round a rate to three digits, which is what names and tables show."""
    return float(f"{rate:.3g}")


def _train(config: Any, rate: float, run: str, num_clips: int) -> Try:
    """Train a try in its workdir, or continue there, and return its result."""
    print(f"tuning: learning rate {rate:g}", flush=True)
    tried = make_try_config(config, rate, num_clips)
    workdir = os.path.join(run, "tune", f"lr{rate:g}")
    try:
        launch.train_and_evaluate(tried, workdir, training=True)
    except FloatingPointError:
        print(f"tuning: learning rate {rate:g} diverged", flush=True)
        return Try(rate, tried.num_train_steps, None, None, None)
    results = read_json(os.path.join(workdir, "results.json"), dict)
    scores = {key: results[key] for key in ("top1", "mean_class_accuracy", "num_videos")}
    return Try(rate, tried.num_train_steps, **scores)


def _read_tries(path: str, record: Mapping[str, Any]) -> list[Try]:
    """Return the finished tries.

    Args:
      path: of tune.json.
      record: what it must say of settings, scores and inputs.

    Raises:
      ValueError: they were made with other settings or inputs, or the file is damaged.
    """
    if not os.path.exists(path):
        return []
    content = read_json(path, dict)
    try:
        tries = [_parse_try(entry) for entry in content["tries"]]
        changes = config_changes(content["config"], record["config"])
        for key, value in record["origin"].items():
            if (old := content.get("origin", {}).get(key, value)) != value:
                changes[key] = (old, value)
        inputs = changed_inputs(content.get("inputs", {}), record["inputs"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({truncated_repr(str(error))}): delete it, and all rates are tried "
            "again"
        ) from None
    if all(entry.diverged for entry in tries):
        changes.pop("optimizer.learning_rate", None)  # the remedy: no training has begun with it
    if changes or inputs:
        listed = [f"{key} was {old}, is {new}" for key, (old, new) in changes.items()]
        if inputs:
            listed.append(f"changed: {', '.join(inputs)}")
        raise ValueError(
            f"the tries in {path} had other settings: {', '.join(listed)}. Choose another --out, "
            f"or delete {path} and {os.path.dirname(path)}/tune"
        )
    return tries


def _parse_try(entry: Mapping[str, Any]) -> Try:
    """Return a try of tune.json.

    Raises:
      TypeError, ValueError: a value is missing, or not a number.
    """
    parsed = Try(**entry)
    scores = (parsed.top1, parsed.mean_class_accuracy, parsed.num_videos)
    numbers = (parsed.learning_rate, parsed.steps, *(() if scores == (None,) * 3 else scores))
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError("a value is not a number")
    return parsed

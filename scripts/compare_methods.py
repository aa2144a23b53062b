"""Compares the tuning methods on generated videos: choices on validation videos, then a test.

    python scripts/compare_methods.py
    python scripts/compare_methods.py --short --results=runs/short.jsonl

The first command makes docs/comparison.jsonl in many hours. It does not train again what is in that
file, and can therefore be interrupted and resumed. `--short` takes less than 30 minutes:
the set `paths`, six contestants, learning rates from docs/comparison.jsonl, 400 steps, one seed.
`python scripts/show_comparison.py` makes the tables and plots of docs/comparison.md.

Every contestant sees the same videos and augmentations (configs/finetune.py:demo); a tenth of the
steps is warm-up. By seed 0 and 400 steps of 16 clips on `paths`, its learning rate is chosen: 1e-3
and 3e-3 are tried, then the next one on the better side while validation top-1 rises, four at most.
Then the number of steps is doubled while validation top-1 rises by at least 0.02, to 1,600 at most.
Test videos are evaluated after these choices, with three seeds. On `demo` and `paths_large`, some
contestants are trained by one seed, with the rate of `paths`; the number of steps follows the same
rule.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dualpath_jax.cli import build_parser, positive, user_errors
from dualpath_jax.config import recipes
from dualpath_jax.runtime import console, environment

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "comparison.jsonl"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MAX_RATES = 4
FIRST_STEPS, MAX_STEPS, MIN_GAIN = 400, 1600, 0.02
SEEDS = (0, 1, 2)
# Changes to `recipes.finetune("demo")` or its form for a baseline: the backbone has width 96 and
# depth 4, for which the papers give no sizes.
CONTESTANTS: dict[str, dict[str, Any]] = {
    "dualpath": {},
    # The recipe before framesets held pictures of motion.
    "dualpath_differences": {
        "data.frameset_input": "abs_minus_mean",
        "model.readout_frame_width": 0,
    },
    "dualpath_paper": {"data.num_frames": 16, "model.pre_attention_adapter": True},
    "st_adapter": {"model.st_adapter.width": 48},
    "st_adapter_16": {"model.st_adapter.width": 48, "data.num_frames": 16},
    "aim": {"model.aim.num_temporal_adapters": 2, "model.aim.scale": 1.0},
    "evl": {"model.evl.num_blocks": 2},
    "adaptformer": {},
    "protuning": {"model.protuning.width": 32},
    "vpt": {},
    "videoprompt": {"model.videoprompt.num_prompts": 8},
    "lora": {},
    "zeroi2v": {"model.zeroi2v.offsets": (-1,)},  # the backbone has two heads
    "full": {},
    "linear": {},
}
METHODS = {  # others: their own name
    "dualpath_differences": "dualpath",
    "dualpath_paper": "dualpath",
    "st_adapter_16": "st_adapter",
}
ON_OTHER_SETS = ("dualpath", "dualpath_paper", "st_adapter", "adaptformer", "evl", "linear")
SETS = ("paths", "demo", "paths_large")


@dataclasses.dataclass(frozen=True)
class Run:
    """Names one training.

    Attributes:
      data: the set of videos, see `SETS`.
      contestant: see `CONTESTANTS`.
      learning_rate: peak learning rate.
      steps: number of steps of 16 clips.
      seed: of parameters and batches.
    """

    data: str
    contestant: str
    learning_rate: float
    steps: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the folder of the run, relative to that of all runs."""
        rate = f"lr{self.learning_rate:g}"
        return f"{self.data}/{self.contestant}/{rate}_steps{self.steps}_seed{self.seed}"


def run_config(run: Run) -> Any:
    """Return the configuration of a run, without the split that it is evaluated on."""
    from dualpath_jax.demo import paths, render

    sizes = {"paths": paths.SIZES, "demo": render.SIZES, "paths_large": paths.LARGE_SIZES}
    num_videos = sizes[run.data]["train"]
    if run.contestant in ("dualpath", "dualpath_differences"):
        config = recipes.finetune("demo")
    else:
        method = METHODS.get(run.contestant, run.contestant)
        config = recipes.baseline(recipes.own_videos("demo"), method)
    config.update_from_flattened_dict(CONTESTANTS[run.contestant])
    config.data.source, config.data.dir = run.data, f"data/{run.data}"
    config.optimizer.learning_rate = run.learning_rate
    config.seed = run.seed
    config.num_train_steps = config.checkpoint.every_steps = run.steps
    config.optimizer.warmup_epochs = 0.1 * run.steps * config.data.batch_size / num_videos
    config.eval.batch_size, config.eval.every_epochs = 40, 0
    return config


class Results:
    """Reads and writes the results, a line of JSON for each pair of run and split.

    Args:
      path: file of the results, created where it is missing.
      out: folder of the runs.
    """

    def __init__(self, path: pathlib.Path, out: pathlib.Path):
        self._path, self._out = path, out

    def read(self) -> list[dict[str, Any]]:
        """Return all results, in the order of the file."""
        if not self._path.exists():
            return []
        try:
            return [json.loads(line) for line in self._path.read_text().splitlines()]
        except ValueError as error:
            raise ValueError(f"{self._path} has a line that is not JSON: {error}") from None

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the first result that has the values `wanted`, or None."""
        return next((row for row in self.read() if wanted.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a result and return it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def score(self, run: Run, split: str) -> dict[str, Any]:
        """Return the result of `run` on `split`; train and evaluate where it is missing."""
        key = dataclasses.asdict(run) | {"split": split}
        row = self.find(**key)
        if row is None:
            start = time.monotonic()
            row = self.add(key | train_and_score(run, split, self._out / run.name))
            print(
                f"{run.name}  {split} top-1 {row['top1']:.4f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )
        return row


def train_and_score(run: Run, split: str, workdir: pathlib.Path) -> dict[str, Any]:
    """Train in `workdir`, or take the finished training there, and evaluate on `split`.

    Output goes to the workdir's log.txt.

    Returns:
      top1 (0..1), trainable_params, and correct, a "1" or "0" for each video by its name's order.
    """
    import jax

    from dualpath_jax import launch
    from dualpath_jax.training.predictions import read_predictions

    config = run_config(run)
    config.eval.split = split
    finished = (workdir / "checkpoints" / str(run.steps)).exists()
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        launch.train_and_evaluate(config, str(workdir), training=not finished)
    jax.clear_caches()
    results = json.loads((workdir / "results.json").read_text())
    _, rows = read_predictions(str(workdir), results)
    rows.sort(key=lambda row: row["id"])
    return {
        "top1": results["top1"],
        "trainable_params": results["trainable_params"],
        "correct": "".join(str(int(row["classes"][0] == row["label"])) for row in rows),
    }


def choose_rate(score: Callable[[float], float]) -> float:
    """Return the learning rate with the best score.

    1e-3 and 3e-3 are tried, then the next one on the better side while the score rises.

    Args:
      score: learning rate -> validation top-1.
    """
    scores = {rate: score(rate) for rate in (1e-3, 3e-3)}
    direction = 1 if scores[3e-3] > scores[1e-3] else -1
    best = max(scores, key=scores.get)
    while len(scores) < MAX_RATES:
        index = RATES.index(best) + direction
        if not 0 <= index < len(RATES):
            break
        scores[RATES[index]] = score(RATES[index])
        if scores[RATES[index]] <= scores[best]:
            break
        best = RATES[index]
    return best


def choose_steps(score: Callable[[int], float]) -> int:
    """Return the number of steps: doubled while the score rises by `MIN_GAIN`.

    Args:
      score: number of steps -> validation top-1.
    """
    steps = FIRST_STEPS
    while 2 * steps <= MAX_STEPS and score(2 * steps) - score(steps) >= MIN_GAIN:
        steps *= 2
    return steps


def compare(
    results: Results, sets: Sequence[str], contestants: Sequence[str], seeds: Sequence[int]
) -> None:
    """Make all choices and score the chosen runs on training and test videos.

    Args:
      results: has what was found before, and gets the rest.
      sets: of `SETS`.
      contestants: of `CONTESTANTS`.
      seeds: of the runs on `paths`; other sets have only seed 0.
    """

    def validate(*run: Any) -> float:
        return results.score(Run(*run), "validation")["top1"]

    for data in sets:
        for name in contestants:
            if data != "paths" and name not in ON_OTHER_SETS:
                continue
            rate = choose_rate(lambda rate: validate("paths", name, rate, FIRST_STEPS))  # noqa: B023
            steps = choose_steps(lambda steps: validate(data, name, rate, steps))  # noqa: B023
            for seed in seeds if data == "paths" else (0,):
                for split in ("train", "test"):
                    results.score(Run(data, name, rate, steps, seed), split)


def compare_shortly(results: Results, contestants: Sequence[str], seeds: Sequence[int]) -> None:
    """Score runs of `FIRST_STEPS` on `paths`, with the learning rates of `RESULTS`.

    Raises:
      ValueError: `RESULTS` has no test result of a contestant.
    """
    known, rates = Results(RESULTS, pathlib.Path()), {}
    for name in contestants:
        chosen = known.find(data="paths", contestant=name, split="test")
        if chosen is None:
            raise ValueError(f"{RESULTS} has no learning rate of {name}; run without --short")
        rates[name] = chosen["learning_rate"]
    for name, rate in rates.items():
        for seed in seeds:
            for split in ("train", "test"):
                results.score(Run("paths", name, rate, FIRST_STEPS, seed), split)


def measure_costs(results: Results, contestants: Sequence[str], out: pathlib.Path) -> None:
    """Add multiply-accumulates of a clip, and the time of a training step, for each contestant.

    The times are ratios to `dualpath`'s, medians over rounds in which the contestants take turns.
    """
    from dualpath_jax.analysis.efficiency import measure_efficiency

    names = list(dict.fromkeys(["dualpath", *contestants]))
    if all(results.find(contestant=name, split="costs") for name in names):
        return
    ratios = time_steps({name: run_config(Run("paths", name, 1e-3, 100)) for name in names}, out)
    for name in names:
        if not results.find(contestant=name, split="costs"):
            gmacs = measure_efficiency(run_config(Run("paths", name, 1e-3, 1))).gmacs_per_view
            costs = {"contestant": name, "split": "costs", "gmacs": gmacs}
            results.add(costs | {"step_time": ratios[name]})


def time_steps(
    configs: dict[str, Any], out: pathlib.Path, rounds: int = 9, steps: int = 2
) -> dict[str, float]:
    """Measure step times as ratios to `dualpath`'s in the same round; return their medians.

    Args:
      configs: configuration by contestant; contains "dualpath".
      out: folder of the runs; its subfolder `timing` is used and removed.
      rounds: how often all contestants are timed in turn.
      steps: steps per contestant and round.
    """
    import jax

    from dualpath_jax.data import pipeline
    from dualpath_jax.data.video_dataset import VideoDataset
    from dualpath_jax.models import registry as method_registry
    from dualpath_jax.training import sharding
    from dualpath_jax.training.experiment import build_experiment
    from dualpath_jax.training.step import make_train_step

    ready = {}
    for name, config in configs.items():
        dataset = VideoDataset(config.data.dir, config.data.train_split)
        with open(os.devnull, "w") as log, contextlib.redirect_stdout(log):
            experiment, state = build_experiment(config, str(out / "timing"), dataset)
        inputs = method_registry.clip_inputs(config)
        batch = next(pipeline.train_batches(dataset, config.data, 0, 0, 1, inputs=inputs))
        step = make_train_step(experiment.model, config, experiment.optimizer)
        step = jax.jit(step, donate_argnums=0)
        batch, frozen = sharding.shard_batch(batch, experiment.mesh), experiment.frozen
        ready[name] = [step, step(state, frozen, batch)[0], frozen, batch]
    shutil.rmtree(out / "timing", ignore_errors=True)
    # The contestants take turns, so that a slow moment of the machine affects all of them.
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (step, state, frozen, batch) in ready.items():
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, frozen, batch)
            jax.block_until_ready(metrics)
            times[name].append(time.perf_counter() - start)
            ready[name][1] = state
    pairs = {name: zip(t, times["dualpath"], strict=True) for name, t in times.items()}
    return {name: statistics.median(own / base for own, base in p) for name, p in pairs.items()}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    add = arg_parser.add_argument
    add("--results", help="file of the results (docs/comparison.jsonl); --short needs another one")
    add("--out", default="runs/compare", help="folder of the runs (runs/compare)")
    add("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET",
        help=f"sets to train on, of {', '.join(SETS)} (all)")  # fmt: skip
    add("--contestants", nargs="+", choices=list(CONTESTANTS), metavar="NAME",
        help=f"of {', '.join(CONTESTANTS)} (all; with --short six of them)")  # fmt: skip
    add("--seeds", type=positive(int), default=None, help="number of seeds (3; with --short 1)")
    add("--short", action="store_true", help="only a part that takes less than 30 minutes")
    add("--only_costs", action="store_true", help="only count and time, without training")
    return arg_parser


def main() -> None:
    args = parser().parse_args()
    import jax
    from absl import logging

    from dualpath_jax.demo import setup

    logging.set_verbosity(logging.ERROR)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "compiled"))
    with user_errors():
        if args.short and args.results is None:
            raise ValueError("--short needs --results=FILE, a file of its own")
        results = Results(pathlib.Path(args.results or RESULTS), out)
        contestants = args.contestants or list(ON_OTHER_SETS if args.short else CONTESTANTS)
        seeds = range(args.seeds or (1 if args.short else len(SEEDS)))
        if args.short and not args.only_costs:
            compare_shortly(results, contestants, seeds)
        elif not args.only_costs:
            compare(results, args.sets, contestants, seeds)
        setup.ensure_generated(run_config(Run("paths", "dualpath", 1e-3, 1)))
        measure_costs(results, contestants, out)


if __name__ == "__main__":
    environment.configure_environment()
    console.run(main)

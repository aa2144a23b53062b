"""Compares all tuning methods on the demo: equal steps, learning rate chosen by validation.

    python scripts/compare_methods.py --out=runs/compare

For each method: one training per learning rate of the grid with seed 0, scored on the validation
split; then seeds 0, 1 and 2 at the best learning rate, scored on the test split. Each score is
stored in OUT/scores.json at once; after an interruption, the same command resumes. It ends with the
table of docs/methods_on_the_demo.md. Step times are measured last, the methods in turn, and given
as ratios to DualPath's; `--only_times` only measures these, which takes a few minutes.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dualpath_jax.cli import build_parser, positive
from dualpath_jax.runtime import environment, files

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
METHOD_SETTINGS = {  # changes to the configuration for a backbone of width 96 and depth 4
    "dualpath": {"data.grid": (2, 2), "data.frame_scale": 2},
    "aim": {"model.aim.num_temporal_adapters": 2, "model.aim.scale": 1.0},
    "st_adapter": {"model.st_adapter.width": 48},
    "evl": {"model.evl.num_blocks": 2},
    "adaptformer": {},
    "protuning": {"model.protuning.width": 32},
    "vpt": {},
    "videoprompt": {"model.videoprompt.num_prompts": 8},
    "full": {},
    "linear": {},
}


def method_config(method: str, learning_rate: float, seed: int, steps: int):
    """Return the demo's configuration with 4 frames, for one run."""
    from configs import demo

    config = demo.get_config()
    config.data.num_frames = 4
    config.model.method = method
    config.update_from_flattened_dict(METHOD_SETTINGS[method])
    config.optimizer.learning_rate = learning_rate
    config.seed = seed
    config.num_train_steps = config.checkpoint.every_steps = steps
    return config


def build_run(config, workdir: str):
    """Build a run in `workdir`; return experiment, initial state and training split."""
    from dualpath_jax.data.video_dataset import VideoDataset
    from dualpath_jax.training.experiment import build_experiment
    from dualpath_jax.training.inputs import check_workdir

    check_workdir(workdir)
    dataset = VideoDataset(config.data.dir, config.data.train_split)
    return *build_experiment(config, workdir, dataset), dataset


def train_and_score(config, workdir: str, split: str) -> dict:
    """Train in `workdir`, unless the training is finished, and evaluate on `split`.

    Output goes to the workdir's log.txt.

    Returns:
      top1 (0..1) and trainable_params.
    """
    import jax

    from dualpath_jax import evaluate, train
    from dualpath_jax.data.video_dataset import VideoDataset

    os.makedirs(workdir, exist_ok=True)
    with open(f"{workdir}/log.txt", "a") as log, contextlib.redirect_stdout(log):
        experiment, state, dataset = build_run(config, workdir)
        evaluator = evaluate.Evaluator(experiment, VideoDataset(config.data.dir, split))
        state = train.train(experiment, state, dataset, evaluator)
        scores = evaluator.evaluate(state)
    jax.clear_caches()
    return {"top1": scores.top1, "trainable_params": experiment.trainable_params}


def time_steps(configs: dict, out: str, rounds: int = 9, steps: int = 4) -> dict[str, float]:
    """Measure step times as ratios to `dualpath`'s in the same round; return their medians.

    Args:
      configs: configuration by method; contains "dualpath".
      out: folder; gets a subfolder `timing`.
      rounds: how often all methods are timed in turn.
      steps: steps per method and round.
    """
    import jax

    from dualpath_jax.data import pipeline
    from dualpath_jax.models import registry as method_registry
    from dualpath_jax.training import sharding
    from dualpath_jax.training.step import make_train_step

    ready = {}
    for method, config in configs.items():
        with open(os.devnull, "w") as log, contextlib.redirect_stdout(log):
            experiment, state, dataset = build_run(config, f"{out}/timing")
        framesets = method_registry.uses_framesets(method)
        batch = next(pipeline.train_batches(dataset, config.data, 0, 0, 1, framesets=framesets))
        step = make_train_step(experiment.model, config, experiment.optimizer)
        step = jax.jit(step, donate_argnums=0)
        batch, frozen = sharding.shard_batch(batch, experiment.mesh), experiment.frozen
        ready[method] = [step, step(state, frozen, batch)[0], frozen, batch]
    # The methods take turns, so that a slow moment of the machine affects all of them.
    times: dict[str, list[float]] = {method: [] for method in ready}
    for _ in range(rounds):
        for method, (step, state, frozen, batch) in ready.items():
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, frozen, batch)
            jax.block_until_ready(metrics)
            times[method].append(time.perf_counter() - start)
            ready[method][1] = state
    pairs = {m: zip(t, times["dualpath"], strict=True) for m, t in times.items()}
    return {m: statistics.median(own / base for own, base in p) for m, p in pairs.items()}


class ScoreCache:
    """Stores results by key in a JSON file, which is replaced atomically."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._entries = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make) -> dict:
        """Return the entry `key`; creates it by `make()` and store it if it is missing."""
        if key not in self._entries:
            self._entries[key] = make()
            files.write_text(self._path, json.dumps(self._entries, indent=1) + "\n")
        return self._entries[key]


def compare_methods(out: pathlib.Path, methods: list[str], steps: int) -> list[dict]:
    """Train and scores all methods; return a row of results for each."""
    scores, rows, best = ScoreCache(out / "scores.json"), [], {}

    def score_run(method, learning_rate, seed, split):
        config = method_config(method, learning_rate, seed, steps)
        name = f"{method}/steps{steps}_lr{learning_rate:g}_seed{seed}"
        start = time.monotonic()
        entry = scores.get(
            f"{name}/{split}", lambda: train_and_score(config, f"{out}/{name}", split)
        )
        print(f"{name}  {split} {entry['top1']:.4f}  {time.monotonic() - start:.0f} s", flush=True)
        return entry

    for method in methods:
        search = {lr: score_run(method, lr, 0, "validation")["top1"] for lr in LEARNING_RATES}
        best[method] = max(search, key=search.get)
        tests = [score_run(method, best[method], seed, "test") for seed in SEEDS]
        rows.append(
            {
                "method": method,
                "trainable_params": tests[0]["trainable_params"],
                "learning_rate": best[method],
                "top1": [entry["top1"] for entry in tests],
            }
        )
    configs = {method: method_config(method, best[method], 0, steps) for method in methods}
    if "dualpath" in methods:
        key = f"step time/{steps}/{' '.join(configs)}"
        times = scores.get(key, lambda: time_steps(configs, str(out)))
        for row in rows:
            row["step_time"] = times[row["method"]]
    return rows


def format_table(rows: list[dict]) -> str:
    """Format the rows as a Markdown table, best method first."""
    lines = [
        "| method | trainable parameters | learning rate | top-1, mean of 3 seeds "
        "| lowest - highest | step time / DualPath's |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -statistics.mean(row["top1"])):
        top1 = row["top1"]
        lines.append(
            f"| `{row['method']}` | {row['trainable_params']:,} | {row['learning_rate']:g} "
            f"| {statistics.mean(top1):.3f} | {min(top1):.3f} - {max(top1):.3f} "
            f"| {row.get('step_time', float('nan')):.2f} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument(
        "--out", default="runs/compare", help="folder for runs and scores (runs/compare)"
    )
    arg_parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHOD_SETTINGS),
        choices=list(METHOD_SETTINGS),
        metavar="NAME",
        help=f"methods to compare, of {', '.join(METHOD_SETTINGS)} (all)",
    )
    arg_parser.add_argument(
        "--steps",
        type=positive(int),
        default=250,
        help="training steps of 16 clips, equal for all methods (250)",
    )
    arg_parser.add_argument(
        "--only_times", action="store_true", help="only measure step times, without training"
    )
    return arg_parser


def main() -> None:
    args = parser().parse_args()
    import jax
    from absl import logging

    from configs import demo as demo_config
    from dualpath_jax.demo import setup

    logging.set_verbosity(logging.ERROR)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "compiled"))
    setup.ensure_generated(demo_config.get_config())
    if args.only_times:
        methods = dict.fromkeys(["dualpath", *args.methods])
        configs = {m: method_config(m, LEARNING_RATES[0], 0, args.steps) for m in methods}
        for method, ratio in time_steps(configs, str(out)).items():
            print(f"{method:12} step time / DualPath's {ratio:.2f}")
        return
    print(format_table(compare_methods(out, args.methods, args.steps)))


if __name__ == "__main__":
    environment.configure_environment()
    main()

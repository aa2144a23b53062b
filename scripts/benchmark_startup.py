"""Measures the time from a command to its first training step, and to one prediction.

    python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo
    python scripts/benchmark_startup.py
    python scripts/benchmark_startup.py --other=../before --rounds=3

It starts the demo and a ViT-B/16 with random weights on the demo's videos, each with an empty and
with a filled compilation cache, and prints the CPU seconds of each stage: medians over the rounds.
The difference between both is compilation. The process that decodes videos is not counted. With
--other the package of another checkout is measured in turns, and medians of the ratios follow.
"""

import argparse
import contextlib
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs without installation

from dualpath_jax.cli import build_parser, positive  # noqa: E402
from dualpath_jax.runtime import console  # noqa: E402
from scripts.benchmarks import startup  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = build_parser(__doc__)
    add = result.add_argument
    add("--data", default="data/demo", help="the demo's prepared videos (data/demo)")
    add("--models", nargs="+", default=["demo", "b16"], choices=["demo", "b16"], help="(demo b16)")
    add("--rounds", type=positive(int), default=3, help="starts of each kind (3)")
    add("--other", metavar="DIR", help="another checkout, measured in turns with this one")
    return result


def list_options(model: str, data: str, folder: pathlib.Path) -> list[str]:
    """Return the options of a training of "demo" or "b16", whose weights are written to `folder`.

    Args:
      model: key of `--models`.
      data: the demo's prepared videos.
      folder: for the weights.
    """
    if model == "demo":
        config, weights = "demo", f"{data}/backbone.safetensors"
        more = []
    else:  # small frames, because the step itself is not of interest
        config, weights = "ssv2_vitb", str(folder / "b16.safetensors")
        more = ["--config.data.image_size=64"]
        startup.write_random_backbone(weights, "ViT-B/16")
    return [
        *(f"--config={ROOT}/configs/{config}.py", f"--config.data.dir={data}"),
        *(f"--config.backbone.checkpoint={weights}", "--config.data.batch_size=2", *more),
    ]


def save_model(options: list[str], workdir: pathlib.Path) -> None:
    """Train one step and stop when its checkpoint is saved, before the evaluation."""
    module = [sys.executable, "-m", "dualpath_jax.main"]
    more = [f"--workdir={workdir}", "--config.num_train_steps=1", "--quiet"]
    process = subprocess.Popen([*module, *options, *more], cwd=ROOT)
    while process.poll() is None and not (workdir / "checkpoints" / "1").exists():
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
    if not (workdir / "checkpoints" / "1").exists():
        raise ValueError("the training step of the measured model failed; its error is above")


def measure_model(
    model: str, data: str, roots: dict[str, str], rounds: int
) -> dict[tuple[str, str, str], list[dict[str, float]]]:
    """Measure all starts of a model in turns.

    Returns:
      (command, cache, name of the checkout) -> a result of `measure_start` for each round.
    """
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        options = list_options(model, data, folder)
        save_model(options, folder / "run")
        video = min(pathlib.Path(data, "raw", "videos").iterdir())
        for number in range(rounds):
            for kind in ("train", "predict"):
                for checkout in list(roots)[:: 1 if number % 2 == 0 else -1]:
                    cache = folder / f"cache-{kind}-{checkout}-{number}"
                    for state in ("cold", "cached"):
                        workdir = folder / f"{cache.name}-{state}"
                        arguments = [*options, f"--workdir={workdir}"]
                        if kind == "predict":
                            arguments = [f"--workdir={folder}/run", str(video)]
                        result = startup.measure_start(kind, arguments, cache, roots[checkout])
                        results.setdefault((kind, state, checkout), []).append(result)
                        text = " ".join(f"{name} {value:.2f}" for name, value in result.items())
                        print(model, kind, state, checkout, text, file=sys.stderr, flush=True)
    return results


def format_tables(model: str, results: dict, names: list[str]) -> list[str]:
    """Return the Markdown lines of a model's tables: seconds, then ratios of two checkouts."""
    columns = [*startup.STAGES, "total"]
    lines = [
        f"| {model} | cache | checkout | {' | '.join(columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for (kind, state, checkout), rounds in results.items():
        medians = [statistics.median(result[c] for result in rounds) for c in columns]
        cells = " | ".join(f"{value:.2f}" for value in medians)
        lines.append(f"| {kind} | {state} | {checkout} | {cells} |")
    for (kind, state, checkout), rounds in results.items():
        if len(names) == 2 and checkout == names[0]:
            pairs = list(zip(rounds, results[kind, state, names[1]], strict=True))
            ratio = statistics.median(a["total"] / b["total"] for a, b in pairs)
            lines.append(f"{model} {kind} {state}: {names[0]} / {names[1]}: {ratio:.2f}")
    return lines


def main() -> None:
    """Measure and print the tables."""
    arguments = parser().parse_args()
    roots = {"this": str(ROOT)}
    if arguments.other:
        roots["other"] = str(pathlib.Path(arguments.other).resolve())
    data = str(pathlib.Path(arguments.data).resolve())
    for model in arguments.models:
        results = measure_model(model, data, roots, arguments.rounds)
        print("\n".join(format_tables(model, results, list(roots))), flush=True)


if __name__ == "__main__":
    console.run(main)

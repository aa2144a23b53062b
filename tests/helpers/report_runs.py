"""Writes workdirs like those of finished trainings, with made-up results, for test_report.py."""

import json
import pathlib

import numpy as np

from configs import demo

NAMES = ["moves left", "moves right", "comes closer", "goes away", "turns", "rises", "falls", "<b>"]


def write_run(
    workdir: pathlib.Path, names=NAMES, num_videos=200, steps=1500, seed=0, wrong=0.2
) -> pathlib.Path:
    """Write a finished run of the demo's model with the classes `names`; return the workdir.

    Video i has class i % C. A share `wrong` of the videos is predicted as the next class. The data
    and the backbone that the files name do not exist.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    data_dir = _write_config_and_environment(workdir, steps, seed)
    _write_metrics(workdir, steps, rng)
    labels = np.arange(num_videos) % len(names)
    mistaken = rng.uniform(size=num_videos) < wrong
    rows = _make_predictions(labels, mistaken, len(names), rng)
    results = _write_results(workdir, mistaken, steps, data_dir)
    header = {key: results[key] for key in ("step", "split", "views")} | {"class_names": names}
    (workdir / "predictions").mkdir(exist_ok=True)
    text = "\n".join(map(json.dumps, [header, *rows])) + "\n"
    (workdir / "predictions" / "00000-of-00001.jsonl").write_text(text)
    return workdir


def _write_config_and_environment(workdir: pathlib.Path, steps: int, seed: int) -> str:
    """Write config.json and environment.json; return the folder of the data."""
    config = demo.get_config("paper")
    config.seed, config.num_train_steps = seed, steps
    config.data.dir = str(workdir / "no_data")
    config.backbone.checkpoint = str(workdir / "no_backbone.safetensors")
    (workdir / "config.json").write_text(config.to_json_best_effort())
    environment = {
        "command": "python -m dualpath_jax.main --config=configs/demo.py --workdir=elsewhere",
        "versions": {"dualpath_jax": "0.1.0", "jax": "0.10.2"},
        "devices": {"TPU v5e": 16},
        "num_train_steps": steps,
    }
    (workdir / "environment.json").write_text(json.dumps(environment))
    return config.data.dir


def _write_metrics(workdir: pathlib.Path, steps: int, rng: np.random.Generator) -> None:
    """Write metrics.jsonl: an entry every 100 steps, and one evaluation halfway."""
    lines = []
    for step in range(100, steps + 1, 100):
        progress = step / steps
        entry = {
            "step": step,
            "split": "train",
            "loss": 2.0 * (1.1 - progress) + 0.1 * rng.uniform(),
            "accuracy": 0.9 * progress,
            "learning_rate": 3e-3 * (1 - progress),
            "data_wait": 0.05,
        }
        lines.append(json.dumps(entry))
    lines.append(json.dumps({"step": steps // 2, "split": "test", "top1": 0.5}))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _make_predictions(
    labels: np.ndarray, mistaken: np.ndarray, num_classes: int, rng: np.random.Generator
) -> list[dict]:
    """Return a row per video; its first class is the label or, if mistaken, the next class."""
    rows = []
    for i, label in enumerate(labels.tolist()):
        first = (label + int(mistaken[i])) % num_classes
        others = [c % num_classes for c in range(first + num_classes - 1, first, -1)][:4]
        top = float(rng.uniform(0.4, 1.0))
        rest = [(1 - top) / 5] * len(others)
        row = {"id": f"v{i}", "label": label, "classes": [first, *others]}
        rows.append(row | {"probabilities": [round(p, 6) for p in (top, *rest)]})
    return rows


def _write_results(workdir: pathlib.Path, mistaken: np.ndarray, steps: int, data_dir: str) -> dict:
    """Write results.json; return its content."""
    top1 = float(1 - mistaken.mean())
    results = {
        "top1": top1,
        "top5": 1.0,
        "mean_class_accuracy": top1,
        "num_videos": len(mistaken),
        "views": "16x1x1",
        "total_params": 742824,
        "trainable_params": 264168,
        "step": steps,
        "dataset": data_dir,
        "split": "test",
        "backbone": "custom",
        "backbone_sha256": "0" * 64,
        "synthetic": False,
    }
    (workdir / "results.json").write_text(json.dumps(results))
    return results

"""Workdirs as a training leaves them, made up. For test_report.py.

Public: `write_run`, `NAMES`.
"""

import json
import pathlib

import numpy as np

from configs import demo

NAMES = ["moves left", "moves right", "comes closer", "goes away", "turns", "rises", "falls", "<b>"]


def write_run(
    workdir: pathlib.Path, names=NAMES, num_videos=200, steps=1500, seed=0, wrong=0.2
) -> pathlib.Path:
    """A finished run of the demo's model with `names`; a share `wrong` of its videos are mistaken.

    Video i is of class i % C, a mistaken one is taken for the next class. Data and weights that its
    files name are not there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    rng, classes = np.random.default_rng(seed), len(names)
    config = demo.get_config()
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
    lines = []
    for step in range(100, steps + 1, 100):
        part = step / steps
        entry = {
            "step": step,
            "split": "train",
            "loss": 2.0 * (1.1 - part) + 0.1 * rng.uniform(),
            "accuracy": 0.9 * part,
            "learning_rate": 3e-3 * (1 - part),
            "data_wait": 0.05,
        }
        lines.append(json.dumps(entry))
    lines.append(json.dumps({"step": steps // 2, "split": "test", "top1": 0.5}))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    labels = np.arange(num_videos) % classes
    mistaken = rng.uniform(size=num_videos) < wrong
    rows = []
    for i, label in enumerate(labels.tolist()):
        first = (label + int(mistaken[i])) % classes
        others = [c % classes for c in range(first + classes - 1, first, -1)][:4]
        top = float(rng.uniform(0.4, 1.0))
        rest = [(1 - top) / 5] * len(others)
        row = {"id": f"v{i}", "label": label, "classes": [first, *others]}
        rows.append(row | {"probabilities": [round(p, 6) for p in (top, *rest)]})
    top1 = float(1 - mistaken.mean())
    results = {
        "top1": top1,
        "top5": 1.0,
        "mean_class_accuracy": top1,
        "num_videos": num_videos,
        "views": "16x1x1",
        "total_params": 742824,
        "trainable_params": 264168,
        "step": steps,
        "dataset": config.data.dir,
        "split": "test",
        "backbone": "custom",
        "backbone_sha256": "0" * 64,
        "synthetic": False,
    }
    (workdir / "results.json").write_text(json.dumps(results))
    header = {key: results[key] for key in ("step", "split", "views")} | {"class_names": names}
    (workdir / "predictions").mkdir(exist_ok=True)
    text = "\n".join(map(json.dumps, [header, *rows])) + "\n"
    (workdir / "predictions" / "00000-of-00001.jsonl").write_text(text)
    return workdir

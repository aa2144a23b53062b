"""Compares the workdirs of two trainings bit for bit."""

import json
import pathlib
from typing import Any

import numpy as np

from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.metrics_logger import PROCESS_METRICS


def read_metric_entries(workdir: str) -> list[dict[str, Any]]:
    """Return the entries of metrics.jsonl, without the metrics of the process (such as timing)."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in entry.items() if k not in PROCESS_METRICS} for entry in entries]


def find_run_differences(left: str, right: str) -> list[str]:
    """Return a line for each difference between two finished runs.

    It compares the newest checkpoints (trainable parameters, optimizer state, step), every entry of
    metrics.jsonl, and results.json, bit for bit.
    """
    states = [_read_newest_checkpoint(workdir) for workdir in (left, right)]
    differences = _list_differences("checkpoint", *states)
    metrics = [
        {i: json.dumps(e) for i, e in enumerate(read_metric_entries(w))} for w in (left, right)
    ]
    differences += _list_differences("entry of metrics.jsonl", *metrics)
    results = [json.loads((pathlib.Path(w) / "results.json").read_text()) for w in (left, right)]
    return differences + _list_differences("results.json", *results)


def _read_newest_checkpoint(workdir: str) -> dict[str, tuple]:
    """Return (shape, dtype, bytes) of each array of the newest checkpoint, by its path."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f"no checkpoints in {workdir}/checkpoints")
    leaves, _ = checkpoints.read(step)
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    return {name: (a.shape, str(a.dtype), a.tobytes()) for name, a in arrays.items()}


def _list_differences(what: str, left: dict, right: dict) -> list[str]:
    """Return a line for each key whose values differ, or that only one dictionary has."""
    names = sorted(left.keys() | right.keys())
    missing = object()
    return [f"{what}: {n}" for n in names if left.get(n, missing) != right.get(n, missing)]

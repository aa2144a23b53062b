"""Are two trainings the same, bit for bit? What their workdirs hold is compared.

Public: `read_metric_entries`, `find_run_differences`.
"""

import json
import pathlib
from typing import Any

import numpy as np

from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.metrics_logger import PROCESS_METRICS


def read_metric_entries(workdir: str) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl, without what they tell of the process."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    return [{k: v for k, v in entry.items() if k not in PROCESS_METRICS} for entry in kept]


def find_run_differences(left: str, right: str) -> list[str]:
    """What differs between two finished runs: a line each; none if they are bit for bit equal.

    Compared are the newest checkpoints (trainables, optimizer state, step), every entry of
    metrics.jsonl, and results.json.
    """
    states = [_state(workdir) for workdir in (left, right)]
    found = _differing("checkpoint", *states)
    metrics = [
        {i: json.dumps(e) for i, e in enumerate(read_metric_entries(w))} for w in (left, right)
    ]
    found += _differing("entry of metrics.jsonl", *metrics)
    results = [json.loads((pathlib.Path(w) / "results.json").read_text()) for w in (left, right)]
    return found + _differing("results.json", *results)


def _state(workdir: str) -> dict[str, tuple]:
    """Leaves of the newest checkpoint by path: shape, dtype, bytes."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f"no checkpoints in {workdir}/checkpoints")
    leaves, _ = checkpoints.read(step)
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    return {name: (a.shape, str(a.dtype), a.tobytes()) for name, a in arrays.items()}


def _differing(what: str, left: dict, right: dict) -> list[str]:
    names = sorted(left.keys() | right.keys())
    missing = object()
    return [f"{what}: {n}" for n in names if left.get(n, missing) != right.get(n, missing)]

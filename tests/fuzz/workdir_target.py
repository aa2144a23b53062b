"""Defines the fuzzing target for workdirs, with their checkpoints, links and pipes."""

import contextlib
import pathlib
import random
from unittest import mock

import numpy as np

from dualpath_jax.report import page, run_reader
from dualpath_jax.runtime import file_lock, files
from dualpath_jax.training import inputs, metrics_logger
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from dualpath_jax.training.predictions import PredictionWriter
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_text
from tests.fuzz.sandbox import FIFO, LINK_TO_FILE, LINK_TO_FOLDER, Case, Target
from tests.helpers.report_runs import write_run

_NOT_FILES = (FIFO, LINK_TO_FILE, LINK_TO_FOLDER)


class Workdirs(Target):
    """Reads and changes a workdir as the commands do.

    "report" draws the page of the run, "checkpoint" reads the newest checkpoint, and "write" locks
    the workdir and writes what an evaluation and a resumed training write. Every third damage puts
    a link or a pipe in the place of a file or a folder.
    """

    changes_files = True
    seconds = 15.0

    def __init__(self, folder: pathlib.Path):
        write_run(folder / "run", num_videos=8, steps=300)
        metadata = dict.fromkeys(("method", "backbone_name", "backbone_sha256"), "x")
        metadata |= {"class_names": ["a", "b"], "config": {"seed": 0}}
        checkpoints = Checkpoints(str(folder / "run"))
        arrays = {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float32)}
        checkpoints.save(1, arrays, metadata)
        checkpoints.close()
        paths = [path for path in sorted((folder / "run").rglob("*")) if path.is_file()]
        content = {str(path.relative_to(folder / "run")): path.read_bytes() for path in paths}
        self._seeds = [Case(kind, content) for kind in ("report", "checkpoint", "write")]

    def seeds(self) -> list[Case]:
        return self._seeds

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        names = [
            n for n in seed.files if n.startswith("checkpoints/") == (seed.kind == "checkpoint")
        ]
        name = rng.choice(names)
        if rng.random() < 1 / 3:
            return Case(seed.kind, _replace_by_other(rng, seed.files, name))
        content = seed.files[name]
        if name.endswith(".json") and rng.random() < 0.7:
            content = mutate_json(rng, content)
        elif name.endswith(".jsonl"):
            lines = content.splitlines(keepends=True)
            place = rng.randrange(len(lines))
            if rng.random() < 0.5:
                lines[place] = mutate_json(rng, lines[place]) + b"\n"
            content = b"".join(lines) if rng.random() < 0.7 else mutate_text(rng, content)
        else:
            content = mutate_bytes(rng, content)
        return Case(seed.kind, seed.files | {name: content})

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        del out
        workdir = str(folder)
        if kind == "report":
            # Tracing the model takes seconds; targets with configs of their own cover it.
            with mock.patch.object(run_reader, "_count_parameters"):
                page.render_page(run_reader.read_runs([workdir]), [], {})
        elif kind == "checkpoint":
            _read_checkpoint(workdir)
        else:
            _write_results(workdir)


def _replace_by_other(
    rng: random.Random, contents: dict[str, bytes], name: str
) -> dict[str, bytes]:
    """Put a link or a pipe in the place of a file or of a folder above it, or add one."""
    kind = rng.choice(_NOT_FILES)
    parts = name.split("/")
    place = "/".join(parts[: rng.randrange(1, len(parts) + 1)])
    if rng.random() < 0.3:
        place = rng.choice((".lock", ".shared", "predictions/00001-of-00002.jsonl", "results.tmp"))
    kept = {n: c for n, c in contents.items() if n != place and not n.startswith(f"{place}/")}
    return kept | {place: kind}


def _read_checkpoint(workdir: str) -> None:
    """Read the newest checkpoint without a change, as evaluation and export do."""
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if (step := checkpoints.latest_step()) is None:
            raise ValueError("no checkpoint")
        checkpoints.read(step)
    except DamagedCheckpoint as damage:  # as `trained_model` and `restore` report it
        raise ValueError(str(damage)) from None
    finally:
        with contextlib.suppress(OSError):
            checkpoints.close()


def _write_results(workdir: str) -> None:
    """Write what an evaluation and a resumed training write."""
    inputs.check_workdir(workdir)
    with file_lock.exclusive_lock(workdir, "--workdir"):
        files.remove_incomplete(workdir)
        logger = metrics_logger.MetricsLogger(workdir, 5, 1)
        logger.resume(200, evaluated=True)
        writer = PredictionWriter(workdir, {"step": 1}, ["v"])
        writer.close()
        for name in ("config.json", "environment.json", "results.json"):
            files.write_text(pathlib.Path(workdir) / name, "{}")
        metrics_logger.advise_after_training(workdir, 8, "test", 0.5)

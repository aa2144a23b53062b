"""Writes and reads the predictions of an evaluation: one file of JSON lines per process.

The file of process 0 of 4 is WORKDIR/predictions/00000-of-00004.jsonl. Its first line describes the
evaluation; each other line is the prediction for a video:

    {"step": 1500, "split": "test", "views": "16x1x1", "class_names": [...]}
    {"id": "v17", "label": 3, "classes": [3, 1, ...], "probabilities": [0.9, ...]}

"classes" are the five most probable ones, or all if there are fewer. "probabilities" are theirs, in
0..1, averaged over views.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dualpath_jax.runtime import files, gcs
from dualpath_jax.runtime.safe_read import parse_json, read_lines

FOLDER = "predictions"
_FILE_NAME = re.compile(r"\d{5}-of-\d{5}\.jsonl")
_SHARED_WITH_RESULTS = ("step", "split", "views")  # keys of the first line and of results.json


def top_predictions(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the most probable classes by the probabilities averaged over views.

    Args:
      logits: [B, V, classes] float32.

    Returns:
      probabilities [B, 5] float32 in 0..1, in descending order; classes [B, 5] int32. There are
      fewer columns if there are fewer than 5 classes.
    """
    probabilities = jax.nn.softmax(logits, axis=-1).mean(axis=1)
    # For lax.top_k XLA would gather the rows of all devices (jax 0.10.2).
    best = jnp.argsort(-probabilities, axis=-1)[:, :5]
    return jnp.take_along_axis(probabilities, best, axis=-1), best


def gather_local_rows(array: jax.Array) -> np.ndarray:
    """Return the rows of a batch on this process's devices, in order: [B / processes, ...]."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


class PredictionWriter:
    """Collects the predictions of this process, about 200 bytes a video; `close` writes them.

    Args:
      workdir: of the run, local or gs://.
      header: first line of the file, see the module's docstring.
      ids: names of the split's videos.
    """

    def __init__(self, workdir: str, header: dict[str, Any], ids: Sequence[str]):
        self._folder, self._ids = epath.Path(workdir) / FOLDER, ids
        self._suffix = f"-of-{jax.process_count():05}"
        self._path = self._folder / f"{jax.process_index():05}{self._suffix}.jsonl"
        self._lines = [json.dumps(header)]

    def add(
        self,
        example_id: np.ndarray,
        label: np.ndarray,
        classes: np.ndarray,
        probabilities: np.ndarray,
    ) -> None:
        """Add the predictions of a batch.

        Args:
          example_id: int64 [B], row in the split's video table; -1 for padding, which is left out.
          label: int32 [B].
          classes: int32 [B, 5], see `top_predictions`.
          probabilities: float32 [B, 5].
        """
        for i in np.flatnonzero(example_id >= 0):
            row = {
                "id": self._ids[int(example_id[i])],
                "label": int(label[i]),
                "classes": classes[i].tolist(),
                "probabilities": [round(float(p), 6) for p in probabilities[i]],
            }
            self._lines.append(json.dumps(row))

    def close(self) -> None:
        """Write the file; process 0 removes those of runs with another number of processes.

        It removes only files that this module has named, and leaves one that cannot be removed.

        Raises:
          OSError: it cannot be written.
        """
        with gcs.gcs_errors(str(self._path)):
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_text(self._path, "\n".join(self._lines) + "\n")
            if jax.process_index() == 0:
                for path in _list_files(self._folder):
                    if self._suffix not in path.name:
                        with contextlib.suppress(OSError):  # a folder of that name, say
                            path.unlink()


def _list_files(folder: epath.Path) -> list[epath.Path]:
    """Return the paths in `folder` that have names of this module's files, sorted."""
    paths = folder.glob("*-of-*.jsonl")
    return sorted(path for path in paths if _FILE_NAME.fullmatch(path.name))


def read_predictions(workdir: str, results: dict[str, Any]) -> tuple[list[str], list[dict]]:
    """Read the predictions of the evaluation that wrote results.json.

    Args:
      workdir: of the run, local or gs://.
      results: content of its results.json.

    Returns:
      The class names, and a row for each video, see the module's docstring.

    Raises:
      ValueError: there are no predictions, or they are damaged or of another evaluation.
    """
    class_names, rows = [], []
    paths = _list_files(epath.Path(workdir) / FOLDER)
    if not paths:
        raise ValueError(f"no {FOLDER} in {workdir}; --mode=eval writes them")
    for path in paths:
        try:
            lines = [line for line in read_lines(path) if line]
            header = parse_json(lines[0], dict, path)
            evaluation = {key: header[key] for key in _SHARED_WITH_RESULTS}
            class_names = header["class_names"]
            rows += [parse_json(line, dict, path) for line in lines[1:]]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); --mode=eval writes it again") from None
        expected = {key: results.get(key) for key in _SHARED_WITH_RESULTS}
        if evaluation != expected:
            raise ValueError(
                f"{path} belongs to {evaluation}, results.json to {expected}; run --mode=eval again"
            )
    if len(rows) != results["num_videos"]:
        raise ValueError(
            f"{workdir}/{FOLDER} holds {len(rows)} videos, results.json counts "
            f"{results['num_videos']}; run --mode=eval again"
        )
    return class_names, rows

"""What an evaluation said of each video: one file of JSON lines from each process.

Public: `top_predictions`, `gather_local_rows`, `PredictionWriter`, `read_predictions`, `FOLDER`.

    WORKDIR/predictions/00000-of-00004.jsonl   process 0 of 4; its first line, and one for a video:
      {"step": 1500, "split": "test", "views": "16x1x1", "class_names": [...]}
      {"id": "v17", "label": 3, "classes": [3, 1, ...], "probabilities": [0.9, ...]}

The most probable classes come first, five or as many as there are; probabilities are in 0..1 and
averaged over views.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dualpath_jax.runtime import files, gcs

FOLDER = "predictions"
SHARED_WITH_RESULTS = ("step", "split", "views")  # what the first line shares with results.json


def top_predictions(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable classes by the probabilities averaged over views.

    Args:
      logits: [B, V, classes] float32.

    Returns:
      probabilities [B, 5] float32 in 0..1, falling; classes [B, 5] int32. Fewer than 5 where there
      are fewer classes.
    """
    probabilities = jax.nn.softmax(logits, axis=-1).mean(axis=1)
    # Not by lax.top_k, for which XLA gathers the rows of all devices (jax 0.10.2).
    best = jnp.argsort(-probabilities, axis=-1)[:, :5]
    return jnp.take_along_axis(probabilities, best, axis=-1), best


def gather_local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch that lie on this process's devices, in order: [B / processes, ...]."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


class PredictionWriter:
    """Collects this process's rows, some 200 bytes for each video; `close` writes them.

    Args:
      workdir: of the run.
      header: first line of the file, see the module.
      ids: names of the split's videos.
    """

    def __init__(self, workdir: str, header: dict[str, Any], ids: Sequence[str]):
        self._folder, self._ids = epath.Path(workdir) / FOLDER, ids
        self._share = f"-of-{jax.process_count():05}"
        self._path = self._folder / f"{jax.process_index():05}{self._share}.jsonl"
        self._lines = [json.dumps(header)]

    def add(
        self,
        example_id: np.ndarray,
        label: np.ndarray,
        classes: np.ndarray,
        probabilities: np.ndarray,
    ) -> None:
        """Rows of a batch: [B] int64, -1 for padding; [B] int32; [B, 5] int32 and float32."""
        for i in np.flatnonzero(example_id >= 0):
            row = {
                "id": self._ids[int(example_id[i])],
                "label": int(label[i]),
                "classes": classes[i].tolist(),
                "probabilities": [round(float(p), 6) for p in probabilities[i]],
            }
            self._lines.append(json.dumps(row))

    def close(self) -> None:
        """Write the file; process 0 removes those of another number of processes.

        Raises:
          OSError: it cannot be written.
        """
        with gcs.gcs_errors(str(self._path)):
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_text(self._path, "\n".join(self._lines) + "\n")
            if jax.process_index() == 0:
                for path in self._folder.glob("*"):
                    if self._share not in path.name:
                        path.unlink(missing_ok=True)


def read_predictions(workdir: str, results: dict[str, Any]) -> tuple[list[str], list[dict]]:
    """(class names, rows of all videos) of the evaluation that wrote `results`, results.json.

    Raises:
      ValueError: there are none, or they are not those of that evaluation; says why.
    """
    class_names, rows = [], []
    paths = sorted((epath.Path(workdir) / FOLDER).glob("*-of-*.jsonl"))
    if not paths:
        raise ValueError(f"no {FOLDER} in {workdir}; --mode=eval writes them")
    for path in paths:
        try:
            lines = path.read_text().splitlines()
            header = json.loads(lines[0])
            named = {key: header[key] for key in SHARED_WITH_RESULTS}
            class_names = header["class_names"]
            rows += [json.loads(line) for line in lines[1:]]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); --mode=eval writes it anew") from None
        expected = {key: results.get(key) for key in SHARED_WITH_RESULTS}
        if named != expected:
            raise ValueError(
                f"{path} belongs to {named}, results.json to {expected}; run --mode=eval again"
            )
    if len(rows) != results["num_videos"]:
        raise ValueError(
            f"{workdir}/{FOLDER} holds {len(rows)} videos, results.json counts "
            f"{results['num_videos']}; run --mode=eval again"
        )
    return class_names, rows

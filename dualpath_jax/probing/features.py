"""Computes the tokens of clips by a frozen backbone once, and keeps them on disk.

    WORKDIR/probe_features/train-00000.safetensors    up to 256 MiB; train-00001, ...

A shard is a safetensors file with "tokens" bfloat16 [rows, V, T, N, D] and "labels" int32 [rows].
Its metadata entry "identity" is JSON of everything that the tokens depend on: a shard of another
identity is never used. Shards are written atomically, so an interrupted computation continues with
the first one that is missing.

Axes: B batch, V views, T frames, N tokens of a frame, D width.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dualpath_jax.runtime import files
from dualpath_jax.runtime.progress_bar import ProgressBar, format_duration, print_above_bar
from dualpath_jax.runtime.safe_read import MAX_JSON_BYTES, parse_json, truncated_repr

FOLDER = "probe_features"
_SHARD_BYTES = 2**28
_BFLOAT16 = np.dtype(jnp.bfloat16)
_WARM_UP_BATCHES = 1  # not in the estimate of time: the first batch compiles


def row_bytes(shape: tuple[int, int, int, int]) -> int:
    """Return the size on disk of the tokens (V, T, N, D) of a clip, and of its label."""
    return math.prod(shape) * _BFLOAT16.itemsize + 4


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Describes the features of a split.

    Attributes:
      split: name of the split, which names the files.
      num_clips: number of rows: videos, or clips of several passes over them.
      shape: (V, T, N, D) of a row.
      identity: what the features depend on, as values of JSON.
      batch_size: rows that are computed at once.
    """

    split: str
    num_clips: int
    shape: tuple[int, int, int, int]
    identity: dict[str, Any]
    batch_size: int

    @property
    def row_bytes(self) -> int:
        """Return the size of a row on disk."""
        return row_bytes(self.shape)

    @property
    def num_bytes(self) -> int:
        """Return the size of all rows on disk."""
        return self.num_clips * self.row_bytes

    @property
    def shard_rows(self) -> int:
        """Return the number of rows of a shard: whole batches, at least one."""
        return max(1, _SHARD_BYTES // self.row_bytes // self.batch_size) * self.batch_size

    @property
    def num_shards(self) -> int:
        """Return the number of shards."""
        return -(-self.num_clips // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return min(self.shard_rows, self.num_clips - shard * self.shard_rows)


@dataclasses.dataclass(frozen=True)
class Features:
    """Gives access to the features of a split; they are mapped, not read into memory.

    Attributes:
      labels: int32 [n], class of each row.
      shards: bfloat16 [rows, V, T, N, D] of each shard; all but the last have equally many rows.
    """

    labels: np.ndarray
    shards: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Return some rows: bfloat16 [B, V, T, N, D]."""
        length = len(self.shards[0])
        return np.stack([self.shards[row // length][row % length] for row in rows])


class FeatureCache:
    """Keeps features in a folder.

    Args:
      folder: a local folder; created when features are written.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = pathlib.Path(folder)

    def _path(self, spec: FeatureSpec, shard: int) -> pathlib.Path:
        return self._folder / f"{spec.split}-{shard:05}.safetensors"

    def num_complete(self, spec: FeatureSpec) -> int:
        """Return how many of the first shards are there, of the same identity and undamaged."""
        for shard in range(spec.num_shards):
            try:
                _open_shard(self._path(spec, shard), spec, shard)
            except (OSError, ValueError):
                return shard
        return spec.num_shards

    def remove_others(self, spec: FeatureSpec) -> str:
        """Remove the files of a split from the first that `spec` cannot use.

        Returns:
          Why there were any, "" if there were none.
        """
        reason, first = "", self.num_complete(spec)
        name = re.compile(rf"{re.escape(spec.split)}-(\d{{5}})\.safetensors")
        for path in sorted(self._folder.glob("*.safetensors")):
            match = name.fullmatch(path.name)
            if match and int(match[1]) >= first:
                try:
                    _open_shard(path, spec, int(match[1]))
                except (OSError, ValueError) as error:
                    reason = reason or str(error)
                path.unlink()
        return reason

    def write(
        self,
        spec: FeatureSpec,
        first: int,
        batches: Iterator[tuple[np.ndarray, np.ndarray]],
        on_batch: Callable[[int], None],
    ) -> None:
        """Write the shards from `first` on.

        Args:
          spec: of the features.
          first: the first shard that is missing.
          batches: (tokens bfloat16 [B, V, T, N, D], labels int32 [B]) of the rows from the first
            row of that shard on; rows after the last one are left out.
          on_batch: called with the number of rows after each batch.

        Raises:
          OSError: a file cannot be written.
        """
        self._folder.mkdir(exist_ok=True)
        for shard in range(first, spec.num_shards):
            rows, written, labels = spec.rows_of(shard), 0, []
            path = self._path(spec, shard)
            with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
                file.write(_format_header(spec, shard))
                while written < rows:
                    tokens, batch_labels = next(batches)
                    tokens = tokens[: rows - written]
                    file.write(np.ascontiguousarray(tokens).view(np.uint16).data)
                    labels.append(batch_labels[: len(tokens)])
                    written += len(tokens)
                    on_batch(len(tokens))
                file.write(np.concatenate(labels).astype("<i4").data)

    def open(self, spec: FeatureSpec) -> Features:
        """Open complete features.

        Raises:
          OSError, ValueError: a shard is missing, damaged or of another identity.
        """
        opened = [
            _open_shard(self._path(spec, shard), spec, shard) for shard in range(spec.num_shards)
        ]
        labels = np.concatenate([labels for _, labels in opened])
        return Features(labels, [tokens for tokens, _ in opened])


def _format_header(spec: FeatureSpec, shard: int) -> bytes:
    """Return the header of a shard's file."""
    rows = spec.rows_of(shard)
    size = rows * math.prod(spec.shape) * _BFLOAT16.itemsize
    content = {
        "__metadata__": {"identity": json.dumps(spec.identity)},
        "tokens": {"dtype": "BF16", "shape": [rows, *spec.shape], "data_offsets": [0, size]},
        "labels": {"dtype": "I32", "shape": [rows], "data_offsets": [size, size + 4 * rows]},
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _open_shard(path: pathlib.Path, spec: FeatureSpec, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Map a shard: tokens bfloat16 [rows, V, T, N, D]; and its labels, int32 [rows].

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or of another identity; the message says what differs.
    """
    with open(files.open_in_place(path, os.O_RDONLY), "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_JSON_BYTES:
            raise ValueError(f"{path} is damaged")
        header = file.read(length)
        if start + header != _format_header(spec, shard):
            raise ValueError(f"{path} {_describe_difference(header, spec)}")
        size = os.fstat(file.fileno()).st_size
        rows = spec.rows_of(shard) if shard < spec.num_shards else 0
        if size != 8 + length + rows * spec.row_bytes:
            raise ValueError(f"{path} is damaged: it has {size:,} bytes")
        shape = (rows, *spec.shape)
        tokens = np.memmap(file, np.uint16, "r", 8 + length, shape).view(_BFLOAT16)
        file.seek(size - 4 * rows)
        return tokens, np.frombuffer(file.read(), "<i4")


def _describe_difference(header: bytes, spec: FeatureSpec) -> str:
    """Return how the identity in the header of a shard differs from that of `spec`."""
    try:
        saved = json.loads(parse_json(header, dict, "")["__metadata__"]["identity"])
        changes = [
            f"{key}={truncated_repr(saved.get(key))}, now {truncated_repr(spec.identity.get(key))}"
            for key in saved.keys() | spec.identity.keys()
            if saved.get(key) != spec.identity.get(key)
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        return "is damaged"
    return f"was made with {'; '.join(sorted(changes))}" if changes else "has other rows"


class ProgressOfSplits:
    """Shows progress over several splits, and prints the whole duration once it can be estimated.

    Args:
      num_clips: rows to compute, of all splits.
    """

    def __init__(self, num_clips: int, clock: Callable[[], float] = time.monotonic):
        self._total, self._clock = num_clips, clock
        self._batches, self._done, self._first, self._start = 0, 0, 0, 0.0
        self._bar: ProgressBar | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator["ProgressOfSplits"]:
        """Show a bar while the block runs."""
        with ProgressBar(self._total, "features", "clips") as self._bar:
            yield self

    def on_batch(self, rows: int) -> None:
        """Count the rows of a batch."""
        self._batches += 1
        self._done += rows
        self._bar.update(rows)
        if self._batches == _WARM_UP_BATCHES:
            self._first, self._start = self._done, self._clock()
        elif self._batches == _WARM_UP_BATCHES + 1:
            seconds = (self._clock() - self._start) / (self._done - self._first)
            left = format_duration(seconds * (self._total - self._done))
            print_above_bar(f"features: {seconds:.2g} s a clip, about {left} for the others")

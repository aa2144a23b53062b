"""Checkpoints: trainables, optimizer state and what they belong to. The only importer of orbax.

Public: `Checkpoints`, `DamagedCheckpoint`, `config_changes`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from dualpath_jax.config.values import (
    INVALID_CONFIG_ERRORS,
    format_views,
    restore_config,
)
from dualpath_jax.models import param_tree
from dualpath_jax.runtime import files

_MAX_BYTES = 32 * 2**30  # of the arrays of a checkpoint; ViT-L, fully tuned, has 4 GB
METRIC = "top1"  # by which the best checkpoint is the best
_MAX_ERRORS = 10  # that one save may give, one by one


def _is_news(record: Any) -> bool:
    """Not what orbax raises, whose traceback each of its threads logs, nor that we only read."""
    if logging.level_debug() or "orbax" not in record.pathname:
        return True
    return not (record.exc_info or "read_only" in str(record.msg) or "read only" in str(record.msg))


logging.get_absl_logger().addFilter(_is_news)


@dataclasses.dataclass(frozen=True)
class _NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay: the newest `count` and the best one."""

    count: int
    best_step: Callable[[], int | None]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        newest = [info.step for info in checkpoints][-self.count :]
        return [info.step in newest or info.step == self.best_step() for info in checkpoints]


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class Checkpoints:
    """The checkpoints of a workdir, written in the background.

    Kept are the newest `keep` ones and the best one by `METRIC`. A checkpoint holds the leaves of a
    state by path (float32 trainables, optimizer slots, step), metadata, and the SHA-256 of both.
    The frozen backbone is not in it: it is read from its own file, and its hash compared. A
    checkpoint appears under its step, whole, when all of it is on disk.

    Args:
      workdir: of the run.
      keep: how many of the newest stay.
      read_only: leave all as it is; another process may be writing there.
    """

    def __init__(self, workdir: str, keep: int = 3, read_only: bool = False):
        path = epath.Path(workdir)
        self._workdir = path if path.is_absolute() else path.absolute()  # gs:// is absolute
        self.directory = self._workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # on gs:// orbax alone can tell them
            preservation_policy=_NewestAndBest(keep, self.best_step),
        )
        if not read_only:
            self._remove_incomplete()  # of a process that was killed while it saved
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
        )
        self._saving: int | None = None  # the step that is being written
        self._lost = False  # could it not be?
        self._scores: dict[int, dict[str, Any]] = {}  # of the checkpoints that have some
        for step in self._manager.all_steps():
            with contextlib.suppress(DamagedCheckpoint):
                saved = self.read_metadata(step)
                if saved["scores"] is not None:
                    self._scores[step] = _evaluated_as(saved["config"]) | saved["scores"]

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest `METRIC`, None if none was evaluated.

        Of those evaluated as the newest was, on its split and with its views.
        """
        if not self._scores:
            return None
        last = self._scores[max(self._scores)]
        alike = [
            step
            for step, scores in self._scores.items()
            if all(scores.get(key) == last.get(key) for key in ("split", "views"))
        ]
        return max(alike, key=lambda step: self._scores[step][METRIC])

    def has_scores(self, step: int) -> bool:
        """Was the checkpoint of `step` evaluated?"""
        return step in self._scores

    def path(self, step: int | None) -> str:
        """Where the checkpoint of `step` lies, for messages."""
        return "none" if step is None else str(self.directory / str(step))

    def save(
        self,
        step: int,
        state: Any,
        metadata: dict[str, Any],
        reported: bool = True,
    ) -> None:
        """Write `state` (any pytree of arrays) in the background, unless `step` is there already.

        A checkpoint that cannot be written is given up with a warning, here or, where it
        shows later, in the next call; so is one whose steps are not `reported`: a run that resumed
        there would never report them.
        """
        self.wait()
        if self._lost:
            self._clean_up()  # again: its threads may have written on
        if step in self._manager.all_steps():
            return
        self._saving, self._lost = step, False
        if _on_any_host(not reported):
            self._give_up(OSError("the metrics of its steps are not on disk"))
            return
        leaves = param_tree.flatten(state)
        metadata = {**metadata, "scores": None, "leaves": _digests(leaves)}
        metadata["sha256"] = _digest_json(metadata)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), metadata=ocp.args.JsonSave(metadata)
        )
        self._attempt(lambda: self._manager.save(step, args=args))

    def add_scores(self, step: int, scores: dict[str, Any], reported: bool = True) -> None:
        """Note the first scores of an evaluation in the checkpoint of `step`.

        They are `METRIC` and others by name, and "split" and "views", see `best_step`.

        Where it is not there nothing is done, nor unless they are `reported`, as in `save`; a
        warning where its metadata cannot be written.
        """
        self.wait()
        there = step in self._manager.all_steps() and not self.has_scores(step)
        if _on_any_host(not (there and reported)):
            return
        problem = None
        try:
            saved = self.read_metadata(step) | {"scores": scores}
            saved["sha256"] = _digest_json(saved)
            if jax.process_index() == 0:  # the file of orbax's JsonCheckpointHandler
                files.write_text(
                    self.directory / str(step) / "metadata/metadata", json.dumps(saved)
                )
        except (DamagedCheckpoint, OSError) as error:
            problem = error
            logging.warning("the scores of step %d are not kept: %s", step, _one_line(error))
        if not _on_any_host(problem is not None):
            self._scores[step] = scores

    def wait(self) -> None:
        """Return when everything saved so far is on disk, or has been given up."""
        self._attempt(self._manager.wait_until_finished)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of many kinds: the disk is full, the folder is gone, ...
            logging.debug("%s", traceback.format_exc())
            self._clean_up()
            if self._saving in self._manager.all_steps():
                logging.warning("an old checkpoint could not be deleted: %s", _one_line(error))
            else:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._scores.pop(self._saving, None)
        logging.warning(
            "the checkpoint of step %s could not be written: %s. Training goes on; the last good "
            "one is %s",
            self._saving,
            _one_line(error),
            self.path(self.latest_step()),
        )
        self._lost = True

    def _clean_up(self) -> None:
        """After a save that failed: free its disk space, and count what is on disk again."""
        for _ in range(_MAX_ERRORS):
            try:
                self._manager.wait_until_finished()  # each of its threads may have failed
                break
            except Exception:
                logging.debug("%s", traceback.format_exc())
        self._remove_incomplete()
        self._manager.reload()

    def _remove_incomplete(self) -> None:
        if jax.process_index() == 0 and self.directory.exists():
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    path.rmtree()

    def restore_newest(self, state: Any, metadata: dict[str, Any]) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that is whole, or None if there is none.

        A damaged one is moved to WORKDIR/damaged_checkpoints with a warning. Otherwise as
        `restore`.
        """
        while (step := self.latest_step()) is not None:
            leaves, damage = None, None
            try:
                leaves = self._read_for(step, state, metadata)
            except DamagedCheckpoint as error:
                damage = error
            if not _on_any_host(damage is not None):
                return step, _placed(leaves, state)
            self._set_aside(step, damage)
        return None

    def restore(self, step: int, state: Any, metadata: dict[str, Any]) -> Any:
        """The state saved at `step`, in the structure, dtypes and shardings of `state`.

        Raises:
          ValueError: the checkpoint belongs to another backbone, method or set of classes than
            `metadata` names, or holds other parameters than `state`.
          DamagedCheckpoint: it cannot be read, or is not what was saved.
        """
        return _placed(self._read_for(step, state, metadata), state)

    def _read_for(self, step: int, state: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        """Leaves by path, fit for `state`; raises as `restore`."""
        saved = self.read_metadata(step)
        _compare_metadata(saved, metadata, self.path(step))
        _compare_shapes(saved["leaves"], param_tree.flatten(state), self.path(step))
        return self._read_leaves(step, saved)

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(leaves by path, metadata) of `step`, whatever it belongs to.

        Raises:
          DamagedCheckpoint: it cannot be read, or is not what was saved.
        """
        saved = self.read_metadata(step)
        return self._read_leaves(step, saved), saved

    def _read_leaves(self, step: int, saved: dict[str, Any]) -> dict[str, jax.Array]:
        """The arrays of `step`, compared with the digests in its metadata, `saved`."""
        where = self.path(step)
        # Onto a device of this process: those of the processes that saved need not be there. By a
        # handler: the manager waits for all processes here, also for one that cannot read.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=device)
            for name, entry in saved["leaves"].items()
        }
        try:
            leaves = ocp.StandardCheckpointHandler().restore(
                self.directory / str(step) / "state", args=ocp.args.StandardRestore(abstract)
            )
        except Exception as error:
            raise DamagedCheckpoint(
                f"checkpoint {where} cannot be read: {_one_line(error)}"
            ) from error
        now = _digests(leaves)
        differing = [name for name, entry in saved["leaves"].items() if now.get(name) != entry]
        if differing:
            raise DamagedCheckpoint(
                f"checkpoint {where} does not hold what was saved: {len(differing)} arrays differ, "
                f"first {differing[0]}"
            )
        return leaves

    def read_metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given for `step`, and "leaves"; DamagedCheckpoint if it is not that."""
        where = self.path(step)
        try:
            folder = self.directory / str(step) / "metadata"
            saved = dict(ocp.JsonCheckpointHandler().restore(folder, args=ocp.args.JsonRestore()))
            digest = saved.pop("sha256")
        except Exception as error:
            raise DamagedCheckpoint(
                f"checkpoint {where} cannot be read: {_one_line(error)}"
            ) from error
        if digest != _digest_json(saved):
            raise DamagedCheckpoint(f"checkpoint {where} does not hold what was saved: metadata")
        _check_metadata(saved, where)
        return saved

    def _set_aside(self, step: int, damage: DamagedCheckpoint | None) -> None:
        """Moves a damaged checkpoint out of the way, so that its step can be saved again."""
        folder = self._workdir / "damaged_checkpoints"
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            number = 0
            while (kept := folder / f"{step}-{number}").exists():
                number += 1
            (self.directory / str(step)).rename(kept)
            problem = damage or f"another host cannot read checkpoint {self.path(step)}"
            logging.warning("%s; it was moved to %s", problem, kept)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
        self._scores.pop(step, None)
        self._manager.reload()

    def close(self) -> None:
        """Wait for what is being written. OSError if the last checkpoint could not be written."""
        self.wait()
        self._manager.close()
        if self._lost:
            raise OSError(
                f"the last checkpoint, of step {self._saving}, could not be written to "
                f"{self.directory}; make room there and run the same command again, which goes on "
                f"from {self.path(self.latest_step())}"
            )


def _evaluated_as(config: dict[str, Any]) -> dict[str, str]:
    """Split and views of scores that do not say so, as those of older versions do not."""
    config = restore_config(config)
    return {"split": config.eval.split, "views": format_views(config)}


def _on_any_host(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _placed(leaves: dict[str, jax.Array], state: Any) -> Any:
    """`leaves` in the structure, dtypes and shardings of `state`; to be called by all processes."""
    target = param_tree.flatten(state)
    new = [
        jax.device_put(np.asarray(leaves[name], leaf.dtype), leaf.sharding)
        for name, leaf in target.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), new)


def _digests(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 of arrays by name."""
    entries = {}
    for name, leaf in leaves.items():
        value = np.asarray(jax.device_get(leaf), order="C")
        entries[name] = {
            "shape": list(value.shape),
            "dtype": str(value.dtype),
            "sha256": hashlib.sha256(value).hexdigest(),
        }
    return entries


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _check_metadata(saved: dict[str, Any], where: str) -> None:
    """DamagedCheckpoint unless it has what is relied on, and arrays that fit into memory."""
    try:
        for key in ("method", "backbone_name", "backbone_sha256", "class_names", "scores"):
            saved[key]
        restore_config(saved["config"])
        arrays = [(entry["shape"], np.dtype(entry["dtype"])) for entry in saved["leaves"].values()]
        size = sum(math.prod(map(int, shape)) * dtype.itemsize for shape, dtype in arrays)
    except INVALID_CONFIG_ERRORS as error:
        raise DamagedCheckpoint(f"checkpoint {where} is none of ours: {_one_line(error)}") from None
    if size > _MAX_BYTES or any(int(n) < 0 for shape, _ in arrays for n in shape):
        raise DamagedCheckpoint(f"checkpoint {where} claims {size:,} bytes of parameters")


def _compare_metadata(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    for key in ("method", "backbone_name", "backbone_sha256"):
        if saved[key] != current[key]:
            raise ValueError(
                f"checkpoint {where} was trained with {key} {saved[key]!r}, this run has "
                f"{current[key]!r}: use the same one, or another --workdir"
            )
    ours, theirs = current["class_names"], saved["class_names"]
    for index in range(max(len(ours), len(theirs))):
        pair = [names[index] if index < len(names) else None for names in (theirs, ours)]
        if pair[0] != pair[1]:
            raise ValueError(
                f"checkpoint {where} has {len(theirs)} classes, the data set has {len(ours)}; the "
                f"first difference is at class {index}: {pair[0]!r} against {pair[1]!r}. Use the "
                "data set that the checkpoint was trained on, or another --workdir"
            )


def _compare_shapes(saved: dict[str, Any], target: dict[str, Any], where: str) -> None:
    saved_shapes = {name: tuple(entry["shape"]) for name, entry in saved.items()}
    shapes = {name: tuple(leaf.shape) for name, leaf in target.items()}
    if saved_shapes == shapes:
        return
    names = sorted(saved_shapes.keys() | shapes.keys())
    differing = [n for n in names if saved_shapes.get(n) != shapes.get(n)]
    first = differing[0]
    raise ValueError(
        f"checkpoint {where} holds other parameters than this config builds: {len(differing)} "
        f"differ, first {first}: {saved_shapes.get(first)} against {shapes.get(first)}. Use the "
        "config of that run (config.json in its workdir), or another --workdir"
    )

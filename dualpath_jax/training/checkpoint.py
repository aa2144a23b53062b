"""Saves and restores checkpoints: trainable parameters, optimizer state and metadata.

This is the only module that imports orbax.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging as std_logging
import math
import os
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
    restore_config,
    score_origin,
)
from dualpath_jax.models import param_tree
from dualpath_jax.runtime import environment, files, safe_read

_MAX_BYTES = 32 * 2**30  # of all arrays of a checkpoint; those of a fully tuned ViT-L take 4 GB
_MAX_ERRORS = 10  # a failed save raises the errors of its threads one by one


def _is_relevant(record: Any) -> bool:
    """Filter out orbax's tracebacks of errors that it also raises, and its read-only notices."""
    if logging.level_debug() or "orbax" not in record.pathname:
        return True
    return not (record.exc_info or "read_only" in str(record.msg) or "read only" in str(record.msg))


logging.get_absl_logger().addFilter(_is_relevant)
# Futures of a failed save that nobody asks for; the error itself is reported.
std_logging.getLogger("asyncio").addFilter(
    lambda record: logging.level_debug() or "never retrieved" not in record.getMessage()
)


@dataclasses.dataclass(frozen=True)
class _NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest `count` checkpoints and the best one."""

    count: int
    best_step: Callable[[], int | None]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        newest = [info.step for info in checkpoints][-self.count :]
        return [info.step in newest or info.step == self.best_step() for info in checkpoints]


class DamagedCheckpoint(Exception):
    """Reports that a checkpoint lacks a part, or does not contain what was saved."""


class UnreadableCheckpoint(OSError):
    """Reports that a checkpoint cannot be read at present; nothing is known about its content."""


# What errors say when a file cannot be read, whatever it contains: the system's texts, those of
# TensorStore and XLA, and Python's where a library has changed.
_UNREADABLE = (
    *(
        os.strerror(number)
        for number in (
            *(errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
            *(errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.ENOTCONN, errno.ECONNRESET),
            *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
        )
    ),
    *("RESOURCE_EXHAUSTED", "Out of memory", "UNAVAILABLE", "unexpected keyword argument"),
)


class Checkpoints:
    """Manages the checkpoints of a workdir and writes them in the background.

    The newest `keep` ones and the best one by `eval.criterion` are kept. A checkpoint holds the
    leaves of a state by path (float32 parameters, optimizer slots, step), metadata, and the SHA-256
    of both. It does not hold the frozen backbone, which is read from its own file and compared by
    its hash.
    A checkpoint appears under its step when all of it is on disk.

    Args:
      workdir: of the run, local or gs://.
      keep: number of newest checkpoints that are kept.
      read_only: change nothing in the workdir; another process may be writing there.

    Raises:
      ValueError: the folder of checkpoints holds a file that is not regular, such as a pipe.
    """

    def __init__(self, workdir: str, keep: int = 3, read_only: bool = False):
        path = epath.Path(workdir)
        self._workdir = path if path.is_absolute() else path.absolute()  # gs:// is absolute
        self.directory = self._workdir / "checkpoints"
        if "://" not in str(self.directory):  # orbax would wait for a pipe
            safe_read.check_regular_files(self.directory)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # on gs:// only orbax recognizes them
            preservation_policy=_NewestAndBest(keep, self.best_step),
        )
        if not read_only:
            self._remove_incomplete()  # left by a process that was killed while it saved
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
        )
        self._saving_step: int | None = None  # the step that is being written
        self._save_failed = False  # True if the checkpoint of that step could not be written
        self._scores: dict[int, dict[str, Any]] = {}  # by step, of the evaluated checkpoints
        for step in self._manager.all_steps():
            # Whoever needs this checkpoint will meet the error again.
            with contextlib.suppress(DamagedCheckpoint, UnreadableCheckpoint):
                saved = self.read_metadata(step)
                if saved["scores"] is not None:
                    # Scores of older versions lack these entries.
                    origin = score_origin(restore_config(saved["config"]))
                    self._scores[step] = origin | saved["scores"]

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint; None without checkpoints."""
        return self._manager.latest_step()

    def best_step(self, criterion: str | None = None) -> int | None:
        """Return the step of the checkpoint with the highest score; None if none was evaluated.

        Only checkpoints that were evaluated like the newest one are compared: on the same split,
        with the same views.

        Args:
          criterion: name of the score; None: `eval.criterion` of the newest evaluation.
        """
        if not self._scores:
            return None
        last = self._scores[max(self._scores)]
        comparable = [
            step
            for step, scores in self._scores.items()
            if all(scores.get(key) == last.get(key) for key in ("split", "views"))
        ]
        criterion = criterion or last.get("criterion", "top1")
        return max(comparable, key=lambda step: self._scores[step][criterion])

    def has_scores(self, step: int) -> bool:
        """Return whether the checkpoint of `step` was evaluated."""
        return step in self._scores

    def path(self, step: int | None) -> str:
        """Return the folder of the checkpoint of `step` for messages; "none" if `step` is None."""
        return "none" if step is None else str(self.directory / str(step))

    def save(
        self,
        step: int,
        state: Any,
        metadata: dict[str, Any],
        metrics_on_disk: bool = True,
    ) -> None:
        """Write a state in the background, unless there is a checkpoint of `step` already.

        If the checkpoint cannot be written, a warning is logged here or in the next call, and
        training continues.

        Args:
          step: number of updates done.
          state: any pytree of arrays.
          metadata: what the checkpoint belongs to, see `Experiment.metadata`.
          metrics_on_disk: False if metrics.jsonl lacks entries of earlier steps. The checkpoint is
            then not written, because a run that resumed there would never log these entries.
        """
        self.wait()
        if self._save_failed:
            self._clean_up()  # once more: threads of the failed save may have kept writing
        if step in self._manager.all_steps():
            return
        self._saving_step, self._save_failed = step, False
        if _on_any_host(not metrics_on_disk):
            self._give_up(OSError("the metrics of its steps are not on disk"))
            return
        leaves = param_tree.flatten(state)
        metadata = {**metadata, "step": step, "scores": None, "leaves": _digest_leaves(leaves)}
        metadata["sha256"] = _digest_json(metadata)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), metadata=ocp.args.JsonSave(metadata)
        )

        def save() -> None:
            if not self._manager.save(step, args=args):
                raise OSError("orbax did not save it, as a later step has a checkpoint")

        self._attempt(save)

    def add_scores(self, step: int, scores: dict[str, Any], metrics_on_disk: bool = True) -> None:
        """Add the scores of an evaluation to the metadata of the checkpoint of `step`.

        Nothing is done if there is no such checkpoint, if it has scores already, or if
        `metrics_on_disk` is False, see `save`. If the metadata cannot be written, a warning is
        logged.

        Args:
          step: number of updates of the evaluated state.
          scores: "top1" and others by name, and "split", "views" and "criterion", see `best_step`.
          metrics_on_disk: see `save`.
        """
        self.wait()
        needs_scores = step in self._manager.all_steps() and not self.has_scores(step)
        if _on_any_host(not (needs_scores and metrics_on_disk)):
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
            logging.warning(
                "the scores of step %d could not be saved: %s", step, _format_error(error)
            )
        if not _on_any_host(problem is not None):
            self._scores[step] = scores

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is on disk, or its save has failed."""
        self._attempt(self._manager.wait_until_finished)

    def _attempt(self, action: Callable[[], Any]) -> None:
        """Run an action of the manager; if it fails, clean up and log a warning."""
        try:
            action()
        except Exception as error:  # many kinds: the disk is full, the folder was deleted, ...
            logging.debug("%s", traceback.format_exc())
            self._clean_up()
            if self._saving_step in self._manager.all_steps():
                logging.warning("an old checkpoint could not be deleted: %s", _format_error(error))
            else:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Mark the current save as failed and log a warning."""
        self._scores.pop(self._saving_step, None)
        logging.warning(
            "the checkpoint of step %s could not be written: %s. Training continues; the last "
            "good one is %s",
            self._saving_step,
            _format_error(error),
            self.path(self.latest_step()),
        )
        self._save_failed = True
        environment.note_that_a_thread_may_hang()  # orbax's, if the clock was set

    def _clean_up(self) -> None:
        """Free the disk space of a failed save and list the checkpoints on disk again."""
        for _ in range(_MAX_ERRORS):
            try:
                self._manager.wait_until_finished()  # raises the error of one thread per call
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
        """Restore the newest checkpoint that is not damaged.

        Damaged ones are moved to WORKDIR/damaged_checkpoints with a warning.

        Args:
          state: has the structure, dtypes and shardings of the result.
          metadata: of the run, see `restore`.

        Returns:
          (step, state), or None if the workdir never had a checkpoint.

        Raises:
          ValueError: as from `restore`, or all checkpoints are damaged.
          UnreadableCheckpoint: a checkpoint cannot be read at present.
        """
        while (step := self.latest_step()) is not None:
            leaves, damage, unreadable = None, None, None
            try:
                leaves = self._read_for(step, state, metadata)
            except DamagedCheckpoint as error:
                damage = error
            except UnreadableCheckpoint as error:
                unreadable = error
            if _on_any_host(unreadable is not None):
                text = f"another host cannot read checkpoint {self.path(step)} at present"
                raise unreadable or UnreadableCheckpoint(text)
            if not _on_any_host(damage is not None):
                return step, _place_leaves(leaves, state)
            self._set_aside(step, damage)
        damaged = self._workdir / "damaged_checkpoints"
        if damaged.exists() and any(damaged.iterdir()):
            raise ValueError(
                f"all checkpoints of {self._workdir} are damaged and were moved to {damaged}: copy "
                f"a good one to {self.directory}, or begin at step 0 with --start_over"
            )
        return None

    def start_over(self) -> None:
        """Move all checkpoints, damaged ones too, to WORKDIR/old_checkpoints."""
        self.wait()
        if jax.process_index() == 0:
            for folder in (self.directory, self._workdir / "damaged_checkpoints"):
                if not folder.exists() or not any(folder.iterdir()):
                    continue
                target = _unused_path(self._workdir / "old_checkpoints", folder.name)
                folder.rename(target)
                print(f"--start_over: moved {folder} to {target}", flush=True)
            self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("start over")
        self._scores.clear()
        self._manager.reload()

    def restore(self, step: int, state: Any, metadata: dict[str, Any]) -> Any:
        """Return the state saved at `step`, in the structure, dtypes and shardings of `state`.

        Raises:
          ValueError: the checkpoint belongs to another backbone, method or set of classes than
            `metadata` names, or holds other parameters than `state`.
          DamagedCheckpoint: it lacks a part, or does not contain what was saved.
          UnreadableCheckpoint: it cannot be read at present.
        """
        return _place_leaves(self._read_for(step, state, metadata), state)

    def _read_for(self, step: int, state: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the leaves of `step` by path, checked against `state`; raises like `restore`."""
        saved = self.read_metadata(step)
        _compare_metadata(saved, metadata, self.path(step))
        _compare_shapes(saved["leaves"], param_tree.flatten(state), self.path(step))
        return self._read_leaves(step, saved)

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (leaves by path, metadata) of `step`, without a check of what it belongs to.

        Raises:
          DamagedCheckpoint, UnreadableCheckpoint: as from `restore`.
        """
        saved = self.read_metadata(step)
        return self._read_leaves(step, saved), saved

    def _read_leaves(self, step: int, saved: dict[str, Any]) -> dict[str, jax.Array]:
        """Read the arrays of `step` and compare them with the digests in its metadata."""
        where = self.path(step)
        # The arrays go to a device of this process, as the devices that saved them may be gone. The
        # handler reads them, because the manager would wait for processes that cannot read.
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
            raise self._classify(step, error) from error
        digests = _digest_leaves(leaves)
        differing = [name for name, entry in saved["leaves"].items() if digests.get(name) != entry]
        if differing:
            raise DamagedCheckpoint(
                f"checkpoint {where} does not contain what was saved: {len(differing)} arrays "
                f"differ, first {differing[0]}"
            )
        return leaves

    def read_metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of `step`, with its "scores" and the digests of its "leaves".

        Raises:
          DamagedCheckpoint: it lacks a part, or is not what was saved.
          UnreadableCheckpoint: it cannot be read at present.
        """
        where = self.path(step)
        try:
            folder = self.directory / str(step) / "metadata"
            safe_read.check_size(folder / "metadata", safe_read.MAX_JSON_BYTES)
            saved = dict(ocp.JsonCheckpointHandler().restore(folder, args=ocp.args.JsonRestore()))
            digest = saved.pop("sha256")
        except Exception as error:
            raise self._classify(step, error) from error
        if digest != _digest_json(saved):
            raise DamagedCheckpoint(f"checkpoint {where} does not contain what was saved: metadata")
        _check_metadata(saved, where)
        if saved.setdefault("step", step) != step:  # version 0.1.0 did not save it
            raise DamagedCheckpoint(
                f"checkpoint {where} holds step {saved['step']}: it was renamed"
            )
        return saved

    def _classify(self, step: int, error: Exception) -> DamagedCheckpoint | UnreadableCheckpoint:
        """Return the exception for `error`, raised by reading `step`: damaged or unreadable.

        Errors of orbax and TensorStore do not distinguish the two. Therefore all files are read
        once more: if that succeeds, the content is damaged.
        """
        where, problem = self.path(step), error
        is_damage = not isinstance(error, MemoryError | ImportError | jax.errors.JaxRuntimeError)
        is_damage &= not any(text in str(error) for text in _UNREADABLE)
        try:
            if is_damage:
                files.check_readable(self.directory / str(step))
        except FileNotFoundError:
            pass  # a part is missing
        except OSError as read_error:
            is_damage, problem = False, read_error
        if is_damage:
            return DamagedCheckpoint(f"checkpoint {where} cannot be read: {_format_error(problem)}")
        return UnreadableCheckpoint(
            f"checkpoint {where} cannot be read at present: {_format_error(problem)}. It was left "
            "as it is; run the same command again when it can be read"
        )

    def _set_aside(self, step: int, damage: DamagedCheckpoint | None) -> None:
        """Move a damaged checkpoint out of the way, so that its step can be saved again."""
        folder = self._workdir / "damaged_checkpoints"
        if jax.process_index() == 0:
            target = _unused_path(folder, str(step))
            (self.directory / str(step)).rename(target)
            problem = damage or f"another host cannot read checkpoint {self.path(step)}"
            logging.warning("%s; it was moved to %s", problem, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
        self._scores.pop(step, None)
        self._manager.reload()

    def close(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        self.wait()
        self._manager.close()
        if self._save_failed:
            raise OSError(
                f"the last checkpoint, of step {self._saving_step}, could not be written to "
                f"{self.directory}; make room there and run the same command again, which resumes "
                f"from {self.path(self.latest_step())}"
            )


def _unused_path(folder: epath.Path, name: str) -> epath.Path:
    """Return folder/NAME-0, or with the next number that is not taken; create `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return next(
        path for number in itertools.count() if not (path := folder / f"{name}-{number}").exists()
    )


def _on_any_host(flag: bool) -> bool:
    """Return whether `flag` is True in any process; all processes must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _place_leaves(leaves: dict[str, jax.Array], state: Any) -> Any:
    """Return `leaves` in the structure, dtypes and shardings of `state`.

    All processes must call it.
    """
    target = param_tree.flatten(state)
    new = [
        jax.device_put(np.asarray(leaves[name], leaf.dtype), leaf.sharding)
        for name, leaf in target.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), new)


def _digest_leaves(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and SHA-256 of each array, by name."""
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


def _format_error(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _check_metadata(saved: dict[str, Any], where: str) -> None:
    """Check that the metadata have all required entries, and arrays that fit into memory.

    Raises:
      DamagedCheckpoint: they do not.
    """
    try:
        for key in ("method", "backbone_name", "backbone_sha256", "class_names", "scores"):
            saved[key]
        restore_config(saved["config"])
        arrays = [(entry["shape"], np.dtype(entry["dtype"])) for entry in saved["leaves"].values()]
        size = sum(math.prod(map(int, shape)) * dtype.itemsize for shape, dtype in arrays)
    except INVALID_CONFIG_ERRORS as error:
        raise DamagedCheckpoint(
            f"checkpoint {where} was not written by this package: {_format_error(error)}"
        ) from None
    if size > _MAX_BYTES or any(int(n) < 0 for shape, _ in arrays for n in shape):
        raise DamagedCheckpoint(f"checkpoint {where} claims {size:,} bytes of parameters")


def _compare_metadata(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raise ValueError unless a checkpoint has the run's method, backbone and classes."""
    for key in ("method", "backbone_name", "backbone_sha256"):
        if saved[key] != current[key]:
            raise ValueError(
                f"checkpoint {where} was trained with {key} {saved[key]!r}, this run has "
                f"{current[key]!r}: use the same one, or another --workdir"
            )
    old, new = saved["class_names"], current["class_names"]
    for index, (before, now) in enumerate(itertools.zip_longest(old, new)):
        if before != now:
            raise ValueError(
                f"checkpoint {where} has {len(old)} classes, the data set has {len(new)}; the "
                f"first difference is at class {index}: {before!r} against {now!r}. Use the "
                "data set that the checkpoint was trained on, or another --workdir"
            )


def _compare_shapes(saved: dict[str, Any], target: dict[str, Any], where: str) -> None:
    """Raise ValueError unless a checkpoint has the leaves of `target`, in the same shapes."""
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

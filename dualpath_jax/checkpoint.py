"""Checkpoints: trainables, optimizer state and what they belong to. The only importer of orbax.

Public: `Checkpoints`.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dualpath_jax import params as params_lib


class Checkpoints:
    """The checkpoints of a workdir, written in the background, newest `keep` kept.

    A checkpoint holds the leaves of a state by path (float32 trainables, optimizer slots, step) and
    metadata. The frozen backbone is not in it: it is read from its own file, and its hash compared.
    """

    def __init__(self, workdir: str, keep: int = 3):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def path(self, step: int | None) -> str:
        """Where the checkpoint of `step` lies, for messages."""
        return "none" if step is None else str(self.directory / str(step))

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Write `state` (any pytree of arrays) in the background."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(params_lib.flatten(state)),
            metadata=ocp.args.JsonSave(metadata),
        )
        self._manager.save(step, args=args)

    def restore(self, step: int, state: Any, metadata: dict[str, Any]) -> Any:
        """The state saved at `step`, in the structure, dtypes and shardings of `state`.

        Raises ValueError when the checkpoint belongs to another backbone, method or set of classes
        than `metadata` names, or holds other parameters than `state`.
        """
        where = self.path(step)
        saved = self._manager.restore(
            step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
        )
        _compare_metadata(saved["metadata"], metadata, where)
        target = params_lib.flatten(state)
        _compare_shapes(self._manager.item_metadata(step)["state"], target, where)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in target.items()
        }
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        leaves = self._manager.restore(step, args=args)["state"]
        structure = jax.tree.structure(state)
        return jax.tree.unflatten(structure, [leaves[name] for name in target])

    def wait(self) -> None:
        """Return when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


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


def _compare_shapes(saved: Any, target: dict[str, Any], where: str) -> None:
    saved_shapes = {name: tuple(leaf.shape) for name, leaf in saved.items()}
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

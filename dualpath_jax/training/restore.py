"""Restores the state that a run starts from: a checkpoint of its workdir, or an adapter file."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from dualpath_jax.config.values import config_changes
from dualpath_jax.training import adapter_file
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from dualpath_jax.training.experiment import Experiment
from dualpath_jax.training.state import TrainState

# Settings that decide how videos become the model's inputs, and these its logits.
_MODEL_SETTINGS = (
    "model.",
    *("data.num_frames", "data.num_spatial_frames", "data.sampling", "data.grid"),
    *("data.frame_scale", "data.image_size", "data.mean", "data.std"),
)


def restore_for_training(
    run: Experiment, state: TrainState, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """Restores the newest complete checkpoint.

    Args:
      run: the run.
      state: its initial state, with the structure and shardings that the result has.
      checkpoints: of the run's workdir.

    Returns:
      The step of the checkpoint and its state; 0 and `state` if there is no checkpoint.

    Raises:
      ValueError: it was trained with other settings or data, and `config.resume_changed` is off.
    """
    restored = checkpoints.restore_newest(state, run.metadata())
    if restored is None:
        return 0, state
    step, state = restored
    saved, where = checkpoints.read_metadata(step), checkpoints.path(step)
    differing = config_changes(saved["config"], run.metadata()["config"])
    differing |= _data_changes(run, saved, ("frame_format", "num_videos"))
    _report_changes(run, differing, where, "resumed from")
    file = run.config.init_from
    if file and file != saved["config"].get("init_from"):
        print(f"init_from={file} is ignored: the run in {run.workdir} has begun", flush=True)
    return step, state


def restore_for_evaluation(run: Experiment, state: TrainState) -> TrainState:
    """Restores the checkpoint that `config.eval.checkpoint` names, or else `config.init_from`.

    The workdir is not changed: a training may be running there.

    Args:
      run: the run.
      state: its initial state, with the structure and shardings that the result has.

    Raises:
      ValueError: there is no such checkpoint, a damaged one, or one that was trained with other
        settings, and `config.resume_changed` is off.
    """
    which, file = run.config.eval.checkpoint, run.config.init_from
    if which not in ("latest", "best"):
        raise ValueError(f"unknown eval.checkpoint={which!r}: known are latest, best")
    checkpoints = None
    if (epath.Path(run.workdir) / "checkpoints").exists():
        checkpoints = Checkpoints(run.workdir, read_only=True)
    if checkpoints and checkpoints.latest_step() is not None:
        step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
        if step is None:
            raise ValueError(
                f"eval.checkpoint=best: no checkpoint in {run.workdir} was evaluated by a training "
                "(eval.every_epochs, or its end): take the latest"
            )
        try:
            state = checkpoints.restore(step, state, run.metadata())
            saved = checkpoints.read_metadata(step)
        except DamagedCheckpoint as damage:
            raise ValueError(f"{damage}; a training in {run.workdir} sets it aside") from None
        if file and file != saved["config"].get("init_from"):
            raise ValueError(
                f"which one is meant: config.init_from={file!r}, or the run in {run.workdir}, "
                "which did not start from it? Leave init_from out, or pass another --workdir"
            )
        differing = config_changes(saved["config"], run.metadata()["config"])
        where = checkpoints.path(step)
    elif file:
        state, saved = adapter_file.init_from_adapter(run, state, file, training=False)
        where = file
        differing = config_changes(saved["config"], run.metadata()["config"])
        differing = {k: v for k, v in differing.items() if k.startswith(_MODEL_SETTINGS)}
    else:
        raise ValueError(
            f"no checkpoint in {run.workdir}/checkpoints: train first, --mode=train, or pass "
            "--config.init_from=FILE"
        )
    differing |= _data_changes(run, saved, ("frame_format",))
    _report_changes(run, differing, where, "evaluating")
    return state


def _data_changes(
    run: Experiment, saved: dict[str, Any], keys: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Compares the metadata `keys` of the data set, which older checkpoints do not have."""
    now = run.metadata()
    return {
        f"{key} of the data set": (saved[key], now[key])
        for key in keys
        if saved.get(key, now[key]) != now[key]
    }


def _report_changes(
    run: Experiment, differing: dict[str, tuple[Any, Any]], where: str, doing: str
) -> None:
    """Prints where a state comes from, and which settings have changed since.

    Raises:
      ValueError: some have changed, and `config.resume_changed` is off.
    """
    listed = "".join(f"\n  {key}: {old} -> {new}" for key, (old, new) in differing.items())
    if differing and not run.config.resume_changed:
        raise ValueError(
            f"{where} was trained with other settings:{listed}\nUse those, or another --workdir; "
            "or continue with the new ones by --config.resume_changed=True"
        )
    print(f"{doing} {where}" + (f" with other settings:{listed}" if listed else ""), flush=True)

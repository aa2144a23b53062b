"""Restores the state that a run starts from: a checkpoint of its workdir, or an adapter file."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from dualpath_jax.config.values import config_changes
from dualpath_jax.training import adapter_file
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from dualpath_jax.training.experiment import Experiment
from dualpath_jax.training.state import TrainState

# Prefixes of the settings that decide the model's inputs and its logits.
_MODEL_SETTINGS = (
    "model.",
    *("data.num_frames", "data.num_spatial_frames", "data.sampling", "data.grid"),
    *("data.frame_scale", "data.frameset_input", "data.image_size", "data.mean", "data.std"),
)


def restore_for_training(
    experiment: Experiment, state: TrainState, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """Restore the newest checkpoint of the workdir that is not damaged.

    Args:
      experiment: the run.
      state: its initial state, which has the structure and shardings of the result.
      checkpoints: of the run's workdir.

    Returns:
      The step of the checkpoint and its state; 0 and `state` if there is no checkpoint.

    Raises:
      ValueError: the checkpoint was trained with other settings or data, and
        `config.resume_changed` is off; or all checkpoints are damaged.
      OSError: a checkpoint cannot be read at present.
    """
    restored = checkpoints.restore_newest(state, experiment.metadata())
    if restored is None:
        return 0, state
    step, state = restored
    saved, where = checkpoints.read_metadata(step), checkpoints.path(step)
    differing = config_changes(saved["config"], experiment.metadata()["config"])
    differing |= _data_changes(experiment, saved, ("frame_format", "num_videos"))
    differing |= _identity_changes(experiment, saved, where)
    _report_changes(experiment, differing, where, "resumed from")
    _report_machine(saved, experiment.metadata(), where)
    file = experiment.config.init_from
    if file and file != saved["config"].get("init_from"):
        print(
            f"init_from={file} is ignored: the run in {experiment.workdir} has already begun",
            flush=True,
        )
    return step, state


def start_over(config: Any, workdir: str) -> None:
    """Move the checkpoints of a workdir aside, so that its next training begins at step 0."""
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    checkpoints.start_over()
    checkpoints.close()


def restore_for_evaluation(experiment: Experiment, state: TrainState) -> TrainState:
    """Restore the checkpoint that `config.eval.checkpoint` names, or else `config.init_from`.

    The workdir is not changed: a training may be running there.

    Args:
      experiment: the run.
      state: its initial state, which has the structure and shardings of the result.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or it was trained with other settings
        and `config.resume_changed` is off.
    """
    which, file = experiment.config.eval.checkpoint, experiment.config.init_from
    criterion = experiment.config.eval.criterion
    checkpoints = None
    if (epath.Path(experiment.workdir) / "checkpoints").exists():
        checkpoints = Checkpoints(experiment.workdir, read_only=True)
    if checkpoints and checkpoints.latest_step() is not None:
        step = checkpoints.best_step(criterion) if which == "best" else checkpoints.latest_step()
        if step is None:
            raise ValueError(
                f"eval.checkpoint=best: no checkpoint in {experiment.workdir} was evaluated by a "
                "training (eval.every_epochs, or its end): use eval.checkpoint=latest"
            )
        try:
            state = checkpoints.restore(step, state, experiment.metadata())
            saved = checkpoints.read_metadata(step)
        except DamagedCheckpoint as damage:
            raise ValueError(
                f"{damage}; --mode=train in {experiment.workdir} moves it out of the way"
            ) from None
        if file and file != saved["config"].get("init_from"):
            raise ValueError(
                f"config.init_from={file!r} is ambiguous: {experiment.workdir} has a checkpoint of "
                "a run that did not start from it. Leave out init_from to evaluate the checkpoint, "
                "or pass another --workdir to evaluate the adapter file"
            )
        differing = config_changes(saved["config"], experiment.metadata()["config"])
        where = checkpoints.path(step)
    elif file:
        state, saved = adapter_file.init_from_adapter(experiment, state, file, training=False)
        where = file
        differing = config_changes(saved["config"], experiment.metadata()["config"])
        differing = {k: v for k, v in differing.items() if k.startswith(_MODEL_SETTINGS)}
    else:
        raise ValueError(
            f"no checkpoint in {experiment.workdir}/checkpoints: train first, --mode=train, or "
            "pass --config.init_from=FILE"
        )
    differing |= _data_changes(experiment, saved, ("frame_format",))
    _report_changes(experiment, differing, where, "evaluating")
    return state


def _data_changes(
    experiment: Experiment, saved: dict[str, Any], keys: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the (old, new) values of the data set's metadata `keys` that have changed.

    Checkpoints of older versions do not have them.
    """
    now = experiment.metadata()
    return {
        f"{key} of the data set": (saved[key], now[key])
        for key in keys
        if saved.get(key, now[key]) != now[key]
    }


def _identity_changes(
    experiment: Experiment, saved: dict[str, Any], where: str
) -> dict[str, tuple[Any, Any]]:
    """Return the (old, new) digests of the training data that differ, shortened.

    A checkpoint of version 0.1.0 has no digests; a message says so.
    """
    old, new = saved.get("data_identity"), experiment.data_identity
    if old is None:
        print(
            f"{where} does not say which videos it was trained on; the next checkpoint will",
            flush=True,
        )
        return {}
    names = {
        "videos": "digest of the ids and labels of the training videos",
        "frames": "digest of the stored frames",
    }
    return {
        names[key]: (old[key][:12], new[key][:12])
        for key in names
        if old[key] and new[key] and old[key] != new[key]
    }


def _report_machine(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Print that a resumed run will differ in the last bits if the machine has changed."""
    old, new = saved.get("machine"), now["machine"]
    if old not in (None, new):
        print(
            f"{where} was saved on {_format_machine(old)}, and this is {_format_machine(new)}: "
            "sums are rounded differently, so the results will not be those of an undisturbed run "
            "to the last bit",
            flush=True,
        )


def _format_machine(machine: dict[str, Any]) -> str:
    """Return "1 cpu with 2 cores" or "8 NVIDIA H200 in 2 processes"."""
    text = " and ".join(f"{count} {kind}" for kind, count in machine["devices"].items())
    if machine["cpu_cores"]:
        text += f" with {machine['cpu_cores']} cores"
    return text + (f" in {machine['processes']} processes" if machine["processes"] > 1 else "")


def _report_changes(
    experiment: Experiment, differing: dict[str, tuple[Any, Any]], where: str, action: str
) -> None:
    """Print where a state comes from, and which settings have changed since.

    Args:
      experiment: the run.
      differing: (old, new) values of the changed settings.
      where: the checkpoint or adapter file.
      action: how the state is used: "resumed from" or "evaluating".

    Raises:
      ValueError: settings have changed, and `config.resume_changed` is off.
    """
    listed = "".join(f"\n  {key}: {old} -> {new}" for key, (old, new) in differing.items())
    if differing and not experiment.config.resume_changed:
        raise ValueError(
            f"{where} was trained with other settings:{listed}\nUse those, or another --workdir; "
            "or continue with the new ones by --config.resume_changed=True"
        )
    print(f"{action} {where}" + (f" with other settings:{listed}" if listed else ""), flush=True)

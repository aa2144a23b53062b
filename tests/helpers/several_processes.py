"""Runs scenarios of test_multiprocess.py, one after the other, as one of several processes.

It is started in the repository's root with PYTHONPATH=. and the arguments SCENARIOS ADDRESS
NUM_PROCESSES PROCESS_ID FOLDER DATA BACKBONE; SCENARIOS are names separated by commas.
"""

import itertools
import json
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from dualpath_jax import evaluate, train
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import preprocess
from dualpath_jax.runtime import distributed
from dualpath_jax.runtime.preemption import Preempted, PreemptionGuard
from dualpath_jax.training import sharding
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from tests.helpers.compiling_once import compiling_once
from tests.helpers.runs import build_run
from tests.helpers.small_config import small_config


def make_six_step_config(data, backbone):
    """Return a config of six steps, saved at 2, 4 and 6, on the spatial path only."""
    config = small_config(data, backbone)
    config.num_train_steps = 6
    config.checkpoint.every_steps = 2
    config.log_every_steps = 1
    config.optimizer.max_skipped_steps = 1
    config.model.temporal_path = False
    return config


def train_and_evaluate(config, workdir, evaluation=True, poison=0.0):
    """Train and evaluate.

    Args:
      config: the configuration.
      workdir: folder of the run.
      evaluation: whether to evaluate after training.
      poison: added to the inputs of the second training step, in the rows of this process.

    Returns:
      The run, and the ids of the examples that this process has read in "train" and "test".
    """
    dataset, test = (VideoDataset(config.data.dir, split) for split in ("train", "test"))
    run = build_run(config, str(workdir), dataset)
    example_ids = {"train": [], "test": []}
    original_inputs = preprocess.model_inputs

    def shard_training(batch, mesh):
        example_ids["train"].append(batch["example_id"].tolist())
        is_second_step = len(example_ids["train"]) == 2
        added = np.full(len(batch["label"]), poison if is_second_step else 0, np.float32)
        return sharding.shard_batch({**batch, "added": added}, mesh)

    def shard_testing(batch, mesh):
        example_ids["test"].append(batch["example_id"].tolist())
        return sharding.shard_batch(batch, mesh)

    def model_inputs(batch, data, dtype):
        spatial, temporal = original_inputs(batch, data, dtype)
        if "added" in batch:
            spatial += batch["added"][:, None, None, None, None]
        return spatial, temporal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "shard_batch", shard_training)
        patch.setattr(evaluate, "shard_batch", shard_testing)
        patch.setattr(preprocess, "model_inputs", model_inputs)
        run.train(dataset, test)
        if evaluation:
            run.evaluate_and_write(test)
    return run, example_ids


def straight(config, folder, process_id):
    """Train and evaluate without interruption, or from an existing checkpoint."""
    _, example_ids = train_and_evaluate(config, folder)
    (folder / f"seen{process_id}.json").write_text(json.dumps(example_ids))


def stopped(config, folder, process_id):
    """Stop after three steps, as on SIGTERM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreemptionGuard, "should_stop", lambda self, step: step == 3)
        with pytest.raises(Preempted, match="checkpoints/3"):
            train_and_evaluate(config, folder)


def apart(config, folder, process_id):
    """Check that workdirs that are not shared are refused."""
    own = folder / str(process_id)
    own.mkdir(parents=True)
    with pytest.raises(OSError, match=f"--workdir={own} is another folder for process 1 than"):
        distributed.check_shared_workdir(str(own))


def damaged(config, folder, process_id):
    """Resume when the newest checkpoint is damaged, and the one before only for process 1."""
    if process_id == 0:
        shutil.copytree(folder.parent / "straight", folder)
        arrays = [p for p in (folder / "checkpoints/6/state").rglob("*") if p.is_file()]
        largest = max(arrays, key=lambda path: path.stat().st_size)
        largest.write_bytes(b"\0" * largest.stat().st_size)
    distributed.check_shared_workdir(str(folder.parent))  # waits
    read = Checkpoints._read_leaves

    def read_or_fail(self, step, *args):
        if step == 4 and process_id == 1:
            raise DamagedCheckpoint("only here")
        return read(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "_read_leaves", read_or_fail)
        _, example_ids = train_and_evaluate(config, folder, evaluation=False)
    assert len(example_ids["train"]) == 4  # from step 2


def skipped(config, folder, process_id):
    """Skip the second step, in which the rows of process 1 are not finite."""
    run, _ = train_and_evaluate(
        config, folder, evaluation=False, poison=np.nan if process_id == 1 else 0.0
    )
    assert int(run.state.skipped) == 1


def timed(config, folder, process_id):
    """Save by time: the clock of process 0 advances by a minute at every reading."""
    config.checkpoint.every_steps = 100
    config.checkpoint.keep = 10
    config.checkpoint.every_minutes = 1.0
    clock = itertools.count(0, 61 if process_id == 0 else 0)  # that of process 1 does not advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "time", types.SimpleNamespace(monotonic=clock.__next__))
        train_and_evaluate(config, folder, evaluation=False)


SCENARIOS = {f.__name__: f for f in (apart, straight, stopped, damaged, skipped, timed)}


def main():
    """Run the scenarios named on the command line."""
    names, address, number, process_id, folder, data, backbone = sys.argv[1:]
    with distributed.end_together(), compiling_once():
        distributed.initialize(address, int(number), int(process_id))
        for name in names.split(","):
            config = make_six_step_config(data, backbone)
            SCENARIOS[name](config, pathlib.Path(folder) / name, int(process_id))


if __name__ == "__main__":
    main()

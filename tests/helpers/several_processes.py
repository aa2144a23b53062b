"""One of the processes that test_multiprocess.py starts: what it does, one thing after the other.

With PYTHONPATH=. from the repository's root:
python tests/helpers/several_processes.py WHAT ADDRESS NUM_PROCESSES PROCESS_ID FOLDER DATA BACKBONE
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
from dualpath_jax.runtime import distributed
from dualpath_jax.runtime.preemption import Preempted, PreemptionGuard
from dualpath_jax.training import experiment, sharding
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from tests.helpers.compiling_once import compiling_once
from tests.helpers.small_config import small_config


def six_steps(data, backbone):
    """Saved at 2, 4 and 6; the spatial path alone, which compiles sooner."""
    config = small_config(data, backbone)
    config.num_train_steps = 6
    config.checkpoint.every_steps = 2
    config.log_every_steps = 1
    config.optimizer.max_skipped_steps = 1
    config.model.temporal_path = False
    return config


def run_all(config, workdir, evaluation=True, poison=0.0):
    """Train, evaluate; the run and the examples that this process read: in training, in testing.

    `poison` is added to the inputs of the second training step, in the rows of this process.
    """
    dataset, test = (VideoDataset(config.data.dir, split) for split in ("train", "test"))
    run = experiment.build_experiment(config, str(workdir), dataset)
    seen = {"train": [], "test": []}
    inputs = train.preprocess.model_inputs

    def shard_training(batch, mesh):
        seen["train"].append(batch["example_id"].tolist())
        added = np.full(len(batch["label"]), poison if len(seen["train"]) == 2 else 0, np.float32)
        return sharding.shard_batch({**batch, "added": added}, mesh)

    def shard_testing(batch, mesh):
        seen["test"].append(batch["example_id"].tolist())
        return sharding.shard_batch(batch, mesh)

    def add(batch, data, dtype):
        spatial, temporal = inputs(batch, data, dtype)
        if "added" in batch:
            spatial += batch["added"][:, None, None, None, None]
        return spatial, temporal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "shard_batch", shard_training)
        patch.setattr(evaluate, "shard_batch", shard_testing)
        patch.setattr(train.preprocess, "model_inputs", add)
        train.train(run, dataset, test)
        if evaluation:
            evaluate.evaluate_and_write(run, test)
    return run, seen


def straight(config, folder, me):
    """Without interruption, or from the checkpoint that is there."""
    _, seen = run_all(config, folder)
    (folder / f"seen{me}.json").write_text(json.dumps(seen))


def stopped(config, folder, me):
    """Told to stop after three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreemptionGuard, "should_stop", lambda self, step: step == 3)
        with pytest.raises(Preempted, match="checkpoints/3"):
            run_all(config, folder)


def apart(config, folder, me):
    """Each process has a workdir of its own."""
    own = folder / str(me)
    own.mkdir(parents=True)
    with pytest.raises(OSError, match=f"--workdir={own} is another folder for process 1 than"):
        distributed.check_shared_workdir(str(own))


def damaged(config, folder, me):
    """The newest checkpoint is damaged for all, the one before for process 1 alone."""
    if me == 0:
        shutil.copytree(folder.parent / "straight", folder)
        arrays = [p for p in (folder / "checkpoints/6/state").rglob("*") if p.is_file()]
        largest = max(arrays, key=lambda path: path.stat().st_size)
        largest.write_bytes(b"\0" * largest.stat().st_size)
    distributed.check_shared_workdir(str(folder.parent))  # waits
    read = Checkpoints._read_leaves

    def read_or_fail(self, step, *args):
        if step == 4 and me == 1:
            raise DamagedCheckpoint("only here")
        return read(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "_read_leaves", read_or_fail)
        _, seen = run_all(config, folder, evaluation=False)
    assert len(seen["train"]) == 4  # from step 2


def skipped(config, folder, me):
    """The rows of process 1 are not finite at the second step."""
    run, _ = run_all(config, folder, evaluation=False, poison=np.nan if me == 1 else 0.0)
    assert int(run.state.skipped) == 1


def timed(config, folder, me):
    """A checkpoint is due by time: a minute goes by at every look at the clock of process 0."""
    config.checkpoint.every_steps = 100
    config.checkpoint.keep = 10
    config.checkpoint.every_minutes = 1.0
    clock = itertools.count(0, 61 if me == 0 else 0)  # that of process 1 stands still
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "time", types.SimpleNamespace(monotonic=clock.__next__))
        run_all(config, folder, evaluation=False)


WHAT = {f.__name__: f for f in (apart, straight, stopped, damaged, skipped, timed)}


def main():
    what, address, number, me, folder, data, backbone = sys.argv[1:]
    with distributed.end_together(), compiling_once():
        distributed.initialize(address, int(number), int(me))
        for name in what.split(","):
            config = six_steps(data, backbone)
            WHAT[name](config, pathlib.Path(folder) / name, int(me))


if __name__ == "__main__":
    main()

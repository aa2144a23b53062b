"""What the command line starts: training and evaluation in a workdir that nobody else uses.

Public: `train_and_evaluate`, `shared_settings`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from dualpath_jax import evaluate, train
from dualpath_jax.config.values import flatten_config
from dualpath_jax.demo import setup
from dualpath_jax.runtime import distributed, environment, file_lock
from dualpath_jax.training import experiment, restore
from dualpath_jax.training.inputs import (
    check_inputs,
    check_workdir,
    dataset_fingerprint,
    expand_splits,
    open_datasets,
)

# What may differ: files lie where they lie on each host, and nothing else waits for batches.
_OF_A_HOST = ("data.dir", "data.prefetch", "backbone.checkpoint", "init_from")


def train_and_evaluate(config: Any, workdir: str, training: bool) -> None:
    """Each run that `config` asks for: train (unless only evaluation is wanted), then evaluate.

    Raises:
      ValueError, OSError, FloatingPointError: what the user can mend, with the remedy.
      Preempted: told to stop; the state is saved.
    """
    environment.disable_async_dispatch()
    with _claimed(workdir):
        own = shared_settings(config) | {"--mode": training}
        distributed.check_same_on_all_hosts(own, "give all hosts the same config file and options")
        if config.data.source == "demo" and not config.data.synthetic:
            with file_lock.waiting_lock(config.data.dir):
                setup.ensure_demo_data(config)
        check_inputs(config)
        results = []
        for part, folder in expand_splits(config, workdir):
            if distributed.is_main_process():
                check_workdir(folder)
            dataset, eval_dataset = open_datasets(part)
            splits = {"training videos": dataset, "evaluation videos": eval_dataset}
            distributed.check_same_on_all_hosts(
                {name: dataset_fingerprint(one) for name, one in splits.items()},
                "give all hosts the same (on each host's own disk: copy the data set again)",
            )
            run = experiment.build_experiment(part, folder, dataset)
            if training:
                train.train(run, dataset, eval_dataset)
            else:
                restore.restore_for_evaluation(run)
            results.append(evaluate.evaluate_and_write(run, eval_dataset))
            if training:
                train.record_final_scores(run, results[-1])
        if len(results) > 1:
            evaluate.write_mean_results(workdir, results)


def shared_settings(config: Any) -> dict[str, Any]:
    """Values by dotted key, without those that may differ from host to host."""
    return {key: value for key, value in flatten_config(config).items() if key not in _OF_A_HOST}


@contextlib.contextmanager
def _claimed(workdir: str) -> Iterator[None]:
    """Process 0 makes the workdir and holds it; the others wait for that."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            check_workdir(workdir)
            stack.enter_context(file_lock.exclusive_lock(workdir, "--workdir"))
        distributed.check_shared_workdir(workdir)
        distributed.share_compiled_programs(workdir)
        yield

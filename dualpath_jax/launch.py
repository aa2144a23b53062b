"""Launches what the command line asks for: training and evaluation in a workdir of their own."""

import contextlib
from collections.abc import Iterator
from typing import Any

from dualpath_jax import evaluate, train
from dualpath_jax.config.loading import upgrade_config
from dualpath_jax.config.values import flatten_config
from dualpath_jax.demo import setup
from dualpath_jax.probing.results import describe_probe
from dualpath_jax.runtime import distributed, environment
from dualpath_jax.training import restore
from dualpath_jax.training.experiment import build_experiment
from dualpath_jax.training.inputs import (
    check_inputs,
    dataset_fingerprint,
    expand_splits,
    lock_workdir,
    open_datasets,
    report_untrained_classes,
)
from dualpath_jax.training.state import TrainState
from dualpath_jax.weights.backbone_keys import fill_backbone_keys

# Settings that may differ between hosts: paths on their own disks, and the number of prefetched
# batches.
_HOST_SETTINGS = ("data.dir", "data.prefetch", "backbone.checkpoint", "init_from")


def train_and_evaluate(config: Any, workdir: str, training: bool, start_over: bool = False) -> None:
    """Train, if `training`, and evaluate each run that `config` asks for.

    Args:
      config: the whole configuration.
      workdir: for checkpoints and results, local or gs://.
      training: False evaluates a checkpoint of the workdir.
      start_over: begin the training at step 0, also where the workdir has checkpoints; these are
        moved aside.

    Raises:
      ValueError, OSError, FloatingPointError: the user can fix the problem; the message has the
        remedy.
      Preempted: a signal stopped the run; the state is saved.
    """
    upgrade_config(config)
    environment.disable_async_dispatch()
    with _claim_workdir(workdir):
        settings = shared_settings(config) | {"--mode": training}
        remedy = "give all hosts the same config file and options"
        distributed.check_same_on_all_hosts(settings, remedy)
        runs = expand_splits(config, workdir)
        if not config.data.synthetic:
            setup.ensure_generated(config)
        check_inputs(config)
        for split_config, _ in runs:
            fill_backbone_keys(split_config)
        results = []
        for split_config, folder in runs:
            # Another program may have been started with the folder of one split.
            with contextlib.nullcontext() if folder == workdir else lock_workdir(folder):
                results.append(_run_split(split_config, folder, training, start_over))
            if distributed.is_main_process() and (probe := describe_probe(folder)):
                print(probe, flush=True)
        if len(results) > 1:
            evaluate.write_mean_results(workdir, results)


def _run_split(config: Any, workdir: str, training: bool, start_over: bool) -> dict[str, Any]:
    """Train, if `training`, and evaluate one run; return the content of results.json."""
    dataset, eval_dataset = open_datasets(config)
    if training and not config.data.synthetic and distributed.is_main_process():
        report_untrained_classes(dataset)
    distributed.check_same_on_all_hosts(
        {
            "training videos": dataset_fingerprint(dataset),
            "evaluation videos": dataset_fingerprint(eval_dataset),
        },
        "give all hosts the same (on each host's own disk: copy the data set again)",
    )
    experiment, state = build_experiment(config, workdir, dataset)
    evaluator = evaluate.Evaluator(experiment, eval_dataset)
    if training:
        if start_over:
            restore.start_over(config, workdir)
        state = train.train(experiment, state, dataset, evaluator)
        return _evaluate_trained(evaluator, state)
    state = restore.restore_for_evaluation(experiment, state)
    return evaluate.evaluate_and_write(evaluator, state)


def _evaluate_trained(evaluator: evaluate.Evaluator, state: TrainState) -> dict[str, Any]:
    """Evaluate the last state of a training, then the best if that is asked for.

    Returns:
      The content of results.json.
    """
    experiment = evaluator.experiment
    results = evaluate.evaluate_and_write(evaluator, state)
    train.record_final_scores(experiment, results)
    if experiment.config.eval.checkpoint != "best":
        return results
    best = restore.restore_for_evaluation(experiment, state)
    return results if best.step == state.step else evaluate.evaluate_and_write(evaluator, best)


def shared_settings(config: Any) -> dict[str, Any]:
    """Return the settings, by dotted key, that must be the same on all hosts."""
    settings = flatten_config(config)
    return {key: value for key, value in settings.items() if key not in _HOST_SETTINGS}


@contextlib.contextmanager
def _claim_workdir(workdir: str) -> Iterator[None]:
    """Make the workdir and lock it in process 0, for which the other processes wait."""
    with lock_workdir(workdir):
        distributed.check_shared_workdir(workdir)
        distributed.share_compiled_programs(workdir)
        yield

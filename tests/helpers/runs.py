"""Builds runs for tests: an experiment and its state in one mutable object."""

import dataclasses
from typing import Any

from dualpath_jax import evaluate, train
from dualpath_jax.training import adapter_file, restore
from dualpath_jax.training.experiment import Experiment, build_experiment
from dualpath_jax.training.state import TrainState


@dataclasses.dataclass
class Run:
    """Holds an experiment and its current state; it also has the attributes of the experiment."""

    experiment: Experiment
    state: TrainState

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experiment, name)

    def replace(self, **values: Any) -> None:
        """Replace values of the experiment, which is frozen."""
        self.experiment = dataclasses.replace(self.experiment, **values)

    def train(self, dataset, eval_dataset) -> None:
        """Train to the last step."""
        evaluator = evaluate.Evaluator(self.experiment, eval_dataset)
        self.state = train.train(self.experiment, self.state, dataset, evaluator)

    def evaluate(self, dataset) -> evaluate.Scores:
        """Return the scores of the current state."""
        return evaluate.Evaluator(self.experiment, dataset).evaluate(self.state)

    def evaluate_and_write(self, dataset) -> dict[str, Any]:
        """Evaluate the current state, write results.json and return its content."""
        evaluator = evaluate.Evaluator(self.experiment, dataset)
        return evaluate.evaluate_and_write(evaluator, self.state)

    def restore_for_evaluation(self) -> None:
        """Restore the state that --mode=eval evaluates."""
        self.state = restore.restore_for_evaluation(self.experiment, self.state)

    def restore_for_training(self, checkpoints) -> int:
        """Restore the newest checkpoint and return its step."""
        step, self.state = restore.restore_for_training(self.experiment, self.state, checkpoints)
        return step

    def init_from_adapter(self, path: str) -> dict[str, Any]:
        """Start from an adapter file and return its metadata."""
        self.state, metadata = adapter_file.init_from_adapter(self.experiment, self.state, path)
        return metadata


def build_run(config: Any, workdir: str, dataset) -> Run:
    """Build the experiment of `config` and its initial state."""
    return Run(*build_experiment(config, workdir, dataset))

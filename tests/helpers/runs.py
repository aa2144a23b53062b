"""Builds runs for tests: an experiment with its state in one object that changes."""

import dataclasses
from typing import Any

from dualpath_jax import evaluate, train
from dualpath_jax.training import adapter_file, restore
from dualpath_jax.training.experiment import Experiment, build_experiment
from dualpath_jax.training.state import TrainState


@dataclasses.dataclass
class Run:
    """Holds an experiment and its present state; attributes of the experiment are its own too."""

    experiment: Experiment
    state: TrainState

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experiment, name)

    def train(self, dataset, eval_dataset) -> None:
        """Trains to the end."""
        self.state = train.train(self.experiment, self.state, dataset, eval_dataset)

    def evaluate(self, dataset) -> evaluate.Scores:
        """Returns the scores of the present state."""
        return evaluate.Evaluator(self.experiment, dataset).evaluate(self.state)

    def evaluate_and_write(self, dataset) -> dict[str, Any]:
        """Evaluates the present state and writes results.json."""
        return evaluate.evaluate_and_write(self.experiment, self.state, dataset)

    def restore_for_evaluation(self) -> None:
        """Restores what the configuration names for --mode=eval."""
        self.state = restore.restore_for_evaluation(self.experiment, self.state)

    def restore_for_training(self, checkpoints) -> int:
        """Restores the newest checkpoint and returns its step."""
        step, self.state = restore.restore_for_training(self.experiment, self.state, checkpoints)
        return step

    def init_from_adapter(self, path: str) -> dict[str, Any]:
        """Starts from an adapter file and returns its metadata."""
        self.state, metadata = adapter_file.init_from_adapter(self.experiment, self.state, path)
        return metadata


def build_run(config: Any, workdir: str, dataset) -> Run:
    """Builds the experiment of `config` and its initial state."""
    return Run(*build_experiment(config, workdir, dataset))

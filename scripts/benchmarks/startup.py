"""Measures a start of the program in stages, in a process of its own: `measure_start`."""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

# In the order of the table. Compilation counts to the stage that needs it, which is mostly "first
# call"; with a filled cache, programs are only traced and read.
STAGES = ("imports", "data", "weights", "init", "first call", "rest")


def measure_start(
    kind: str, arguments: list[str], cache: str | os.PathLike[str], package_root: str
) -> dict[str, float]:
    """Run a command up to its first step or prediction, in a new process.

    Args:
      kind: "train" (to the end of the first step) or "predict" (to the end of the program).
      arguments: of the module `dualpath_jax.main`, or of `commands.predict`.
      cache: folder of JAX's compilation cache; cold if it is empty.
      package_root: folder of the checkout whose package is measured.

    Returns:
      Seconds of CPU time of each of `STAGES`, of "total", and "wall" seconds in total.

    Raises:
      RuntimeError: the command failed; the message is the end of its output.
    """
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=os.fspath(cache))
    environment["PYTHONPATH"] = package_root
    command = [sys.executable, os.path.abspath(__file__), kind, *arguments]
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"imports"')]
    if not lines:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
    return json.loads(lines[0]) | {"wall": time.monotonic() - begin}


def write_random_backbone(path: str | os.PathLike[str], name: str) -> None:
    """Write a backbone file with random weights of the architecture `name`, such as ViT-B/16."""
    from safetensors.numpy import save_file

    from dualpath_jax.models.backbones import registry
    from dualpath_jax.weights import convert

    config = registry.MODELS[name]
    rng = np.random.default_rng(0)
    arrays = {
        key: rng.standard_normal(shape, np.float32) * 0.02
        for key, shape in convert.parameter_shapes(config).items()
    }
    meta = {
        "version": convert.FORMAT_VERSION,
        "family": "vit",
        "config": dataclasses.asdict(config),
        "source": "random",
        "source_sha256": "random",
    }
    save_file(arrays, path, {convert.CONVERTED_KEY: json.dumps(meta)})


class _StageClock:
    """Adds up the CPU time of stages; a nested stage does not count to the outer one."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._open = ["imports"]
        self._last = 0.0  # process_time begins with the process

    def _advance(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._advance()
        self._open.append(name)
        try:
            yield
        finally:
            self._advance()
            self._open.pop()

    def wrap(self, name: str, owner: str, attribute: str) -> None:
        """Replace a function of a module, or of a class in it, by one that counts to a stage."""
        module, _, class_name = owner.partition(":")
        holder = importlib.import_module(module)
        holder = getattr(holder, class_name) if class_name else holder
        function = getattr(holder, attribute)

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        setattr(holder, attribute, wrapped)

    def finish(self) -> None:
        """Print the stages as JSON and end the process."""
        self._advance()
        print(json.dumps(self.seconds | {"total": time.process_time()}), flush=True)
        os._exit(0)


def _time_training(clock: _StageClock) -> Callable[[], None]:
    """Prepare the measurement of a training; return the command to run."""
    from dualpath_jax import main, train
    from dualpath_jax.training.metrics_logger import MetricsLogger

    package = "dualpath_jax"
    clock.wrap("rest", f"{package}.launch", "train_and_evaluate")
    clock.wrap("data", f"{package}.launch", "open_datasets")
    clock.wrap("init", f"{package}.launch", "build_experiment")
    clock.wrap("weights", f"{package}.training.experiment", "load_backbone")
    jit_train_step, train_batches = train.jit_train_step, train._train_batches

    def timed_train_step(*args):
        step = jit_train_step(*args)

        def call(*arrays):
            with clock.stage("first call"):
                return step(*arrays)

        return call

    def timed_batches(*args):
        with contextlib.closing(train_batches(*args)) as batches:
            while True:
                with clock.stage("data"):
                    batch = next(batches)
                yield batch

    train.jit_train_step, train._train_batches = timed_train_step, timed_batches
    log_first_step = MetricsLogger.log_first_step

    def finish(*args):
        with clock.stage("first call"):
            log_first_step(*args)
        clock.finish()

    MetricsLogger.log_first_step = finish
    return main.main


def _time_prediction(clock: _StageClock) -> Callable[[], None]:
    """Prepare the measurement of a prediction; return the command to run."""
    from dualpath_jax.commands import predict

    package = "dualpath_jax.inference"
    clock.wrap("rest", f"{package}.predict_files", "predict_videos")
    clock.wrap("init", f"{package}.trained_model", "load")
    clock.wrap("weights", "dualpath_jax.weights.convert", "load_backbone")
    clock.wrap("data", f"{package}.trained_model:TrainedModel", "clips")
    clock.wrap("data", f"{package}.trained_model:TrainedModel", "clips_from_frames")
    clock.wrap("first call", f"{package}.trained_model:TrainedModel", "logits")
    clock.wrap("first call", f"{package}.trained_model:TrainedModel", "features")
    return predict.main


def main() -> None:
    """Run as the measured process: kind, then the arguments of its command.

    Raises:
      SystemExit: the command failed.
      RuntimeError: a training has ended before its first step.
    """
    from dualpath_jax.runtime import environment

    environment.configure_environment()  # the command does the same before it imports JAX
    kind = sys.argv.pop(1)
    clock = _StageClock()
    command = {"train": _time_training, "predict": _time_prediction}[kind](clock)
    try:
        command()
    except SystemExit as end:
        if end.code:
            raise
    if kind == "train":  # `_time_training` ends the process in the first step
        raise RuntimeError("the training has ended before its first step: give it more steps")
    clock.finish()


if __name__ == "__main__":
    main()

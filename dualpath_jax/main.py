"""Command line: trains and evaluates the model of a config file.

python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo
"""

import contextlib
import os
import pathlib
import signal
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from dualpath_jax import environment

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration, see configs/.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints and results; default: runs/<config file name>, with _synthetic behind "
    "for data.synthetic.",
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "check"],
    "train (resuming), then evaluate; evaluate alone; or check the configuration, without data, "
    "weights and workdir.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "HOST:PORT of process 0, where one run has several processes; not needed where JAX finds it "
    "out (Cloud TPU, Slurm, Open MPI). Environment: JAX_COORDINATOR_ADDRESS.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    os.environ.get("JAX_NUM_PROCESSES"),
    "How many they are. Environment: JAX_NUM_PROCESSES.",
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    os.environ.get("JAX_PROCESS_ID"),
    "Which of them this is, from 0. Environment: JAX_PROCESS_ID.",
)


@contextlib.contextmanager
def user_errors():
    """Report what the user can mend as one line, without a traceback (-v=1 shows it)."""
    from dualpath_jax import distributed  # imports JAX
    from dualpath_jax.preemption import EXIT_CODE, Preempted

    try:
        yield
    except Preempted as stop:
        print(f"{distributed.label()}{stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (ValueError, OSError, FloatingPointError) as error:
        if distributed.another_failed(error):
            raise
        if logging.level_debug():
            traceback.print_exc()
        print(f"{distributed.label()}error: {error}", file=sys.stderr)
        sys.exit(2)


def default_workdir(config) -> str:
    """runs/<name of the config file>, with _synthetic behind for `data.synthetic`."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return f"runs/{pathlib.Path(path.split(':')[0]).stem}{'_synthetic' * config.data.synthetic}"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save otherwise
    config = CONFIG.value
    workdir = WORKDIR.value or default_workdir(config)
    # Imported here, so that --help is quick and decoding workers do not load JAX and TensorFlow.
    from dualpath_jax import preemption

    signal.signal(signal.SIGTERM, preemption.leave)  # the loop has a handler of its own
    from dualpath_jax import check, distributed, job, run

    with distributed.ending_together(), user_errors():
        if MODE.value == "check":
            check.check(run.divide(config, workdir)[0][0])  # the others differ in names alone
            return
        distributed.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        job.train_and_evaluate(config, workdir, MODE.value == "train")


if __name__ == "__main__":
    environment.prepare()
    flags.mark_flag_as_required("config")
    app.run(main)

"""Trains the model of a config file and evaluates it, or goes on where it was interrupted.

    python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m dualpath_jax.main --config=configs/folder_vitb.py --config.data.dir=data/mine

--config.KEY=VALUE sets any key of the configuration, such as --config.data.batch_size=32 or
--config.seed=1. Every key stands in dualpath_jax/config/schema.py with its default and a comment. -v=1 shows what
is logged, and the traceback of an error.

Exit status: 0 done; 2 an error that you can mend; 75 told to stop (SIGTERM; 130 by Ctrl-C) and
saved: the same command goes on. docs/troubleshooting.md has what errors mean.
"""

import os
import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from dualpath_jax import cli
from dualpath_jax.runtime import environment, progress_bar

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
QUIET = flags.DEFINE_bool(
    "quiet",
    False,
    "No progress, only results, warnings and errors. Without a terminal progress is lines.",
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    os.environ.get("JAX_PROCESS_ID"),
    "Which of them this is, from 0. Environment: JAX_PROCESS_ID.",
)


def default_workdir(config) -> str:
    """runs/<name of the config file>, with _synthetic behind for `data.synthetic`."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return f"runs/{pathlib.Path(path.split(':')[0]).stem}{'_synthetic' * config.data.synthetic}"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save otherwise
    progress_bar.set_quiet(QUIET.value)
    config = CONFIG.value
    workdir = WORKDIR.value or default_workdir(config)
    # Imported here, so that --help is quick and decoding workers do not load JAX and TensorFlow.
    from dualpath_jax.runtime import preemption

    preemption.install_sigterm_handler()  # the loop has a handler of its own
    from dualpath_jax import check_config, launch
    from dualpath_jax.runtime import distributed
    from dualpath_jax.training.inputs import expand_splits

    with distributed.end_together(), cli.user_errors():
        if MODE.value == "check":
            check_config.check_config(
                expand_splits(config, workdir)[0][0]
            )  # the others differ in names alone
            return
        distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        launch.train_and_evaluate(config, workdir, MODE.value == "train")


if __name__ == "__main__":
    environment.configure_environment()
    flags.mark_flag_as_required("config")
    cli.run_app(main)

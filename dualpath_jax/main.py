"""Trains the model of a config file and evaluates it, resuming where a run was interrupted.

    python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m dualpath_jax.main --config=configs/finetune.py --config.data.dir=data/mine

--config takes a path, or the name of a file in ./configs or in the package. --config.KEY=VALUE sets
any key of the configuration, such as --config.data.batch_size=32; --help_config lists all keys with
their defaults. -v=1 shows what is logged, and the traceback of an error.

`dualpath train`, `dualpath eval` and `dualpath check` are this command with its modes.

Exit status: 0 done; 2 an error that you can fix; 75 stopped by SIGTERM or SIGHUP (130 by
Ctrl-C) and saved: the same command resumes. docs/troubleshooting.md explains the errors.
"""

if __name__ == "__main__":  # SIGTERM ends the program with its status also while it imports
    from dualpath_jax.runtime import preemption

    preemption.install_sigterm_handler()

import os
import pathlib
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dualpath_jax import cli
from dualpath_jax.config import loading
from dualpath_jax.runtime import console, environment, preemption, progress_bar

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file: a path, or a name such as ssv2_vitb or ssv2_vitb:32."
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints and results; default: runs/NAME, the name of the config file, with "
    "_synthetic appended for data.synthetic.",
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "check"],
    "train: train or resume, then evaluate; eval: only evaluate; check: check the configuration "
    "without data, weights and workdir.",
)
START_OVER = flags.DEFINE_bool(
    "start_over",
    False,
    "Train from step 0 although the workdir has checkpoints; they are moved to its folder "
    "old_checkpoints. Leave it out when you resume.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "HOST:PORT of process 0 in a run of several processes; not needed where JAX detects it (Cloud "
    "TPU, Slurm, Open MPI). Environment: JAX_COORDINATOR_ADDRESS.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    os.environ.get("JAX_NUM_PROCESSES"),
    "Total number of processes in the run. Environment: JAX_NUM_PROCESSES.",
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    os.environ.get("JAX_PROCESS_ID"),
    "Index of this process, starting at 0. Environment: JAX_PROCESS_ID.",
)
QUIET = flags.DEFINE_bool(
    "quiet",
    False,
    "Print only results, warnings and errors, but no progress.",
)


def _default_workdir(config: Any) -> str:
    """Return runs/NAME, the name of the config file; "_synthetic" follows for synthetic data."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return f"runs/{pathlib.Path(path.split(':')[0]).stem}{'_synthetic' * config.data.synthetic}"


def run(argv: list[str]) -> None:
    """Run the mode that the flags name; absl calls it with the parsed command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if MODE.value != "check":
        console.protect_streams(is_log=True)  # results are in the workdir
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax logs each step of a save otherwise
    progress_bar.set_quiet(QUIET.value)
    config = CONFIG.value
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    loading.prefer_num_epochs(config, overrides)
    workdir = WORKDIR.value or _default_workdir(config)

    # Imported here, so that --help is quick and decoding workers do not load JAX and TensorFlow.
    with cli.user_errors():
        from dualpath_jax import check_config, launch
        from dualpath_jax.runtime import distributed
        from dualpath_jax.training.inputs import expand_splits

    with distributed.end_together(), cli.user_errors():
        if START_OVER.value and MODE.value != "train":
            raise ValueError(f"--start_over belongs to --mode=train, not to --mode={MODE.value}")
        if MODE.value == "check":
            loading.upgrade_config(config)
            first_config, _ = expand_splits(config, workdir)[0]  # the others have other split names
            check_config.check_config(first_config, overrides)
            return
        distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        launch.train_and_evaluate(config, workdir, MODE.value == "train", START_OVER.value)


def main() -> None:
    """Parse the command line and run it; the module's docstring lists the exit statuses."""
    preemption.install_sigterm_handler()  # the loop has its own handler
    environment.configure_environment()
    flags.mark_flag_as_required("config")
    cli.run_app(run, __doc__)


if __name__ == "__main__":
    console.run(main)

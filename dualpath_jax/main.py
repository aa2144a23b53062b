"""Trains the model of a config file and evaluates it, resuming where a run was interrupted.

    python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m dualpath_jax.main --config=configs/finetune.py --config.data.dir=data/mine
    python -m dualpath_jax.main --mode=eval --workdir=runs/demo

--config takes a path, or the name of a file in ./configs or in the package. A file NAME.json is a
saved configuration; each run writes its own, config.json, into its workdir, and --mode=eval takes
it from there. --config.KEY=VALUE sets any key of the configuration, such as
--config.data.batch_size=32; --help_config lists all keys with their defaults. -v=1 shows what is
logged, and the traceback of an error.

`dualpath train`, `dualpath eval` and `dualpath check` are this command with its modes.

Exit status: 0 done; 2 an error that you can fix; 75 stopped by SIGTERM or SIGHUP (130 by
Ctrl-C) and saved: the same command resumes. docs/troubleshooting.md explains the errors.
"""

if __name__ == "__main__":  # SIGTERM ends the program with its status also while it imports
    from dualpath_jax.runtime import preemption

    preemption.install_sigterm_handler()

import os
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from dualpath_jax import cli
from dualpath_jax.config import loading, saved_config
from dualpath_jax.config.values import flatten_config
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
    """Return the folder of `loading.default_workdir`; "_synthetic" follows for synthetic data."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return loading.default_workdir(path) + "_synthetic" * config.data.synthetic


def _find_config(arguments: list[str]) -> list[str]:
    """Return the arguments with a --config; an evaluation takes that of its workdir.

    Raises:
      flags.Error: neither is named.
    """
    if any(argument.lstrip("-").split("=")[0] == "config" for argument in arguments):
        return arguments
    rest = flags.FLAGS(["", *arguments], known_only=True)[1:]
    words = [argument for argument in rest if not argument.startswith("-")]
    if MODE.value != "eval":
        raise flags.Error("--config is missing: name a config file, such as --config=finetune")
    if not (workdir := WORKDIR.value or (words[0] if words else None)):
        raise flags.Error("name the run to evaluate by its folder, or a config file by --config")
    for folder, added in ((workdir, ()), (f"{workdir}/split1", ("--config.data.split=all",))):
        if epath.Path(folder, "config.json").exists():
            # Overrides of keys must follow the config.
            return [f"--config={folder}/config.json", *arguments, *added]
    raise flags.Error(
        f"{workdir} has no config.json: it is not the folder of a training run; name that folder, "
        "or a config file by --config"
    )


def _describe_overrides(overrides: Mapping[str, Any]) -> str:
    """Return a line with the saved configuration that is used, and what the user sets in it."""
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[2]
    saved = flatten_config(saved_config.get_config(path))
    changed = [f"{key}={new!r} instead of {saved[key]!r}" for key, new in overrides.items()]
    return f"configuration: {path}" + (f", with {', '.join(changed)}" if changed else "")


def run(argv: list[str]) -> None:
    """Run the mode that the flags name; absl calls it with the parsed command line."""
    words = argv[1:]
    workdir = WORKDIR.value or (words.pop(0) if words and MODE.value == "eval" else None)
    if words:
        raise app.UsageError(f"unexpected arguments: {' '.join(words)}")
    if MODE.value != "check":
        console.protect_streams(is_log=True)  # results are in the workdir
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax logs each step of a save otherwise
    progress_bar.set_quiet(QUIET.value)
    config = CONFIG.value
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    loading.prefer_num_epochs(config, overrides)
    workdir = workdir or _default_workdir(config)
    if config_flags.get_config_filename(flags.FLAGS["config"]).endswith(".json"):
        print(_describe_overrides(overrides), flush=True)

    # Imported here, so that --help is quick and decoding workers do not load JAX and TensorFlow.
    with cli.user_errors():
        from dualpath_jax.runtime import distributed
        from dualpath_jax.training.inputs import expand_splits

    with distributed.end_together(), cli.user_errors():
        if START_OVER.value and MODE.value != "train":
            raise ValueError(f"--start_over belongs to --mode=train, not to --mode={MODE.value}")
        if MODE.value == "check":
            from dualpath_jax import check_config

            loading.upgrade_config(config)
            first_config, _ = expand_splits(config, workdir)[0]  # the others have other split names
            check_config.check_config(first_config, overrides)
            return
        from dualpath_jax import launch

        distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        launch.train_and_evaluate(config, workdir, MODE.value == "train", START_OVER.value)


def main() -> None:
    """Parse the command line and run it; the module's docstring lists the exit statuses."""
    preemption.install_sigterm_handler()  # the loop has its own handler
    environment.configure_environment()
    cli.run_app(run, __doc__, _find_config)


if __name__ == "__main__":
    console.run(main)

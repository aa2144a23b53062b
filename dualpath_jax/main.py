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


@contextlib.contextmanager
def user_errors():
    """Report what the user can mend as one line, without a traceback (-v=1 shows it)."""
    from dualpath_jax.preemption import EXIT_CODE, Preempted  # imports JAX

    try:
        yield
    except Preempted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (ValueError, OSError, FloatingPointError) as error:
        if logging.level_debug():
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
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
    from dualpath_jax import check, demo, evaluate, lock, train
    from dualpath_jax import run as run_lib

    with user_errors():
        if MODE.value == "check":
            check.check(run_lib.divide(config, workdir)[0][0])  # the others differ in names alone
            return
        run_lib.check_workdir(workdir)
        with lock.claimed(workdir, "--workdir"):
            if config.data.source == "demo" and not config.data.synthetic:
                demo.ensure_demo(config)
            run_lib.check_inputs(config)
            results = []
            for part, folder in run_lib.divide(config, workdir):
                run_lib.check_workdir(folder)
                dataset, eval_dataset = run_lib.open_data(part)
                run = run_lib.build_run(part, folder, dataset)
                if MODE.value == "train":
                    train.train(run, dataset, eval_dataset)
                else:
                    train.restore_for_eval(run)
                results.append(evaluate.evaluate_and_write(run, eval_dataset))
            if len(results) > 1:
                evaluate.write_mean(workdir, results)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # On CPU, XLA's YNNPACK fusions make the demo's training step 1.2 times slower (jax 0.10.2).
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    flags.mark_flag_as_required("config")
    app.run(main)

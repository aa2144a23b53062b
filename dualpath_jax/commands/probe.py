"""Trains probes: heads on the features of the frozen backbone, as a baseline for a tuned model.

    dualpath probe --config=demo --workdir=runs/demo
    dualpath probe --config=finetune --config.data.dir=data/mine --workdir=runs/finetune

The backbone sees each training, validation and test video once; its features are kept in
WORKDIR/probe_features. Three heads are trained on them: `linear` and `attentive` do not know the
order of the frames, `ordered` does. Each is trained with all --learning_rates and --weight_decays
at once, and the best by validation videos is evaluated on eval.split. WORKDIR/probe.json has the
results, which reports show; adapter files for `dualpath predict` have the trained heads.

A config of another method is probed with 8 frames, unless --config.data.num_frames is given.
--config.KEY=VALUE sets any key that has an effect here. Interrupted, the same command continues.

In a checkout, python scripts/probe.py is the same command.
"""

import argparse
from collections.abc import Sequence

from dualpath_jax.cli import build_parser, parse_with_overrides, positive, user_errors
from dualpath_jax.config.loading import find_overridden_keys, load_config
from dualpath_jax.probing.options import HEADS, ProbeOptions, as_probe, check_overrides
from dualpath_jax.runtime import console, environment, progress_bar


def probe(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Train the probes of the config in the workdir that the command line names."""
    if "://" in args.workdir:
        raise ValueError(
            f"--workdir={args.workdir}: a probe keeps its features on a local disk; choose a local "
            "folder"
        )
    config = load_config(args.config, overrides)
    keys = find_overridden_keys(overrides)
    check_overrides(keys, augmented=args.augmented_passes > 0)
    options = ProbeOptions(
        heads=tuple(args.heads),
        augmented_passes=args.augmented_passes,
        learning_rates=tuple(args.learning_rates),
        weight_decays=tuple(args.weight_decays),
        num_steps=args.steps,
        batch_size=args.batch_size,
    )
    # Imported here, because they import JAX and TensorFlow.
    from dualpath_jax.probing.run import run_probe
    from dualpath_jax.training.inputs import expand_splits, lock_workdir

    environment.disable_async_dispatch()
    config = as_probe(config, keys)
    for split_config, workdir in expand_splits(config, args.workdir):
        with lock_workdir(workdir):
            run_probe(split_config, workdir, options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    add, defaults = arg_parser.add_argument, ProbeOptions()
    add("--config", required=True, help="config file: a path, or a name such as finetune")
    add("--workdir", required=True, help="local folder for features and results; may be a run's")
    add(
        "--heads",
        nargs="+",
        choices=HEADS,
        default=HEADS,
        metavar="HEAD",
        help=f"heads to train ({' '.join(HEADS)})",
    )
    add(
        "--augmented_passes",
        type=int,
        default=0,
        help="passes over the training videos with the config's augmentation, whose features are "
        "all kept; 0 is one pass without augmentation (0)",
    )
    for name, values, what in (
        ("learning_rates", defaults.learning_rates, "learning rates"),
        ("weight_decays", defaults.weight_decays, "weight decays"),
    ):
        default = " ".join(map(str, values))
        help_ = f"{what} of the grid ({default})"
        add(f"--{name}", nargs="+", type=positive(float), default=values, help=help_)
    add("--steps", type=positive(int), help="updates of each training (300, or 20 epochs if more)")
    add("--batch_size", type=positive(int), default=32, help="clips of each update (32)")
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def main() -> None:
    """Train the probes that the command line names."""
    environment.configure_environment()
    arg_parser = parser()
    args, overrides = parse_with_overrides(arg_parser)
    if args.augmented_passes < 0:
        arg_parser.error(f"--augmented_passes={args.augmented_passes} must be at least 0")
    console.protect_streams(is_log=True)  # results are in the workdir
    progress_bar.set_quiet(args.quiet)
    with user_errors():
        probe(args, overrides)

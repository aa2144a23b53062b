"""Writes a training batch as the model sees it to a PNG file: one row per clip.

    dualpath show-batch --config=demo --out=batch.png
    dualpath show-batch --config=finetune --config.data.dir=data/mine --out=batch.png

It shows the effect of sampling, cropping and augmentation on your videos: everything up to
normalization, color operations included. It needs prepared data, but no weights.

In a checkout, python scripts/show_batch.py is the same command.
"""

import argparse
import contextlib

from dualpath_jax.cli import build_parser, parse_with_overrides, user_errors
from dualpath_jax.config.loading import load_config
from dualpath_jax.runtime import environment, files


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument(
        "--config",
        required=True,
        help="config file as for training; --config.KEY=VALUE sets its keys",
    )
    arg_parser.add_argument("--out", required=True, help="PNG file to write")
    arg_parser.add_argument(
        "--data_dir", help="folder of the prepared data (the config's data.dir)"
    )
    arg_parser.add_argument("--step", type=int, default=0, help="training step of the batch (0)")
    arg_parser.add_argument("--clips", type=int, default=8, help="number of clips to show (8)")
    arg_parser.add_argument(
        "--zoom", type=int, default=1, help="factor by which images are enlarged (1)"
    )
    return arg_parser


def main() -> None:
    """Write the image of the batch that the command line names."""
    environment.configure_environment()
    args, overrides = parse_with_overrides(parser())
    with user_errors():
        from dualpath_jax.analysis.batch_figure import draw_batch
        from dualpath_jax.config.schema import check_values
        from dualpath_jax.data import pipeline
        from dualpath_jax.models import registry as method_registry
        from dualpath_jax.training.inputs import open_training_split

        config = load_config(args.config, overrides)
        check_values(config)
        data_dir = args.data_dir or config.data.dir
        if data_dir is None:
            raise ValueError("no prepared data: name their folder by --data_dir=FOLDER")
        config.data.dir = data_dir
        dataset = open_training_split(config)
        batches = pipeline.train_batches(
            dataset,
            config.data,
            config.seed,
            args.step,
            args.step + 1,
            inputs=method_registry.clip_inputs(config),
        )
        with contextlib.closing(batches):  # TensorFlow's threads could outlive an error
            batch = {key: value[: args.clips] for key, value in next(batches).items()}
        image = draw_batch(batch, config.data, dataset.class_names, args.zoom)
        with files.atomic_path(args.out) as temporary:
            image.save(temporary)
    print(f"wrote {args.out}: {len(batch['label'])} clips of step {args.step}")

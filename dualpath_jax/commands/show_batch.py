"""Writes a training batch as the model sees it to a PNG file: one row per clip.

    dualpath show-batch --config=demo --out=batch.png
    dualpath show-batch --config=finetune --config.data.dir=data/mine --out=batch.png

Shows the effect of sampling, cropping and augmentation on your videos: everything up to
normalization, color operations included. Needs prepared data, but no weights.

In a checkout, python scripts/show_batch.py is the same command.
"""

import argparse
import contextlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dualpath_jax.cli import build_parser, parse_with_overrides, user_errors
from dualpath_jax.config.loading import load_config
from dualpath_jax.runtime import environment, files

GAP = 8  # pixels between images
LINE = 16  # pixels for a line of text
MIN_WIDTH = 480  # pixels; leaves room for the label above small images


def format_operations(batch: dict, i: int) -> str:
    """Return the operations of RandAugment on clip `i` as text; "" without any."""
    from dualpath_jax.data.randaugment_ops import OPS

    pairs = zip(batch["ops"][i], batch["op_values"][i], strict=True) if "ops" in batch else ()
    return "".join(f"; {OPS[op]}" + (f" {value:.3g}" if value else "") for op, value in pairs if op)


def apply_color_operations(batch: dict) -> dict:
    """Return `batch` with the color operations applied, which training applies on the device."""
    from dualpath_jax.models import preprocess

    if "ops" not in batch:
        return batch
    keys = [key for key in ("spatial", "temporal") if key in batch]
    inputs = [batch[key] for key in keys]
    images = preprocess.augment_color(inputs, batch["ops"], batch["op_values"], batch["tables"])
    pairs = zip(keys, images, strict=True)
    return batch | {k: np.asarray(x).round().astype(np.uint8) for k, x in pairs}


def draw_differences(batch: dict, data_config: Any) -> dict:
    """Return `batch` with the framesets as the model gets them, if they hold differences.

    A difference of zero is gray, or black where absolute values are taken.
    """
    from dualpath_jax.data.clip_spec import normalization
    from dualpath_jax.models import preprocess

    kind = data_config.frameset_input
    if kind == "rgb" or "temporal" not in batch:
        return batch
    images = preprocess.normalize(batch["temporal"], data_config, np.float32)
    differences = np.asarray(preprocess.subtract_static(images, data_config))
    _, std = normalization(data_config)
    differences = 255 * differences * np.asarray(std, np.float32)
    shown = differences if kind == "abs_minus_mean" else 127.5 + differences / 2
    return batch | {"temporal": shown.round().clip(0, 255).astype(np.uint8)}


def draw_batch(batch: dict, class_names: list[str], zoom: int) -> Image.Image:
    """Draw one row per clip: label, spatial frames and framesets, as far as the model uses them."""
    from dualpath_jax.analysis.image_grid import load_font

    clips = []
    for i in range(len(batch["label"])):
        inputs = [batch[key][i] for key in ("spatial", "temporal") if key in batch]
        pictures = [picture for images in inputs for picture in images]
        pictures = [picture.repeat(zoom, axis=0).repeat(zoom, axis=1) for picture in pictures]
        width = max(sum(p.shape[1] + GAP for p in pictures), MIN_WIDTH)
        height = max(p.shape[0] for p in pictures) + LINE + GAP
        canvas = Image.new("RGB", (width, height), "white")
        label = batch["label"][i]
        text = f"video {batch['example_id'][i]}, class {label}: {class_names[label]}"
        text += format_operations(batch, i)
        ImageDraw.Draw(canvas).text((0, 2), text, fill="black", font=load_font(10))
        left = 0
        for picture in pictures:
            canvas.paste(Image.fromarray(picture), (left, LINE))
            left += picture.shape[1] + GAP
        clips.append(np.asarray(canvas))
    return Image.fromarray(np.concatenate(clips))


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
        from dualpath_jax.config.schema import check_values
        from dualpath_jax.data import pipeline
        from dualpath_jax.data.video_dataset import VideoDataset
        from dualpath_jax.models import registry as method_registry

        config = load_config(args.config, overrides)
        check_values(config)
        data_dir = args.data_dir or config.data.dir
        if data_dir is None:
            raise ValueError("no prepared data: name their folder by --data_dir=FOLDER")
        dataset = VideoDataset(data_dir, config.data.train_split)
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
        batch = draw_differences(apply_color_operations(batch), config.data)
        with files.atomic_path(args.out) as temporary:
            draw_batch(batch, dataset.class_names, args.zoom).save(temporary)
    print(f"wrote {args.out}: {len(batch['label'])} clips of step {args.step}")

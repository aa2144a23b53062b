"""Writes a training batch, as the model gets it, as PNG: one row per clip.

    python scripts/show_batch.py --config=configs/demo.py --out=batch.png

Shows what sampling, cropping and augmentation do to your videos, colour operations included, up to
normalisation. Needs prepared data, no weights.
"""

import argparse
import importlib.util
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from dualpath_jax.cli import build_parser  # noqa: E402

GAP = 8  # pixels between pictures
LINE = 16  # pixels for a line of text
MIN_WIDTH = 480  # pixels, so that small pictures leave room for their label


def load_config(name: str):
    """The configuration of a file, "FILE" or "FILE:ARGUMENT"."""
    path, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or not os.path.exists(path):
        raise ValueError(f"there is no config file {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def drawn(batch: dict, i: int) -> str:
    """The operations of RandAugment for clip `i`, as text; empty without."""
    from dualpath_jax.data.randaugment_ops import OPS

    pairs = zip(batch["ops"][i], batch["op_values"][i], strict=True) if "ops" in batch else ()
    return "".join(f"; {OPS[op]}" + (f" {value:.3g}" if value else "") for op, value in pairs if op)


def colour(batch: dict) -> dict:
    """`batch` with its images after the operations that the device does."""
    from dualpath_jax.models import preprocess

    if "ops" not in batch:
        return batch
    keys = [key for key in ("spatial", "temporal") if key in batch]
    inputs = [batch[key] for key in keys]
    images = preprocess.augment_color(inputs, batch["ops"], batch["op_values"], batch["tables"])
    pairs = zip(keys, images, strict=True)
    return batch | {k: np.asarray(x).round().astype(np.uint8) for k, x in pairs}


def draw(batch: dict, class_names: list[str], zoom: int) -> Image.Image:
    """One row per clip: its label, its spatial frames, its framesets if the method takes them."""
    from dualpath_jax.analysis.image_grid import text_font

    clips = []
    for i in range(len(batch["label"])):
        inputs = [batch[key][i] for key in ("spatial", "temporal") if key in batch]
        pictures = [picture for images in inputs for picture in images]
        pictures = [picture.repeat(zoom, axis=0).repeat(zoom, axis=1) for picture in pictures]
        width = max(sum(p.shape[1] + GAP for p in pictures), MIN_WIDTH)
        height = max(p.shape[0] for p in pictures) + LINE + GAP
        canvas = Image.new("RGB", (width, height), "white")
        name = class_names[batch["label"][i]]
        text = f"video {batch['example_id'][i]}, class {batch['label'][i]}: {name}{drawn(batch, i)}"
        ImageDraw.Draw(canvas).text((0, 2), text, fill="black", font=text_font(10))
        left = 0
        for picture in pictures:
            canvas.paste(Image.fromarray(picture), (left, LINE))
            left += picture.shape[1] + GAP
        clips.append(np.asarray(canvas))
    return Image.fromarray(np.concatenate(clips))


def parser() -> argparse.ArgumentParser:
    made = build_parser(__doc__)
    made.add_argument("--config", required=True, help="config file, FILE or FILE:ARGUMENT")
    made.add_argument("--out", required=True, help="PNG file to write")
    made.add_argument("--data_dir", help="instead of the config's data.dir")
    made.add_argument("--step", type=int, default=0, help="training step whose batch is shown (0)")
    made.add_argument("--clips", type=int, default=8, help="clips shown (8)")
    made.add_argument("--zoom", type=int, default=1, help="factor of enlargement (1)")
    return made


def main() -> None:
    args = parser().parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from dualpath_jax.config.ranges import check_ranges
    from dualpath_jax.data import pipeline
    from dualpath_jax.data.video_dataset import VideoDataset
    from dualpath_jax.models import registry as method_registry

    try:
        config = load_config(args.config)
        check_ranges(config)
        dataset = VideoDataset(args.data_dir or config.data.dir, config.data.train_split)
        batches = pipeline.train_batches(
            dataset,
            config.data,
            config.seed,
            args.step,
            args.step + 1,
            framesets=method_registry.uses_framesets(config.model.method),
        )
        batch = {key: value[: args.clips] for key, value in next(batches).items()}
        draw(colour(batch), dataset.class_names, args.zoom).save(args.out)
    except (ValueError, OSError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.out}: {len(batch['label'])} clips of step {args.step}")


if __name__ == "__main__":
    main()

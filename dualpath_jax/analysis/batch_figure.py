"""Draws a training batch as the model sees it: everything up to normalization."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dualpath_jax.analysis.image_grid import load_font
from dualpath_jax.data.clip_spec import normalization
from dualpath_jax.data.randaugment_ops import OPS
from dualpath_jax.models import preprocess

GAP = 8  # pixels between images
LINE = 16  # pixels for a line of text
MIN_WIDTH = 480  # pixels; leaves room for the label above small images


def format_operations(batch: dict, i: int) -> str:
    """Return the operations of RandAugment on clip `i` as text; "" without any."""
    pairs = zip(batch["ops"][i], batch["op_values"][i], strict=True) if "ops" in batch else ()
    return "".join(f"; {OPS[op]}" + (f" {value:.3g}" if value else "") for op, value in pairs if op)


def apply_color_operations(batch: dict) -> dict:
    """Return `batch` with the color operations applied, which training applies on the device."""
    if "ops" not in batch:
        return batch
    keys = [key for key in ("spatial", "temporal") if key in batch]
    inputs = [batch[key] for key in keys]
    images = preprocess.augment_color(inputs, batch["ops"], batch["op_values"], batch["tables"])
    pairs = zip(keys, images, strict=True)
    return batch | {k: np.asarray(x).round().astype(np.uint8) for k, x in pairs}


def draw_differences(batch: dict, data_config: Any) -> dict:
    """Return `batch` with the framesets as the model gets them, if they hold differences.

    A difference of zero is gray, or black where absolute values are taken. "motion" is shown with
    0 as black and three times the clip's root mean square as full red, green or blue.
    """
    kind = data_config.frameset_input
    if kind == "rgb" or "temporal" not in batch:
        return batch
    images = preprocess.normalize(batch["temporal"], data_config, np.float32)
    differences = np.asarray(preprocess.subtract_static(images, data_config))
    if kind == "motion":
        shown = 255 / 3 * differences
    else:
        _, std = normalization(data_config)
        differences = 255 * differences * np.asarray(std, np.float32)
        shown = differences if kind == "abs_minus_mean" else 127.5 + differences / 2
    return batch | {"temporal": shown.round().clip(0, 255).astype(np.uint8)}


def draw_batch(batch: dict, data_config: Any, class_names: list[str], zoom: int = 1) -> Image.Image:
    """Draw one row per clip: label, spatial frames and framesets, as the model gets them.

    Args:
      batch: of training, see `data.pipeline`.
      data_config: `config.data`.
      class_names: one per class.
      zoom: factor by which the images are enlarged.
    """
    batch = draw_differences(apply_color_operations(batch), data_config)
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

"""Chooses the settings of `dualpath finetune` by the number of training clips.

`SIZES` and `METHODS` are the whole choice; docs/finetuning.md prints both tables
(`markdown_tables`), and a test compares them.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dualpath_jax.config import recipes, schema

NUM_EVALUATIONS = 20  # of a training
PATIENCE = 12  # evaluations without a new best score after which it stops
WARMUP = 0.1  # of the epochs
UNEVEN = 3.0  # largest class / smallest class from which on the classes are weighted


@dataclasses.dataclass(frozen=True)
class SizeRow:
    """Holds the settings for a number of training clips.

    Attributes:
      max_clips: the row is for at most so many training clips.
      method: `model.method`.
      batch_size: clips per step.
      epochs: length of a training of this method at most; it stops early.
      randaugment_layers: RandAugment operations per clip.
    """

    max_clips: float
    method: str
    batch_size: int
    epochs: int
    randaugment_layers: int


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """Holds the learning rates of a method, and how long it trains.

    Attributes:
      published: peak learning rate on published backbones, such as CLIP's.
      small: on small backbones, narrower than `SMALL_WIDTH`, such as the demo's.
      length: factor on a row's epochs.
    """

    published: float
    small: float
    length: float = 2


_METHOD = "dualpath"  # docs/comparison.md recommends it
SIZES = (
    SizeRow(100, _METHOD, 8, 120, 3),
    SizeRow(300, _METHOD, 16, 70, 3),
    SizeRow(1_000, _METHOD, 16, 40, 3),
    SizeRow(5_000, _METHOD, 32, 16, 3),
    SizeRow(float("inf"), _METHOD, 64, 10, 3),
)
SMALL_WIDTH = 384  # of tokens
METHODS = {
    "dualpath": MethodRow(1e-3, 1e-3, length=1),
    "st_adapter": MethodRow(5e-4, 1e-2),
}
OTHER_METHODS = MethodRow(1e-3, 3e-3)


def choose_size(num_clips: int) -> SizeRow:
    """Return the row of `SIZES` for a number of training clips."""
    return next(row for row in SIZES if num_clips <= row.max_clips)


def make_config(num_clips: int, backbone: Any, method: str | None = None) -> ConfigDict:
    """Return the configuration of a training on `num_clips` own clips.

    Args:
      num_clips: training clips.
      backbone: shape of the backbone, such as a `vit.ViTConfig`.
      method: `model.method` instead of the table's.
    """
    size = choose_size(num_clips)
    method = method or size.method
    is_small = backbone.width < SMALL_WIDTH and hasattr(backbone, "depth")
    config = recipes.own_videos("demo" if is_small else "clip")
    if method == "dualpath":
        recipes.set_small_data_form(config)
    else:
        recipes.baseline(config, method)
        _unset_dualpath_keys(config)
    if method == "st_adapter" and hasattr(backbone, "depth"):
        config.model.st_adapter.width = backbone.width // 2  # its authors' share
    row = METHODS.get(method, OTHER_METHODS)
    config.optimizer.learning_rate = row.small if is_small else row.published
    config.num_epochs = round(row.length * size.epochs)
    config.optimizer.warmup_epochs = WARMUP * config.num_epochs
    config.data.batch_size = config.eval.batch_size = size.batch_size
    config.data.randaugment_layers = size.randaugment_layers
    config.eval.every_epochs = max(1, config.num_epochs // NUM_EVALUATIONS)
    config.eval.checkpoint = "best"
    config.early_stopping_evaluations = PATIENCE
    config.checkpoint.every_minutes = 5.0
    config.checkpoint.keep = 1
    return config


def set_uneven_classes(config: ConfigDict) -> None:
    """Set weights of classes, and the mean class accuracy as the score that decides."""
    config.data.class_weights = "balanced"
    config.eval.criterion = "mean_class_accuracy"


def _unset_dualpath_keys(config: ConfigDict) -> None:
    """Reset the keys of the recipe that only DualPath reads, so that no warning names them."""
    defaults = schema.get_config()
    config.data.num_spatial_frames = defaults.data.num_spatial_frames
    config.model.adapter_bottleneck = defaults.model.adapter_bottleneck
    config.model.temporal_position = defaults.model.temporal_position


def markdown_tables() -> str:
    """Return both tables as Markdown."""
    lines = [
        "| training clips | method | batch | epochs, at most | warm-up | RandAugment operations |",
        "|---|---|---|---|---|---|",
    ]
    for row in SIZES:
        clips = "more" if row.max_clips == float("inf") else f"up to {row.max_clips:,}"
        warmup = f"{WARMUP * row.epochs:g} epoch{'s' if WARMUP * row.epochs != 1 else ''}"
        cells = (clips, row.method, row.batch_size, row.epochs, warmup, row.randaugment_layers)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "| method | learning rate, published backbones | learning rate, small backbones | epochs |",
        "|---|---|---|---|",
    ]
    for name, rates in (METHODS | {"others": OTHER_METHODS}).items():
        epochs = "as above" if rates.length == 1 else f"{rates.length:g} times as many"
        lines.append(f"| {name} | {rates.published:g} | {rates.small:g} | {epochs} |")
    return "\n".join(lines) + "\n"

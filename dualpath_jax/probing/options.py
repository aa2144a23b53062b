"""Defines the options of a probe, and the configuration that it takes from that of a run.

It imports neither JAX nor TensorFlow.
"""

import copy
import dataclasses
from collections.abc import Collection
from typing import Any

from dualpath_jax.config import recipes, schema

HEADS: tuple[str, ...] = schema.choices("model.probe.head")
# Keys under config.data that tokens depend on, and those that only augmented clips depend on.
CLIP_KEYS = ("num_frames", "image_size", "sampling", "sampling_interval", "mean", "std")
AUGMENTATION_KEYS = (
    *("crop_scale", "crop_ratio", "flip", "randaugment_layers", "randaugment_magnitude"),
    "erasing_probability",
)
# The other keys, and beginnings of keys, that have an effect on a probe.
_READ_KEYS = (
    *("seed", "backbone.", "mesh.fsdp", "model.dtype", "model.scan_blocks", "model.probe.width"),
    *(f"data.{name}" for name in ("dir", "source", "train_split", "split", "shots", "prefetch")),
    *("data.class_weights", "data.keep_normalization"),
    *("optimizer.warmup_epochs", "optimizer.b1", "optimizer.b2"),
    *("optimizer.clip_norm", "optimizer.label_smoothing", "eval.split", "eval.batch_size"),
    *("eval.temporal_views", "eval.spatial_crops"),
)
_AUGMENTED_KEYS = (*AUGMENTATION_KEYS, "label_swap", "max_broken_videos")
_OPTIONS = {
    "model.probe.head": "--heads",
    "optimizer.learning_rate": "--learning_rates",
    "optimizer.weight_decay": "--weight_decays",
    "num_train_steps": "--steps",
    "num_epochs": "--steps",
    "data.batch_size": "--batch_size",
}


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """Describes the trainings of a probe.

    Attributes:
      heads: names of `HEADS`.
      augmented_passes: passes over the training videos with the augmentation of `config.data`; 0:
        one plain pass, the middle crop of the clip in the middle of each video.
      learning_rates: peaks of AdamW's cosine schedule.
      weight_decays: each is combined with each learning rate.
      num_steps: updates of each training; None: 300, or 20 epochs if they are more.
      batch_size: clips per step.

    Raises:
      ValueError: a head is unknown, or there is nothing to train.
    """

    heads: tuple[str, ...] = HEADS
    augmented_passes: int = 0
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    weight_decays: tuple[float, ...] = (0.01, 0.1, 1.0)
    num_steps: int | None = None
    batch_size: int = 32

    def __post_init__(self):
        if unknown := [head for head in self.heads if head not in HEADS]:
            raise ValueError(f"unknown head {unknown[0]!r}: known are {', '.join(HEADS)}")
        for name in ("heads", "learning_rates", "weight_decays"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")


def as_probe(config: Any, keep: Collection[str] = ()) -> Any:
    """Return a copy of `config` whose method is probe.

    A config of another method gets the frames of the baselines, see `recipes.baseline`.

    Args:
      config: the whole configuration, of any method.
      keep: dotted keys that the user set; they stay as they are.
    """
    probe = copy.deepcopy(config)
    if config.model.method != "probe":
        recipes.baseline(probe, "probe")
        for key in keep:
            group, _, name = key.rpartition(".")
            if group in ("data", "eval"):
                probe[group][name] = config[group][name]
    return probe


def check_overrides(keys: Collection[str], augmented: bool) -> None:
    """Check that keys of the configuration that a command line sets have an effect on a probe.

    Args:
      keys: dotted keys.
      augmented: training clips are augmented.

    Raises:
      ValueError: a key has none; the message names the option that does what it does elsewhere.
    """
    known = [f"data.{name}" for name in (*CLIP_KEYS, *_AUGMENTED_KEYS * augmented)]
    for key in keys:
        if key in known or key.startswith(_READ_KEYS) or key == "model.method":
            continue
        if key.removeprefix("data.") in _AUGMENTED_KEYS:
            remedy = "it is for --augmented_passes=1 or more"
        else:
            remedy = f"use {_OPTIONS[key]}" if key in _OPTIONS else "leave it out"
        raise ValueError(f"--config.{key} has no effect on a probe: {remedy}")

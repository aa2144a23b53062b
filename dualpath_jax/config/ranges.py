"""What the numbers of a configuration may be, each by itself. Public: `check_ranges`.

What belongs together is compared where it is used. Upper limits are far above what anybody trains:
a configuration may come with a stranger's file.
"""

import dataclasses
from typing import Any

from dualpath_jax.config.values import flatten_config


@dataclasses.dataclass(frozen=True)
class _Range:
    """`low` ... `high`, both included; `above`: without `low`; `below`: without `high`."""

    low: float
    high: float = float("inf")
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        left, right = "(" if self.above else "[", ")" if self.below else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


_COUNT, _NOT_NEGATIVE, _POSITIVE = _Range(1), _Range(0), _Range(0, above=True)
_PART, _RATE = _Range(0, 1), _Range(0, 1, below=True)
_SIZE, _WIDTH, _DEPTH = _Range(1, 4096), _Range(1, 2**16), _Range(1, 256)

# Of a tuple, each number. None, where a key has it, is always good.
_RANGES = {
    "num_epochs": _NOT_NEGATIVE,
    "num_train_steps": _NOT_NEGATIVE,
    "log_every_steps": _COUNT,
    "data.batch_size": _COUNT,
    "data.image_size": _SIZE,
    "data.num_frames": _SIZE,
    "data.num_spatial_frames": _SIZE,
    "data.grid": _SIZE,
    "data.frame_scale": _SIZE,
    "data.sampling_interval": _COUNT,
    "data.crop_scale": _Range(0, 1, above=True),
    "data.crop_ratio": _POSITIVE,
    "data.randaugment_layers": _NOT_NEGATIVE,
    "data.randaugment_magnitude": _Range(0, 10),
    "data.erasing_probability": _PART,
    "data.std": _POSITIVE,
    "data.prefetch": _Range(-1),  # -1: as tf.data chooses
    "data.max_broken_videos": _NOT_NEGATIVE,
    "mesh.fsdp": _COUNT,
    "backbone.patch_size": _SIZE,
    "backbone.width": _WIDTH,
    "backbone.depth": _DEPTH,
    "backbone.depths": _DEPTH,
    "backbone.heads": _WIDTH,
    "backbone.mlp_dim": _WIDTH,
    "backbone.window_size": _SIZE,
    "backbone.projection_dim": _WIDTH,
    "model.adapter_bottleneck": _WIDTH,
    "model.adapter_dropout": _RATE,
    "model.vpt.num_prompts": _WIDTH,
    "model.adaptformer.bottleneck": _WIDTH,
    "model.protuning.width": _WIDTH,
    "model.st_adapter.width": _WIDTH,
    "model.st_adapter.kernel_size": _SIZE,
    "model.videoprompt.num_prompts": _WIDTH,
    "model.aim.bottleneck": _WIDTH,
    "model.aim.drop_path": _RATE,
    "model.aim.dropout": _RATE,
    "model.evl.mlp_dropout": _RATE,
    "model.evl.dropout": _RATE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.warmup_epochs": _NOT_NEGATIVE,
    "optimizer.b1": _RATE,
    "optimizer.b2": _RATE,
    "optimizer.clip_norm": _POSITIVE,
    "optimizer.label_smoothing": _RATE,
    "optimizer.accumulation_steps": _COUNT,
    "optimizer.max_skipped_steps": _NOT_NEGATIVE,
    "eval.batch_size": _COUNT,
    "eval.temporal_views": _Range(1, 1024),
    "eval.every_epochs": _NOT_NEGATIVE,
    "checkpoint.every_steps": _COUNT,
    "checkpoint.every_minutes": _POSITIVE,
    "checkpoint.keep": _COUNT,
    "profile.first_step": _NOT_NEGATIVE,
    "profile.num_steps": _NOT_NEGATIVE,
}


def check_ranges(config: Any) -> None:
    """ValueError with key, value and range for a number of `config` that makes no sense.

    TypeError for what is no number, which only a stranger's configuration can have.
    """
    values = flatten_config(config)
    for key, range_ in _RANGES.items():
        value = values[key]
        if value is None:
            continue
        many = isinstance(value, tuple | list)
        if not all(map(range_.holds, value if many else (value,))):
            raise ValueError(f"{key}={value} must be {range_}")
    if values["eval.spatial_crops"] not in (1, 3):
        raise ValueError(f"eval.spatial_crops={values['eval.spatial_crops']} must be 1 or 3")
    for key in ("data.crop_scale", "data.crop_ratio"):
        if len(values[key]) != 2 or values[key][0] > values[key][1]:
            raise ValueError(f"{key}={values[key]} must be the smallest and the largest")

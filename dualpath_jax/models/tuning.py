"""Tuning methods: how each is built and which of its parameters train.

Public: `METHODS`, `Method`, `build_model`, `trains`.

To add a method: write its module, add it to `METHODS` with a rule for each of its parameters.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dualpath_jax.models.adapters import Adapter
from dualpath_jax.models.backbones import FAMILIES, BackboneConfig, family_of
from dualpath_jax.models.dualpath import DualPath

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to tune a frozen backbone.

    Attributes:
      build: (config, backbone shape, number of classes) -> module whose `__call__` takes
        `spatial`, `temporal` and an optional `dropout_rng` and returns logits [B, classes].
      rules: (regular expression of the whole parameter path, does it train), first match wins.
      families: the backbones that it works with, names of `backbones.FAMILIES`.
    """

    build: Callable[[Any, BackboneConfig, int], nn.Module]
    rules: tuple[tuple[str, bool], ...]
    families: tuple[str, ...] = tuple(FAMILIES)


def _build_dualpath(config: Any, backbone: BackboneConfig, num_classes: int) -> DualPath:
    data, model = config.data, config.model
    adapter = Adapter(
        bottleneck=model.adapter_bottleneck,
        scale=model.adapter_scale,
        dropout=model.adapter_dropout,
        layer_norm=model.adapter_layer_norm,
        parent=None,
    )
    frame_size = data.image_size // data.frame_scale
    for side, name in zip(data.grid, ("width", "height"), strict=True):
        if side * frame_size % backbone.patch_size:
            raise ValueError(
                f"frameset {name} of {side} frames x {frame_size} pixels is not divisible by the "
                f"patch size {backbone.patch_size} of {backbone.name}: change "
                f"data.grid={tuple(data.grid)}, data.frame_scale={data.frame_scale} or "
                f"data.image_size={data.image_size}"
            )
    return DualPath(
        config=backbone,
        num_classes=num_classes,
        grid=tuple(data.grid),
        frame_size=frame_size,
        num_framesets=data.num_frames // (data.grid[0] * data.grid[1]),
        spatial_path=model.spatial_path,
        temporal_path=model.temporal_path,
        adapter=adapter,
        serial_skip=model.serial_skip,
        pre_attention_adapter=model.pre_attention_adapter,
        pre_attention_residual=model.pre_attention_residual,
        temporal_position=model.temporal_position,
        train_tokens=model.train_tokens,
        adapt_shifted_windows=model.adapt_shifted_windows,
        dtype=compute_dtype(config),
        scan_blocks=model.scan_blocks,
    )


METHODS = {
    "dualpath": Method(
        build=_build_dualpath,
        rules=(
            ("backbone/.*", False),
            ("(spatial|temporal)/adapters/.*", True),
            ("(spatial|temporal)/(class_token|position)", True),
            ("classifier/.*", True),
        ),
    ),
}


def compute_dtype(config: Any) -> Any:
    """The dtype named by `config.model.dtype`."""
    if config.model.dtype not in DTYPES:
        raise ValueError(
            f"unknown model.dtype {config.model.dtype!r}: known are {', '.join(DTYPES)}"
        )
    return DTYPES[config.model.dtype]


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown model.method {name!r}: known are {', '.join(METHODS)}")
    return METHODS[name]


def build_model(config: Any, backbone: BackboneConfig, num_classes: int) -> nn.Module:
    """The module of `config.model.method` on a backbone of shape `backbone`."""
    name = config.model.method
    method, family = _method(name), family_of(backbone)
    if family not in method.families:
        raise ValueError(
            f"model.method {name!r} works with backbones of the families "
            f"{', '.join(method.families)}, and backbone {backbone.name!r} is of the family "
            f"{family}: change config.model.method or config.backbone.name"
        )
    return method.build(config, backbone, num_classes)


def trains(method: str) -> Callable[[str], bool]:
    """Predicate of a parameter's path ("spatial/class_token"): does it train under `method`?

    The predicate raises ValueError for a path that no rule names.
    """
    rules = _method(method).rules

    def predicate(path: str) -> bool:
        for pattern, trained in rules:
            if re.fullmatch(pattern, path):
                return trained
        raise ValueError(f"no rule of method {method!r} says whether parameter {path!r} trains")

    return predicate

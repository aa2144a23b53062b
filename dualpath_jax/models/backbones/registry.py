"""The backbones by name: what a new one has to join.

Public: `MODELS`, `CUSTOM`, `FAMILIES`, `BackboneConfig`, `backbone_config`, `build_backbone`,
`family_of`, `find_named_config`.

A backbone is a config (a frozen dataclass) and a module. In every family they offer the same.
The config: `name`, `image_size`, `patch_size`, `width` (of the tokens that `embed` returns),
`num_tokens`, `feature_dim`, `has_class_token`, `activation`, `eps`, `heads`; for conversion
`from_arrays`, `architecture`, `position_size`, `resize_position_tables`. The module:

    embed(images, class_token=None, position=None) -> tokens
    encode(tokens, hooks=None, hook_params=None, dropout_rng=None, cls_token_only=False) -> tokens
    pool(tokens, project=True) -> features [M, feature_dim]
    init_hooks(rng, hooks, num_images, num_tokens) -> hook_params
    __call__(images) -> (tokens, features)

images [M, H, W, 3]; tokens [M, N, D] of a ViT, class token first, or a map [M, R, C, D] of a Swin.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dualpath_jax.models.backbones import swin, vit

BackboneConfig = vit.ViTConfig | swin.SwinConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of backbone: class of its shapes, class of its module."""

    config: type
    module: type


FAMILIES = {
    "vit": Family(vit.ViTConfig, vit.ViT),
    "swin": Family(swin.SwinConfig, swin.Swin),
}
MODELS: dict[str, BackboneConfig] = {**vit.MODELS, **swin.MODELS}
CUSTOM = {"custom": "vit", "custom-swin": "swin"}  # shapes spelt out in config.backbone


def backbone_config(name: str, **overrides: Any) -> BackboneConfig:
    """The shape called `name`, or with a name of `CUSTOM` the one that `overrides` spell out.

    Overrides that are None are ignored. Raises ValueError for an unknown name, a missing value, or
    an override that this backbone does not have.
    """
    overrides = {k: v for k, v in overrides.items() if v is not None}
    if name not in MODELS and name not in CUSTOM:
        raise ValueError(f"unknown backbone {name!r}: known are {', '.join([*MODELS, *CUSTOM])}")
    config = FAMILIES[CUSTOM[name]].config if name in CUSTOM else type(MODELS[name])
    foreign = set(overrides) - {field.name for field in dataclasses.fields(config)}
    if foreign:
        keys = ", ".join(f"config.backbone.{key}" for key in sorted(foreign))
        raise ValueError(f"backbone {name!r} has no {keys}: unset them, or choose another backbone")
    if name in MODELS:
        return dataclasses.replace(MODELS[name], **overrides)
    try:
        return config(name=name, **overrides)
    except TypeError as error:
        raise ValueError(f"backbone {name!r} needs its shape in config.backbone: {error}") from None


def build_backbone(
    config: BackboneConfig,
    dtype: Any = jnp.float32,
    scan_blocks: bool = False,
    remat: str = "none",
) -> nn.Module:
    """The module of a shape; for the arguments see `vit.ViT`."""
    module = FAMILIES[family_of(config)].module
    return module(config, dtype=dtype, scan_blocks=scan_blocks, remat=remat)


def family_of(config: BackboneConfig) -> str:
    """The name in `FAMILIES` that a shape belongs to."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.config)


def find_named_config(config: BackboneConfig) -> BackboneConfig:
    """`config` under the name that its architecture has in `MODELS`, if it has one there."""
    same = [
        m
        for m in MODELS.values()
        if type(m) is type(config) and m.architecture == config.architecture
    ]
    same.sort(key=lambda m: m.image_size != config.image_size)  # the one of this size first
    return dataclasses.replace(config, name=same[0].name) if same else config

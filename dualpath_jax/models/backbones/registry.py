"""Registers the backbones by name; `contract.py` says what each of them offers."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dualpath_jax.models.backbones import swin, vit
from dualpath_jax.models.backbones.contract import BackboneConfig


@dataclasses.dataclass(frozen=True)
class _Family:
    """Holds the classes of a kind of backbone.

    Attributes:
      config: describes a shape, such as `vit.ViTConfig`; a `contract.BackboneConfig`.
      module: computes it, such as `vit.ViT`; a `contract.Backbone`.
    """

    config: type
    module: type


FAMILIES = {
    "vit": _Family(vit.ViTConfig, vit.ViT),
    "swin": _Family(swin.SwinConfig, swin.Swin),
}
MODELS: dict[str, BackboneConfig] = {**vit.MODELS, **swin.MODELS}
DEFAULT = "ViT-B/16"  # of a configuration that names neither a backbone nor an existing file
_CUSTOM = {"custom": "vit", "custom-swin": "swin"}  # shapes given by the keys of config.backbone


def backbone_config(name: str, **overrides: Any) -> BackboneConfig:
    """Return the shape of a backbone.

    Args:
      name: a name of `MODELS`, or of `_CUSTOM` for a shape that `overrides` define.
      **overrides: fields of the config; None is ignored.

    Raises:
      ValueError: the name is unknown, a custom shape lacks a field, or the backbone does not have a
        field of `overrides`.
    """
    overrides = {k: v for k, v in overrides.items() if v is not None}
    if name not in MODELS and name not in _CUSTOM:
        raise ValueError(f"unknown backbone {name!r}: known are {', '.join([*MODELS, *_CUSTOM])}")
    config = FAMILIES[_CUSTOM[name]].config if name in _CUSTOM else type(MODELS[name])
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
    """Build the module of a backbone; for the arguments see `vit.ViT`."""
    module = FAMILIES[family_of(config)].module
    return module(config, dtype=dtype, scan_blocks=scan_blocks, remat=remat)


def family_of(config: BackboneConfig) -> str:
    """Return the name in `FAMILIES` of the family that a shape belongs to."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.config)


def custom_name(family: str) -> str:
    """Return the name of a family's backbones whose shape the configuration gives."""
    return next(name for name, known in _CUSTOM.items() if known == family)


def find_named_config(config: BackboneConfig) -> BackboneConfig:
    """Return `config` with the name of its architecture in `MODELS`, if it has one there."""
    matches = [
        model
        for model in MODELS.values()
        if type(model) is type(config) and model.architecture == config.architecture
    ]
    matches.sort(key=lambda model: model.image_size != config.image_size)  # same size first
    return dataclasses.replace(config, name=matches[0].name) if matches else config

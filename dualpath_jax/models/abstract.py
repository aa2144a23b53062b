"""Describes models without values: shapes of inputs and parameters, and which parameters train."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import registry as backbone_registry


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """Describes a model without values.

    Attributes:
      module: the Flax module.
      params: its parameter tree; leaves are `jax.ShapeDtypeStruct`.
      mask: tree of bool, True where a parameter trains.
    """

    module: nn.Module
    params: Any
    mask: Any


def clip_shapes(config: Any) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the shapes of `spatial` [1, S, H, W, 3] and `temporal` [1, G, H', W', 3] of one clip.

    The shape of an input that the model does not take is None.
    """
    clip = method_registry.clip_format(config)
    spatial = temporal = None
    if clip.num_spatial_frames:
        spatial = (1, clip.num_spatial_frames, clip.image_size, clip.image_size, 3)
    if clip.framesets:
        temporal = (1, clip.framesets.num_framesets, *clip.framesets.size, 3)
    return spatial, temporal


def abstract_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Return the abstract inputs of the model for one clip: `spatial` and `temporal`, float32."""
    return tuple(
        None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in clip_shapes(config)
    )


def build_backbone_config(config: Any) -> backbone_registry.BackboneConfig:
    """Return the shape of the backbone that `config` names, at its image size.

    If it names none, `registry.DEFAULT` is taken; `backbone_keys.fill_backbone_keys` sets the name.
    """
    return backbone_registry.backbone_config(
        config.backbone.name or backbone_registry.DEFAULT,
        image_size=config.data.image_size,
        **{k: config.backbone[k] for k in config.backbone if k not in ("name", "checkpoint")},
    )


def abstract_model(
    config: Any, num_classes: int, backbone: backbone_registry.BackboneConfig | None = None
) -> AbstractModel:
    """Return the model that `config` describes, its parameters' shapes and which of them train.

    Args:
      config: the whole configuration.
      num_classes: width of the logits.
      backbone: shape of the loaded weights; None: the one that `config` names.
    """
    if backbone is None:
        backbone = build_backbone_config(config)
    module = method_registry.build_model(config, backbone, num_classes)
    params = jax.eval_shape(module.init, jax.random.key(0), *abstract_inputs(config))["params"]
    is_trainable = method_registry.is_trainable_fn(config.model.method)
    return AbstractModel(module, params, param_tree.trainable_mask(params, is_trainable))

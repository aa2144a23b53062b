"""Builds models without values: shapes of inputs and parameters, and which parameters train."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dualpath_jax.data import clip_spec
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import registry as backbone_registry


def clip_shapes(config: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of `spatial` [1, S, H, W, 3] and `temporal` [1, G, H', W', 3] for one clip.

    For a method without framesets S is T and `temporal` None.
    """
    clip = clip_spec.build_clip_format(
        config.data, method_registry.uses_framesets(config.model.method)
    )
    spatial = (1, clip.num_spatial_frames, clip.image_size, clip.image_size, 3)
    if clip.framesets is None:
        return spatial, None
    return spatial, (1, clip.framesets.num_framesets, *clip.framesets.size, 3)


def abstract_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """`spatial` and `temporal` of one clip as the model takes them, without values."""
    return tuple(
        None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in clip_shapes(config)
    )


def build_backbone_config(config: Any) -> backbone_registry.BackboneConfig:
    """The backbone that `config` names, at its image size."""
    return backbone_registry.backbone_config(
        config.backbone.name,
        image_size=config.data.image_size,
        **{k: config.backbone[k] for k in config.backbone if k not in ("name", "checkpoint")},
    )


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model without values: leaves of `params` are `jax.ShapeDtypeStruct`, of `mask` bool."""

    model: Any
    params: Any
    mask: Any


def abstract_model(config: Any, num_classes: int) -> AbstractModel:
    """The model that `config` describes, its parameters and which of them train."""
    model = method_registry.build_model(config, build_backbone_config(config), num_classes)
    inputs = abstract_inputs(config)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    mask = param_tree.trainable_mask(params, method_registry.is_trainable_fn(config.model.method))
    return AbstractModel(model, params, mask)

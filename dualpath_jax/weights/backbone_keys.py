"""Fills the keys of a configuration that the file of its backbone answers."""

from typing import Any

from etils import epath

from dualpath_jax.data.clip_spec import normalization
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.runtime import gcs
from dualpath_jax.weights import convert


def fill_backbone_keys(config: Any) -> bool:
    """Set `backbone.name`, `data.mean` and `data.std` where they are None, in place.

    They are set to what the file `backbone.checkpoint` states; for a backbone without a name in
    `registry.MODELS`, the keys of its shape are set too. Without a file they are set to
    `registry.DEFAULT` and CLIP's normalization. Keys that are set already stay, and disagreement
    about them is an error when the weights are loaded.

    Args:
      config: the whole configuration.

    Returns:
      Whether the file was read.

    Raises:
      ValueError: the file is not a converted backbone, or `backbone.name` is None and another key
        of the shape disagrees with the file.
    """
    path, found = config.backbone.checkpoint, False
    if path and not config.data.synthetic:
        with gcs.gcs_errors(path):
            found = epath.Path(path).is_file()
    stated = None
    if found:
        shape, stated = convert.read_description(path)
        if config.backbone.name is None:
            _fill_shape(config, shape)
    elif config.backbone.name is None:
        config.backbone.name = backbone_registry.DEFAULT
    default = stated or normalization(config.data)
    for key, value in zip(("mean", "std"), default, strict=True):
        if config.data[key] is None:
            config.data[key] = tuple(value)
    return found


def _fill_shape(config: Any, shape: backbone_registry.BackboneConfig) -> None:
    """Set the keys of `config.backbone`, which has no name, to a shape."""
    named = shape.name in backbone_registry.MODELS
    for key, value in config.backbone.items():
        if key in ("name", "checkpoint"):
            continue
        actual = getattr(shape, key, None)
        if value is not None and value != actual:
            raise ValueError(
                f"config.backbone.{key}={value}, but {config.backbone.checkpoint} holds "
                f"{shape.name} with {actual}: leave the key out, or name another file"
            )
        if not named:
            config.backbone[key] = actual
    family = backbone_registry.family_of(shape)
    config.backbone.name = shape.name if named else backbone_registry.custom_name(family)

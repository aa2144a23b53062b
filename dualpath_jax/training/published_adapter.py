"""Converts adapters that the authors of a method published to adapter files.

The published checkpoints hold the whole model. Its frozen backbone is compared with the backbone
file that the adapter file will belong to, and is left out.

Axes: L blocks, D width, T frames.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualpath_jax.config.schema import check_values
from dualpath_jax.models import abstract, param_tree
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.training.adapter_file import write_adapter
from dualpath_jax.training.experiment import describe_trained
from dualpath_jax.weights import convert
from dualpath_jax.weights.backbone_keys import fill_backbone_keys
from dualpath_jax.weights.layouts import AIM, LAYOUTS
from dualpath_jax.weights.source_checkpoint import rename_tensors
from dualpath_jax.weights.source_files import find_source, format_names, open_tensors

_TOLERANCE = 2e-3  # of backbone weights, relative to a tensor's largest; float16 rounds by 5e-4


def convert_aim(
    checkpoint: str | os.PathLike[str],
    out: str,
    backbone: str,
    config: Any,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Write an adapter file of a checkpoint of AIM's authors.

    Args:
      checkpoint: their file, whose weights are named "backbone.transformer.resblocks.0..." and
        "cls_head.fc_cls...".
      out: the adapter file, local or gs://.
      backbone: converted file of the CLIP that they started from.
      config: of method "aim"; `data.num_frames`, `model.aim.bottleneck` and
        `model.aim.num_temporal_adapters` are set to those of the checkpoint, in place.
        `model.aim.scale` is not in the checkpoint and stays.
      class_names: in the order of the classifier's outputs.

    Returns:
      A dict with the keys "out", "parameters" (their number), "frames", "classes" and "backbone".

    Raises:
      ValueError: the checkpoint is of another kind or has another backbone, or the configuration or
        the number of classes does not fit.
      OSError: a file cannot be read or written.
    """
    if config.model.method != "aim":
        raise ValueError(f"config.model.method is {config.model.method!r}: use a config of 'aim'")
    source = find_source(checkpoint)
    _, tensors, _ = open_tensors(source)
    tensors = {name.removeprefix("module."): read for name, read in tensors.items()}
    trained = rename_tensors(source.given, tensors, AIM)
    leaves = {name: array.astype(np.float32) for name, array in trained.items()}
    config.data.num_frames = leaves["temporal_position"].shape[0]
    config.model.aim.bottleneck = leaves["adapters/joint/down/kernel"].shape[-1]
    config.model.aim.num_temporal_adapters = 1 + ("adapters/temporal_in/up/bias" in leaves)
    config.backbone.checkpoint, config.data.synthetic = str(backbone), False
    fill_backbone_keys(config)
    check_values(config)
    frozen, shape, info = convert.load_backbone(backbone, abstract.build_backbone_config(config))
    _check_same_backbone(source.given, tensors, frozen, backbone)
    _check_shapes(source.given, leaves, config, class_names, shape)
    write_adapter(out, leaves, describe_trained(config, info, class_names) | {"step": 0})
    return {
        "out": out,
        "parameters": param_tree.count_params(leaves),
        "frames": config.data.num_frames,
        "classes": len(class_names),
        "backbone": info.name,
    }


def _check_same_backbone(
    path: str, tensors: Mapping[str, Any], frozen: Mapping[str, Any], backbone: str
) -> None:
    """Raise ValueError unless a checkpoint's frozen weights are those of the backbone file."""
    tower = {
        name.replace("backbone.", "visual.", 1): read
        for name, read in tensors.items()
        if re.fullmatch(AIM.ignored, name)
    }
    theirs = rename_tensors(path, tower, LAYOUTS["openai"])
    ours = param_tree.flatten(frozen)
    wrong = []
    for name, array in theirs.items():
        own = np.asarray(ours.get(name, np.nan), np.float32)
        limit = _TOLERANCE * np.abs(array).max()
        if own.shape != array.shape or not np.abs(own - array).max() <= limit:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{path} was trained on another backbone than {backbone}: {format_names(wrong)} "
            "differ; convert the CLIP that its authors started from"
        )


def _check_shapes(
    path: str,
    leaves: Mapping[str, np.ndarray],
    config: Any,
    class_names: Sequence[str],
    shape: backbone_registry.BackboneConfig,
) -> None:
    """Raise ValueError unless the parameters are those that the configuration trains."""
    classes = leaves["head/output/bias"].shape[0]
    if classes != len(class_names):
        raise ValueError(f"{path} has {classes} classes, but {len(class_names)} names are given")
    model = abstract.abstract_model(config, classes, shape)
    trained, _ = param_tree.split(model.params, model.mask)
    expected = {name: leaf.shape for name, leaf in param_tree.flatten(trained).items()}
    found = {name: leaf.shape for name, leaf in leaves.items()}
    if wrong := {name for name in expected | found if expected.get(name) != found.get(name)}:
        raise ValueError(f"{path} does not fit the model of the config: {format_names(wrong)}")

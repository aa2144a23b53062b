"""Converts adapters that the authors of a method published to adapter files.

AIM's checkpoints hold the whole model. Its frozen backbone is compared with the backbone file that
the adapter file will belong to, and is left out. ST-Adapter's hold only the trained weights.

Axes: L blocks, D width, T frames.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dualpath_jax.config.schema import check_values
from dualpath_jax.models import abstract, param_tree
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.training.adapter_file import write_adapter
from dualpath_jax.training.experiment import describe_trained
from dualpath_jax.weights import convert, layouts
from dualpath_jax.weights.backbone_keys import fill_backbone_keys
from dualpath_jax.weights.layouts import Layout
from dualpath_jax.weights.source_checkpoint import rename_tensors
from dualpath_jax.weights.source_files import find_source, format_names, open_tensors

_TOLERANCE = 2e-3  # of backbone weights, relative to a tensor's largest; float16 rounds by 5e-4


def _set_aim(config: Any, leaves: Mapping[str, np.ndarray]) -> None:
    config.data.num_frames = leaves["temporal_position"].shape[0]
    config.model.aim.bottleneck = leaves["adapters/joint/down/kernel"].shape[-1]
    config.model.aim.num_temporal_adapters = 1 + ("adapters/temporal_in/up/bias" in leaves)


def _set_st_adapter(config: Any, leaves: Mapping[str, np.ndarray]) -> None:
    options = config.model.st_adapter
    kernel = leaves["adapters/mlp_adapter/conv/kernel"]  # [L, T, H, W, 1, R]
    options.form, options.scale = "released", 1.0
    options.places = "both" if "adapters/attention_adapter/up/bias" in leaves else "mlp"
    options.width, options.kernel_size = kernel.shape[-1], kernel.shape[1:4]


class Published(NamedTuple):
    """Describes the checkpoints that a method's authors published.

    Attributes:
      layout: names of the trained weights.
      tower: prefix of the names of the frozen weights, which else are OpenAI's.
      set_keys: sets the keys of a configuration that the weights state.
    """

    layout: Layout
    tower: str
    set_keys: Callable[[Any, Mapping[str, np.ndarray]], None]


METHODS = {
    "aim": Published(layouts.AIM, "backbone.", _set_aim),
    "st_adapter": Published(layouts.ST_ADAPTER, "", _set_st_adapter),
}


def convert_published(
    method: str,
    checkpoint: str | os.PathLike[str],
    out: str,
    backbone: str,
    config: Any,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Write an adapter file of a checkpoint that a method's authors published.

    Args:
      method: a key of `METHODS`.
      checkpoint: the authors' file.
      out: the adapter file, local or gs://.
      backbone: converted file of the CLIP that they started from.
      config: of the same method. Keys that the weights state are set in place: widths and places of
        adapters; of AIM also `data.num_frames`; of ST-Adapter also kernel, `form` and `scale`.
        `model.aim.scale` and ST-Adapter's number of frames are not in a checkpoint and stay.
      class_names: in the order of the classifier's outputs.

    Returns:
      A dict with the keys "out", "parameters" (their number), "frames", "classes" and "backbone".

    Raises:
      ValueError: the checkpoint is of another kind or has another backbone, or the configuration or
        the number of classes does not fit.
      OSError: a file cannot be read or written.
    """
    if config.model.method != method:
        raise ValueError(
            f"config.model.method is {config.model.method!r}: use a config of {method!r}"
        )
    published = METHODS[method]
    source = find_source(checkpoint)
    _, tensors, _ = open_tensors(source)
    tensors = {name.removeprefix("module."): read for name, read in tensors.items()}
    trained = rename_tensors(source.given, tensors, published.layout)
    leaves = {name: array.astype(np.float32) for name, array in trained.items()}
    published.set_keys(config, leaves)
    config.backbone.checkpoint, config.data.synthetic = str(backbone), False
    fill_backbone_keys(config)
    check_values(config)
    frozen, shape, info = convert.load_backbone(backbone, abstract.build_backbone_config(config))
    _check_same_backbone(source.given, tensors, published, frozen, backbone)
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
    path: str,
    tensors: Mapping[str, Any],
    published: Published,
    frozen: Mapping[str, Any],
    backbone: str,
) -> None:
    """Raise ValueError unless a checkpoint's frozen weights, if any, are those of the backbone."""
    tower = {
        f"visual.{name.removeprefix(published.tower)}": read
        for name, read in tensors.items()
        if re.fullmatch(published.layout.ignored, name)
    }
    if not tower:
        return
    theirs = rename_tensors(path, tower, layouts.LAYOUTS["openai"])
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

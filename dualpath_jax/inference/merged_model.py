"""Writes a tuned model as a plain backbone and a small adapter file with the same logits."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from dualpath_jax.data.clip_spec import normalization
from dualpath_jax.inference import trained_model
from dualpath_jax.models import abstract, merge, param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones.contract import BackboneConfig
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.training import adapter_file
from dualpath_jax.training.experiment import describe_trained
from dualpath_jax.weights import convert


@dataclasses.dataclass(frozen=True)
class MergedFiles:
    """Describes the files of a merged model.

    Attributes:
      backbone: the backbone file.
      adapter: the adapter file, whose configuration names the backbone file.
      method, step: of the tuned model.
      parameters: number of parameters of the backbone.
      remaining: number of parameters in the adapter file.
    """

    backbone: str
    adapter: str
    method: str
    step: int
    parameters: int
    remaining: int


def merge_model(
    path: str, out: str, backbone: str | None = None, checkpoint: str = "latest"
) -> MergedFiles:
    """Merge what a model trained in its backbone, and write the result.

    Merged weights are float32; those that the method did not change keep the dtype of their file.
    With `model.dtype=float32` the logits differ by rounding alone.

    Args:
      path: workdir of a run, or an adapter file; local or gs://.
      out: backbone file to write, local or gs://. The adapter file is written next to it.
      backbone: file of the converted backbone; None: the file that the run used.
      checkpoint: of a run: "latest", or "best" during training by `eval.criterion`.

    Raises:
      OSError: a file is missing or cannot be written.
      ValueError: the method cannot be merged, or see `trained_model.load`.
    """
    path, out = os.path.expanduser(path), os.path.expanduser(out)
    leaves, saved = trained_model.read_trained_params(path, checkpoint)
    config = trained_model.check_trained_params(path, leaves, saved)
    _check_mergeable(path, config)
    adapter = f"{out.removesuffix('.safetensors')}.adapter.safetensors"
    source = os.path.expanduser(backbone or config.backbone.checkpoint)
    _check_outputs((out, adapter), (path, source))
    frozen, shape, _ = trained_model.load_backbone_of(path, config, saved, backbone)
    merged = {
        "method": config.model.method,
        "step": saved["step"],
        "backbone_sha256": saved["backbone_sha256"],
    }
    arrays = _merge_arrays(config, shape, frozen, leaves)
    info = convert.write_merged(out, arrays, shape, source, merged, normalization(config.data))

    config.update_from_flattened_dict(method_registry.METHODS[config.model.method].merged)
    config.backbone.checkpoint = out
    model = abstract.abstract_model(config, len(saved["class_names"]), shape)
    trained = param_tree.flatten(param_tree.split(model.params, model.mask)[0])
    rest = {name: leaves[name] for name in trained}
    description = describe_trained(config, info, saved["class_names"])
    adapter_file.write_adapter(adapter, rest, saved | description)
    counts = [sum(array.size for array in tree.values()) for tree in (arrays, rest)]
    return MergedFiles(out, adapter, merged["method"], merged["step"], *counts)


def _check_outputs(written: Sequence[str], read: Sequence[str]) -> None:
    """Raise ValueError if a file that is read would be replaced."""
    for new in map(epath.Path, written):
        for old in map(epath.Path, read):
            if new.exists() and new.resolve() == old.resolve():
                raise ValueError(f"{new} would replace {old}, which is read: choose another --out")


def _check_mergeable(path: str, config: Any) -> None:
    """Raise ValueError unless the method of a model can be merged."""
    methods, method = method_registry.METHODS, config.model.method
    if methods[method].merged is None:
        known = ", ".join(name for name in methods if methods[name].merged is not None)
        raise ValueError(
            f"{path} was tuned with {method!r}, which cannot be merged into a backbone: only "
            f"{known} can; `{command_line('export-adapter')}` writes any model's parameters"
        )
    if config.model.merged:
        raise ValueError(f"{path} is merged already: its backbone is {config.backbone.checkpoint}")


def _merge_arrays(
    config: Any, shape: BackboneConfig, frozen: Any, leaves: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the weights of the merged backbone by flat name."""
    config = copy.deepcopy(config)
    config.model.dtype = "float32"
    arrays = param_tree.flatten({"backbone": frozen})
    arrays |= {name: leaf for name, leaf in leaves.items() if name in arrays}
    hooks = getattr(method_registry.build_model(config, shape, 1), "hooks", None)
    params = traverse_util.unflatten_dict({**arrays, **leaves}, sep="/")
    weights = params["backbone"]
    if hooks is not None:
        changed = merge.merge_backbone(hooks, params["adapters"], weights)
        weights = jax.tree.map(_keep_unchanged, weights, changed)
    return {name: np.asarray(leaf) for name, leaf in param_tree.flatten(weights).items()}


def _keep_unchanged(before: Any, after: Any) -> np.ndarray:
    """Return `before` in its own dtype if the values are the same, else `after`."""
    same = np.array_equal(np.asarray(before, np.float32), np.asarray(after, np.float32))
    return np.asarray(before if same else after)

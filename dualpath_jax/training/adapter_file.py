"""Writes and reads trained parameters as one file: safetensors with metadata, no pickle.

The tensors are the trainable parameters by path ("spatial/class_token"), float32. The metadata
entry "dualpath_jax" is JSON with format (1), method, backbone_name, backbone_sha256, class_names,
config, version and step, and frame_format unless an older version wrote the run.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dualpath_jax.models import abstract, param_tree
from dualpath_jax.runtime import files, gcs
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.runtime.safe_read import (
    check_safetensors_header,
    check_size,
    parse_json,
    truncated_repr,
)
from dualpath_jax.training.experiment import Experiment
from dualpath_jax.training.state import TrainState
from dualpath_jax.weights.source_files import MAX_BYTES

_FORMAT = 1
_REMEDY = f"copy it again, or write it again with `{command_line('export-adapter')}`"
_KEYS = {
    "method": str,
    "backbone_name": str,
    "backbone_sha256": str,
    "class_names": list,
    "config": dict,
    "version": str,
    "step": int,
}


def write_adapter(path: str, leaves: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write an adapter file, complete or not at all.

    Args:
      path: the new file, local or gs://.
      leaves: trainable parameters by path, float32.
      metadata: with method, backbone_name, backbone_sha256, class_names, config, version and step;
        other entries except frame_format are left out.
    """
    entries = {key: metadata[key] for key in _KEYS}
    if "frame_format" in metadata:
        entries["frame_format"] = metadata["frame_format"]
    text = json.dumps({"format": _FORMAT} | entries)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(save(arrays, metadata={"dualpath_jax": text}))


def read_adapter(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read an adapter file.

    Args:
      path: local or gs://; the file may be untrusted.

    Returns:
      (trainable parameters by path, float32; metadata).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not an adapter file, or it is damaged.
    """
    with gcs.gcs_errors(path):
        if not epath.Path(path).exists():
            raise FileNotFoundError(f"no adapter file {path!r}")
        if epath.Path(path).is_dir():
            raise ValueError(
                f"{path!r} is a folder: {command_line('export-adapter')} --workdir={path} "
                "--out=FILE makes an adapter file of a run"
            )
        check_size(path, MAX_BYTES)
        check_safetensors_header(path)
    try:
        with _local_copy(path) as local, safe_open(local, "numpy") as file:
            text = (file.metadata() or {}).get("dualpath_jax", "{}")
            metadata = parse_json(text, dict, f"the metadata of {path!r}")
            _check_metadata(path, metadata)
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path!r} is not a readable safetensors file: {error}; {_REMEDY}"
        ) from None
    other_dtypes = {str(leaf.dtype) for leaf in leaves.values()} - {"float32"}
    if other_dtypes:
        raise ValueError(
            f"{path!r} has parameters of {', '.join(sorted(other_dtypes))}, not float32; {_REMEDY}"
        )
    return leaves, metadata


def _check_metadata(path: str, metadata: dict[str, Any]) -> None:
    """Raise ValueError unless the metadata have the entries of an adapter file."""
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path!r} is not an adapter file of this package (format {_FORMAT}); "
            f"`{command_line('export-adapter')}` writes them"
        )
    for key, kind in _KEYS.items():
        if not isinstance(metadata.get(key), kind):
            raise ValueError(
                f"{path!r} is damaged: its {key} is {truncated_repr(metadata.get(key))}; {_REMEDY}"
            )
    frame_format = metadata.get("frame_format", {})
    if not isinstance(frame_format, dict):
        raise ValueError(
            f"{path!r} is damaged: its frame_format is {truncated_repr(frame_format)}; {_REMEDY}"
        )
    if not all(isinstance(name, str) for name in metadata["class_names"]):
        raise ValueError(f"{path!r} is damaged: its class_names are not all text; {_REMEDY}")


@contextlib.contextmanager
def _local_copy(path: str) -> Iterator[str]:
    """Yield the path of a local file, or of a temporary copy of one in Cloud Storage."""
    if not path.startswith("gs://"):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder, gcs.gcs_errors(path):
        local = pathlib.Path(folder) / "adapter.safetensors"
        local.write_bytes(epath.Path(path).read_bytes())
        yield str(local)


def init_from_adapter(
    experiment: Experiment, state: TrainState, path: str, training: bool = True
) -> tuple[TrainState, dict[str, Any]]:
    """Replace the trainable parameters of an initial state by those of an adapter file.

    If the file was trained on other classes, the layers that depend on the number of classes keep
    their fresh parameters.

    Args:
      experiment: the run.
      state: its initial state, at step 0.
      path: the adapter file, local or gs://.
      training: False if the state is only evaluated; the classes must then be the same.

    Returns:
      The new state and the file's metadata.

    Raises:
      ValueError: the file belongs to another method or backbone, has other parameters, or, if
        `training` is False, other classes.
    """
    leaves, metadata = read_adapter(path)
    own = experiment.metadata()
    for key in ("method", "backbone_name", "backbone_sha256"):
        if metadata[key] != own[key]:
            raise ValueError(
                f"config.init_from={path!r} was trained with {key} {metadata[key]!r}, this run has "
                f"{own[key]!r}: use the same one"
            )
    fresh = set()
    if metadata["class_names"] != experiment.class_names:
        if not training:
            raise ValueError(
                f"config.init_from={path!r} predicts {len(metadata['class_names'])} classes, but "
                f"the data set has {len(experiment.class_names)} different ones. Fine-tune it on "
                "this data set, or evaluate it on the one it was trained on"
            )
        fresh = _class_dependent_leaves(experiment)
        print(
            f"init_from: {path} has other classes; these parameters start anew: {', '.join(fresh)}"
        )
    target = param_tree.flatten(state.trainable)
    _check_leaves(path, leaves, target, fresh)
    new = [
        leaf if name in fresh else jax.device_put(leaves[name].astype(leaf.dtype), leaf.sharding)
        for name, leaf in target.items()
    ]
    trainable = jax.tree.unflatten(jax.tree.structure(state.trainable), new)
    print(f"started from {path}, trained for {metadata['step']} steps", flush=True)
    return state.replace(trainable=trainable), metadata


def _check_leaves(
    path: str, leaves: dict[str, np.ndarray], target: dict[str, Any], fresh: Collection[str]
) -> None:
    """Check that an adapter file has the parameters of `target`, except `fresh`, and no others.

    Raises:
      ValueError: it does not.
    """
    for name, leaf in target.items():
        if name in fresh:
            continue
        if name not in leaves or leaves[name].shape != leaf.shape:
            content = f"shape {leaves[name].shape}" if name in leaves else "nothing"
            raise ValueError(
                f"config.init_from={path!r} has {content} for {name}, this config builds "
                f"{leaf.shape}: use the config that the file was trained with"
            )
    surplus = sorted(leaves.keys() - target.keys())
    if surplus:
        raise ValueError(
            f"config.init_from={path!r} has parameters that this config does not build: "
            f"{', '.join(surplus[:5])}: use the config that the file was trained with"
        )


def _class_dependent_leaves(experiment: Experiment) -> set[str]:
    """Return the paths of the parameters whose shape depends on the number of classes."""
    shapes = [
        {name: leaf.shape for name, leaf in param_tree.flatten(model.params).items()}
        for model in (abstract.abstract_model(experiment.config, n) for n in (3, 4))
    ]
    return {name for name, shape in shapes[0].items() if shapes[1][name] != shape}

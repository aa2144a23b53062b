"""Trained parameters as one portable file: safetensors with metadata, no pickle, no optimizer.

Public: `write_adapter`, `read_adapter`, `init_from_adapter`.

    tensors    every trainable parameter by its path ("spatial/class_token"), float32
    metadata   "dualpath_jax": JSON with format (1), method, backbone_name, backbone_sha256,
               class_names, config, version and step, and frame_format unless the run is of an
               older version
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dualpath_jax.models import abstract, param_tree
from dualpath_jax.runtime import gcs
from dualpath_jax.runtime.safe_read import check_size, parse_json, truncated_repr
from dualpath_jax.training import experiment
from dualpath_jax.weights.source_checkpoint import MAX_BYTES

FORMAT = 1
_REMEDY = "copy it again, or write it again with scripts/export_adapter.py"
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
    """Write the file, whole or not at all.

    Args:
      path: of the new file, local or gs://.
      leaves: trainable parameters by path.
      metadata: with method, backbone_name, backbone_sha256, class_names, config, version and step.
    """
    kept = {key: metadata[key] for key in _KEYS}
    if "frame_format" in metadata:
        kept["frame_format"] = metadata["frame_format"]
    text = json.dumps({"format": FORMAT} | kept)
    temporary = epath.Path(f"{path}.incomplete")
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    with gcs.gcs_errors(path):
        temporary.write_bytes(save(arrays, metadata={"dualpath_jax": text}))
        temporary.replace(path)


def read_adapter(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(leaves by path, metadata) of a file of `write_adapter`; ValueError if it is none."""
    with gcs.gcs_errors(path):
        if not epath.Path(path).exists():
            raise FileNotFoundError(f"no adapter file {path!r}")
        if epath.Path(path).is_dir():
            raise ValueError(
                f"{path!r} is a folder: python scripts/export_adapter.py --workdir={path} --out=F "
                "makes an adapter file of a run"
            )
        check_size(path, MAX_BYTES)
    try:
        with _local(path) as local, safe_open(local, "numpy") as file:
            text = (file.metadata() or {}).get("dualpath_jax", "{}")
            metadata = parse_json(text, dict, f"the metadata of {path!r}")
            _check_metadata(path, metadata)
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path!r} is not a readable safetensors file: {error}; {_REMEDY}"
        ) from None
    foreign = {str(leaf.dtype) for leaf in leaves.values()} - {"float32"}
    if foreign:
        raise ValueError(
            f"{path!r} has parameters of {', '.join(sorted(foreign))}, not float32; {_REMEDY}"
        )
    return leaves, metadata


def _check_metadata(path: str, metadata: dict[str, Any]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path!r} is not an adapter file of this package (format {FORMAT}); "
            "scripts/export_adapter.py writes them"
        )
    for key, kind in _KEYS.items():
        if not isinstance(metadata.get(key), kind):
            raise ValueError(
                f"{path!r} is damaged: its {key} is {truncated_repr(metadata.get(key))}; {_REMEDY}"
            )
    if not isinstance(metadata.get("frame_format", {}), dict):
        raise ValueError(
            f"{path!r} is damaged: its frame_format is {truncated_repr(metadata['frame_format'])}; {_REMEDY}"
        )
    if not all(isinstance(name, str) for name in metadata["class_names"]):
        raise ValueError(f"{path!r} is damaged: its class_names are not all text; {_REMEDY}")


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    """The file itself, or a copy of one in Cloud Storage."""
    if not path.startswith("gs://"):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder, gcs.gcs_errors(path):
        local = pathlib.Path(folder) / "adapter.safetensors"
        local.write_bytes(epath.Path(path).read_bytes())
        yield str(local)


def init_from_adapter(
    run: experiment.Experiment, path: str, training: bool = True
) -> dict[str, Any]:
    """Take the trained parameters of an adapter file as the start of `run`, at step 0.

    Where the file was trained on other classes, the layer that names them starts afresh, to be
    trained. Returns the file's metadata.

    Raises:
      ValueError: the file belongs to another method or backbone, has other parameters, or, where
        `run` is not trained, other classes.
    """
    leaves, metadata = read_adapter(path)
    own = run.metadata()
    for key in ("method", "backbone_name", "backbone_sha256"):
        if metadata[key] != own[key]:
            raise ValueError(
                f"config.init_from={path!r} was trained with {key} {metadata[key]!r}, this run has "
                f"{own[key]!r}: use the same one"
            )
    target = param_tree.flatten(run.state.trainable)
    fresh = set()
    if metadata["class_names"] != run.class_names:
        if not training:
            raise ValueError(
                f"config.init_from={path!r} was trained on other classes, "
                f"{len(metadata['class_names'])} of them, than the {len(run.class_names)} of the "
                "data set, of which it says nothing: train on these, or evaluate on its own data"
            )
        fresh = _class_leaves(run)
        print(f"init_from: other classes than in {path}; starting afresh: {', '.join(fresh)}")
    for name, leaf in target.items():
        if name in fresh:
            continue
        if name not in leaves or leaves[name].shape != leaf.shape:
            found = f"shape {leaves[name].shape}" if name in leaves else "nothing"
            raise ValueError(
                f"config.init_from={path!r} has {found} for {name}, this config builds "
                f"{leaf.shape}: use the config that the file was trained with"
            )
    surplus = sorted(leaves.keys() - target.keys())
    if surplus:
        raise ValueError(
            f"config.init_from={path!r} has parameters that this config does not build: "
            f"{', '.join(surplus[:5])}: use the config that the file was trained with"
        )
    new = [
        leaf if name in fresh else jax.device_put(leaves[name].astype(leaf.dtype), leaf.sharding)
        for name, leaf in target.items()
    ]
    trainable = jax.tree.unflatten(jax.tree.structure(run.state.trainable), new)
    run.state = run.state.replace(trainable=trainable)
    print(f"started from {path}, trained for {metadata['step']} steps", flush=True)
    return metadata


def _class_leaves(run: experiment.Experiment) -> set[str]:
    """Parameters whose shape follows the number of classes."""
    shapes = [
        {name: leaf.shape for name, leaf in param_tree.flatten(outline.params).items()}
        for outline in (abstract.abstract_model(run.config, n) for n in (3, 4))
    ]
    return {name for name, shape in shapes[0].items() if shapes[1][name] != shape}

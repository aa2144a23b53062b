"""Converts CLIP, ViT and Swin checkpoints to this project's backbone file, and loads that file.

A backbone file is a safetensors file. It holds the image tower under the flat names of its module's
parameter tree ("blocks/attention/qkv/kernel", [L, D, 3D]) and one metadata entry, `CONVERTED_KEY`,
whose JSON describes the weights. There is only one entry because safetensors writes several entries
in random order, and converting the same checkpoint twice must give the same bytes.

Axes: L blocks, D width.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from flax import traverse_util

from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.runtime import files, gcs
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.runtime.safe_read import (
    check_safetensors_header,
    parse_json,
    read_bytes,
    truncated_repr,
)
from dualpath_jax.weights.source_checkpoint import (
    CONVERTED_KEY,
    MAX_BYTES,
    PUBLISHED_SHA256,
    format_names,
    read_checkpoint,
)

FORMAT_VERSION = 1

_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jnp.bfloat16)}

# Above these sizes, computing the expected shapes from a config could exhaust the memory.
_SIZE_LIMITS = {"image_size": 4096, "window_size": 64, "depth": 256, "depths": 256}
# For each type of a config field: does a metadata value fit it?
_FIELD_CHECKS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and 0 < value <= 2**20,
    int | None: lambda value: value is None or _FIELD_CHECKS[int](value),
    float: lambda value: isinstance(value, float) and 0 <= value < 1,  # eps
    tuple[int, ...]: lambda value: (
        isinstance(value, list | tuple) and all(map(_FIELD_CHECKS[int], value))
    ),
}


@dataclasses.dataclass(frozen=True)
class BackboneInfo:
    """Describes where a backbone comes from, for checkpoints and reports.

    Attributes:
      name: architecture, for example "ViT-B/16", or "custom".
      sha256: SHA-256 of the converted file.
      source_sha256: SHA-256 of the checkpoint that was converted.
      source: file name of that checkpoint.
    """

    name: str
    sha256: str
    source_sha256: str
    source: str


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: backbone_registry.BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a backbone's parameters by flat name."""
    module = backbone_registry.build_backbone(config)
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    tree = jax.eval_shape(lambda x: module.init(jax.random.key(0), x)["params"], image)
    return {n: leaf.shape for n, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def _check_limits(path: Any, config: backbone_registry.BackboneConfig) -> None:
    """Raise ValueError if a backbone is larger than any real one."""
    for name, limit in _SIZE_LIMITS.items():
        value = getattr(config, name, 0)
        total = sum(value) if isinstance(value, tuple) else value
        if total > limit:
            raise ValueError(f"{path}: {name} is {value}, but at most {limit} is supported")


def _check_arrays(
    path: Any, arrays: Mapping[str, np.ndarray], config: backbone_registry.BackboneConfig
) -> None:
    """Raise ValueError unless names, shapes and dtypes are those of the backbone."""
    _check_limits(path, config)
    expected = parameter_shapes(config)
    actual = {n: array.shape for n, array in arrays.items()}
    if wrong := [n for n in expected | actual if expected.get(n) != actual.get(n)]:
        problems = [
            f"{n}: expected {expected.get(n, 'nothing')}, found {actual.get(n, 'nothing')}"
            for n in wrong
        ]
        raise ValueError(f"{path}: wrong names or shapes for {config}: {format_names(problems)}")
    dtypes = {array.dtype for array in arrays.values()}
    if not dtypes <= set(_DTYPES.values()):
        raise ValueError(
            f"{path} has the dtypes {format_names(dtypes)}, but only {format_names(_DTYPES)} are "
            "supported"
        )
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(
            f"{path} has values that are not numbers (NaN) or infinite in {format_names(broken)}: "
            "download it again, or use another checkpoint"
        )


def _infer_config(
    arrays: Mapping[str, np.ndarray], stated: Mapping[str, Any], family: str, checkpoint: Any
) -> backbone_registry.BackboneConfig:
    """Return the backbone's config: sizes come from `arrays`, all other values from `stated`."""
    if "activation" not in stated:
        raise ValueError(
            f"{checkpoint} does not state the activation of its MLPs: pass "
            "--activation=quick_gelu (OpenAI's weights and models named quickgelu) or "
            "--activation=gelu (LAION, DataComp and most others)"
        )
    try:
        return backbone_registry.find_named_config(
            backbone_registry.FAMILIES[family].config.from_arrays(arrays, stated)
        )
    except (IndexError, ValueError, ZeroDivisionError) as error:  # arrays of odd shapes
        raise ValueError(f"{checkpoint}: {error}") from None


@contextlib.contextmanager
def _writable_output(out: epath.Path) -> Iterator[epath.Path]:
    """Yield the temporary path of `files.atomic_path` after checking that it can be written."""
    with files.atomic_path(out) as temporary:
        try:
            if out.is_dir():
                raise IsADirectoryError(None, "it is a directory")
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(b"")
        except OSError as error:
            raise OSError(f"cannot write {out}: {error.strerror}") from None
        yield temporary


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    trust: bool = False,
    activation: str | None = None,
    heads: int | None = None,
) -> dict[str, Any]:
    """Write the image tower of a checkpoint as this project's backbone file.

    Supported files are OpenAI's TorchScript archives, torch state dicts (bare or under
    "state_dict" or "model"), and safetensors; the format is detected from the content. The weights
    must have the names of a layout in `layouts.py`: CLIP of OpenAI, open_clip and Hugging Face; ViT
    of timm and Hugging Face; Swin of its authors, timm and Hugging Face. Each parameter keeps its
    dtype (float32, float16 or bfloat16).

    Args:
      checkpoint: local file.
      out: file to write, local or gs://. It is replaced atomically once it is complete.
      trust: open a TorchScript archive that is not one of OpenAI's published ones.
      activation: "quick_gelu" or "gelu". Overrides the value stated by the checkpoint or by the
        publisher's config next to it.
      heads: number of attention heads. Overrides the stated value in the same way. If it is stated
        nowhere, a ViT has one head per 64 of width, and a Swin has as many as its tables of
        relative positions.

    Returns:
      A dict with the keys "version", "container", "layout", "family", "config" (of the backbone),
      "parameters" (their number), "source", "source_sha256", "published" (name in OpenAI's release,
      or None), "out" and "sha256" (of the written file).

    Raises:
      ValueError: the checkpoint has no known layout, is damaged or refused, or its activation is
        unknown.
      OSError: `checkpoint` cannot be read or `out` cannot be written.
    """
    checkpoint, out = pathlib.Path(checkpoint), epath.Path(out)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint file at {checkpoint}")
    if os.path.exists(out) and os.path.samefile(out, checkpoint):
        raise ValueError(f"{out} is the checkpoint itself: write to another file")
    flags = {"activation": activation, "heads": heads}
    flags = {key: value for key, value in flags.items() if value is not None}
    with _writable_output(out) as temporary:
        arrays, meta = _convert_arrays(checkpoint, trust, flags)
        data = safetensors.numpy.save(arrays, {CONVERTED_KEY: json.dumps(meta, sort_keys=True)})
        temporary.write_bytes(data)
    return {
        **meta,
        "config": _parse_stored_config(out, meta),
        "parameters": sum(array.size for array in arrays.values()),
        "published": PUBLISHED_SHA256.get(meta["source_sha256"]),
        "out": str(out),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _convert_arrays(
    checkpoint: pathlib.Path, trust: bool, flags: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays under our flat names, and the metadata for the backbone file."""
    source = read_checkpoint(checkpoint, trust)
    arrays = source.arrays
    config = _infer_config(arrays, source.stated | flags, source.family, checkpoint)
    _check_arrays(checkpoint, arrays, config)
    return arrays, {
        "version": FORMAT_VERSION,
        "family": source.family,
        "config": dataclasses.asdict(config),
        "container": source.container,
        "layout": source.layout,
        "source": checkpoint.name,
        "source_sha256": source.sha256,
    }


def _parse_stored_config(path: Any, meta: Mapping[str, Any]) -> backbone_registry.BackboneConfig:
    """Return the config in a backbone file's metadata; raises ValueError if it is invalid."""
    family = meta.get("family", "vit")  # old files have no entry: ViT was the only family
    values = meta.get("config")
    known_family = backbone_registry.FAMILIES.get(family) if isinstance(family, str) else None
    if known_family is None or not isinstance(values, dict):
        raise ValueError(
            f"{path} does not describe a known backbone: its family is {truncated_repr(family)}"
        )
    types = typing.get_type_hints(known_family.config)
    wrong = [
        n for n, value in values.items() if n not in types or not _FIELD_CHECKS[types[n]](value)
    ]
    if wrong:
        raise ValueError(
            f"{path} describes an impossible backbone: invalid fields {format_names(wrong)}"
        )
    try:
        return known_family.config(**values)
    except (TypeError, ValueError) as error:  # TypeError: a field is missing
        raise ValueError(f"{path} describes an impossible backbone: {error}") from None


def load_backbone(
    path: str | os.PathLike[str], config: backbone_registry.BackboneConfig
) -> tuple[dict[str, Any], backbone_registry.BackboneConfig, BackboneInfo]:
    """Load the frozen backbone's parameters from a file that `convert_checkpoint` wrote.

    Args:
      path: the file, local or gs://.
      config: the wanted architecture and image size.

    Returns:
      The backbone's parameter tree (nested dict of numpy arrays in the file's dtypes), in which a
      ViT's position table is resized to `config.image_size` and a Swin's to `config.window_size`;
      `config` with the activation, eps and heads of the weights; and the origin of the weights.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a converted one, is damaged, or has another architecture.
    """
    arrays, meta, sha256 = _read_backbone(path)
    stored = _parse_stored_config(path, meta)
    if stored.architecture != config.architecture:
        raise ValueError(
            f"{path} holds {stored.name} {stored.architecture}, but the config asks for "
            f"{config.name} {config.architecture}: convert that checkpoint, or change the config"
        )
    _check_arrays(path, arrays, stored)
    if config.position_size != stored.position_size:
        logging.warning(
            "%s: position table resized from %s to %s",
            *(path, stored.position_size, config.position_size),
        )
        arrays = config.resize_position_tables(arrays)
    config = dataclasses.replace(
        config, activation=stored.activation, eps=stored.eps, heads=stored.heads
    )
    info = BackboneInfo(stored.name, sha256, str(meta["source_sha256"]), str(meta["source"]))
    return traverse_util.unflatten_dict(arrays, sep="/"), config, info


def _read_backbone(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Any, str]:
    """Return the arrays by flat name, the metadata and the SHA-256 of a backbone file."""
    create_this = (
        "create it from a checkpoint with "
        f"`{command_line('convert')} --checkpoint=FILE --out={path}`"
    )
    not_converted = (
        f"{path} is not a converted backbone: if it is a checkpoint, convert it with "
        f"`{command_line('convert')} --checkpoint={path} --out=NEW`"
    )
    with gcs.gcs_errors(path):
        if not epath.Path(path).exists():
            raise FileNotFoundError(f"no backbone at {path}: {create_this}")
        data = read_bytes(path, MAX_BYTES)
    if data[8:9] != b"{":
        raise ValueError(not_converted)
    check_safetensors_header(path)
    try:
        tensors = safetensors.deserialize(data)  # checks header and sizes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): {create_this}") from None
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], dict, path)
    text = (header.get("__metadata__") or {}).get(CONVERTED_KEY, "{}")
    meta = parse_json(text, dict, f"the metadata of {path}")
    if meta.get("version") != FORMAT_VERSION or not {"source", "source_sha256"} <= meta.keys():
        raise ValueError(not_converted)
    if unsupported := {t["dtype"] for _, t in tensors} - set(_DTYPES):
        raise ValueError(
            f"{path} has the dtypes {format_names(unsupported)}, but only "
            f"{format_names(_DTYPES)} are supported"
        )
    if empty := [name for name, t in tensors if not t["data"]]:
        raise ValueError(f"{path} has empty parameters: {format_names(empty)}")
    arrays = {
        name: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"])
        for name, t in tensors
    }
    return arrays, meta, hashlib.sha256(data).hexdigest()

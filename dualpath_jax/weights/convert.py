"""Checkpoints of CLIP, ViT and Swin to this project's backbone file, and that file to parameters.

Public: `convert_checkpoint`, `load_backbone`, `BackboneInfo`, `PUBLISHED_SHA256`, `parameter_shapes`.

A backbone file is a safetensors file that holds the image tower under the flat names of its
module's parameter tree ("blocks/attention/qkv/kernel", [L, D, 3D]) and one metadata entry,
`CONVERTED_KEY`, whose JSON says what the weights are. It is one entry because safetensors writes
several in random order, and the same checkpoint shall give the same bytes.

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
from dualpath_jax.runtime import gcs
from dualpath_jax.runtime.safe_read import parse_json, truncated_repr
from dualpath_jax.weights.source_checkpoint import (
    CONVERTED_KEY,
    MAX_BYTES,
    PUBLISHED_SHA256,
    format_names,
    read_checkpoint,
)

VERSION = 1

_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jnp.bfloat16)}

# Above these, what is computed from a config before its shapes are compared fills the memory.
_LIMITS = {"image_size": 4096, "window_size": 64, "depth": 256, "depths": 256}
# Is a value in the metadata of the kind that a config's field has?
_FIELDS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and 0 < value <= 2**20,
    int | None: lambda value: value is None or _FIELDS[int](value),
    float: lambda value: isinstance(value, float) and 0 <= value < 1,  # eps
    tuple[int, ...]: lambda value: (
        isinstance(value, list | tuple) and all(map(_FIELDS[int], value))
    ),
}


@dataclasses.dataclass(frozen=True)
class BackboneInfo:
    """Where a backbone comes from, for checkpoints and reports.

    Attributes:
      name: what the architecture is called, "ViT-B/16", or "custom".
      sha256: of the converted file.
      source_sha256: of the checkpoint that was converted.
      source: file name of that checkpoint.
    """

    name: str
    sha256: str
    source_sha256: str
    source: str


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: backbone_registry.BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a backbone's parameters by flat name."""
    module = backbone_registry.build_backbone(config)
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    tree = jax.eval_shape(lambda x: module.init(jax.random.key(0), x)["params"], image)
    return {n: leaf.shape for n, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def _check_limits(path: Any, config: backbone_registry.BackboneConfig) -> None:
    """ValueError for a backbone too large to be one."""
    for name, limit in _LIMITS.items():
        value = getattr(config, name, 0)
        total = sum(value) if isinstance(value, tuple) else value
        if total > limit:
            raise ValueError(f"{path}: {name} is {value}; {limit} is the most that is read")


def _check(
    path: Any, arrays: Mapping[str, np.ndarray], config: backbone_registry.BackboneConfig
) -> None:
    """ValueError unless names, shapes and dtypes are those of the backbone."""
    _check_limits(path, config)
    want = parameter_shapes(config)
    have = {n: array.shape for n, array in arrays.items()}
    wrong = [n for n in want | have if want.get(n) != have.get(n)]
    if wrong:
        wrong = [f"{n} is {have.get(n, 'missing')}, not {want.get(n, 'known')}" for n in wrong]
        raise ValueError(f"{path}: wrong names or shapes for {config}: {format_names(wrong)}")
    dtypes = {array.dtype for array in arrays.values()}
    if not dtypes <= set(_DTYPES.values()):
        raise ValueError(
            f"{path} has the dtypes {format_names(dtypes)}; known are {format_names(_DTYPES)}"
        )


def _config(
    arrays: Mapping[str, np.ndarray], stated: Mapping[str, Any], family: str, checkpoint: Any
) -> backbone_registry.BackboneConfig:
    """The backbone's config: shape from its arrays, what they do not say from `stated`."""
    if "activation" not in stated:
        raise ValueError(
            f"{checkpoint} does not say which activation its MLPs have: pass "
            "--activation=quick_gelu (OpenAI's weights, or whoever says quickgelu) or "
            "--activation=gelu (LAION, DataComp and most others)"
        )
    try:
        return backbone_registry.find_named_config(
            backbone_registry.FAMILIES[family].config.from_arrays(arrays, stated)
        )
    except (IndexError, ValueError, ZeroDivisionError) as error:  # of arrays of odd shapes
        raise ValueError(f"{checkpoint}: {error}") from None


# ---------------------------------------------------------------- public


@contextlib.contextmanager
def _replacing(out: epath.Path) -> Iterator[epath.Path]:
    """A temporary file beside `out` that replaces it on success, and disappears on failure."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror}") from None
    try:
        yield temporary
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    trust: bool = False,
    activation: str | None = None,
    heads: int | None = None,
) -> dict[str, Any]:
    """Writes the image tower of a checkpoint as this project's backbone file.

    Read are, by content: OpenAI's TorchScript archives, torch state dicts (bare or under
    "state_dict" or "model"), and safetensors, with the names of a layout in `weight_layouts.py`:
    CLIP of OpenAI, open_clip and Hugging Face; ViT of timm and Hugging Face; Swin of its authors,
    timm and Hugging Face. The dtype of each parameter is kept (float32, float16, bfloat16).

    Args:
      checkpoint: local file.
      out: file to write, local or gs://, replaced at once when complete.
      trust: open a TorchScript archive that is none of OpenAI's published ones.
      activation: "quick_gelu" or "gelu", over what the checkpoint or the config beside it says.
      heads: attention heads, likewise; the default is one per 64 of width (of a Swin, what its
        tables of relative positions have).

    Returns:
      {"container", "layout", "family", "config": of the backbone, "parameters", "source",
      "source_sha256", "published": name in OpenAI's release or None, "out", "sha256": of the
      written file}.

    Raises:
      ValueError: no layout that is known, or the activation is unknown.
      OSError: `checkpoint` cannot be read or `out` cannot be written.
    """
    checkpoint, out = pathlib.Path(checkpoint), epath.Path(out)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint file at {checkpoint}")
    if os.path.exists(out) and os.path.samefile(out, checkpoint):
        raise ValueError(f"{out} is the checkpoint itself: write to another file")
    flags = {"activation": activation, "heads": heads}
    flags = {key: value for key, value in flags.items() if value is not None}
    with gcs.gcs_errors(out), _replacing(out) as temporary:
        arrays, meta = _convert(checkpoint, trust, flags)
        data = safetensors.numpy.save(arrays, {CONVERTED_KEY: json.dumps(meta, sort_keys=True)})
        temporary.write_bytes(data)
    return {
        **meta,
        "config": _stored_config(out, meta),
        "parameters": sum(array.size for array in arrays.values()),
        "published": PUBLISHED_SHA256.get(meta["source_sha256"]),
        "out": str(out),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _convert(
    checkpoint: pathlib.Path, trust: bool, flags: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays under our flat names, and what the backbone file's metadata says of them."""
    source = read_checkpoint(checkpoint, trust)
    arrays = source.arrays
    config = _config(arrays, source.stated | flags, source.family, checkpoint)
    _check(checkpoint, arrays, config)
    return arrays, {
        "version": VERSION,
        "family": source.family,
        "config": dataclasses.asdict(config),
        "container": source.container,
        "layout": source.layout,
        "source": checkpoint.name,
        "source_sha256": source.sha256,
    }


def _stored_config(path: Any, meta: Mapping[str, Any]) -> backbone_registry.BackboneConfig:
    """The config in a backbone file's metadata; ValueError if it is none."""
    family = meta.get("family", "vit")  # files from before there were others do not say
    values = meta.get("config")
    known = backbone_registry.FAMILIES.get(family) if isinstance(family, str) else None
    if known is None or not isinstance(values, dict):
        raise ValueError(
            f"{path} does not say what backbone it is (family {truncated_repr(family)})"
        )
    kinds = typing.get_type_hints(known.config)
    wrong = [n for n, value in values.items() if n not in kinds or not _FIELDS[kinds[n]](value)]
    if wrong:
        raise ValueError(
            f"{path} describes an impossible backbone; wrong are {format_names(wrong)}"
        )
    try:
        return known.config(**values)
    except (TypeError, ValueError) as error:  # the former where one is missing
        raise ValueError(f"{path} describes an impossible backbone: {error}") from None


def load_backbone(
    path: str | os.PathLike[str], config: backbone_registry.BackboneConfig
) -> tuple[dict[str, Any], backbone_registry.BackboneConfig, BackboneInfo]:
    """Parameters of the frozen backbone from a file that `convert_checkpoint` wrote.

    Args:
      path: the file, local or gs://.
      config: the architecture wanted, at the image size wanted.

    Returns:
      The backbone's parameter tree (nested dict of numpy arrays in the file's dtypes), with a
      ViT's position table resized to `config.image_size` and a Swin's to `config.window_size`;
      `config` with the activation, eps and heads of the weights; where the weights come from.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a converted file, damaged, or another architecture.
    """
    arrays, meta, sha256 = _read_backbone(path)
    stored = _stored_config(path, meta)
    if stored.architecture != config.architecture:
        raise ValueError(
            f"{path} holds {stored.name} {stored.architecture}, but the config asks for "
            f"{config.name} {config.architecture}: convert that checkpoint, or change the config"
        )
    _check(path, arrays, stored)
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
    """Arrays, metadata and SHA-256 of a backbone file."""
    remedy = f"`python scripts/convert_clip.py --checkpoint=FILE --out={path}`"
    convert = (
        f"`python scripts/convert_clip.py --checkpoint={path} --out=NEW` makes one of a checkpoint"
    )
    with gcs.gcs_errors(path):
        there = epath.Path(path).is_file()
    if not there:
        raise FileNotFoundError(f"no backbone at {path}: make it from a checkpoint by {remedy}")
    size = epath.Path(path).stat().length
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than any backbone: make it by {remedy}")
    data = epath.Path(path).read_bytes()
    if data[8:9] != b"{":
        raise ValueError(f"{path} is not a converted backbone: {convert}")
    try:
        tensors = safetensors.deserialize(data)  # checks header and sizes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): make it by {remedy}") from None
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], dict, path)
    text = (header.get("__metadata__") or {}).get(CONVERTED_KEY, "{}")
    meta = parse_json(text, dict, f"the metadata of {path}")
    if meta.get("version") != VERSION or not {"source", "source_sha256"} <= meta.keys():
        raise ValueError(f"{path} is not a converted backbone: {convert}")
    if foreign := {t["dtype"] for _, t in tensors} - set(_DTYPES):
        raise ValueError(
            f"{path} has the dtypes {format_names(foreign)}; known are {format_names(_DTYPES)}"
        )
    if empty := [name for name, t in tensors if not t["data"]]:
        raise ValueError(f"{path} has empty parameters: {format_names(empty)}")
    arrays = {
        name: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"])
        for name, t in tensors
    }
    return arrays, meta, hashlib.sha256(data).hexdigest()

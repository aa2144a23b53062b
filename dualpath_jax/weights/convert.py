"""Converts checkpoints of image transformers to this project's backbone file, and loads that file.

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

from dualpath_jax.data.clip_spec import normalization
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.models.backbones import vit
from dualpath_jax.runtime import files, gcs
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.runtime.safe_read import (
    MAX_JSON_BYTES,
    check_safetensors_header,
    open_binary,
    parse_json,
    read_bytes,
    truncated_repr,
)
from dualpath_jax.weights.source_checkpoint import (
    CONVERTED_KEY,
    PUBLISHED_SHA256,
    STATED_CHECKS,
    read_checkpoint,
)
from dualpath_jax.weights.source_configs import NORMALIZATIONS
from dualpath_jax.weights.source_files import MAX_BYTES, Source, find_source, format_names

FORMAT_VERSION = 1

_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jnp.bfloat16)}

# Fields of a config that version 0.1.0 did not have. Files leave them out at their defaults;
# weights that were converted then and now therefore have the same bytes.
_NEWER_FIELDS = (*vit.RARE_FIELDS, "position_resize")

# Fields that a loaded backbone has from its file, whatever its name is.
_OWN_FIELDS = ("activation", "eps", "heads", "position_resize")

# Above these sizes, computing the expected shapes from a config could exhaust the memory.
_SIZE_LIMITS = {
    "image_size": 4096,
    "num_register_tokens": 4096,
    "window_size": 64,
    "depth": 256,
    "depths": 256,
}
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

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation


@dataclasses.dataclass(frozen=True)
class BackboneInfo:
    """Describes where a backbone comes from, for checkpoints and reports.

    Attributes:
      name: architecture, for example "ViT-B/16", or "custom".
      sha256: SHA-256 of the file without its normalization. Version 0.1.0 did not write one;
        weights that were converted then and now have the same identity.
      source_sha256: SHA-256 of the checkpoint that was converted.
      source: file name of that checkpoint.
      normalization: mean and standard deviation, each of red, green and blue in 0..1; None for
        files of version 0.1.0.
      merged: method whose training is merged into the weights, see `write_merged`.
    """

    name: str
    sha256: str
    source_sha256: str
    source: str
    normalization: Normalization | None = None
    merged: str | None = None


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: backbone_registry.BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a backbone's parameters by flat name."""
    module = backbone_registry.build_backbone(config, scan_blocks=True)  # is traced faster
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
    try:
        config = backbone_registry.find_named_config(
            backbone_registry.FAMILIES[family].config.from_arrays(arrays, stated)
        )
    except (IndexError, ValueError, ZeroDivisionError) as error:  # arrays of odd shapes
        raise ValueError(f"{checkpoint}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{checkpoint} has no weights for {error}") from None
    named = backbone_registry.MODELS.get(config.name)
    if named is not None and "heads" not in stated:  # a head of H/14, for example, has width 80
        config = dataclasses.replace(config, heads=named.heads)
    return config


def _check_stated(stated: Mapping[str, Any], checkpoint: Any) -> None:
    """Raise ValueError if the activation or the normalization is not stated."""
    questions = []
    if "activation" not in stated:
        questions.append(
            "the activation of its MLPs: pass --activation=quick_gelu (OpenAI's weights and models "
            "named quickgelu) or --activation=gelu (LAION, DataComp and most others)"
        )
    if not {"mean", "std"} <= stated.keys():
        questions.append(
            "the normalization of its images: pass --normalization=clip (most CLIPs), "
            "--normalization=imagenet (DeiT, DINO, MAE) or --normalization=half (ImageNet-21K)"
        )
    if questions:
        raise ValueError(f"{checkpoint} does not state {'; nor '.join(questions)}")


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
    activation: str | None = None,
    heads: int | None = None,
    normalization: str | None = None,
) -> dict[str, Any]:
    """Write the image tower of a checkpoint as this project's backbone file.

    Supported files are safetensors, torch state dicts (bare, or in a training checkpoint),
    TorchScript archives, of which nothing is executed, and the official `.npz`. The names must be
    those of a layout in `layouts.py`. Each parameter keeps its dtype (float32, float16, bfloat16).

    Args:
      checkpoint: local file, index of shards, folder as of Hugging Face, or "hf:org/name".
      out: file to write, local or gs://. It is replaced atomically once it is complete.
      activation: "quick_gelu", "gelu" or "gelu_tanh". Overrides the value stated by the checkpoint
        or by the publisher's config next to it.
      heads: number of attention heads. Overrides the stated value in the same way. If it is stated
        nowhere, a ViT has those of the named model of its shape, else one per 64 of width, and a
        Swin has as many as its tables of relative positions.
      normalization: a name of `source_configs.NORMALIZATIONS`; overrides the stated mean and
        standard deviation in the same way.

    Returns:
      A dict with the keys "version", "container", "layout", "family", "config" (of the backbone),
      "mean" and "std" (of red, green and blue in 0..1 that the backbone expects), "parameters"
      (their number), "source", "source_sha256", "published" (name in OpenAI's release, or None),
      "out" and "sha256" (of the written file).

    Raises:
      ValueError: the checkpoint has no known layout, is damaged or refused, or its activation is
        unknown.
      OSError: `checkpoint` cannot be read or `out` cannot be written.
    """
    out = epath.Path(out)
    flags = {"activation": activation, "heads": heads, **_find_normalization(normalization)}
    flags = {key: value for key, value in flags.items() if value is not None}
    source = find_source(checkpoint)
    if source.owns(out):
        raise ValueError(
            f"{out} is the checkpoint itself, its folder or one of its files: write to another file"
        )
    with _writable_output(out) as temporary:
        arrays, meta = _convert_arrays(source, flags)
        data = _serialize(arrays, meta)
        temporary.write_bytes(data)
    return {
        **meta,
        "config": _parse_stored_config(out, meta),
        "parameters": sum(array.size for array in arrays.values()),
        "published": PUBLISHED_SHA256.get(meta["source_sha256"]),
        "out": str(out),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _find_normalization(name: str | None) -> Mapping[str, tuple[float, ...]]:
    """Return the "mean" and "std" of a name of `NORMALIZATIONS`; None: an empty mapping."""
    if name is None:
        return {}
    if name not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {name!r}: known are {', '.join(NORMALIZATIONS)}")
    return NORMALIZATIONS[name]


def _convert_arrays(
    source: Source, flags: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays under our flat names, and the metadata for the backbone file."""
    checkpoint = read_checkpoint(source)
    arrays, stated = checkpoint.arrays, checkpoint.stated | flags
    _check_stated(stated, source.given)
    config = _infer_config(arrays, stated, checkpoint.family, source.given)
    if config.activation != flags.get("activation", config.activation):
        raise ValueError(
            f"{source.given} has gated MLPs (SwiGLU), whose activation is {config.activation}: "
            f"leave out --activation={flags['activation']}"
        )
    _check_arrays(source.given, arrays, config)
    return arrays, {
        "version": FORMAT_VERSION,
        "family": checkpoint.family,
        "config": _describe_config(config),
        "mean": list(stated["mean"]),
        "std": list(stated["std"]),
        "container": checkpoint.container,
        "layout": checkpoint.layout,
        "source": checkpoint.name,
        "source_sha256": checkpoint.sha256,
    }


def _describe_config(config: backbone_registry.BackboneConfig) -> dict[str, Any]:
    """Return a config's fields for the metadata, see `_NEWER_FIELDS`."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NEWER_FIELDS or getattr(config, field.name) != field.default
    }


def _parse_stored_config(path: Any, meta: Mapping[str, Any]) -> backbone_registry.BackboneConfig:
    """Return the config in a backbone file's metadata; raise ValueError if it is invalid."""
    family = meta.get("family", "vit")  # old files have no entry: ViT was the only family
    values = meta.get("config")
    known_family = backbone_registry.FAMILIES.get(family) if isinstance(family, str) else None
    if known_family is None or not isinstance(values, dict):
        raise ValueError(
            f"{path} does not describe a known backbone: its family is {truncated_repr(family)}"
        )
    types = typing.get_type_hints(known_family.config)
    defaults = {field.name: field.default for field in dataclasses.fields(known_family.config)}

    def is_valid(name: str, value: Any) -> bool:
        if name not in types:
            return False
        is_default = type(value) is type(defaults[name]) and value == defaults[name]
        return is_default or _FIELD_CHECKS[types[name]](value)

    wrong = [name for name, value in values.items() if not is_valid(name, value)]
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
      `config` with the `_OWN_FIELDS` of the weights; and the origin of the weights.

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
    own = {name: getattr(stored, name) for name in _OWN_FIELDS if hasattr(stored, name)}
    config = dataclasses.replace(config, **own)
    if config.position_size != stored.position_size:
        logging.warning(
            "%s: position table resized from %s to %s",
            *(path, stored.position_size, config.position_size),
        )
        arrays = config.resize_position_tables(arrays)
    source = str(meta["source_sha256"]), str(meta["source"])
    merged = _parse_merged(path, meta)
    info = BackboneInfo(stored.name, sha256, *source, _parse_normalization(path, meta), merged)
    return traverse_util.unflatten_dict(arrays, sep="/"), config, info


def read_sha256(path: str | os.PathLike[str]) -> str:
    """Return `BackboneInfo.sha256` of a backbone file, which is read as a whole.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a converted one, or is damaged.
    """
    return _read_backbone(path)[2]


def is_converted(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a file that `convert_checkpoint` wrote, by its header."""
    if not epath.Path(path).is_file():
        return False
    with open_binary(path, MAX_BYTES) as file:
        size = int.from_bytes(file.read(8), "little")
        return size <= MAX_JSON_BYTES and CONVERTED_KEY.encode() in file.read(size)


def read_description(
    path: str | os.PathLike[str],
) -> tuple[backbone_registry.BackboneConfig, Normalization | None]:
    """Read only the header of a backbone file.

    Returns:
      The shape of the backbone, and mean and standard deviation of its images; None for files of
      version 0.1.0.

    Raises:
      ValueError: the file is not a converted one, or is damaged.
    """
    meta = _read_metadata(path)
    return _parse_stored_config(path, meta), _parse_normalization(path, meta)


def _read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a backbone file; read only its header."""
    with gcs.gcs_errors(path), epath.Path(path).open("rb") as file:
        start = file.read(8)
        check_safetensors_header(path, start)
        header = file.read(int.from_bytes(start, "little"))
    if header[:1] != b"{":
        raise ValueError(_describe_unconverted(path))
    return _parse_metadata(path, header)


def write_merged(
    out: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    config: backbone_registry.BackboneConfig,
    source: str | os.PathLike[str],
    merged: Mapping[str, Any],
    default_normalization: Normalization,
) -> BackboneInfo:
    """Write a backbone file with weights that were trained on those of another one.

    Args:
      out: file to write, local or gs://. It is replaced atomically once it is complete.
      arrays: the weights by flat name.
      config: their shape.
      source: the other backbone file, whose origin and normalization are stated in the new one.
      merged: what was merged, for the new file's metadata.
      default_normalization: for files of version 0.1.0, which state none.

    Raises:
      ValueError: the arrays are not those of `config`.
      OSError: `source` cannot be read or `out` cannot be written.
    """
    out = epath.Path(out)
    meta = _read_metadata(source)
    mean, std = _parse_normalization(source, meta) or default_normalization
    meta |= {"mean": list(mean), "std": list(std), "merged": dict(merged)}
    meta["config"] = _describe_config(config)
    _check_arrays(out, arrays, config)
    data = _serialize(arrays, meta)
    with _writable_output(out) as temporary:
        temporary.write_bytes(data)
    origin = str(meta["source_sha256"]), str(meta["source"])
    sha256 = _identity_sha256(data, arrays, meta)
    return BackboneInfo(config.name, sha256, *origin, (mean, std), _parse_merged(out, meta))


def _parse_merged(path: Any, meta: Mapping[str, Any]) -> str | None:
    """Return the method whose training is merged into the weights of a file, or None."""
    merged = meta.get("merged")
    if merged is None:
        return None
    if not isinstance(merged, Mapping) or not isinstance(merged.get("method"), str):
        raise ValueError(f"{path} does not say what is merged into it: it is damaged")
    return merged["method"]


def check_merged(path: Any, info: BackboneInfo, model_config: Any) -> None:
    """Raise ValueError if `model.merged` needs another backbone file.

    Args:
      path: the backbone's file, for messages.
      info: of `load_backbone`.
      model_config: the group `model` of the configuration.
    """
    method = model_config.method
    if model_config.merged and info.merged != method:
        raise ValueError(
            f"model.merged=True, but no training of {method} is merged into {path}: "
            f"`{command_line('merge')}` writes such files; or set model.merged=False"
        )


def _parse_normalization(path: Any, meta: Mapping[str, Any]) -> Normalization | None:
    """Return mean and standard deviation in the metadata of a file; None if it has neither."""
    if not {"mean", "std"} & meta.keys():
        return None
    if not all(STATED_CHECKS[key](meta.get(key)) for key in ("mean", "std")):
        raise ValueError(f"{path} describes an impossible normalization of images")
    return tuple(meta["mean"]), tuple(meta["std"])


def _describe_unconverted(path: Any) -> str:
    """Return the message for a file that is not a converted backbone."""
    return (
        f"{path} is not a converted backbone: if it is a checkpoint, convert it with "
        f"`{command_line('convert')} --checkpoint={path} --out=NEW`"
    )


def _parse_metadata(path: Any, header: bytes) -> dict[str, Any]:
    """Return the metadata of a converted file from its safetensors header, which is JSON."""
    entries = parse_json(header, dict, path).get("__metadata__") or {}
    meta = parse_json(entries.get(CONVERTED_KEY, "{}"), dict, f"the metadata of {path}")
    if meta.get("version") != FORMAT_VERSION or not {"source", "source_sha256"} <= meta.keys():
        raise ValueError(_describe_unconverted(path))
    return meta


def check_normalization(path: Any, info: BackboneInfo, data_config: Any) -> None:
    """Raise ValueError if a backbone's file and a config disagree on the images' normalization.

    Args:
      path: the backbone's file, for messages.
      info: of `load_backbone`.
      data_config: the group `data` of the configuration; `keep_normalization` allows it to differ.
    """
    if info.normalization is None or data_config.keep_normalization:
        return
    configured = normalization(data_config)
    if not np.allclose(info.normalization, configured, rtol=0, atol=1e-3):
        stated, own = (
            [tuple(round(x, 3) for x in color) for color in pair]
            for pair in (info.normalization, configured)
        )
        raise ValueError(
            f"{path} expects images of mean {stated[0]} and standard deviation {stated[1]}, but "
            f"the config has data.mean={own[0]} and data.std={own[1]}: leave them out of it, set "
            "them to those of the file, or pass --config.data.keep_normalization=True"
        )


def _identity_sha256(data: bytes, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> str:
    """Return `BackboneInfo.sha256` of a converted file with these bytes and this content."""
    if not {"mean", "std"} & meta.keys():
        return hashlib.sha256(data).hexdigest()
    old = {key: value for key, value in meta.items() if key not in ("mean", "std")}
    return hashlib.sha256(_serialize(arrays, old)).hexdigest()


def _serialize(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    return safetensors.numpy.save(dict(arrays), {CONVERTED_KEY: json.dumps(meta, sort_keys=True)})


def _read_backbone(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Any, str]:
    """Return the arrays by flat name, the metadata and the identity of a backbone file."""
    create_this = (
        "create it from a checkpoint with "
        f"`{command_line('convert')} --checkpoint=FILE --out={path}`"
    )
    with gcs.gcs_errors(path):
        if not epath.Path(path).exists():
            raise FileNotFoundError(f"no backbone at {path}: {create_this}")
        data = read_bytes(path, MAX_BYTES)
    if data[8:9] != b"{":
        raise ValueError(_describe_unconverted(path))
    check_safetensors_header(path, data)
    try:
        tensors = safetensors.deserialize(data)  # checks header and sizes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): {create_this}") from None
    meta = _parse_metadata(path, data[8 : 8 + int.from_bytes(data[:8], "little")])
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
    return arrays, meta, _identity_sha256(data, arrays, meta)

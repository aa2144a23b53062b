"""Reads published checkpoints (torch and safetensors files) and renames their weights to our names.

This is the only module that imports torch, and only for checkpoints in torch's own formats. The
known names are in `layouts.py`.
"""

import collections
import dataclasses
import functools
import hashlib
import mmap
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from dualpath_jax.runtime import progress_bar
from dualpath_jax.runtime.safe_read import (
    check_safetensors_header,
    check_size,
    open_binary,
    read_json,
    truncated_repr,
)
from dualpath_jax.weights.layouts import (
    LAYOUTS,
    TEXT_TOWER_NAMES,
    UNSUPPORTED_PREFIXES,
    Layout,
    Row,
)

CONVERTED_KEY = "dualpath_jax_backbone"  # metadata entry of a file that is already converted

# OpenAI's release, the directory part of each download address in clip/clip.py.
PUBLISHED_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}

MAX_BYTES = 64 * 2**30  # of a file; the largest CLIP with its text tower has 10 GB in float32
_MAX_EXPANSION = 2  # ratio of bytes in memory to bytes on disk: tied weights are stored once
_MAX_STAGES = 16

# For each value that a publisher's config may state: is it valid?
_STATED_CHECKS: dict[str, Callable[[Any], bool]] = {
    "activation": lambda value: isinstance(value, str),
    "heads": lambda value: type(value) is int and value > 0,
    "eps": lambda value: type(value) in (int, float) and 0 < value < 1,
    "image_size": lambda value: type(value) is int and value > 0,
}

_NOT_A_CHECKPOINT = "not a CLIP, ViT or Swin checkpoint"
_TensorReaders = Mapping[str, Callable[[], np.ndarray]]  # by name; called to read the tensor


# ---------------------------------------------------------------- files


def _detect_container(path: pathlib.Path) -> str:
    """Return "safetensors", "torchscript" or "torch".

    Looks only at the file's bytes and executes nothing in it.
    """
    with open_binary(path, MAX_BYTES) as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty")
    if head[8:9] == b"{":  # follows the 8 bytes of the header's length
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _detect_zip_container(path)
    if head.startswith(b"\x80"):  # a pickle: torch.save before torch 1.6
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    raise ValueError(f"{path} is not a checkpoint: it is neither a safetensors nor a torch file")


def _detect_zip_container(path: pathlib.Path) -> str:
    """Return "torchscript" or "torch" by the names in an archive, without unpacking it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # many types; BadZipFile is only one of them
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    names = [member.filename for member in members]
    if any(name.startswith("/") or ".." in name.split("/") for name in names):
        raise ValueError(f"{path} is refused: it contains paths outside the archive")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return "torchscript"
    _check_expansion(path, sum(member.file_size for member in members))
    return "torch"


def _check_expansion(path: pathlib.Path, num_bytes: int) -> None:
    """Raise ValueError if a file claims to hold far more bytes than it has."""
    size = path.stat().st_size
    if num_bytes > _MAX_EXPANSION * size:
        raise ValueError(
            f"{path} has {size:,} bytes but claims to hold {num_bytes:,}: it is damaged, or was "
            "made to exhaust the memory"
        )


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    """Convert a torch tensor to an array of the same dtype, bfloat16 included."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy itself has no bfloat16
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _load_torch(path: pathlib.Path, container: str) -> Mapping[str, Any]:
    """Return the state dict in a torch file.

    Opening a TorchScript archive can run code from it; opening any other torch file cannot.
    """
    import torch

    try:
        if container == "torchscript":
            return torch.jit.load(path, map_location="cpu").state_dict()
        # The file is mapped because torch's old format requests as many bytes as the file claims.
        with (
            open_binary(path, MAX_BYTES) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            state = torch.load(data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and is refused: other pickled objects "
            "can run code when loaded. Save only the state dict, preferably as safetensors. "
            f"torch says: {str(error)[:200].partition(chr(10))[0]}"
        ) from None
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        message = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"{path} is truncated or damaged: {message}") from None
    for key in ("state_dict", "model"):  # "model" is used by Swin's authors
        if isinstance(state, Mapping):
            state = state.get(key, state)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} is {_NOT_A_CHECKPOINT}: it holds no state dict")
    others = [
        name
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise ValueError(
            f"{path} is {_NOT_A_CHECKPOINT}: these entries are not tensors: {format_names(others)}"
        )
    # A tensor that stores a few bytes may be expanded to any shape.
    _check_expansion(path, sum(t.numel() * t.element_size() for t in state.values()))
    return {name.removeprefix("module."): value for name, value in state.items()}


def _open_tensors(path: pathlib.Path, container: str) -> tuple[_TensorReaders, dict[str, str]]:
    """Return readers of the tensors by name, and the file's metadata."""
    if container == "safetensors":
        check_safetensors_header(path)
        try:
            file = safetensors.safe_open(path, "numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
        readers = {n: functools.partial(file.get_tensor, n) for n in sorted(file.keys())}
        return _wrap_readers(path, readers), file.metadata() or {}
    try:
        state = _load_torch(path, container)
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} is a torch file, but torch is not installed: install torch (the CPU build is "
            "enough) or use the safetensors file of the same model"
        ) from None
    readers = {n: functools.partial(_torch_to_numpy, tensor) for n, tensor in state.items()}
    return _wrap_readers(path, readers), {}


def _wrap_readers(path: pathlib.Path, readers: _TensorReaders) -> _TensorReaders:
    """Make the readers raise ValueError for a tensor that is empty or unknown to numpy."""

    def read(name: str) -> np.ndarray:
        try:
            array = readers[name]()
        except Exception as error:  # safetensors, torch and numpy each raise their own types
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None
        if array.size == 0:
            raise ValueError(f"{path}: {name} is empty, of shape {array.shape}")
        return array

    return {name: functools.partial(read, name) for name in readers}


def compute_sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open_binary(path, MAX_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_names(names: Any) -> str:
    """List at most eight of the names, sorted, for a message."""
    names = sorted(map(str, names))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more


# ---------------------------------------------------------------- renaming


def _detect_layout(path: pathlib.Path, names: Collection[str], metadata: Mapping[str, str]) -> str:
    """Return the name in `LAYOUTS` of the layout that these weights have.

    Raises:
      ValueError: the file is already converted, or the weights have no known layout.
    """
    if CONVERTED_KEY in metadata:
        raise ValueError(f"{path} is already converted")
    for prefix, tower in UNSUPPORTED_PREFIXES.items():
        if any(name.startswith(prefix) for name in names):
            raise ValueError(f"{path} has {tower}: of the CLIP models, only the ViTs are supported")
    for name, layout in LAYOUTS.items():
        if any(re.fullmatch(layout.marker, n) for n in names):
            return name
    if names and all(re.fullmatch(TEXT_TOWER_NAMES, name) for name in names):
        raise ValueError(f"{path} holds only a text tower, no image tower: {format_names(names)}")
    raise ValueError(f"{path} is {_NOT_A_CHECKPOINT}: its names are {format_names(names)}")


def _normalize_name(name: str, layout: Layout) -> str:
    """Return `name` as the layout's table spells it."""
    name = name.removeprefix(layout.prefix)
    for pattern, replacement in layout.aliases:
        name = re.sub(pattern, replacement, name)
    return name


def _count_blocks(table: tuple[Row, ...], names: Collection[str]) -> list[int]:
    """Count the blocks of each stage, at least one each.

    A table without stages counts as one stage.
    """
    source = next(source for source, _, _ in table if "{i}" in source)
    pattern = re.escape(source).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{i\}", r"\d+")
    matches = (re.fullmatch(pattern, name) for name in names)
    counts = collections.Counter(int(m.groupdict().get("s", 0)) for m in matches if m)
    last_stage = max(counts, default=0)
    if last_stage >= _MAX_STAGES:
        raise ValueError(
            f"a weight belongs to stage {last_stage}, but at most {_MAX_STAGES} are supported"
        )
    return [max(1, counts[stage]) for stage in range(last_stage + 1)]


def _expand_table(
    table: tuple[Row, ...], depths: list[int]
) -> Iterator[tuple[list[str], str, Callable]]:
    """Yield the table's rows for all stages and blocks.

    A row is (the source names of all blocks of a stage, our name, transform).
    """
    for source, name, transform in table:
        stages = 1
        if "{s}" in name:
            stages = len(depths) if "{i}" in source else len(depths) - 1  # one between two stages
        for s in range(stages):
            blocks = range(depths[s] if "{i}" in source else 1)
            sources = [source.format(s=s, next=s + 1, i=i) for i in blocks]
            yield sources, name.format(s=s), transform


def _rename_tensors(
    path: pathlib.Path, tensors: _TensorReaders, layout: Layout
) -> dict[str, np.ndarray]:
    """Read all of `tensors` and return them under our flat names.

    Raises:
      ValueError: names are left over or missing (the message lists both), or shapes are wrong.
    """
    tensors = {_normalize_name(name, layout): tensor for name, tensor in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not re.fullmatch(layout.ignored, n)}
    rows = list(_expand_table(layout.table, _count_blocks(layout.table, tensors)))
    known = {source for sources, _, _ in rows for source in sources}
    left, missing = set(tensors) - known, known - set(tensors)
    if left or missing:
        raise ValueError(
            f"{path} does not have the names of {layout.title}; left over: {format_names(left)}; "
            f"missing: {format_names(missing)}"
        )
    parts: dict[str, np.ndarray] = {}
    for sources, name, transform in progress_bar.iterate_with_bar(rows, "convert", "tensors"):
        arrays = [tensors[source]() for source in sources]
        try:
            arrays = [transform(array) for array in arrays]
            part = np.stack(arrays) if name.startswith("blocks") else arrays[0]  # [L, ...]
            previous = [parts[name]] if name in parts else []
            parts[name] = np.concatenate([*previous, part], axis=-1)
        except (ValueError, TypeError):  # TypeError: the dtypes have no common type
            shapes = format_names({f"{array.dtype} {array.shape}" for array in arrays})
            raise ValueError(f"{path}: wrong shape of {sources[0]}: {shapes}") from None
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}


def _read_publisher_config(
    checkpoint: pathlib.Path, layout: Layout, shape: tuple
) -> dict[str, Any]:
    """Return the values stated by the publisher's config next to the checkpoint.

    The keys are "activation", "heads", "eps" and "image_size", as far as the config states them.
    The dict is empty if there is no config.

    Raises:
      ValueError: the config is invalid, or describes a model of another `shape`, (width, depth).
    """
    path = checkpoint.with_name(layout.config_file)
    config = read_json(path, dict) if path.is_file() else {}
    try:
        stated = layout.read_config(config)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not describe a model of its publisher's: {error}") from None
    if stated is None:
        return {}
    described = stated.pop("shape")
    for key, value in stated.items():
        if not _STATED_CHECKS[key](value):
            raise ValueError(f"{path} gives an impossible {key}: {truncated_repr(value)}")
    if described != shape:
        raise ValueError(
            f"{path} describes another model: its (width, depth) is {described}, but that of "
            f"{checkpoint.name} is {shape}. Replace it with the matching config, or remove it"
        )
    return stated


@dataclasses.dataclass(frozen=True)
class SourceCheckpoint:
    """Holds the image tower of a checkpoint.

    Attributes:
      arrays: weights by our flat names, in the source's dtypes. The blocks of a stage are stacked
        [L, ...].
      container: "safetensors", "torch" or "torchscript".
      layout: a key of `LAYOUTS`.
      family: a key of `FAMILIES` in `models/backbones/registry.py`.
      sha256: SHA-256 of the file.
      stated: "activation", "heads", "eps" and "image_size", as far as the layout, the file or the
        publisher's config next to it states them.
    """

    arrays: dict[str, np.ndarray]
    container: str
    layout: str
    family: str
    sha256: str
    stated: dict[str, Any]


def read_checkpoint(path: pathlib.Path, trust: bool) -> SourceCheckpoint:
    """Read the image tower of the checkpoint at `path`.

    Args:
      path: local file; its format is detected from its content.
      trust: open a TorchScript archive that is not one of OpenAI's published ones.

    Returns:
      The weights under our names, and all that the checkpoint states about them.

    Raises:
      ValueError: the file is refused or damaged, has no known layout, or has left-over or missing
        names (the message lists both).
    """
    check_size(path, MAX_BYTES)
    container, sha256 = _detect_container(path), compute_sha256(path)
    if container == "torchscript" and not (trust or sha256 in PUBLISHED_SHA256):
        raise ValueError(
            f"{path} is a TorchScript archive, a program that can run code when opened, and its "
            f"SHA-256 {sha256} is not one of the four that OpenAI published. Use the safetensors "
            "file of the same model, or pass --trust if you trust its source"
        )
    tensors, metadata = _open_tensors(path, container)
    name = _detect_layout(path, tensors, metadata)
    layout = LAYOUTS[name]
    arrays = _rename_tensors(path, tensors, layout)
    try:
        arrays = layout.postprocess(arrays)
        shape = layout.get_shape(arrays)
    except (IndexError, ValueError) as error:  # an array has too few axes
        raise ValueError(f"{path}: wrong shapes for {layout.title}: {error}") from None
    # Later values win: layout, publisher's config, OpenAI's marker, the file's own metadata.
    stated = {**layout.stated, **_read_publisher_config(path, layout, shape)}
    if "input_resolution" in tensors:  # only OpenAI's own files have it
        stated["activation"] = "quick_gelu"
    stated |= {key: metadata[key] for key in ("activation", "heads") if key in metadata}
    return SourceCheckpoint(arrays, container, name, layout.family, sha256, stated)

"""Other people's checkpoints: files of torch and safetensors, and their weights under our names.

Public: `read_checkpoint`, `Checkpoint`, `PUBLISHED_SHA256`, `CONVERTED_KEY`, `MAX_BYTES`,
`sha256_of`, `format_names`.

This is the only module that imports torch, and only for checkpoints in torch's own formats. The
names that it knows are in `weight_layouts.py`.
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
from dualpath_jax.runtime.safe_read import check_size, read_json, truncated_repr
from dualpath_jax.weights.layouts import LAYOUTS, TEXT_TOWER, UNSUPPORTED, Layout, Row

CONVERTED_KEY = "dualpath_jax_backbone"  # metadata entry of a file that is already converted

# OpenAI's release, the directory part of each download address in clip/clip.py.
PUBLISHED_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}

MAX_BYTES = 64 * 2**30  # of a file; CLIP's largest with its text tower has 10 GB in float32
_MAX_EXPANSION = 2  # bytes in memory to bytes on disk: tied weights are stored once
_MAX_STAGES = 16

# What a config may state.
_STATED: dict[str, Callable[[Any], bool]] = {
    "activation": lambda value: isinstance(value, str),
    "heads": lambda value: type(value) is int and value > 0,
    "eps": lambda value: type(value) in (int, float) and 0 < value < 1,
    "image_size": lambda value: type(value) is int and value > 0,
}

_NOT_A_CHECKPOINT = "no CLIP, ViT or Swin"
_Tensors = Mapping[str, Callable[[], np.ndarray]]  # by name, read when called


# ---------------------------------------------------------------- files


def _container(path: pathlib.Path) -> str:
    """ "safetensors", "torchscript" or "torch", by the file's bytes; executes nothing in it."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty")
    if head[8:9] == b"{":  # after the header's length, 8 bytes
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _zip_container(path)
    if head.startswith(b"\x80"):  # a pickle: torch.save before torch 1.6
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    raise ValueError(f"{path} is no checkpoint: neither safetensors nor a file of torch")


def _zip_container(path: pathlib.Path) -> str:
    """ "torchscript" or "torch", by the names in an archive, which is not unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # of many kinds, BadZipFile is only one
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    names = [member.filename for member in members]
    if any(name.startswith("/") or ".." in name.split("/") for name in names):
        raise ValueError(f"{path} names files outside of itself and is refused")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return "torchscript"
    _check_expansion(path, sum(member.file_size for member in members))
    return "torch"


def _check_expansion(path: pathlib.Path, num_bytes: int) -> None:
    """ValueError if a file claims to hold far more than it has bytes."""
    size = path.stat().st_size
    if num_bytes > _MAX_EXPANSION * size:
        raise ValueError(
            f"{path} has {size:,} bytes and claims to hold {num_bytes:,}: it is damaged, or made "
            "to fill the memory"
        )


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # unknown to numpy itself
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _load_torch(path: pathlib.Path, container: str) -> Mapping[str, Any]:
    """State dict in a file of torch; all but a TorchScript archive without running code from it."""
    import torch

    try:
        if container == "torchscript":
            return torch.jit.load(path, map_location="cpu").state_dict()
        # Mapped, as torch's old format asks a file for as many bytes as the file itself says.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            state = torch.load(data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and is refused: other pickled objects "
            "can run code when loaded. Save the state dict alone, best as safetensors. "
            f"torch says: {str(error)[:200].partition(chr(10))[0]}"
        ) from None
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        message = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"{path} is truncated or damaged: {message}") from None
    for key in ("state_dict", "model"):  # the latter in the files of Swin's authors
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
            f"{path} is {_NOT_A_CHECKPOINT}: entries that are no tensors: {format_names(others)}"
        )
    # A tensor of a few bytes may be expanded to any shape.
    _check_expansion(path, sum(t.numel() * t.element_size() for t in state.values()))
    return {name.removeprefix("module."): value for name, value in state.items()}


def _open(path: pathlib.Path, container: str) -> tuple[_Tensors, dict[str, str]]:
    """The tensors, not read yet, and the file's metadata."""
    if container == "safetensors":
        try:
            file = safetensors.safe_open(path, "numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
        reads = {n: functools.partial(file.get_tensor, n) for n in sorted(file.keys())}
        return _checked(path, reads), file.metadata() or {}
    try:
        state = _load_torch(path, container)
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} is in a format of torch, which is not installed: install torch (its CPU build "
            "is enough) or use the safetensors file of the same model"
        ) from None
    reads = {n: functools.partial(_torch_to_numpy, tensor) for n, tensor in state.items()}
    return _checked(path, reads), {}


def _checked(path: pathlib.Path, reads: _Tensors) -> _Tensors:
    """`reads` that raise ValueError for a tensor without values, or of a kind unknown to numpy."""

    def read(name: str) -> np.ndarray:
        try:
            array = reads[name]()
        except Exception as error:  # safetensors, torch and numpy each have their own
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None
        if array.size == 0:
            raise ValueError(f"{path}: {name} is empty, of shape {array.shape}")
        return array

    return {name: functools.partial(read, name) for name in reads}


def sha256_of(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_names(names: Any) -> str:
    """At most eight of the names, for a message."""
    names = sorted(map(str, names))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more


# ---------------------------------------------------------------- names to our names


def _layout(path: pathlib.Path, names: Collection[str], metadata: Mapping[str, str]) -> str:
    """The name in `LAYOUTS` of what has these names; ValueError for what is none of them."""
    if CONVERTED_KEY in metadata:
        raise ValueError(f"{path} is already converted")
    for prefix, what in UNSUPPORTED.items():
        if any(name.startswith(prefix) for name in names):
            raise ValueError(f"{path} has {what}; of CLIP only its ViT is supported")
    for name, layout in LAYOUTS.items():
        if any(re.fullmatch(layout.mark, n) for n in names):
            return name
    if names and all(re.fullmatch(TEXT_TOWER, name) for name in names):
        raise ValueError(f"{path} holds a text tower only, no image tower: {format_names(names)}")
    raise ValueError(f"{path} is {_NOT_A_CHECKPOINT}: its names are {format_names(names)}")


def _our_spelling(name: str, layout: Layout) -> str:
    """`name` as the layout's table spells it."""
    name = name.removeprefix(layout.prefix)
    for pattern, replacement in layout.aliases:
        name = re.sub(pattern, replacement, name)
    return name


def _depths(table: tuple[Row, ...], names: Collection[str]) -> list[int]:
    """Blocks of each stage (one stage, where the table knows none), at least one each."""
    source = next(source for source, _, _ in table if "{i}" in source)
    pattern = re.escape(source).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{i\}", r"\d+")
    matches = (re.fullmatch(pattern, name) for name in names)
    found = collections.Counter(int(m.groupdict().get("s", 0)) for m in matches if m)
    if max(found, default=0) >= _MAX_STAGES:
        raise ValueError(f"it names a stage {max(found)}, of at most {_MAX_STAGES}")
    return [max(1, found[stage]) for stage in range(max(found, default=0) + 1)]


def _rows(table: tuple[Row, ...], depths: list[int]) -> Iterator[tuple[list[str], str, Callable]]:
    """The table written out: source names (of all blocks of a stage), our name, transform."""
    for source, name, transform in table:
        stages = 1
        if "{s}" in name:
            stages = len(depths) if "{i}" in source else len(depths) - 1  # or between two stages
        for s in range(stages):
            blocks = range(depths[s] if "{i}" in source else 1)
            sources = [source.format(s=s, next=s + 1, i=i) for i in blocks]
            yield sources, name.format(s=s), transform


def _rename(path: pathlib.Path, tensors: _Tensors, layout: Layout) -> dict[str, np.ndarray]:
    """All of `tensors` under our flat names; ValueError that lists left-over and missing names."""
    tensors = {_our_spelling(name, layout): tensor for name, tensor in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not re.fullmatch(layout.ignored, n)}
    rows = list(_rows(layout.table, _depths(layout.table, tensors)))
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
            before = [parts[name]] if name in parts else []
            parts[name] = np.concatenate([*before, part], axis=-1)
        except (ValueError, TypeError):  # the latter for dtypes that do not go together
            kinds = format_names({f"{array.dtype} {array.shape}" for array in arrays})
            raise ValueError(f"{path}: wrong shape of {sources[0]}: {kinds}") from None
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}


def _beside(checkpoint: pathlib.Path, layout: Layout, shape: tuple) -> dict[str, Any]:
    """What the publisher's config beside the checkpoint states: activation, heads, eps, size.

    ValueError if it describes a model of another `shape`, (width, depth).
    """
    path = checkpoint.with_name(layout.config_file)
    config = read_json(path, dict) if path.is_file() else {}
    try:
        stated = layout.read_config(config)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} describes no model of its publisher's: {error}") from None
    if stated is None:
        return {}
    described = stated.pop("shape")
    for key, value in stated.items():
        if not _STATED[key](value):
            raise ValueError(f"{path} gives an impossible {key}: {truncated_repr(value)}")
    if described != shape:
        raise ValueError(
            f"{path} describes another model, (width, depth) = {described}, than "
            f"{checkpoint.name}, {shape}: put the matching one there, or none"
        )
    return stated


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The image tower of a checkpoint.

    Attributes:
      arrays: by our flat names, blocks of a stage stacked [L, ...], in the source's dtypes.
      container: "safetensors", "torch" or "torchscript".
      layout: a name of `LAYOUTS`.
      family: a name of `backbones.FAMILIES`.
      sha256: of the file.
      stated: activation, heads, eps and image_size, as far as the layout, the file or the config
        beside it says.
    """

    arrays: dict[str, np.ndarray]
    container: str
    layout: str
    family: str
    sha256: str
    stated: dict[str, Any]


def read_checkpoint(path: pathlib.Path, trust: bool) -> Checkpoint:
    """Read the image tower of the checkpoint at `path`.

    Args:
      path: local file, recognised by its content.
      trust: open a TorchScript archive that is none of OpenAI's published ones.

    Raises:
      ValueError: refused, damaged, of no known layout, or left-over or missing names (both are
        listed).
    """
    check_size(path, MAX_BYTES)
    container, sha256 = _container(path), sha256_of(path)
    if container == "torchscript" and not (trust or sha256 in PUBLISHED_SHA256):
        raise ValueError(
            f"{path} is a TorchScript archive, a program that can run code when opened, and "
            f"its SHA-256 {sha256} is none of the four that OpenAI published. Use the safetensors "
            "file of the same model, or pass --trust if you trust where it came from"
        )
    tensors, metadata = _open(path, container)
    name = _layout(path, tensors, metadata)
    layout = LAYOUTS[name]
    arrays = _rename(path, tensors, layout)
    try:
        arrays = layout.finish(arrays)
        shape = layout.shape(arrays)
    except (IndexError, ValueError) as error:  # fewer axes than there must be
        raise ValueError(f"{path}: wrong shapes for {layout.title}: {error}") from None
    stated = {**layout.stated, **_beside(path, layout, shape)}  # later ones win
    stated |= {"activation": "quick_gelu"} if "input_resolution" in tensors else {}  # OpenAI's mark
    stated |= {key: metadata[key] for key in ("activation", "heads") if key in metadata}
    return Checkpoint(arrays, container, name, layout.family, sha256, stated)

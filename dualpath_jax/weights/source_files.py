"""Finds and opens the files of a checkpoint: safetensors, torch, `.npz`; whole or in shards."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging

from dualpath_jax.runtime.safe_read import (
    check_regular,
    check_safetensors_header,
    open_binary,
    read_json,
    truncated_repr,
)
from dualpath_jax.weights import torch_files

MAX_BYTES = 64 * 2**30  # of a file; the largest CLIP with its text tower has 10 GB in float32

TensorReaders = Mapping[str, Callable[[], np.ndarray]]  # by name; called to read the tensor

# Names of the weights in a folder, in order of preference.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_CONFIG_FILES = ("config.json", "open_clip_config.json", "preprocessor_config.json")
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".npz"}
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[^.]+)")
# Entries of training checkpoints that hold the weights; the first one with a tensor is read.
_WRAPPERS = (
    *("state_dict", "model", "model_state", "model_state_dict", "module", "teacher"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Names the files of one checkpoint.

    Attributes:
      given: the file, folder or repository that the user named.
      name: for the converted file: "clip.pt", "hf:org/name".
      files: the files of the weights, in the order of their names.
      folder: where the publisher's config files are.
    """

    given: str
    name: str
    files: tuple[pathlib.Path, ...]
    folder: pathlib.Path

    def owns(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a path is one of the checkpoint's own files, its index or a config."""
        stated = (*_CONFIG_FILES, *(name for name in _WEIGHT_FILES if name.endswith(".json")))
        own = (self.given, *self.files, *(self.folder / name for name in stated))
        return os.path.exists(path) and any(
            os.path.samefile(path, file) for file in own if os.path.exists(file)
        )

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the file; of shards, that of the list of their names and hashes."""
        if len(self.files) == 1:
            return compute_sha256(self.files[0])
        lines = "".join(f"{compute_sha256(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


def compute_sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open_binary(path, MAX_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- finding


def find_source(checkpoint: str | os.PathLike[str]) -> Source:
    """Find the files of a checkpoint.

    Args:
      checkpoint: a file, an index of shards, one shard, a folder as of Hugging Face, or
        "hf:org/name", with "@revision" after it if wanted.

    Raises:
      FileNotFoundError: files are missing.
      ValueError: the folder has no weights, the index is wrong, or the file is not regular.
    """
    name = os.fspath(checkpoint)
    if name.startswith("hf:"):
        file = _download(name)
        return Source(name, name, _find_shards(file), file.parent)
    path = pathlib.Path(checkpoint)
    if path.is_dir():
        file = _choose_file(path)
        return Source(name, path.resolve().name, _find_shards(file), path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no checkpoint file at {path}")
    check_regular(path)
    return Source(name, path.name, _find_shards(path), path.parent)


def _choose_file(folder: pathlib.Path) -> pathlib.Path:
    """Return the file of a folder that holds its weights, or their index."""
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(f for f in folder.iterdir() if f.suffix in _WEIGHT_SUFFIXES and f.is_file())
    match = _SHARD_NAME.fullmatch(files[0].name) if files else None
    if match and all(file.name.startswith(f"{match[1]}-") for file in files):
        return files[0]
    if len(files) != 1:
        found = ", ".join(f.name for f in files[:8]) or "none"
        raise ValueError(
            f"{folder} does not have one file of weights (found: {found}): name the file itself"
        )
    return files[0]


def _find_shards(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Return all files of the set that `path`, an index or one shard, belongs to."""
    if path.name.endswith(".index.json"):
        names = _read_index(path)
    elif match := _SHARD_NAME.fullmatch(path.name):
        count = int(match[3])
        if not 0 < count <= 1000:
            return (path,)
        names = [f"{match[1]}-{i:05d}-of-{match[3]}{match[4]}" for i in range(1, count + 1)]
    else:
        return (path,)
    files = tuple(path.with_name(name) for name in names)
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{path} belongs to a set of {len(files)} shards, of which {len(missing)} are missing: "
            f"download {', '.join(missing[:8])} into {path.parent}"
        )
    return files


def _read_index(path: pathlib.Path) -> list[str]:
    """Return the names of the shards that an index names, sorted.

    Raises:
      ValueError: it is not an index, or names files outside its folder.
    """
    weight_map = read_json(path, dict).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is not an index of shards: it has no weight_map of files")
    for name in names:
        if name in ("", ".", "..") or re.search(r'[/\\:"\0]', name):
            raise ValueError(
                f"{path} is refused: it names {truncated_repr(name)}, a path outside its folder; "
                "download the index again from its publisher"
            )
    return sorted(set(names))


def _download(name: str) -> pathlib.Path:
    """Return the local file of the weights of "hf:org/name[@revision]", or their index.

    huggingface_hub decides about cache, offline mode and credentials.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise ValueError(
            f"{name} needs huggingface_hub: pip install huggingface_hub, or download the files "
            "and name their folder"
        ) from None
    repo, _, revision = name.removeprefix("hf:").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{name} does not name a repository: write hf:org/name")

    def fetch(file: str) -> pathlib.Path | None:
        try:
            return pathlib.Path(
                huggingface_hub.hf_hub_download(repo, file, revision=revision or None)
            )
        except errors.LocalEntryNotFoundError:
            return None  # offline and not in the cache
        except errors.EntryNotFoundError:
            return None

    try:
        for config_file in _CONFIG_FILES:
            fetch(config_file)
        for weights in _WEIGHT_FILES:
            if (path := fetch(weights)) is None:
                continue
            if weights.endswith(".index.json"):
                for shard in _read_index(path):
                    fetch(shard)
            return path
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise OSError(f"{name} cannot be downloaded: {str(error).splitlines()[0]}") from None
    raise FileNotFoundError(
        f"{name} has none of {', '.join(_WEIGHT_FILES)}, or they are neither in the cache nor "
        "within reach: check the name and the connection"
    )


# ---------------------------------------------------------------- opening


def detect_container(path: pathlib.Path) -> str:
    """Return "safetensors", "torchscript", "torch", "torch-legacy" or "npz".

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
        return "torch-legacy"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    if head.startswith(b"GGUF"):
        raise ValueError(f"{path} is a quantized GGUF file: use the model's float weights")
    raise ValueError(
        f"{path} is not a checkpoint: it is neither a safetensors, a torch nor an .npz file"
    )


def _detect_zip_container(path: pathlib.Path) -> str:
    """Return "torchscript", "torch" or "npz" by the names in an archive, without unpacking it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # many types; BadZipFile is only one of them
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    names = [member.filename for member in members]
    if any(name.startswith("/") or ".." in name.split("/") for name in names):
        raise ValueError(f"{path} is refused: it contains paths outside the archive")
    torch_files.check_expansion(path, sum(member.file_size for member in members))
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    scripted = any(name.endswith("/constants.pkl") or "/code/" in name for name in names)
    return "torchscript" if scripted else "torch"


def open_tensors(source: Source) -> tuple[str, dict[str, Callable], dict[str, str]]:
    """Open the files of a checkpoint.

    Returns:
      The container ("safetensors", "torch", "torchscript" or "npz"), the readers of all tensors by
      name, and the metadata of a safetensors file.

    Raises:
      ValueError: a file is refused or damaged, or two shards hold the same tensor.
    """
    readers: dict[str, Callable] = {}
    metadata: dict[str, str] = {}
    for path in source.files:
        container = detect_container(path)
        tensors, stated = _open_file(path, container)
        if twice := readers.keys() & tensors.keys():
            raise ValueError(f"{path} repeats tensors of other shards: {format_names(twice)}")
        readers |= _wrap_readers(path, tensors)
        metadata |= stated
    return container.removesuffix("-legacy"), readers, metadata


def _open_file(path: pathlib.Path, container: str) -> tuple[TensorReaders, dict[str, str]]:
    """Return readers of one file's tensors by name, and its metadata."""
    if container == "safetensors":
        check_safetensors_header(path)
        try:
            file = safetensors.safe_open(path, "numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
        readers = {n: functools.partial(file.get_tensor, n) for n in sorted(file.keys())}
        return readers, file.metadata() or {}
    if container == "npz":
        arrays = np.load(path, allow_pickle=False)
        return {n: functools.partial(_read_npy, arrays, n) for n in arrays.files}, {}
    read = torch_files.read_legacy if container == "torch-legacy" else torch_files.read_zip
    try:
        content = read(path)
        if container == "torchscript":
            content = torch_files.module_tensors(content)
    except torch_files.RefusedPickleError as error:
        raise _refuse(path, str(error)) from None
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged: {str(error)[:200]}") from None
    state = _unwrap(path, content)
    # A tensor that stores a few bytes may be expanded to any shape.
    torch_files.check_expansion(path, sum(tensor.nbytes for tensor in state.values()))
    return {name: tensor.numpy for name, tensor in state.items()}, {}


def _read_npy(arrays: Any, name: str) -> np.ndarray:
    """Read an array; JAX saves bfloat16 as two raw bytes."""
    array = arrays[name]
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


def _refuse(path: pathlib.Path, reason: str) -> ValueError:
    """Return the error for a torch file whose weights are, or contain, other objects."""
    return ValueError(
        f"{path} holds more than tensors ({reason[:150]}) and is refused: other pickled objects "
        "can run code when loaded. Nothing was executed. Save only the state dict, preferably as "
        "safetensors"
    )


def _unwrap(path: pathlib.Path, content: Any) -> dict[str, torch_files.Tensor]:
    """Return the state dict in the content of a torch file."""
    for _ in range(len(_WRAPPERS)):
        if not isinstance(content, dict):
            break
        entries = _find_entries(content)
        with_tensors = [key for key in entries if _holds_tensor(content[key])]
        if len(with_tensors) > 1:
            logging.warning(
                "%s: the weights in %s are read, not those in %s",
                *(path, with_tensors[0], format_names(with_tensors[1:])),
            )
        nested = [key for key in entries if _find_entries(content[key])]
        if not entries:
            break
        content = content[(with_tensors or nested or entries)[0]]
    if isinstance(content, torch_files.Opaque):
        raise _refuse(path, content.name)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is {NOT_A_CHECKPOINT}: it holds no state dict")
    weights = _holds_tensor(content)
    for name, value in content.items():
        if isinstance(value, torch_files.Opaque) and (weights or name in _WRAPPERS):
            raise _refuse(path, f"{str(name)[:50]}: {value.name}")
    others = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, torch_files.Tensor))
    ]
    if others:
        raise ValueError(
            f"{path} is {NOT_A_CHECKPOINT}: these entries are not tensors: {format_names(others)}"
        )
    return content


def _find_entries(content: Mapping[Any, Any]) -> list[str]:
    """Return the entries of a training checkpoint that may hold the weights."""
    return [key for key in _WRAPPERS if isinstance(content.get(key), dict)]


def _holds_tensor(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch_files.Tensor) for value in state.values())


NOT_A_CHECKPOINT = "not a CLIP, SigLIP, DINOv2, ViT or Swin checkpoint"


def _wrap_readers(path: pathlib.Path, readers: TensorReaders) -> TensorReaders:
    """Make the readers raise ValueError for a tensor that is empty or unknown to numpy."""

    def read(name: str) -> np.ndarray:
        try:
            array = readers[name]()
        except Exception as error:  # safetensors, zipfile and numpy each raise their own types
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None
        if array.size == 0:
            raise ValueError(f"{path}: {name} is empty, of shape {array.shape}")
        return array

    return {name: functools.partial(read, name) for name in readers}


def format_names(names: Any) -> str:
    """List at most eight of the names, sorted, for a message."""
    names = sorted(map(str, names))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more

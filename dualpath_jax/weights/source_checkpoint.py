"""Reads published checkpoints and renames their weights to our names.

The files are opened by `source_files.py`; the known names are in `layouts.py`.
"""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from dualpath_jax.runtime import progress_bar
from dualpath_jax.runtime.safe_read import read_json, truncated_repr
from dualpath_jax.weights.layouts import (
    LAYOUTS,
    TEXT_TOWER_NAMES,
    UNSUPPORTED_PREFIXES,
    Layout,
    Row,
)
from dualpath_jax.weights.source_configs import NORMALIZATIONS
from dualpath_jax.weights.source_files import (
    NOT_A_CHECKPOINT,
    Source,
    TensorReaders,
    format_names,
    open_tensors,
)

CONVERTED_KEY = "dualpath_jax_backbone"  # metadata entry of a file that is already converted

# OpenAI's release, the directory part of each download address in clip/clip.py.
PUBLISHED_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}

# Files of this package without a config of their own: demo/demo_backbone.safetensors.
_CLIP_NORMALIZED_SHA256 = {"61ab14891ce060877a4b107c47b303c4e2e1e797348be546f531aad3c83f3dde"}

_MAX_STAGES, _MAX_BLOCKS = 16, 256

# Prefixes that wrappers of training code put before every name. Those in `_TOWER_PREFIXES` name the
# image tower of a larger model, whose other weights are left out.
_PREFIXES = (
    *("module.", "_orig_mod.", "model.", "backbone.", "image_encoder.", "visual.trunk."),
    *("opt/target/", "params/"),
)
_TOWER_PREFIXES = ("backbone.", "image_encoder.", "visual.trunk.")
# A tower on its own: a name that it has, the prefix that its layout expects, the names to change.
_BARE_TOWERS = (
    ("conv1.weight", "visual.", r"class_embedding|positional_embedding|proj|(conv1|ln_|transf).+"),
    (
        "embeddings.class_embedding",
        "vision_model.",
        r"(embeddings|encoder|pre_layrnorm|post_layernorm)\..+",
    ),
    ("head.probe", "vision_model.", r"(embeddings|encoder|post_layernorm|head)\..+"),
)
# Where big_vision has the blocks of a tower stacked [L, ...].
_STACKED_BLOCKS = re.compile(r"(.*Transformer/encoderblock)/(.+)")
# Weights that no layout has, and what to do about them.
_REFUSED_NAMES = {
    r".*\.(lora_[A-Za-z_]+|base_layer)(\..+)?": (
        "holds LoRA matrices that are not merged (PEFT): call merge_and_unload() and save the model"
    ),
    r".*\.(SCB|absmax|quant_map|quant_state\..+|weight_scale.*|qweight|qzeros|g_idx|zero_point"
    r"|_packed_params.*|weight_zero_point)": "is quantized: use the float weights of the model",
}
_OTHER_MODALITIES = {
    r"(.+\.)?(word_embeddings|embed_tokens|shared|wte)\.weight": "a language model",
    r"(.+\.)?audio_(model|branch|encoder|tower|projection)\..+|.*spectrogram.*": "an audio model",
}

# For each value that a publisher's config may state: is it valid?
STATED_CHECKS: dict[str, Callable[[Any], bool]] = {
    "activation": lambda value: isinstance(value, str),
    "heads": lambda value: type(value) is int and value > 0,
    "eps": lambda value: type(value) in (int, float) and 0 < value < 1,
    "image_size": lambda value: type(value) is int and value > 0,
    "mean": lambda value: _are_fractions(value),
    "std": lambda value: _are_fractions(value) and all(value),
}


def _are_fractions(value: Any) -> bool:
    """Return whether a value is three numbers in 0..1, as for red, green and blue."""
    numbers = isinstance(value, list | tuple) and len(value) == 3
    return numbers and all(type(x) in (int, float) and 0 <= x <= 1 for x in value)


# ---------------------------------------------------------------- renaming


def _strip_prefixes(path: str, tensors: TensorReaders) -> TensorReaders:
    """Return the tensors without the prefixes of wrappers, and of the image tower only."""
    prefix: str | None = ""
    while prefix is not None:
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        outside = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
        if prefix in _TOWER_PREFIXES:
            if left_out := [n for n in outside if not re.fullmatch(TEXT_TOWER_NAMES, n)]:
                logging.warning("%s: not in %s, left out: %s", path, prefix, format_names(left_out))
            outside = {}
        if twice := inside.keys() & outside.keys():
            raise ValueError(
                f"{path} holds weights with and without {prefix}: {format_names(twice)}"
            )
        tensors = inside | outside
        prefix = next((p for p in _PREFIXES if any(n.startswith(p) for n in tensors)), None)
    for marker, prefix, names in _BARE_TOWERS:
        if marker in tensors:
            tensors = {(prefix + n if re.fullmatch(names, n) else n): t for n, t in tensors.items()}
    return tensors


def _unstack_blocks(tensors: TensorReaders) -> TensorReaders:
    """Return the tensors with stacked blocks as tensors of each block, by the unstacked names."""
    unstacked: dict[str, Callable] = {}
    for name, read in tensors.items():
        match = _STACKED_BLOCKS.fullmatch(name)
        if match is None:
            unstacked[name] = read
            continue
        array = read()
        length = len(array) if array.ndim else 0
        if not 0 < length <= _MAX_BLOCKS:
            raise ValueError(f"{name} stacks {length} blocks, but 1 to {_MAX_BLOCKS} are supported")
        for i in range(length):
            unstacked[f"{match[1]}_{i}/{match[2]}"] = functools.partial(array.__getitem__, i)
    return unstacked


def _check_names(path: str, names: Collection[str]) -> None:
    """Raise ValueError for weights that are quantized or not merged."""
    for pattern, problem in _REFUSED_NAMES.items():
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            raise ValueError(f"{path} {problem} ({format_names(found[:1])})")


def _detect_layout(path: str, names: Collection[str], metadata: Mapping[str, str]) -> str:
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
    for pattern, kind in _OTHER_MODALITIES.items():
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            raise ValueError(f"{path} holds {kind}, no image tower: {format_names(found[:1])}")
    raise ValueError(f"{path} is {NOT_A_CHECKPOINT}: its names are {format_names(names)}")


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
) -> Iterator[tuple[list[str], str, Callable, bool]]:
    """Yield the table's rows for all stages and blocks.

    A row is (the source names of all blocks of a stage, our name, transform, whether these blocks
    are stacked).
    """
    for source, name, transform in table:
        stages = 1
        if "{s}" in name:
            stages = len(depths) if "{i}" in source else len(depths) - 1  # one between two stages
        for s in range(stages):
            blocks = range(depths[s] if "{i}" in source else 1)
            sources = [source.format(s=s, next=s + 1, i=i) for i in blocks]
            yield sources, name.format(s=s), transform, "{i}" in source


def rename_tensors(path: str, tensors: TensorReaders, layout: Layout) -> dict[str, np.ndarray]:
    """Read all of `tensors` and return them under our flat names.

    Args:
      path: of the file, for messages.
      tensors: readers by the source's names.
      layout: says how the source names its weights.

    Raises:
      ValueError: names are left over or missing (the message lists both), or shapes are wrong.
    """
    tensors = {_normalize_name(name, layout): tensor for name, tensor in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not re.fullmatch(layout.ignored, n)}
    rows = list(_expand_table(layout.table, _count_blocks(layout.table, tensors)))
    known = {source for sources, *_ in rows for source in sources}
    left, missing = set(tensors) - known, known - set(tensors)
    optional = {source for source in missing if re.fullmatch(layout.optional, source)}
    absent = [row for row in rows if optional.issuperset(row[0])]  # not if some blocks have it
    missing -= {source for row in absent for source in row[0]}
    rows = [row for row in rows if row not in absent]
    if left or missing:
        raise ValueError(
            f"{path} does not have the names of {layout.title}; left over: {format_names(left)}; "
            f"missing: {format_names(missing)}"
        )
    parts: dict[str, np.ndarray] = {}
    bar = progress_bar.iterate_with_bar(rows, "convert", "tensors")
    for sources, name, transform, is_stacked in bar:
        arrays = [tensors[source]() for source in sources]
        if name == "patch_embedding/kernel":
            _check_patches(path, sources[0], layout, arrays[0])
        try:
            arrays = [transform(array) for array in arrays]
            part = np.stack(arrays) if is_stacked else arrays[0]  # [L, ...]
            previous = [parts[name]] if name in parts else []
            parts[name] = np.concatenate([*previous, part], axis=-1)
        except (ValueError, TypeError):  # TypeError: the dtypes have no common type
            shapes = format_names({f"{array.dtype} {array.shape}" for array in arrays})
            raise ValueError(f"{path}: wrong shape of {sources[0]}: {shapes}") from None
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}


def _check_patches(path: str, name: str, layout: Layout, kernel: np.ndarray) -> None:
    """Raise ValueError if a patch embedding reads something other than RGB images."""
    channels = kernel.shape[-2 if layout.channels_last else 1] if kernel.ndim == 4 else 3
    if kernel.ndim == 5 or channels != 3:
        kind = "videos" if kernel.ndim == 5 else f"{channels} channels, for example spectrograms"
        raise ValueError(
            f"{path} is the tower of another modality: {name} of shape {kernel.shape} reads "
            f"{kind}, not RGB images"
        )


def _read_publisher_config(
    folder: pathlib.Path, name: str, layout: Layout, shape: tuple
) -> dict[str, Any]:
    """Return the values stated by the publisher's config next to the checkpoint.

    The keys are "activation", "heads", "eps", "image_size", "mean" and "std", as far as the config
    states them. The dict is empty if there is no config. `preprocessor_config.json` states the
    normalization in folders of Hugging Face.

    Raises:
      ValueError: the config is invalid, or describes a model of another `shape`, (width, depth).
    """
    path, preprocessor = folder / layout.config_file, folder / "preprocessor_config.json"
    config = read_json(path, dict) if path.is_file() else {}
    try:
        stated = layout.read_config(config)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not describe a model of its publisher's: {error}") from None
    if stated is None:
        return {}
    described = stated.pop("shape", shape)
    if preprocessor.is_file():
        images = read_json(preprocessor, dict)
        found = {key: images.get(f"image_{key}") for key in ("mean", "std")}
        stated |= {key: value for key, value in found.items() if value is not None}
    for key, value in stated.items():
        if not STATED_CHECKS[key](value):
            raise ValueError(f"{path} gives an impossible {key}: {truncated_repr(value)}")
    if described != shape:
        raise ValueError(
            f"{path} describes another model: its (width, depth) is {described}, but that of "
            f"{name} is {shape}. Replace it with the matching config, or remove it"
        )
    return stated


@dataclasses.dataclass(frozen=True)
class SourceCheckpoint:
    """Holds the image tower of a checkpoint.

    Attributes:
      arrays: weights by our flat names, in the source's dtypes. The blocks of a stage are stacked
        [L, ...].
      container: "safetensors", "torch", "torchscript" or "npz".
      layout: a key of `LAYOUTS`.
      family: a key of `FAMILIES` in `models/backbones/registry.py`.
      name: of the file, the folder or the repository.
      sha256: SHA-256 of the file; of shards, that of the list of their names and hashes.
      stated: "activation", "heads", "eps", "image_size", "mean" and "std", as far as the layout,
        the file or the publisher's config next to it states them.
    """

    arrays: dict[str, np.ndarray]
    container: str
    layout: str
    family: str
    name: str
    sha256: str
    stated: dict[str, Any]


def read_checkpoint(source: Source) -> SourceCheckpoint:
    """Read the image tower of a checkpoint.

    Args:
      source: see `source_files.find_source`. The format is detected from the content.

    Returns:
      The weights under our names, and all that the checkpoint states about them.

    Raises:
      ValueError: the file is refused or damaged, has no known layout, or has left-over or missing
        names (the message lists both).
    """
    path = source.given
    container, tensors, metadata = open_tensors(source)
    _check_names(path, tensors)
    tensors = _unstack_blocks(_strip_prefixes(path, tensors))
    name = _detect_layout(path, tensors, metadata)
    layout = LAYOUTS[name]
    arrays = rename_tensors(path, tensors, layout)
    try:
        arrays = layout.postprocess(arrays)
        shape = layout.get_shape(arrays)
        heads = {"heads": tensors[layout.heads_source]().shape[1]} if layout.heads_source else {}
    except (IndexError, ValueError) as error:  # an array has too few axes
        raise ValueError(f"{path}: wrong shapes for {layout.title}: {error}") from None
    sha256 = source.sha256
    # Later values win: layout, publisher's config, OpenAI's marker, the file's own metadata.
    config = _read_publisher_config(source.folder, source.name, layout, shape)
    stated = {**layout.stated}
    for name_in_file, values in layout.stated_by.items():
        stated |= values if name_in_file in tensors else {}
    stated |= {**config, **heads}
    if "input_resolution" in tensors or sha256 in PUBLISHED_SHA256:  # OpenAI's own files
        stated |= {"activation": "quick_gelu", **NORMALIZATIONS["clip"]}
    if sha256 in _CLIP_NORMALIZED_SHA256:
        stated |= NORMALIZATIONS["clip"]
    stated |= {key: metadata[key] for key in ("activation", "heads") if key in metadata}
    return SourceCheckpoint(arrays, container, name, layout.family, source.name, sha256, stated)

"""CLIP checkpoints of OpenAI, open_clip and Hugging Face: files, names and what is beside them.

Public: `read_checkpoint`, `Checkpoint`, `PUBLISHED_SHA256`, `CONVERTED_KEY`, `sha256_of`, `some`.

This is the only module that imports torch, and only for checkpoints in torch's own formats. To read
another layout, add a table of its names to `_LAYOUTS`.
Axes: L blocks, D width, P patch side, e projected width.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

CONVERTED_KEY = "dualpath_jax_backbone"  # metadata entry of a file that is already converted

# OpenAI's release, the directory part of each download address in clip/clip.py.
PUBLISHED_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}


# ---------------------------------------------------------------- tables of names


_same = np.asarray
_linear = functools.partial(np.transpose, axes=(1, 0))  # torch [out, in] -> Flax [in, out]
_conv = functools.partial(np.transpose, axes=(2, 3, 1, 0))  # [D, 3, P, P] -> [P, P, 3, D]

# Rows: source name, our name, transform. "{i}" runs over the blocks, which are stacked [L, ...];
# rows that share our name are concatenated along its last axis in the order of the rows.
_Table = tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...]

_OPENAI_BLOCK = "visual.transformer.resblocks.{i}."
_OPENAI: _Table = (
    ("visual.class_embedding", "class_embedding", _same),
    ("visual.positional_embedding", "position_embedding", _same),
    ("visual.conv1.weight", "patch_embedding/kernel", _conv),
    ("visual.ln_pre.weight", "ln_pre/scale", _same),
    ("visual.ln_pre.bias", "ln_pre/bias", _same),
    (_OPENAI_BLOCK + "ln_1.weight", "blocks/ln_1/scale", _same),
    (_OPENAI_BLOCK + "ln_1.bias", "blocks/ln_1/bias", _same),
    (_OPENAI_BLOCK + "attn.in_proj_weight", "blocks/attention/qkv/kernel", _linear),
    (_OPENAI_BLOCK + "attn.in_proj_bias", "blocks/attention/qkv/bias", _same),
    (_OPENAI_BLOCK + "attn.out_proj.weight", "blocks/attention/out/kernel", _linear),
    (_OPENAI_BLOCK + "attn.out_proj.bias", "blocks/attention/out/bias", _same),
    (_OPENAI_BLOCK + "ln_2.weight", "blocks/ln_2/scale", _same),
    (_OPENAI_BLOCK + "ln_2.bias", "blocks/ln_2/bias", _same),
    (_OPENAI_BLOCK + "mlp.c_fc.weight", "blocks/mlp/hidden/kernel", _linear),
    (_OPENAI_BLOCK + "mlp.c_fc.bias", "blocks/mlp/hidden/bias", _same),
    (_OPENAI_BLOCK + "mlp.c_proj.weight", "blocks/mlp/output/kernel", _linear),
    (_OPENAI_BLOCK + "mlp.c_proj.bias", "blocks/mlp/output/bias", _same),
    ("visual.ln_post.weight", "ln_post/scale", _same),
    ("visual.ln_post.bias", "ln_post/bias", _same),
    ("visual.proj", "projection", _same),  # [D, e] already
)

_HF_BLOCK = "vision_model.encoder.layers.{i}."
_HUGGINGFACE: _Table = (
    ("vision_model.embeddings.class_embedding", "class_embedding", _same),
    ("vision_model.embeddings.position_embedding.weight", "position_embedding", _same),
    ("vision_model.embeddings.patch_embedding.weight", "patch_embedding/kernel", _conv),
    ("vision_model.pre_layrnorm.weight", "ln_pre/scale", _same),  # the name is spelt so
    ("vision_model.pre_layrnorm.bias", "ln_pre/bias", _same),
    (_HF_BLOCK + "layer_norm1.weight", "blocks/ln_1/scale", _same),
    (_HF_BLOCK + "layer_norm1.bias", "blocks/ln_1/bias", _same),
    (_HF_BLOCK + "self_attn.q_proj.weight", "blocks/attention/qkv/kernel", _linear),
    (_HF_BLOCK + "self_attn.k_proj.weight", "blocks/attention/qkv/kernel", _linear),
    (_HF_BLOCK + "self_attn.v_proj.weight", "blocks/attention/qkv/kernel", _linear),
    (_HF_BLOCK + "self_attn.q_proj.bias", "blocks/attention/qkv/bias", _same),
    (_HF_BLOCK + "self_attn.k_proj.bias", "blocks/attention/qkv/bias", _same),
    (_HF_BLOCK + "self_attn.v_proj.bias", "blocks/attention/qkv/bias", _same),
    (_HF_BLOCK + "self_attn.out_proj.weight", "blocks/attention/out/kernel", _linear),
    (_HF_BLOCK + "self_attn.out_proj.bias", "blocks/attention/out/bias", _same),
    (_HF_BLOCK + "layer_norm2.weight", "blocks/ln_2/scale", _same),
    (_HF_BLOCK + "layer_norm2.bias", "blocks/ln_2/bias", _same),
    (_HF_BLOCK + "mlp.fc1.weight", "blocks/mlp/hidden/kernel", _linear),
    (_HF_BLOCK + "mlp.fc1.bias", "blocks/mlp/hidden/bias", _same),
    (_HF_BLOCK + "mlp.fc2.weight", "blocks/mlp/output/kernel", _linear),
    (_HF_BLOCK + "mlp.fc2.bias", "blocks/mlp/output/bias", _same),
    ("vision_model.post_layernorm.weight", "ln_post/scale", _same),
    ("vision_model.post_layernorm.bias", "ln_post/bias", _same),
    ("visual_projection.weight", "projection", _linear),
)
_LAYOUTS = {"openai": _OPENAI, "huggingface": _HUGGINGFACE}

# What else a CLIP checkpoint holds; nothing outside this list and the tables is accepted.
_IGNORED = re.compile(
    r"positional_embedding|text_projection(\.weight)?|logit_scale|logit_bias|attn_mask"
    r"|token_embedding\.weight|ln_final\.(weight|bias)|transformer\.resblocks\.\d+\..+"
    r"|input_resolution|context_length|vocab_size"  # OpenAI's bookkeeping
    r"|text\..+"  # open_clip's models with another text tower
    r"|text_model\..+|vision_model\.embeddings\.position_ids"  # Hugging Face
)

_UNSUPPORTED = {
    "visual.layer1.": "a ResNet image tower",
    "visual.trunk.": "an image tower of timm",
    "visual.attn_pool.": "an image tower with attention pooling (CoCa)",
}


# ---------------------------------------------------------------- reading checkpoints


def _container(path: pathlib.Path) -> str:
    """ "safetensors", "torchscript" or "torch", by the file's bytes; executes nothing in it."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty")
    if head[8:9] == b"{":  # after the header's length, 8 bytes
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        try:
            members = zipfile.ZipFile(path).namelist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
        script = any(m.endswith("/constants.pkl") or "/code/" in m for m in members)
        return "torchscript" if script else "torch"
    if head.startswith(b"\x80"):  # a pickle: torch.save before torch 1.6
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    raise ValueError(f"{path} is no checkpoint: neither safetensors nor a file of torch")


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and is refused: other pickled objects "
            "can run code when loaded. Save the state dict alone, best as safetensors. "
            f"torch says: {str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is truncated or damaged: {str(error)[:200]}") from None
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} is no CLIP: it holds no state dict")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{path} is no CLIP: entries that are no tensors: {some(others)}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _read(
    path: pathlib.Path, container: str
) -> tuple[dict[str, np.ndarray], set[str], dict[str, str]]:
    """The tensors that are not known and ignored, the names of all, and the file's metadata."""
    if container == "safetensors":
        try:
            with safetensors.safe_open(path, "numpy") as file:
                names = set(file.keys())
                wanted = [name for name in sorted(names) if not _IGNORED.fullmatch(name)]
                return {n: file.get_tensor(n) for n in wanted}, names, file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
    try:
        state = _load_torch(path, container)
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} is in a format of torch, which is not installed: install torch (its CPU build "
            "is enough) or use the safetensors file of the same model"
        ) from None
    wanted = [name for name in state if not _IGNORED.fullmatch(name)]
    return {name: _torch_to_numpy(state[name]) for name in wanted}, set(state), {}


def sha256_of(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: Any) -> str:
    """At most eight of the names, for a message."""
    names = sorted(map(str, names))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more


# ---------------------------------------------------------------- names to our names


def _layout(path: pathlib.Path, names: set[str], metadata: Mapping[str, str]) -> str:
    """ "openai" (open_clip's too) or "huggingface", by names; ValueError for what is neither."""
    if CONVERTED_KEY in metadata:
        raise ValueError(f"{path} is already converted")
    for prefix, what in _UNSUPPORTED.items():
        if any(name.startswith(prefix) for name in names):
            raise ValueError(f"{path} has {what}; only CLIP's ViT is supported")
    if any(name.startswith("visual.") for name in names):
        return "openai"
    if any(name.startswith(("vision_model.", "visual_projection.")) for name in names):
        return "huggingface"
    if names and all(_IGNORED.fullmatch(name) for name in names):
        raise ValueError(f"{path} holds a text tower only, no image tower: {some(names)}")
    raise ValueError(f"{path} is no CLIP: its names are {some(names)}")


def _rename(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], table: _Table
) -> dict[str, np.ndarray]:
    """All of `tensors` under our flat names; ValueError that lists left-over and missing names."""
    first, last = next(source for source, _, _ in table if "{i}" in source).split("{i}")
    depth = max(1, sum(n.startswith(first) and n.endswith(last) for n in tensors))
    blocks = {s: range(depth if "{i}" in s else 1) for s, _, _ in table}
    known = {source.format(i=i) for source, indices in blocks.items() for i in indices}
    left, missing = set(tensors) - known, known - set(tensors)
    if left or missing:
        raise ValueError(
            f"{path} does not have the names of a CLIP ViT; left over: {some(left)}; "
            f"missing: {some(missing)}"
        )
    parts: dict[str, list[np.ndarray]] = {}
    for source, name, transform in table:
        arrays = [tensors[source.format(i=i)] for i in blocks[source]]
        try:
            arrays = [transform(array) for array in arrays]
            part = np.stack(arrays) if "{i}" in source else arrays[0]
        except ValueError:
            shapes = {array.shape for array in arrays}
            raise ValueError(f"{path}: wrong shape of {source}: {shapes}") from None
        parts.setdefault(name, []).append(part)
    return {n: np.ascontiguousarray(np.concatenate(p, axis=-1)) for n, p in parts.items()}


def _beside(checkpoint: pathlib.Path, layout: str, width: int, depth: int) -> dict[str, Any]:
    """Activation, heads and eps that the publisher's config beside the checkpoint states.

    Such files leave defaults out: those of transformers' CLIPVisionConfig and open_clip's
    CLIPVisionCfg.
    """
    name = {"huggingface": "config.json", "openai": "open_clip_config.json"}[layout]
    path = checkpoint.with_name(name)
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if layout == "huggingface" and str(config.get("model_type")).startswith("clip"):
        vision = config.get("vision_config", config)
        shape = vision.get("hidden_size", 768), vision.get("num_hidden_layers", 12)
        activation = vision.get("hidden_act", "quick_gelu")
        heads = vision.get("num_attention_heads", 12)
        eps = vision.get("layer_norm_eps", 1e-5)
    elif layout == "openai" and "model_cfg" in config:
        vision = config["model_cfg"].get("vision_cfg", {})
        shape = vision.get("width", 768), vision.get("layers", 12)
        activation = "quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu"
        heads = width // vision.get("head_width", 64)
        eps = (vision.get("norm_kwargs") or {}).get("eps", 1e-5)
    else:
        return {}
    if shape != (width, depth):
        raise ValueError(
            f"{path} describes another model, (width, depth) = {shape}, than {checkpoint.name}, "
            f"{(width, depth)}: put the matching one there, or none"
        )
    return {"activation": activation, "heads": heads, "eps": eps}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The image tower of a CLIP checkpoint.

    Attributes:
      arrays: by our flat names, blocks stacked [L, ...], in the source's dtypes.
      container: "safetensors", "torch" or "torchscript".
      layout: "openai" (open_clip's too) or "huggingface".
      sha256: of the file.
      stated: activation, heads and eps, as far as the file or the config beside it says.
    """

    arrays: dict[str, np.ndarray]
    container: str
    layout: str
    sha256: str
    stated: dict[str, Any]


def read_checkpoint(path: pathlib.Path, trust: bool) -> Checkpoint:
    """Read the image tower of the checkpoint at `path`.

    Args:
      path: local file, recognised by its content.
      trust: open a TorchScript archive that is none of OpenAI's published ones.

    Raises:
      ValueError: refused, damaged, no CLIP ViT, or left-over or missing names (both are listed).
    """
    container, sha256 = _container(path), sha256_of(path)
    if container == "torchscript" and not (trust or sha256 in PUBLISHED_SHA256):
        raise ValueError(
            f"{path} is a TorchScript archive, a program that can run code when opened, and "
            f"its SHA-256 {sha256} is none of the four that OpenAI published. Use the safetensors "
            "file of the same model, or pass --trust if you trust where it came from"
        )
    tensors, names, metadata = _read(path, container)
    layout = _layout(path, names, metadata)
    arrays = _rename(path, tensors, _LAYOUTS[layout])
    depth, width = arrays["blocks/ln_1/scale"].shape
    stated = _beside(path, layout, width, depth)  # the later ones win
    stated |= {"activation": "quick_gelu"} if "input_resolution" in names else {}  # OpenAI's mark
    stated |= {key: metadata[key] for key in ("activation", "heads") if key in metadata}
    return Checkpoint(arrays, container, layout, sha256, stated)

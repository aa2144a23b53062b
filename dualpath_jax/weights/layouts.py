"""Defines how published checkpoints name their weights, and which of our names they map to.

To support another layout, add a table of its names and an entry in `LAYOUTS`.
Axes: L blocks, D width, P patch side, N tokens, e projected width, w side of a window, K heads.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from dualpath_jax.weights import source_configs

# Transforms from a source's array to ours.
_identity = np.asarray
_transpose_linear = functools.partial(np.transpose, axes=(1, 0))  # [out, in] -> [in, out]
_transpose_conv = functools.partial(np.transpose, axes=(2, 3, 1, 0))  # [D, 3, P, P] -> [P, P, 3, D]
_transpose_depthwise = functools.partial(np.transpose, axes=(2, 3, 4, 1, 0))  # [R, 1, ...]
_squeeze_class_token = functools.partial(np.squeeze, axis=(0, 1))  # [1, 1, D] -> [D]
_squeeze_positions = functools.partial(np.squeeze, axis=0)  # [1, N, D] -> [N, D]

# A row is (source name, our name, transform). In the names, "{s}" runs over the stages, "{next}" is
# the stage after it, and "{i}" runs over the blocks of a stage, which are stacked to [L, ...]. Rows
# that share our name are concatenated along the last axis, in the order of the rows.
Row = tuple[str, str, Callable[[np.ndarray], np.ndarray]]
_Table = tuple[Row, ...]


def _build_block_rows(ours: str, source: str, names: Mapping[str, str]) -> _Table:
    """Build the rows for the weight and bias of each layer of a block.

    Args:
      ours: prefix of our names.
      source: prefix of the source's names.
      names: the source's name of each layer by our name. Several names separated by spaces are
        concatenated.
    """
    rows = []
    for our_name, source_name in names.items():
        norm = our_name.startswith("ln_")
        kernel, transform = ("scale", _identity) if norm else ("kernel", _transpose_linear)
        for name in source_name.split():
            rows.append((f"{source}{name}.weight", f"{ours}{our_name}/{kernel}", transform))
            rows.append((f"{source}{name}.bias", f"{ours}{our_name}/bias", _identity))
    return tuple(rows)


# ---------------------------------------------------------------- CLIP


_OPENAI_BLOCK = "visual.transformer.resblocks.{i}."
_OPENAI: _Table = (
    ("visual.class_embedding", "class_embedding", _identity),
    ("visual.positional_embedding", "position_embedding", _identity),
    ("visual.conv1.weight", "patch_embedding/kernel", _transpose_conv),
    ("visual.ln_pre.weight", "ln_pre/scale", _identity),
    ("visual.ln_pre.bias", "ln_pre/bias", _identity),
    (_OPENAI_BLOCK + "attn.in_proj_weight", "blocks/attention/qkv/kernel", _transpose_linear),
    (_OPENAI_BLOCK + "attn.in_proj_bias", "blocks/attention/qkv/bias", _identity),
    *_build_block_rows(
        "blocks/",
        _OPENAI_BLOCK,
        {
            "ln_1": "ln_1",
            "attention/out": "attn.out_proj",
            "ln_2": "ln_2",
            "mlp/hidden": "mlp.c_fc",
            "mlp/output": "mlp.c_proj",
        },
    ),
    ("visual.ln_post.weight", "ln_post/scale", _identity),
    ("visual.ln_post.bias", "ln_post/bias", _identity),
    ("visual.proj", "projection", _identity),  # [D, e] already
)
_HUGGINGFACE_TOWER: _Table = (  # what CLIP and SigLIP have in common
    ("vision_model.embeddings.position_embedding.weight", "position_embedding", _identity),
    ("vision_model.embeddings.patch_embedding.weight", "patch_embedding/kernel", _transpose_conv),
    *_build_block_rows(
        "blocks/",
        "vision_model.encoder.layers.{i}.",
        {
            "ln_1": "layer_norm1",
            "attention/qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            "attention/out": "self_attn.out_proj",
            "ln_2": "layer_norm2",
            "mlp/hidden": "mlp.fc1",
            "mlp/output": "mlp.fc2",
        },
    ),
    ("vision_model.post_layernorm.weight", "ln_post/scale", _identity),
    ("vision_model.post_layernorm.bias", "ln_post/bias", _identity),
)
_HUGGINGFACE: _Table = (
    *_HUGGINGFACE_TOWER,
    ("vision_model.embeddings.class_embedding", "class_embedding", _identity),
    ("vision_model.pre_layrnorm.weight", "ln_pre/scale", _identity),  # [sic]
    ("vision_model.pre_layrnorm.bias", "ln_pre/bias", _identity),
    ("visual_projection.weight", "projection", _transpose_linear),
)

# Names that a CLIP checkpoint has in addition to its image tower.
TEXT_TOWER_NAMES = (
    r"positional_embedding|text_projection(\.weight)?|logit_scale|logit_bias|attn_mask"
    r"|token_embedding\.weight|ln_final\.(weight|bias)|transformer\.resblocks\.\d+\..+"
    r"|input_resolution|context_length|vocab_size"  # OpenAI's bookkeeping
    r"|text\..+"  # open_clip's models with another text tower
    r"|text_model\..+|vision_model\.embeddings\.position_ids"  # Hugging Face
)

# Prefixes of the names of image towers that are not supported, with a description for messages.
UNSUPPORTED_PREFIXES = {
    "visual.layer1.": "a ResNet image tower",
    "visual.attn_pool.": "an image tower with attention pooling (CoCa)",
}


# ---------------------------------------------------------------- ImageNet ViT, DINOv2, SigLIP


_TIMM_BLOCK_NAMES = {
    "ln_1": "norm1",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "ln_2": "norm2",
    "mlp/hidden": "mlp.fc1",
    "mlp/output": "mlp.fc2",
}
_TIMM_VIT: _Table = (
    ("cls_token", "class_embedding", _squeeze_class_token),
    ("pos_embed", "position_embedding", _squeeze_positions),
    ("patch_embed.proj.weight", "patch_embedding/kernel", _transpose_conv),
    ("patch_embed.proj.bias", "patch_embedding/bias", _identity),
    *_build_block_rows("blocks/", "blocks.{i}.", _TIMM_BLOCK_NAMES),
    ("norm.weight", "ln_post/scale", _identity),
    ("norm.bias", "ln_post/bias", _identity),
)


# timm's CLIP towers. The classifier of the published ones is the projection, with a bias of zeros.
_TIMM_CLIP: _Table = (
    *(row for row in _TIMM_VIT if row[0] != "patch_embed.proj.bias"),
    ("norm_pre.weight", "ln_pre/scale", _identity),
    ("norm_pre.bias", "ln_pre/bias", _identity),
    ("head.weight", "projection", _transpose_linear),
    ("head.bias", "head_bias", _identity),
)


_TIMM_DINOV2: _Table = (  # and its authors' names, by aliases
    *_TIMM_VIT,
    ("blocks.{i}.ls1.gamma", "blocks/attention/layer_scale", _identity),
    ("blocks.{i}.ls2.gamma", "blocks/mlp/layer_scale", _identity),
    ("reg_token", "register_tokens", _squeeze_positions),
)
_TIMM_SIGLIP: _Table = (
    *(row for row in _TIMM_VIT if row[0] != "cls_token"),
    ("attn_pool.latent", "attention_pool/probe", _squeeze_class_token),
    *_build_block_rows(
        "attention_pool/",
        "attn_pool.",
        {
            "attention/qkv": "q kv",
            "attention/out": "proj",
            "mlp/hidden": "mlp.fc1",
            "mlp/output": "mlp.fc2",
        },
    ),
    ("attn_pool.norm.weight", "attention_pool/ln/scale", _identity),
    ("attn_pool.norm.bias", "attention_pool/ln/bias", _identity),
)
_HUGGINGFACE_SIGLIP: _Table = (
    *_HUGGINGFACE_TOWER,
    ("vision_model.embeddings.patch_embedding.bias", "patch_embedding/bias", _identity),
    ("vision_model.head.probe", "attention_pool/probe", _squeeze_class_token),
    (
        "vision_model.head.attention.in_proj_weight",
        "attention_pool/attention/qkv/kernel",
        _transpose_linear,
    ),
    ("vision_model.head.attention.in_proj_bias", "attention_pool/attention/qkv/bias", _identity),
    *_build_block_rows(
        "attention_pool/",
        "vision_model.head.",
        {
            "attention/out": "attention.out_proj",
            "mlp/hidden": "mlp.fc1",
            "mlp/output": "mlp.fc2",
        },
    ),
    ("vision_model.head.layernorm.weight", "attention_pool/ln/scale", _identity),
    ("vision_model.head.layernorm.bias", "attention_pool/ln/bias", _identity),
)


def _pad_class_position(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add a row of zeros for a class token without a position: timm's form with registers."""
    table = arrays["position_embedding"]
    if "class_embedding" in arrays and math.isqrt(len(table)) ** 2 == len(table):
        arrays["position_embedding"] = np.pad(table, ((1, 0), (0, 0)))
    return arrays


def _drop_classifier(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop a classifier, which has a bias; the projection of CLIP has none, or zeros."""
    if np.any(arrays.pop("head_bias", 0)):
        logging.warning("the head has a bias: it is a classifier, not CLIP's projection; left out")
        arrays.pop("projection", None)
    return arrays


# The official files of Dosovitskiy et al. 2021 and of SigLIP.
_JAX_BLOCK = "Transformer/encoderblock_{i}/"
_JAX_ATTENTION = "MultiHeadDotProductAttention_1"
_JAX_POOL = "MAPHead_0/"
_JAX_POOL_ATTENTION = _JAX_POOL + "MultiHeadDotProductAttention_0"


def _merge_heads(kernel: np.ndarray) -> np.ndarray:
    """Merge the heads of a projection [D, K, D/K] or its bias [K, D/K]: [D, D] or [D]."""
    return kernel.reshape(*kernel.shape[:-2], -1)


def _merge_output_heads(kernel: np.ndarray) -> np.ndarray:
    """Merge the heads of the output projection [K, D/K, D]: [D, D]."""
    return kernel.reshape(-1, kernel.shape[-1])


def _build_jax_rows(ours: str, source: str, leaves: Mapping[str, Callable]) -> _Table:
    """Build the rows of one layer, whose leaves have our names."""
    return tuple((f"{source}/{leaf}", f"{ours}/{leaf}", f) for leaf, f in leaves.items())


_DENSE = {"kernel": _identity, "bias": _identity}
_NORM = {"scale": _identity, "bias": _identity}


def _build_jax_attention(ours: str, source: str) -> _Table:
    """Build the rows of an attention layer, whose heads have an axis of their own."""
    heads = {"kernel": _merge_heads, "bias": _merge_heads}
    qkv = (
        _build_jax_rows(f"{ours}/qkv", f"{source}/{name}", heads)
        for name in ("query", "key", "value")
    )
    out = {"kernel": _merge_output_heads, "bias": _identity}
    return (*itertools.chain(*qkv), *_build_jax_rows(f"{ours}/out", f"{source}/out", out))


def _build_jax_blocks(attention: str, ln_2: str, mlp: str) -> _Table:
    """Build the rows of patch embedding, blocks and final norm from the names of their parts."""
    return (
        *_build_jax_rows("patch_embedding", "embedding", _DENSE),
        *_build_jax_rows("blocks/ln_1", _JAX_BLOCK + "LayerNorm_0", _NORM),
        *_build_jax_attention("blocks/attention", _JAX_BLOCK + attention),
        *_build_jax_rows("blocks/ln_2", _JAX_BLOCK + ln_2, _NORM),
        *_build_jax_rows("blocks/mlp/hidden", f"{_JAX_BLOCK}{mlp}/Dense_0", _DENSE),
        *_build_jax_rows("blocks/mlp/output", f"{_JAX_BLOCK}{mlp}/Dense_1", _DENSE),
        *_build_jax_rows("ln_post", "Transformer/encoder_norm", _NORM),
    )


_JAX_VIT: _Table = (
    ("cls", "class_embedding", _squeeze_class_token),
    ("Transformer/posembed_input/pos_embedding", "position_embedding", _squeeze_positions),
    *_build_jax_blocks(_JAX_ATTENTION, "LayerNorm_2", "MlpBlock_3"),
)
_JAX_SIGLIP: _Table = (
    ("pos_embedding", "position_embedding", _squeeze_positions),
    *_build_jax_blocks("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
    (_JAX_POOL + "probe", "attention_pool/probe", _squeeze_class_token),
    *_build_jax_attention("attention_pool/attention", _JAX_POOL_ATTENTION),
    *_build_jax_rows("attention_pool/ln", _JAX_POOL + "LayerNorm_0", _NORM),
    *_build_jax_rows("attention_pool/mlp/hidden", _JAX_POOL + "MlpBlock_0/Dense_0", _DENSE),
    *_build_jax_rows("attention_pool/mlp/output", _JAX_POOL + "MlpBlock_0/Dense_1", _DENSE),
)


def _huggingface_block_names(attention: str) -> dict[str, str]:
    """Return Hugging Face's names of a block's layers by our name."""
    qkv = " ".join(f"attention.{attention}.{name}" for name in ("query", "key", "value"))
    return {
        "ln_1": "layernorm_before",
        "attention/qkv": qkv,
        "attention/out": "attention.output.dense",
        "ln_2": "layernorm_after",
        "mlp/hidden": "intermediate.dense",
        "mlp/output": "output.dense",
    }


_HUGGINGFACE_VIT: _Table = (
    ("embeddings.cls_token", "class_embedding", _squeeze_class_token),
    ("embeddings.position_embeddings", "position_embedding", _squeeze_positions),
    ("embeddings.patch_embeddings.projection.weight", "patch_embedding/kernel", _transpose_conv),
    ("embeddings.patch_embeddings.projection.bias", "patch_embedding/bias", _identity),
    *_build_block_rows("blocks/", "encoder.layer.{i}.", _huggingface_block_names("attention")),
    ("layernorm.weight", "ln_post/scale", _identity),
    ("layernorm.bias", "ln_post/bias", _identity),
)
_HUGGINGFACE_DINOV2: _Table = (
    *(row for row in _HUGGINGFACE_VIT if "encoder.layer" not in row[0]),
    *_build_block_rows(
        "blocks/",
        "encoder.layer.{i}.",
        {
            **_huggingface_block_names("attention"),
            "ln_1": "norm1",
            "ln_2": "norm2",
            "mlp/hidden": "mlp.fc1 mlp.gate_proj mlp.up_proj",  # fc1, or the others in memory
            "mlp/output": "mlp.fc2",
        },
    ),
    ("encoder.layer.{i}.layer_scale1.lambda1", "blocks/attention/layer_scale", _identity),
    ("encoder.layer.{i}.layer_scale2.lambda1", "blocks/mlp/layer_scale", _identity),
    ("embeddings.register_tokens", "register_tokens", _squeeze_positions),
)


# ---------------------------------------------------------------- Swin


def _build_swin_table(
    patch: str,
    patch_norm: str,
    stage: str,
    block: Mapping[str, str],
    bias: str,
    merge: str,
    norm: str,
) -> _Table:
    """Build the table of a Swin from one publisher's prefixes of the names of its parts."""
    return (
        (f"{patch}.weight", "patch_embedding/kernel", _transpose_conv),
        (f"{patch}.bias", "patch_embedding/bias", _identity),
        (f"{patch_norm}.weight", "patch_norm/scale", _identity),
        (f"{patch_norm}.bias", "patch_norm/bias", _identity),
        *_build_block_rows("blocks_{s}/", f"{stage}.blocks.{{i}}.", block),
        (
            f"{stage}.blocks.{{i}}.{bias}.relative_position_bias_table",
            "blocks_{s}/attention/relative_position_bias",
            _identity,
        ),
        (f"{merge}.norm.weight", "merge_{s}/norm/scale", _identity),
        (f"{merge}.norm.bias", "merge_{s}/norm/bias", _identity),
        (f"{merge}.reduction.weight", "merge_{s}/reduction/kernel", _transpose_linear),
        (f"{norm}.weight", "norm/scale", _identity),
        (f"{norm}.bias", "norm/bias", _identity),
    )


_build_timm_swin_table = functools.partial(
    _build_swin_table,
    patch="patch_embed.proj",
    patch_norm="patch_embed.norm",
    stage="layers.{s}",
    block=_TIMM_BLOCK_NAMES,
    bias="attn",
    norm="norm",
)
_TIMM_SWIN = _build_timm_swin_table(merge="layers.{next}.downsample")
_MICROSOFT_SWIN = _build_timm_swin_table(merge="layers.{s}.downsample")
_HUGGINGFACE_SWIN = _build_swin_table(
    patch="embeddings.patch_embeddings.projection",
    patch_norm="embeddings.norm",
    stage="encoder.layers.{s}",
    block=_huggingface_block_names("self"),
    bias="attention.self",
    merge="encoder.layers.{s}.downsample",
    norm="layernorm",
)


def _widen_windows(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Widen the tables of relative positions of all stages to the largest window.

    The tables are [L, (2w-1)^2, K]. At a small image size, the published models shrink the windows
    and tables of the last stages. The added positions do not occur at that size and are zero.
    """
    tables = {n: a for n, a in arrays.items() if n.endswith("relative_position_bias")}
    sides = {name: math.isqrt(table.shape[1]) for name, table in tables.items()}
    largest = max(sides.values())
    for name, side in sides.items():
        if side < largest and side**2 == tables[name].shape[1]:
            logging.warning(
                "%s: windows of %d tokens widened to %d", name, (side + 1) // 2, (largest + 1) // 2
            )
            margin = (largest - side) // 2
            grid = tables[name].reshape(-1, side, side, tables[name].shape[-1])
            grid = np.pad(grid, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
            arrays[name] = grid.reshape(len(grid), largest**2, -1)
    return arrays


# ---------------------------------------------------------------- layouts


def _get_vit_shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Return (width, depth) of a ViT."""
    depth, width = arrays["blocks/ln_1/scale"].shape
    return width, depth


def _get_swin_shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, tuple[int, ...]]:
    """Return the width of a Swin's first stage, and the depth of each stage."""
    stages = sum(name.endswith("/ln_1/scale") for name in arrays)
    shapes = [arrays[f"blocks_{s}/ln_1/scale"].shape for s in range(stages)]
    return shapes[0][1], tuple(depth for depth, _ in shapes)


def _ignore_config(config: Mapping[str, Any]) -> None:
    """Ignore the publisher's config: it states nothing that is needed."""
    del config


@dataclasses.dataclass(frozen=True)
class Layout:
    """Describes how one publisher names the weights of one kind of model.

    Attributes:
      title: kind of model, for messages.
      family: a key of `FAMILIES` in `models/backbones/registry.py`.
      marker: regular expression. A checkpoint has this layout if any of its names matches.
      table: rows for all names that a checkpoint must have.
      ignored: regular expression of additional names that it may have. All others are refused.
      get_shape: returns (width, depth) of the arrays; depth is a tuple if there are stages.
      optional: regular expression of the table's names that a checkpoint may lack.
      heads_source: name of an array [D, K, D/K], whose shape states the number of heads.
      channels_last: whether the source's patch embedding is [P, P, 3, D].
      prefix: optional prefix of the names, which is removed.
      aliases: pairs (regular expression, replacement) that turn a name into the table's spelling.
      stated: values that every checkpoint with this layout has, such as activation and eps.
      stated_by: values that a checkpoint has if it holds a name, by that name; later ones win.
      config_file: file name of the publisher's config, in the checkpoint's folder.
      read_config: reads that config, see `source_configs.py`.
      postprocess: makes the last change to the arrays under our names.
    """

    title: str
    table: _Table
    ignored: str
    marker: str = r"(?!)"  # matches nothing
    family: str = "vit"
    get_shape: Callable[[Mapping[str, np.ndarray]], tuple] = _get_vit_shape
    optional: str = r"(?!)"
    heads_source: str = ""
    channels_last: bool = False
    prefix: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    stated: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stated_by: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    config_file: str = "config.json"
    read_config: Callable[[Mapping[str, Any]], dict[str, Any] | None] = _ignore_config
    postprocess: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict


def _transformers_5_aliases(attention: str) -> tuple[tuple[str, str], ...]:
    """Return aliases for state dicts of transformers 5; its files keep the older names."""
    return (
        (r"^layers\.", "encoder.layer."),
        (r"\.attention\.q_proj\.", f".attention.{attention}.query."),
        (r"\.attention\.k_proj\.", f".attention.{attention}.key."),
        (r"\.attention\.v_proj\.", f".attention.{attention}.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.", f".attention.{attention}."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )


_GELU = {"activation": "gelu"}
_SIGLIP = {
    "title": "a SigLIP",
    "stated": {"activation": "gelu_tanh", "eps": 1e-6, **source_configs.NORMALIZATIONS["half"]},
}
_SWIN = {
    "title": "a Swin",
    "family": "swin",
    "get_shape": _get_swin_shape,
    "stated": {**_GELU, "eps": 1e-5, **source_configs.NORMALIZATIONS["imagenet"]},
    "postprocess": _widen_windows,
}
_DINOV2_STATED = {**_GELU, "eps": 1e-6, **source_configs.NORMALIZATIONS["imagenet"]}
_SWIN_BUFFERS = r"|.+\.relative_position_index|.+\.attn_mask"  # computed, not weights

LAYOUTS = {
    "openai": Layout(  # also used by open_clip
        title="a CLIP ViT",
        marker=r"visual\..+",
        table=_OPENAI,
        ignored=TEXT_TOWER_NAMES,
        optional=r"visual\.proj",
        config_file="open_clip_config.json",
        read_config=source_configs.read_open_clip,
    ),
    "huggingface-siglip": Layout(
        **_SIGLIP,
        marker=r"vision_model\.head\.probe",
        table=_HUGGINGFACE_SIGLIP,
        ignored=rf"{TEXT_TOWER_NAMES}|classifier\..+",
        read_config=source_configs.read_huggingface_siglip,
    ),
    "timm-siglip": Layout(
        **_SIGLIP,
        marker=r"attn_pool\.latent",
        table=_TIMM_SIGLIP,
        ignored=r"head\..+",
        read_config=source_configs.read_timm,
    ),
    "jax-siglip": Layout(
        **_SIGLIP,
        marker=r"img/MAPHead_0/probe",
        table=_JAX_SIGLIP,
        ignored=r"txt/.+|t|b",
        heads_source=f"img/{_JAX_POOL_ATTENTION}/query/kernel",
        channels_last=True,
        prefix="img/",
    ),
    "timm-dinov2": Layout(
        title="a DINOv2",
        marker=r"blocks\.(\d+\.)?\d+\.ls2\.gamma",
        table=_TIMM_DINOV2,
        ignored=r"head\..+|mask_token",
        optional=r"reg_token",
        aliases=(
            (r"^register_tokens$", "reg_token"),
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, with their own numbers
        ),
        stated=_DINOV2_STATED,
        stated_by={  # its authors' names
            "mask_token": {"position_resize": "dinov2"},
            "register_tokens": {"position_resize": "antialias"},
        },
        read_config=source_configs.read_timm,
        postprocess=_pad_class_position,
    ),
    "huggingface-dinov2": Layout(
        title="a DINOv2",
        marker=r"(.+\.)?layer_scale2\.lambda1",
        table=_HUGGINGFACE_DINOV2,
        ignored=r"embeddings\.mask_token|classifier\..+",
        optional=r"embeddings\.register_tokens|.+\.mlp\.(fc1|gate_proj|up_proj)\..+",
        aliases=(
            (r"^dinov2(_with_registers)?\.", ""),
            (r"\.mlp\.weights_in\.", ".mlp.fc1."),
            (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
            *_transformers_5_aliases("attention")[:-2],  # all but those of the MLP
        ),
        stated={**_DINOV2_STATED, "position_resize": "bicubic"},
        stated_by={"embeddings.register_tokens": {"position_resize": "antialias"}},
        read_config=source_configs.read_huggingface_dinov2,
    ),
    "huggingface": Layout(
        title="a CLIP ViT",
        marker=r"(vision_model|visual_projection)\..+",
        table=_HUGGINGFACE,
        ignored=TEXT_TOWER_NAMES,
        optional=r"visual_projection\.weight",
        read_config=source_configs.read_huggingface_clip,
    ),
    "timm-clip": Layout(
        title="a CLIP ViT by timm's names",
        marker=r"norm_pre\.weight",
        table=_TIMM_CLIP,
        ignored=r"(?!)",
        optional=r"head\..+",
        stated={"eps": 1e-5},
        read_config=source_configs.read_timm,
        postprocess=_drop_classifier,
    ),
    "timm-vit": Layout(
        title="an ImageNet ViT",
        marker=r"blocks\.\d+\.attn\.qkv\.weight",
        table=_TIMM_VIT,
        ignored=r"head\..+|pre_logits\..+",
        optional=r"cls_token",  # without it, features are the mean of the patches
        stated={**_GELU, "eps": 1e-6},
        read_config=source_configs.read_timm,
    ),
    "jax-vit": Layout(
        title="an ImageNet ViT",
        marker=r"Transformer/encoderblock_\d+/MultiHeadDotProductAttention_1/query/kernel",
        table=_JAX_VIT,
        ignored=r"head/.+|pre_logits/.+",
        heads_source=f"Transformer/encoderblock_0/{_JAX_ATTENTION}/query/kernel",
        channels_last=True,
        stated={**_GELU, "eps": 1e-6, **source_configs.NORMALIZATIONS["half"]},
    ),
    "huggingface-vit": Layout(
        title="an ImageNet ViT",
        marker=r"(vit\.)?(encoder\.layer|layers)\.\d+\.layernorm_before\.weight",
        table=_HUGGINGFACE_VIT,
        ignored=r"classifier\..+|pooler\..+",
        prefix="vit.",
        aliases=_transformers_5_aliases("attention"),
        stated={**_GELU, "eps": 1e-12},
        read_config=source_configs.read_huggingface_vit,
    ),
    "microsoft-swin": Layout(  # Swin's authors and old files of timm
        **_SWIN,
        marker=r"layers\.0\.downsample\..+",
        table=_MICROSOFT_SWIN,
        ignored=r"head\..+" + _SWIN_BUFFERS,
    ),
    "timm-swin": Layout(
        **_SWIN,
        marker=r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight",
        table=_TIMM_SWIN,
        ignored=r"head\..+" + _SWIN_BUFFERS,
    ),
    "huggingface-swin": Layout(
        **_SWIN,
        marker=r"(swin\.)?encoder\.layers\.\d+\.blocks\.\d+\.layernorm_before\.weight",
        table=_HUGGINGFACE_SWIN,
        ignored=r"classifier\..+|pooler\..+" + _SWIN_BUFFERS,
        prefix="swin.",
        aliases=_transformers_5_aliases("self"),
        read_config=source_configs.read_huggingface_swin,
    ),
}

# The trained weights in checkpoints of the methods' authors, see `training/published_adapter.py`.


def _published_tower(prefix: str) -> str:
    """Return a regular expression of the frozen tower's names, which are OpenAI's."""
    prefix = re.escape(prefix)
    return (
        rf"{prefix}(conv1|class_embedding|positional_embedding|ln_pre|ln_post)(\..+)?"
        rf"|{prefix}transformer\.resblocks\.\d+\.(attn|ln_1|ln_2|mlp)\..+"
    )


_AIM_ADAPTERS = {
    "temporal": "T_Adapter",
    "temporal_in": "T_Adapter_in",
    "spatial": "S_Adapter",
    "joint": "MLP_Adapter",
}
AIM = Layout(
    title="a checkpoint of AIM",
    table=(
        *_build_block_rows(
            "adapters/",
            "backbone.transformer.resblocks.{i}.",
            {
                f"{ours}/{layer}": f"{theirs}.{source}"
                for ours, theirs in _AIM_ADAPTERS.items()
                for layer, source in (("down", "D_fc1"), ("up", "D_fc2"))
            },
        ),
        ("backbone.temporal_embedding", "temporal_position", _squeeze_positions),
        ("cls_head.fc_cls.weight", "head/output/kernel", _transpose_linear),
        ("cls_head.fc_cls.bias", "head/output/bias", _identity),
    ),
    ignored=_published_tower("backbone."),
    optional=r".+\.T_Adapter_in\..+",
)

# Blocks are counted by the first row, which no checkpoint may lack.
_ST_ADAPTERS = {"mlp_adapter": "adapter_pre_mlp", "attention_adapter": "adapter_pre_attn"}
_ST_BLOCK = "transformer.resblocks.{i}."
ST_ADAPTER = Layout(
    title="a checkpoint of ST-Adapter",
    table=(
        *_build_block_rows(
            "adapters/",
            _ST_BLOCK,
            {
                f"{ours}/{layer}": f"{theirs}.{source}"
                for ours, theirs in _ST_ADAPTERS.items()
                for layer, source in (("down", "fc1"), ("up", "fc2"))
            },
        ),
        *(
            (f"{_ST_BLOCK}{theirs}.conv.{source}", f"adapters/{ours}/conv/{leaf}", transform)
            for ours, theirs in _ST_ADAPTERS.items()
            for source, leaf, transform in (
                ("weight", "kernel", _transpose_depthwise),
                ("bias", "bias", _identity),
            )
        ),
        ("fc.weight", "head/output/kernel", _transpose_linear),
        ("fc.bias", "head/output/bias", _identity),
    ),
    ignored=_published_tower(""),
    optional=r".+\.adapter_pre_attn\..+",
)

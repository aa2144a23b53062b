"""Names of weights in other people's checkpoints, and what they are called here.

Public: `LAYOUTS`, `Layout`, `Row`, `TEXT_TOWER`, `UNSUPPORTED`.

To read another layout, add a table of its names and an entry in `LAYOUTS`.
Axes: L blocks, D width, P patch side, N tokens, e projected width, w side of a window, K heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from dualpath_jax.weights import source_configs

_same = np.asarray
_linear = functools.partial(np.transpose, axes=(1, 0))  # torch [out, in] -> Flax [in, out]
_conv = functools.partial(np.transpose, axes=(2, 3, 1, 0))  # [D, 3, P, P] -> [P, P, 3, D]
_class_token = functools.partial(np.squeeze, axis=(0, 1))  # [1, 1, D] -> [D]
_positions = functools.partial(np.squeeze, axis=0)  # [1, N, D] -> [N, D]

# Source name, our name, transform. "{s}" runs over the stages, "{next}" is the stage after it;
# "{i}" runs over the blocks (of a stage), which are stacked [L, ...]. Rows that share our name are
# concatenated along its last axis in the order of the rows.
Row = tuple[str, str, Callable[[np.ndarray], np.ndarray]]
_Table = tuple[Row, ...]


def _block_rows(ours: str, source: str, names: Mapping[str, str]) -> _Table:
    """Rows for weight and bias of each layer of a block; `names`: ours -> the source's."""
    rows = []
    for our_name, source_name in names.items():
        norm = our_name.startswith("ln_")
        kernel, transform = ("scale", _same) if norm else ("kernel", _linear)
        for name in source_name.split():  # several: concatenated
            rows.append((f"{source}{name}.weight", f"{ours}{our_name}/{kernel}", transform))
            rows.append((f"{source}{name}.bias", f"{ours}{our_name}/bias", _same))
    return tuple(rows)


# ---------------------------------------------------------------- CLIP


_OPENAI_BLOCK = "visual.transformer.resblocks.{i}."
_OPENAI: _Table = (
    ("visual.class_embedding", "class_embedding", _same),
    ("visual.positional_embedding", "position_embedding", _same),
    ("visual.conv1.weight", "patch_embedding/kernel", _conv),
    ("visual.ln_pre.weight", "ln_pre/scale", _same),
    ("visual.ln_pre.bias", "ln_pre/bias", _same),
    (_OPENAI_BLOCK + "attn.in_proj_weight", "blocks/attention/qkv/kernel", _linear),
    (_OPENAI_BLOCK + "attn.in_proj_bias", "blocks/attention/qkv/bias", _same),
    *_block_rows(
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
    ("visual.ln_post.weight", "ln_post/scale", _same),
    ("visual.ln_post.bias", "ln_post/bias", _same),
    ("visual.proj", "projection", _same),  # [D, e] already
)
_HUGGINGFACE: _Table = (
    ("vision_model.embeddings.class_embedding", "class_embedding", _same),
    ("vision_model.embeddings.position_embedding.weight", "position_embedding", _same),
    ("vision_model.embeddings.patch_embedding.weight", "patch_embedding/kernel", _conv),
    ("vision_model.pre_layrnorm.weight", "ln_pre/scale", _same),  # the name is spelt so
    ("vision_model.pre_layrnorm.bias", "ln_pre/bias", _same),
    *_block_rows(
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
    ("vision_model.post_layernorm.weight", "ln_post/scale", _same),
    ("vision_model.post_layernorm.bias", "ln_post/bias", _same),
    ("visual_projection.weight", "projection", _linear),
)

# What else a CLIP checkpoint holds.
TEXT_TOWER = (
    r"positional_embedding|text_projection(\.weight)?|logit_scale|logit_bias|attn_mask"
    r"|token_embedding\.weight|ln_final\.(weight|bias)|transformer\.resblocks\.\d+\..+"
    r"|input_resolution|context_length|vocab_size"  # OpenAI's bookkeeping
    r"|text\..+"  # open_clip's models with another text tower
    r"|text_model\..+|vision_model\.embeddings\.position_ids"  # Hugging Face
)

UNSUPPORTED = {
    "visual.layer1.": "a ResNet image tower",
    "visual.trunk.": "an image tower of timm",
    "visual.attn_pool.": "an image tower with attention pooling (CoCa)",
}


# ---------------------------------------------------------------- ImageNet ViT


_TIMM_BLOCK = {
    "ln_1": "norm1",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "ln_2": "norm2",
    "mlp/hidden": "mlp.fc1",
    "mlp/output": "mlp.fc2",
}
_TIMM_VIT: _Table = (
    ("cls_token", "class_embedding", _class_token),
    ("pos_embed", "position_embedding", _positions),
    ("patch_embed.proj.weight", "patch_embedding/kernel", _conv),
    ("patch_embed.proj.bias", "patch_embedding/bias", _same),
    *_block_rows("blocks/", "blocks.{i}.", _TIMM_BLOCK),
    ("norm.weight", "ln_post/scale", _same),
    ("norm.bias", "ln_post/bias", _same),
)


def _huggingface_block(attention: str) -> dict[str, str]:
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
    ("embeddings.cls_token", "class_embedding", _class_token),
    ("embeddings.position_embeddings", "position_embedding", _positions),
    ("embeddings.patch_embeddings.projection.weight", "patch_embedding/kernel", _conv),
    ("embeddings.patch_embeddings.projection.bias", "patch_embedding/bias", _same),
    *_block_rows("blocks/", "encoder.layer.{i}.", _huggingface_block("attention")),
    ("layernorm.weight", "ln_post/scale", _same),
    ("layernorm.bias", "ln_post/bias", _same),
)


# ---------------------------------------------------------------- Swin


def _swin_table(
    patch: str,
    patch_norm: str,
    stage: str,
    block: Mapping[str, str],
    bias: str,
    merge: str,
    norm: str,
) -> _Table:
    return (
        (f"{patch}.weight", "patch_embedding/kernel", _conv),
        (f"{patch}.bias", "patch_embedding/bias", _same),
        (f"{patch_norm}.weight", "patch_norm/scale", _same),
        (f"{patch_norm}.bias", "patch_norm/bias", _same),
        *_block_rows("blocks_{s}/", f"{stage}.blocks.{{i}}.", block),
        (
            f"{stage}.blocks.{{i}}.{bias}.relative_position_bias_table",
            "blocks_{s}/attention/relative_position_bias",
            _same,
        ),
        (f"{merge}.norm.weight", "merge_{s}/norm/scale", _same),
        (f"{merge}.norm.bias", "merge_{s}/norm/bias", _same),
        (f"{merge}.reduction.weight", "merge_{s}/reduction/kernel", _linear),
        (f"{norm}.weight", "norm/scale", _same),
        (f"{norm}.bias", "norm/bias", _same),
    )


_timm_swin = functools.partial(
    _swin_table,
    patch="patch_embed.proj",
    patch_norm="patch_embed.norm",
    stage="layers.{s}",
    block=_TIMM_BLOCK,
    bias="attn",
    norm="norm",
)
_TIMM_SWIN = _timm_swin(merge="layers.{next}.downsample")
_MICROSOFT_SWIN = _timm_swin(merge="layers.{s}.downsample")
_HUGGINGFACE_SWIN = _swin_table(
    patch="embeddings.patch_embeddings.projection",
    patch_norm="embeddings.norm",
    stage="encoder.layers.{s}",
    block=_huggingface_block("self"),
    bias="attention.self",
    merge="encoder.layers.{s}.downsample",
    norm="layernorm",
)


def _widen_windows(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tables of relative positions [L, (2w-1)^2, K] of all stages, for the largest window of all.

    At a small image size the originals shrink windows and tables of the last stages. The positions
    that are added do not occur at that size; they get zeros.
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


def _vit_shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    depth, width = arrays["blocks/ln_1/scale"].shape
    return width, depth


def _swin_shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, tuple[int, ...]]:
    stages = sum(name.endswith("/ln_1/scale") for name in arrays)
    shapes = [arrays[f"blocks_{s}/ln_1/scale"].shape for s in range(stages)]
    return shapes[0][1], tuple(depth for depth, _ in shapes)


def _read_nothing(config: Mapping[str, Any]) -> None:
    """The publisher's config, if any, says nothing that is needed."""
    del config


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one publisher names the weights of one kind of model.

    Attributes:
      title: of what has these names, for messages.
      family: a name of `backbones.FAMILIES`.
      mark: regular expression; a checkpoint with a name that matches has this layout.
      table: all names that a checkpoint must have.
      ignored: regular expression of names that it may have besides; no others are accepted.
      shape: (width, depth) of the arrays, depth a tuple where there are stages.
      prefix: what the names may begin with.
      aliases: (regular expression, replacement) that give the table's spelling of a name.
      stated: what the layout itself says about activation and eps.
      config_file: the publisher's config, in the checkpoint's folder.
      read_config: its reader, see `weight_configs.py`.
      finish: last change to the arrays under our names.
    """

    title: str
    family: str
    mark: str
    table: _Table
    ignored: str
    shape: Callable[[Mapping[str, np.ndarray]], tuple]
    prefix: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    stated: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_file: str = "config.json"
    read_config: Callable[[Mapping[str, Any]], dict[str, Any] | None] = _read_nothing
    finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict


def _transformers_5(attention: str) -> tuple[tuple[str, str], ...]:
    """State dicts in memory since transformers 5; its files keep the older names."""
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


_VIT = {"title": "an ImageNet ViT", "family": "vit", "shape": _vit_shape}
_SWIN = {"title": "a Swin", "family": "swin", "shape": _swin_shape, "finish": _widen_windows}
_GELU = {"activation": "gelu"}
_BUFFERS = r"|.+\.relative_position_index|.+\.attn_mask"  # of Swin, which are computed

LAYOUTS = {
    "openai": Layout(  # open_clip's too
        title="a CLIP ViT",
        family="vit",
        mark=r"visual\..+",
        table=_OPENAI,
        ignored=TEXT_TOWER,
        shape=_vit_shape,
        config_file="open_clip_config.json",
        read_config=source_configs.read_open_clip,
    ),
    "huggingface": Layout(
        title="a CLIP ViT",
        family="vit",
        mark=r"(vision_model|visual_projection)\..+",
        table=_HUGGINGFACE,
        ignored=TEXT_TOWER,
        shape=_vit_shape,
        read_config=source_configs.read_huggingface_clip,
    ),
    "timm-vit": Layout(
        **_VIT,
        mark=r"blocks\.\d+\.attn\.qkv\.weight",
        table=_TIMM_VIT,
        ignored=r"head\..+|pre_logits\..+",
        stated={**_GELU, "eps": 1e-6},
    ),
    "huggingface-vit": Layout(
        **_VIT,
        mark=r"(vit\.)?(encoder\.layer|layers)\.\d+\.layernorm_before\.weight",
        table=_HUGGINGFACE_VIT,
        ignored=r"classifier\..+|pooler\..+",
        prefix="vit.",
        aliases=_transformers_5("attention"),
        stated={**_GELU, "eps": 1e-12},
        read_config=source_configs.read_huggingface_vit,
    ),
    "microsoft-swin": Layout(  # the release of Swin's authors; old files of timm
        **_SWIN,
        mark=r"layers\.0\.downsample\..+",
        table=_MICROSOFT_SWIN,
        ignored=r"head\..+" + _BUFFERS,
        stated={**_GELU, "eps": 1e-5},
    ),
    "timm-swin": Layout(
        **_SWIN,
        mark=r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight",
        table=_TIMM_SWIN,
        ignored=r"head\..+" + _BUFFERS,
        stated={**_GELU, "eps": 1e-5},
    ),
    "huggingface-swin": Layout(
        **_SWIN,
        mark=r"(swin\.)?encoder\.layers\.\d+\.blocks\.\d+\.layernorm_before\.weight",
        table=_HUGGINGFACE_SWIN,
        ignored=r"classifier\..+|pooler\..+" + _BUFFERS,
        prefix="swin.",
        aliases=_transformers_5("self"),
        stated={**_GELU, "eps": 1e-5},
        read_config=source_configs.read_huggingface_swin,
    ),
}

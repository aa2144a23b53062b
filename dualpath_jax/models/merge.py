"""Computes what a method trained inside the blocks into the weights of the backbone."""

from typing import Any

import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.layers import BlockHooks


def merge_backbone(hooks: BlockHooks, hook_params: Any, backbone: Any) -> Any:
    """Return a backbone's parameters with those of a method's hooks merged, see `merge_hooks`.

    Args:
      hooks: of the method, with `mergeable`, in float32.
      hook_params: their parameters, as the backbone's `init_hooks` returns them.
      backbone: its parameters.

    Raises:
      ValueError: its blocks are not those of a ViT or a Swin.
    """
    if "blocks" in backbone:
        places = {"blocks": hook_params}
    else:  # the stages of a Swin
        places = {name.replace("stage_", "blocks_"): tree for name, tree in hook_params.items()}
    if any("qkv" not in backbone[name]["attention"] for name in places):
        raise ValueError("only the blocks of ViT and Swin can be merged, not those of other code")
    merged = {name: merge_hooks(hooks, tree, backbone[name]) for name, tree in places.items()}
    return dict(backbone) | merged


def merge_hooks(hooks: BlockHooks, hook_params: Any, blocks: Any) -> Any:
    """Return the weights of blocks that compute without `hooks` what these compute with them.

    Heads that the hooks shift stay a part of the model. A function before attention must have no
    offset in a Swin, because zeros that pad a map do not pass through it.

    Args:
      hooks: of a method, with `mergeable`, in float32.
      hook_params: their parameters, stacked [L, ...].
      blocks: parameters of the blocks, stacked [L, ...].

    Returns:
      The parameters of the blocks, float32. A `layer_scale` before an output that the hooks map is
      merged as well, and is then 1.
    """
    if not hooks.mergeable:
        raise ValueError(f"{type(hooks).__name__} cannot be merged into weights")
    blocks = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), blocks)

    @jax.jit
    def merge(hook_params, blocks):
        return jax.lax.map(lambda layer: _merge_block(hooks, *layer), (hook_params, blocks))

    with layers.full_precision():
        return merge(hook_params, blocks)


def _merge_block(hooks: BlockHooks, params: Any, block: Any) -> Any:
    """Return the parameters of one block with its hooks merged."""
    bound = layers.bind_hooks(hooks, params, None)
    qkv, out = (block["attention"][name] for name in ("qkv", "out"))
    hidden, output = (block["mlp"][name] for name in ("hidden", "output"))
    linear = zip(layers.LINEAR_LAYERS, (qkv, out, hidden, output), strict=True)
    qkv, out, hidden, output = (_update(bound, name, layer) for name, layer in linear)
    attention = block["attention"] | {"qkv": _map_input(bound.before_attention, qkv)}
    mlp = block["mlp"] | {"hidden": _map_input(bound.before_mlp, hidden)}
    return block | {
        "attention": _map_output(bound.after_attention, attention, "out", out),
        "mlp": _map_output(bound.after_mlp, mlp, "output", output),
    }


def _update(bound: BlockHooks, name: str, layer: Any) -> Any:
    """Add the low-rank update of a linear layer to its kernel."""
    update = bound.weight_update(name, *layer["kernel"].shape)
    return layer if update is None else layer | {"kernel": layer["kernel"] + update[0] @ update[1]}


def _affine(function: Any, width: int) -> tuple[jax.Array, jax.Array]:
    """Return matrix [D, D] and offset [D] of an affine function of rows."""
    offset = function(jnp.zeros((1, width)))
    return function(jnp.eye(width)) - offset, offset[0]


def _map_input(function: Any, layer: Any) -> Any:
    """Merge an affine function before a linear layer."""
    matrix, offset = _affine(function, len(layer["kernel"]))
    kernel, bias = layer["kernel"], layer["bias"]
    return {"kernel": matrix @ kernel, "bias": bias + offset @ kernel}


def _map_output(function: Any, branch: Any, name: str, layer: Any) -> Any:
    """Merge an affine function after the last linear layer of a branch, and its layer scale."""
    matrix, offset = _affine(function, layer["kernel"].shape[1])
    if "layer_scale" in branch:
        matrix = branch["layer_scale"][:, None] * matrix
        branch = branch | {"layer_scale": jnp.ones_like(branch["layer_scale"])}
    merged = {"kernel": layer["kernel"] @ matrix, "bias": layer["bias"] @ matrix + offset}
    return branch | {name: merged}

"""Runs the blocks of a backbone: scanned or unrolled, with activation checkpointing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

REMAT = ("none", "cheap", "full")

# What a block keeps for its backward pass besides its input; the rest is computed again there.
# A frozen matrix product needs no kept input. "cheap" keeps the outputs of the large ones that
# something else reads; it repeats softmax, activations, norms, attention's output and adapters.
_KEPT = ("qkv", "hidden", "branch")

# Where blocks are written out on a CPU or a GPU, it also keeps the residual stream after attention,
# the adapters' first products and what attention's backward pass reads: on a CPU its weights and,
# instead of `qkv`, its parts, heads first; on a GPU what cuDNN's attention returns.
_KEPT_WRITTEN_OUT = {
    "cpu": (*_KEPT, "middle", "down", "heads", "weights"),
    "gpu": (*_KEPT, "middle", "down", "attended"),
}

_NAMES = {name for names in _KEPT_WRITTEN_OUT.values() for name in names}


def _policy(remat: str, scan: bool) -> Any:
    """What `jax.checkpoint` keeps under a name of `REMAT` other than "none"."""
    if remat == "full":
        return jax.checkpoint_policies.nothing_saveable
    names = _KEPT if scan else _KEPT_WRITTEN_OUT.get(jax.default_backend(), _KEPT)
    return jax.checkpoint_policies.save_only_these_names(*names)


def checkpoint_activation(x: jax.Array, name: str) -> jax.Array:
    """x, named so that `remat="cheap"` keeps it for the backward pass."""
    if name not in _NAMES:
        raise ValueError(f"{name!r} is not kept: known are {', '.join(sorted(_NAMES))}")
    if name not in _KEPT:  # A reshape before it would have XLA compute what is kept twice.
        return checkpoint_name(x, name)
    # As a matrix: TPUs store the last two axes in tiles, and pad the 197 tokens of an image. What
    # is not computed as one is copied to other tiles on its way.
    rows = checkpoint_name(x.reshape(-1, x.shape[-1]), name)
    return rows.reshape(x.shape)


def check_remat(name: str) -> None:
    """ValueError unless `name` is in `REMAT`."""
    if name not in REMAT:
        raise ValueError(f"unknown model.remat={name!r}: known are {', '.join(REMAT)}")


def init_stacked(init: Callable[[jax.Array], Any], rng: jax.Array, length: int) -> Any:
    """`init(rng)` for `length` blocks, each with its own rng: leaves [length, ...]."""
    return jax.vmap(init)(jax.random.split(rng, length))


def is_fsdp_sharded() -> bool:
    """Whether, where this is traced, a mesh axis `fsdp` divides the frozen weights."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def gather_fsdp(params: Any) -> Any:
    """Parameters of a block, whole on each device where a mesh axis `fsdp` divides them.

    Without it XLA may divide the computation as the weights are, and send activations round.
    """
    if not is_fsdp_sharded():
        return params
    everywhere = jax.sharding.PartitionSpec()
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere), params)


def loop_blocks(
    body: Callable[[jax.Array, Any], jax.Array],
    h: jax.Array,
    layers: Any,
    scan: bool,
    remat: str,
) -> jax.Array:
    """h through body(h, layer) for each layer of `layers`, a tree with leaves [L, ...].

    `scan` loops in the compiled program; otherwise the layers are written out. `remat` is a name of
    `REMAT`.
    """
    if remat != "none":
        # The barrier is needed where the compiler sees both passes: it would join them again.
        body = jax.checkpoint(body, policy=_policy(remat, scan), prevent_cse=not scan)
    if scan:
        return jax.lax.scan(lambda h, layer: (body(h, layer), None), h, layers)[0]
    # Not scan(unroll=True): that still copies what the backward pass needs into stacked arrays.
    for layer in split_layers(layers):
        h = body(h, layer)
    return h


def split_layers(layers: Any) -> list[Any]:
    """The trees of the L layers in a tree with leaves [L, ...].

    By splits: the gradient of one is a concatenation, that of leaf[i] a sum of L padded arrays.
    """
    leaves, structure = jax.tree.flatten(layers)
    splits = [jnp.split(leaf, len(leaf)) if len(leaf) else [] for leaf in leaves]
    parts = [[part[0] for part in split] for split in splits]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]

"""Runs the blocks of a backbone: scanned or unrolled, with activation checkpointing."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

REMAT = ("none", "save_matmuls", "full")

# Activations that "save_matmuls" saves in addition to a block's input: the outputs of the large
# products that something else reads. The backward pass computes softmax, activations, norms,
# attention's output and adapters again. A frozen product needs no saved input. Unrolled programs
# save more, see `kernels.Kernels.saved_activations`.
SAVED_ACTIVATIONS = ("qkv", "hidden", "branch")
_UNROLLED = ("middle", "down", "heads", "weights", "attended")


def _policy(remat: str, saved_activations: Sequence[str]) -> Any:
    """Return the policy of `jax.checkpoint` for a name of `REMAT` other than "none"."""
    if remat == "full":
        return jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint_policies.save_only_these_names(*saved_activations)


def checkpoint_activation(x: jax.Array, name: str) -> jax.Array:
    """Name an activation x, so that `remat="save_matmuls"` can save it for the backward pass."""
    if name in _UNROLLED:  # a reshape would have XLA compute the activation twice
        return checkpoint_name(x, name)
    if name not in SAVED_ACTIVATIONS:
        known = ", ".join((*SAVED_ACTIVATIONS, *_UNROLLED))
        raise ValueError(f"unknown activation {name!r}: known are {known}")
    # As a matrix: TPUs store the last two axes in tiles and pad the 197 tokens of an image; an
    # array of another shape would be copied to other tiles.
    rows = checkpoint_name(x.reshape(-1, x.shape[-1]), name)
    return rows.reshape(x.shape)


def check_remat(name: str) -> None:
    """Raise ValueError unless `name` is in `REMAT`."""
    if name not in REMAT:
        raise ValueError(f"unknown model.remat={name!r}: known are {', '.join(REMAT)}")


def init_stacked(init: Callable[[jax.Array], Any], rng: jax.Array, length: int) -> Any:
    """Stack `init(rng)` of `length` blocks, each with its own rng: leaves [length, ...]."""
    return jax.vmap(init)(jax.random.split(rng, length))


def is_fsdp_sharded() -> bool:
    """Return whether a mesh axis `fsdp` divides the frozen weights where this is traced."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def gather_fsdp(params: Any) -> Any:
    """Gather the parameters of a block on each device if a mesh axis `fsdp` divides them.

    Otherwise XLA may divide the computation as the weights are, and send activations around.
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
    saved_activations: Sequence[str] = SAVED_ACTIVATIONS,
) -> jax.Array:
    """Apply body(h, layer) for each layer of `layers`, a tree with leaves [L, ...].

    Args:
      body: (h, layer) -> h.
      h: what enters the first layer.
      layers: tree with leaves [L, ...].
      scan: loop in the compiled program; False unrolls the layers.
      remat: a name of `REMAT`.
      saved_activations: names that "save_matmuls" saves, see `checkpoint_activation`.
    """
    if remat != "none":
        # Unrolled, the compiler sees both passes and would join them again without a barrier.
        policy = _policy(remat, saved_activations)
        body = jax.checkpoint(body, policy=policy, prevent_cse=not scan)
    if scan:
        return jax.lax.scan(lambda h, layer: (body(h, layer), None), h, layers)[0]
    # scan(unroll=True) would still copy what the backward pass needs into stacked arrays.
    for layer in split_layers(layers):
        h = body(h, layer)
    return h


def split_layers(layers: Any) -> list[Any]:
    """Return the trees of the L layers in a tree with leaves [L, ...].

    Splits have a concatenation as their gradient; that of leaf[i] is a sum of L padded arrays.
    """
    leaves, structure = jax.tree.flatten(layers)
    splits = [jnp.split(leaf, len(leaf)) if len(leaf) else [] for leaf in leaves]
    parts = [[part[0] for part in split] for split in splits]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]

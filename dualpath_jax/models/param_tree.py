"""Parameter trees: what trains, what decays, splitting, counting.

Public: `trainable_mask`, `decay_mask`, `split`, `merge`, `unstack_blocks`, `flatten`, `count_params`,
`parameter_groups`, `parameter_table`.

A tree split into trainable and frozen leaves keeps its structure; the holes are
`optax.MaskedNode`, which has no leaves, as in optax's own masks.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any


def path_name(path: tuple) -> str:
    """A jax key path as "spatial/adapters/attention/down/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def trainable_mask(params: Tree, predicate: Callable[[str], bool]) -> Tree:
    """Tree of bool: does the leaf train? The predicate is asked for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: predicate(path_name(path)), params)


def decay_mask(params: Tree) -> Tree:
    """Tree of bool: weight decay on kernels only; not on biases, norms, class tokens, positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def split(params: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """(trainable, frozen): each the whole tree, `optax.MaskedNode` where the other has leaves."""
    hole = optax.MaskedNode()
    trainable = jax.tree.map(lambda leaf, train: leaf if train else hole, params, mask)
    frozen = jax.tree.map(lambda leaf, train: hole if train else leaf, params, mask)
    return trainable, frozen


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """Inverse of `split`, and of `unstack_blocks`."""

    def is_hole(node):
        return isinstance(node, optax.MaskedNode)

    def fill(ours, theirs):
        if not is_hole(ours):
            return ours
        return jnp.stack(theirs) if isinstance(theirs, tuple) else theirs

    return jax.tree.map(fill, trainable, frozen, is_leaf=is_hole)


def unstack_blocks(frozen: Tree) -> Tree:
    """Frozen weights with those of the blocks as tuples of the L blocks' own, where stacked.

    For programs that write the blocks out: they are given each block's weights where they lie and
    `merge` them inside. From a stack they would copy them out, every time.
    """

    def of_blocks(path, leaf):
        return tuple(leaf) if path_name(path).startswith("backbone/blocks") else leaf

    return jax.tree_util.tree_map_with_path(of_blocks, frozen)


def count_params(tree: Tree) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def parameter_groups(params: Tree, mask: Tree) -> dict[str, list[int]]:
    """Group of parameters -> [how many, of these trainable, of these decayed]; "total" is last."""
    decays = flatten(decay_mask(params))
    trained = flatten(mask)
    groups: dict[str, list[int]] = {}
    for path, leaf in flatten(params).items():
        parts = path.split("/")
        group = "/".join(parts[:2]) if parts[0] != "backbone" else "backbone"
        size = math.prod(leaf.shape)
        row = groups.setdefault(group, [0, 0, 0])
        row[0] += size
        row[1] += size * trained[path]
        row[2] += size * (trained[path] and decays[path])
    return groups | {"total": [sum(column) for column in zip(*groups.values(), strict=True)]}


def parameter_table(params: Tree, mask: Tree) -> str:
    """`parameter_groups` for people."""
    rows = [("group", "parameters", "trainable", "decayed")]
    for group, row in parameter_groups(params, mask).items():
        rows.append((group, *(f"{n:,}" for n in row)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(r[i].rjust(widths[i]) for i in (1, 2, 3))])
        for r in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

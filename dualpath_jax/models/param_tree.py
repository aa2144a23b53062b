"""Masks, splits, merges and counts parameter trees.

A tree that is split into trainable and frozen leaves keeps its structure. The holes are
`optax.MaskedNode`, a node without leaves, as in optax's own masks.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

Tree = Any

# (regular expression of the end of a parameter's path, whether weight decay applies); the first
# match decides. A parameter that no rule names does not decay, and the parameter table says so.
DECAY_RULES = [
    (r"(\w+_)?kernel", True),
    (r"(\w+_)?(bias|scale)", False),  # of layers and norms
    (r"(\w+_)?(tokens?|embedding|position)(_\d+)?|prompts|probe", False),
    (r"temporal_attention_\d+/(before|after)", False),  # position tables of EVL
]


def path_name(path: tuple) -> str:
    """Format a JAX key path, such as "spatial/adapters/attention/down/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, such as "classifier/output/bias"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def trainable_mask(params: Tree, predicate: Callable[[str], bool]) -> Tree:
    """Return a tree of bool: `predicate(path)` of each leaf's path, True for trainable leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: predicate(path_name(path)), params)


def select(tree: Tree, wanted: Tree) -> Tree:
    """Return the part of `tree`, nested dicts, whose paths `wanted` has."""
    if not isinstance(wanted, Mapping):
        return tree
    return {name: select(tree[name], child) for name, child in wanted.items()}


def _find_decay(path: str) -> bool | None:
    """Return whether weight decay applies to the parameter of a path; None without a rule."""
    for pattern, decays in DECAY_RULES:
        if re.fullmatch(f"(.*/)?({pattern})", path):
            return decays
    return None


def decay_mask(params: Tree) -> Tree:
    """Return a tree of bool that is True where weight decay applies, by `DECAY_RULES`.

    Only kernels decay: not biases, norms, class tokens or positions.
    """
    return trainable_mask(params, lambda path: _find_decay(path) is True)


def split(params: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Split `params` into (trainable, frozen) by a tree of bool.

    Each result has the whole structure, with `optax.MaskedNode` where the other has a leaf.
    """
    hole = optax.MaskedNode()
    trainable = jax.tree.map(lambda leaf, train: leaf if train else hole, params, mask)
    frozen = jax.tree.map(lambda leaf, train: hole if train else leaf, params, mask)
    return trainable, frozen


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """Merge the results of `split`; frozen leaves may come from `unstack_blocks`."""

    def is_hole(node):
        return isinstance(node, optax.MaskedNode)

    def fill(trainable_leaf, frozen_leaf):
        if not is_hole(trainable_leaf):
            return trainable_leaf
        return jnp.stack(frozen_leaf) if isinstance(frozen_leaf, tuple) else frozen_leaf

    return jax.tree.map(fill, trainable, frozen, is_leaf=is_hole)


def unstack_blocks(frozen: Tree) -> Tree:
    """Unstack frozen block weights [L, ...] into tuples of L arrays.

    Unrolled programs use these arrays in place and `merge` them inside; from a stack they would
    slice (copy) the weights of each block at every step.
    """

    def unstack(path, leaf):
        return tuple(leaf) if path_name(path).startswith("backbone/blocks") else leaf

    return jax.tree_util.tree_map_with_path(unstack, frozen)


def count_params(tree: Tree) -> int:
    """Count the parameters of a tree."""
    return int(parameter_overview.count_parameters(flatten(tree)))


def _group_of(path: str) -> str:
    """Return the group of a path: "backbone" or its first two parts, "spatial/adapters"."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] != "backbone" else "backbone"


def parameter_groups(params: Tree, mask: Tree) -> dict[str, list[int]]:
    """Count [all, trainable, decayed] parameters of each group.

    A group is "backbone" or the first two parts of a path, such as "spatial/adapters". The last
    entry is "total".
    """
    decays = flatten(decay_mask(params))
    trained = flatten(mask)
    groups: dict[str, list[int]] = {}
    for path, leaf in flatten(params).items():
        size = math.prod(leaf.shape)
        row = groups.setdefault(_group_of(path), [0, 0, 0])
        row[0] += size
        row[1] += size * trained[path]
        row[2] += size * (trained[path] and decays[path])
    return groups | {"total": [sum(column) for column in zip(*groups.values(), strict=True)]}


def parameter_table(params: Tree, mask: Tree) -> str:
    """Format `parameter_groups` as a text table.

    A group is marked by "*" if it has trained parameters that no rule of `DECAY_RULES` names; a
    line below the table names them.
    """
    trained = [path for path, trains in flatten(mask).items() if trains]
    unnamed = [path for path in trained if _find_decay(path) is None]
    marked = {_group_of(path) for path in unnamed}
    rows = [("group", "parameters", "trainable", "decayed")]
    for group, row in parameter_groups(params, mask).items():
        rows.append((group + "*" * (group in marked), *(f"{n:,}" for n in row)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(r[i].rjust(widths[i]) for i in (1, 2, 3))])
        for r in rows
    ]
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    if unnamed:
        more = ", ..." if len(unnamed) > 5 else ""
        lines.append(
            f"* no rule of weight decay names {', '.join(unnamed[:5])}{more}, so they do not "
            "decay; name them in param_tree.DECAY_RULES"
        )
    return "\n".join(lines)

"""Defines what every backbone offers to the tuning methods: its config and its module.

The methods use nothing else. They ask the config what a backbone has (leading tokens, a position
table, a readout), and never which family it belongs to.

Axes: M images, N tokens (class token first, then registers, then patches row by row), D width, L
blocks, K heads.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import jax
import numpy as np

from dualpath_jax.models.backbones.layers import BlockHooks


class BackboneConfig(Protocol):
    """Describes the shape of a backbone; a frozen dataclass.

    Attributes:
      name: for messages and checkpoints.
      image_size: side of the square image that position tables cover, pixels.
      patch_size: side of a patch, pixels.
      width: D of the tokens that `embed` returns.
      heads: K, in the first block.
      activation: of the MLPs, a name of `layers.ACTIVATIONS`.
      eps: LayerNorm's epsilon.
    """

    name: str
    image_size: int
    patch_size: int
    width: int
    heads: int
    activation: str
    eps: float

    @property
    def num_tokens(self) -> int:
        """Return N of an image of `image_size`."""

    @property
    def num_leading_tokens(self) -> int:
        """Return the number of tokens before the patches: 0, 1 (class), or 1 + registers."""

    @property
    def has_class_token(self) -> bool:
        """Return whether token 0 is a class token, the module's `class_embedding` [D]."""

    @property
    def has_position_table(self) -> bool:
        """Return whether positions are the module's `position_embedding` [N - registers, D].

        A config with such a table also has `resize_positions(table, grid)`, which returns the table
        for another grid (rows, columns) of patches.
        """

    @property
    def has_global_attention(self) -> bool:
        """Return whether every block applies attention to all tokens, whatever their number.

        If so, the config has `depth` and a position table, and the module has
        `encode(..., blocks=slice)`, `queries_and_keys`, `attention` and `patch_features`, as
        `vit.ViT` has them; its blocks offer `ln_1` and `attention` to the hook `on_input`.
        """

    @property
    def readout(self) -> str:
        """Return what `pool` reads: "class" token, "mean" of patches, or "attention" pooling."""

    @property
    def feature_dim(self) -> int:
        """Return the width of the features of `pool`."""

    # For the conversion of weights.

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], stated: Mapping[str, Any]) -> Self:
        """Return the config of converted weights.

        Args:
          arrays: by flat name of the parameter tree.
          stated: "activation", and what else the checkpoint or its publisher states.
        """

    @property
    def architecture(self) -> dict[str, Any]:
        """Return the fields in which weights must agree with this config."""

    @property
    def position_size(self) -> str:
        """Return the size of the position tables, for messages."""

    def resize_position_tables(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `arrays`, by flat name, with position tables resized to this config's size."""


class Backbone(Protocol):
    """Computes the image tower; a Flax module.

    It is built as `module(config, dtype=..., scan_blocks=..., remat=...)`, see `vit.ViT`. Tokens
    are [M, N, D], or a map [M, R, C, D] as in a Swin; inside the blocks, hooks see [M, N, D] in
    both.
    """

    def embed(
        self,
        images: jax.Array,
        class_token: jax.Array | None = None,
        position: jax.Array | None = None,
    ) -> jax.Array:
        """Embed images [M, H, W, 3] as the tokens that enter the first block.

        Args:
          images: normalized as the weights expect.
          class_token: [D], in place of the backbone's own.
          position: [N - registers, D] or [M, N - registers, D], in place of the backbone's own.
        """

    def encode(
        self,
        h: jax.Array,
        hooks: BlockHooks | None = None,
        hook_params: Any = None,
        dropout_rng: jax.Array | None = None,
        cls_token_only: bool = False,
    ) -> jax.Array:
        """Apply all blocks to tokens, with all hooks of `hooks` in each block.

        Args:
          h: of `embed`.
          hooks: what a tuning method does inside the blocks.
          hook_params: of `init_hooks`.
          dropout_rng: switches on the method's dropout.
          cls_token_only: the caller only needs what `pool` reads; tokens may be left out.
        """

    def pool(self, h: jax.Array, project: bool = True) -> jax.Array:
        """Read features [M, feature_dim] out of tokens, or those before a projection."""

    def token_features(self, h: jax.Array) -> jax.Array:
        """Apply the last LayerNorm to all tokens, and return them as [M, N, D]."""

    def init_hooks(
        self, rng: jax.Array, hooks: BlockHooks, num_images: int, num_tokens: int
    ) -> Any:
        """Initialize a method's hooks for all blocks, for images of N = `num_tokens` tokens."""

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Run the frozen backbone: images [M, H, W, 3] -> (tokens, features)."""

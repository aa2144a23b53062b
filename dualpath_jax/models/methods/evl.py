"""Defines EVL (Lin et al., ECCV 2022): a decoder over the features of a frozen ViT.

Axes: B batch, T frames, N tokens (class token first), D width, K heads, M last blocks.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import kernels as kernels_lib
from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.kernels import Kernels
from dualpath_jax.models.backbones.layers import ACTIVATIONS
from dualpath_jax.models.backbones.vit import ViTConfig
from dualpath_jax.models.frame_model import FrameModel, patch_grid_side
from dualpath_jax.models.methods.adapters import DepthwiseConv

# Output tokens [B, T, N, D], queries and keys [B, T, N, K, D/K] of one block.
Features = tuple[jax.Array, jax.Array, jax.Array]


def gather_relative(weights: jax.Array, side: int) -> jax.Array:
    """Convert weights over patches into weights over the rows of the table of relative positions.

    Args:
      weights: [B, T, N, N], weights of the N patches (last axis) for each query patch.
      side: side of the square grid of patches, N = side^2.

    Returns:
      [B, T, N, (2 side - 1)^2], rows in the order of `layers.relative_index`. A query has N nonzero
      weights; the weights of offsets that leave the grid are zero.
    """
    grid = {"r": side, "c": side, "u": side, "v": side}
    x = einops.rearrange(weights, "b t (r c) (u v) -> b t r u c v", **grid)
    x = _shift_rows(x[:, :, :, ::-1, :, ::-1])
    x = _shift_rows(einops.rearrange(x, "b t r u c v -> b t c v r u"))
    return einops.rearrange(x, "b t c v r u -> b t (r c) (u v)")


def _shift_rows(x: jax.Array) -> jax.Array:
    """Move row i of x [..., n, n] right by i places, padded with zeros to [..., n, 2n - 1]."""
    n = x.shape[-1]
    # Padded rows of 2n elements that are read as rows of 2n - 1 move one place further right each.
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n)])
    x = x.reshape(*x.shape[:-2], 2 * n * n)[..., : n * (2 * n - 1)]
    return x.reshape(*x.shape[:-1], n, 2 * n - 1)


class TemporalCrossAttention(nn.Module):
    """Computes features of where the patches of a frame attend in the frames before and after it.

    The backbone's queries attend to its keys of the neighboring frame: softmax over the patches,
    average over the heads. The weights multiply a learned table of relative positions, one for each
    direction, which starts at zero. Class token, registers and missing neighbors give zeros.

    Attributes:
      width: D.
      kernels: with `dense_offsets`, multiply the table by weights that are mostly zeros, instead of
        building a table of all pairs of patches [N, N, D]: more multiply-accumulates, but faster on
        CPUs (see docs/notes/measurements.md).
      dtype: compute dtype of the products.
      leading_tokens: number of tokens before the patches: class token and registers.
    """

    width: int
    kernels: Kernels = kernels_lib.DEFAULT
    dtype: Any = jnp.float32
    leading_tokens: int = 1

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Map queries and keys q, k [B, T, N, K, D/K] to features [B, T, N, D]."""
        first = self.leading_tokens
        q, k = q[:, :, first:] * q.shape[-1] ** -0.5, k[:, :, first:]
        side = patch_grid_side(q.shape[2])

        def attend_to_neighbors(q, k, name):
            table = self.param(name, nn.initializers.zeros, ((2 * side - 1) ** 2, self.width))
            logits = jnp.einsum("btqkd,btpkd->btkqp", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits).mean(axis=2).astype(self.dtype)
            table = table.astype(self.dtype)
            if self.kernels.dense_offsets:
                return gather_relative(weights, side) @ table
            return jnp.einsum("btqp,qpd->btqd", weights, table[layers.relative_index(side, side)])

        before = attend_to_neighbors(q[:, 1:], k[:, :-1], "before")
        after = attend_to_neighbors(q[:, :-1], k[:, 1:], "after")
        # Zeros for the missing neighbor of the first or last frame, and for the leading tokens.
        before = jnp.pad(before, ((0, 0), (1, 0), (first, 0), (0, 0)))
        after = jnp.pad(after, ((0, 0), (0, 1), (first, 0), (0, 0)))
        return before + after


class DecoderBlock(nn.Module):
    """Applies pre-LN cross attention of one query token, then an MLP of ratio 4.

    Attributes:
      config: the backbone's shape; the block has the same number of heads and activation.
      dropout: dropout rate after the MLP's activation, in [0, 1); active when `dropout_rng` is
        given.
      dtype: compute dtype.
    """

    config: ViTConfig
    dropout: float = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, features: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Update the query token x [B, 1, D] with the features [B, T N, D]; return [B, 1, D]."""
        width, heads, dtype = self.config.width, self.config.heads, self.dtype

        def norm(x, name):
            return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)(x)

        q = nn.Dense(width, dtype=dtype, name="query")(norm(x, "ln_query"))
        kv = nn.Dense(2 * width, dtype=dtype, name="key_value")(norm(features, "ln_features"))
        q = einops.rearrange(q, "b n (k d) -> b n k d", k=heads)
        k, v = einops.rearrange(kv, "b n (two k d) -> two b n k d", two=2, k=heads)
        y = einops.rearrange(jax.nn.dot_product_attention(q, k, v), "b n k d -> b n (k d)")
        x = x + nn.Dense(width, dtype=dtype, name="out")(y)
        y = nn.Dense(4 * width, dtype=dtype, name="hidden")(norm(x, "ln_mlp"))
        y = ACTIVATIONS[self.config.activation](y)
        y = nn.Dropout(self.dropout)(y, deterministic=dropout_rng is None, rng=dropout_rng)
        return x + nn.Dense(width, dtype=dtype, name="output")(y)


class EVLDecoder(nn.Module):
    """Decodes the features of M backbone blocks: the i-th decoder block reads the i-th feature.

    First, three terms are added to each feature: its depthwise temporal convolution (kernel 3), a
    learned temporal position, and the temporal cross attention of its block's queries and keys.
    LayerNorm, dropout and an FC on the query token give the logits.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
      mlp_dropout: see `DecoderBlock.dropout`.
      dropout: dropout rate before the FC, in [0, 1); active when `dropout_rng` is given.
      kernels: implementations for the hardware, see `TemporalCrossAttention`.
      dtype: compute dtype of the blocks; the final LayerNorm and FC are computed in float32.
    """

    config: ViTConfig
    num_classes: int
    mlp_dropout: float = 0.5
    dropout: float = 0.5
    kernels: Kernels = kernels_lib.DEFAULT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: list[Features], dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map the features of the last M blocks to logits [B, classes] float32."""
        rngs = [None] * (len(features) + 1)
        if dropout_rng is not None:
            rngs = list(jax.random.split(dropout_rng, len(features) + 1))
        batch, frames, _, width = features[0][0].shape
        x = self.param("query_token", nn.initializers.normal(0.02), (width,)).astype(self.dtype)
        x = jnp.broadcast_to(x, (batch, 1, width))
        for i, (h, q, k) in enumerate(features):
            conv = DepthwiseConv((3, 1), dtype=self.dtype, name=f"temporal_conv_{i}")
            position = self.param(f"position_{i}", nn.initializers.zeros, (frames, width))
            h = h + conv(h) + position[:, None].astype(self.dtype)
            cross = TemporalCrossAttention(
                width,
                self.kernels,
                self.dtype,
                self.config.num_leading_tokens,
                name=f"temporal_attention_{i}",
            )
            h = einops.rearrange(h + cross(q, k), "b t n d -> b (t n) d")
            block = DecoderBlock(self.config, self.mlp_dropout, self.dtype, name=f"block_{i}")
            x = block(x, h, rngs[i])
        x = nn.LayerNorm(epsilon=1e-5, name="ln")(x[:, 0].astype(jnp.float32))
        x = nn.Dropout(self.dropout)(x, deterministic=dropout_rng is None, rng=rngs[-1])
        with layers.full_precision():
            return nn.Dense(self.num_classes, name="output")(x)


class EVLModel(FrameModel):
    """Feeds the features of the last M blocks of the frozen backbone to an `EVLDecoder`.

    Attributes:
      num_blocks: M, between 1 and the backbone's number of blocks.
    """

    num_blocks: int = 4

    def features(self, frames: jax.Array, dropout_rng: jax.Array | None = None) -> list[Features]:
        """Return output, queries and keys of each of the last M blocks for frames [B, T, H, W, 3].

        The shapes are those of `Features`.
        """
        del dropout_rng
        first = self.config.depth - self.num_blocks
        h = self.embed(einops.rearrange(frames, "b t h w c -> (b t) h w c"))
        h = self.backbone.encode(h, blocks=slice(0, first)) if first else h
        features = []
        for i in range(first, self.config.depth):
            heads = self.backbone.queries_and_keys(h, i)
            h = self.backbone.encode(h, blocks=slice(i, i + 1))
            features.append(
                tuple(x.reshape(-1, self.num_frames, *x.shape[1:]) for x in (h, *heads))
            )
        return features

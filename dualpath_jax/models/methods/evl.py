"""EVL (Lin et al., ECCV 2022): a decoder over the features of a frozen image transformer.

Public: `EVLModel`, `EVLDecoder`, `TemporalCrossAttention`.

Axes: B batch, T frames, N tokens (class token first), D width, K heads, M last blocks.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.layers import ACTIVATIONS
from dualpath_jax.models.backbones.vit import ViTConfig
from dualpath_jax.models.frame_model import FrameModel, patch_grid
from dualpath_jax.models.methods.adapters import DepthwiseConv

# Of one block: tokens [B, T, N, D], queries and keys [B, T, N, K, D/K].
Features = tuple[jax.Array, jax.Array, jax.Array]


def gather_relative(weights: jax.Array, side: int) -> jax.Array:
    """Weights of patches as weights of rows of the table: [B, T, N, N] -> [B, T, N, rows].

    N patches of a grid with `side`, (2 side - 1)^2 rows in the order of `layers.relative_index`, of
    which a query has weights for N and zeros for the others.
    """
    grid = {"r": side, "c": side, "u": side, "v": side}
    x = einops.rearrange(weights, "b t (r c) (u v) -> b t r u c v", **grid)
    x = _shifted(x[:, :, :, ::-1, :, ::-1])
    x = _shifted(einops.rearrange(x, "b t r u c v -> b t c v r u"))
    return einops.rearrange(x, "b t c v r u -> b t (r c) (u v)")


def _shifted(x: jax.Array) -> jax.Array:
    """[..., n, n] -> [..., n, 2n - 1]: row i moved i places to the right, zeros beside it."""
    n = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n)])  # a row is one longer than what is wanted
    x = x.reshape(*x.shape[:-2], 2 * n * n)[..., : n * (2 * n - 1)]
    return x.reshape(*x.shape[:-1], n, 2 * n - 1)


class TemporalCrossAttention(nn.Module):
    """Where the patches of a frame look in the frames before and after it.

    Attention of the backbone's queries on its keys of the neighbouring frame, softmax over its
    patches, averaged over heads, times a learned table of relative positions, zero at the start,
    one for each direction. The class token, and a direction without a frame, give zeros.

    Attributes:
      width: D.
      for_cpu: multiply the table with weights that are mostly zeros, instead of making a table of
        all pairs of patches, [N, N, D]. 3.7 times the multiply-accumulates for 14x14 patches; on a
        CPU a third of the time, of the gradient a quarter.
    """

    width: int
    for_cpu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """q, k [B, T, N, K, D/K] -> [B, T, N, D]."""
        q, k = q[:, :, 1:] * q.shape[-1] ** -0.5, k[:, :, 1:]
        side = patch_grid(q.shape[2])

        def look(q, k, name):
            table = self.param(name, nn.initializers.zeros, ((2 * side - 1) ** 2, self.width))
            logits = jnp.einsum("btqkd,btpkd->btkqp", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits).mean(axis=2).astype(self.dtype)
            table = table.astype(self.dtype)
            if self.for_cpu:
                return gather_relative(weights, side) @ table
            return jnp.einsum("btqp,qpd->btqd", weights, table[layers.relative_index(side, side)])

        before = jnp.pad(look(q[:, 1:], k[:, :-1], "before"), ((0, 0), (1, 0), (1, 0), (0, 0)))
        after = jnp.pad(look(q[:, :-1], k[:, 1:], "after"), ((0, 0), (0, 1), (1, 0), (0, 0)))
        return before + after


class DecoderBlock(nn.Module):
    """Pre-LN cross attention of one query token, then an MLP of ratio 4.

    Attributes:
      config: the backbone's shape, whose heads and activation it takes.
      dropout: rate after the MLP's activation; active when `dropout_rng` is given.
    """

    config: ViTConfig
    dropout: float = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, features: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """x [B, 1, D], features [B, T N, D] -> [B, 1, D]."""
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
    """M decoder blocks, the i-th on the i-th feature; LayerNorm, dropout, FC on the query token.

    A feature gets a depth-wise temporal convolution (kernel 3) of itself, a learned temporal
    position and the temporal cross attention of its block's queries and keys added.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
      mlp_dropout: see `DecoderBlock`.
      dropout: rate before the FC; active when `dropout_rng` is given.
      for_cpu: see `TemporalCrossAttention`.
      dtype: compute dtype of the blocks; LayerNorm and FC at the end are float32.
    """

    config: ViTConfig
    num_classes: int
    mlp_dropout: float = 0.5
    dropout: float = 0.5
    for_cpu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: list[Features], dropout_rng: jax.Array | None = None) -> jax.Array:
        """Features of the last M blocks -> logits [B, classes] float32."""
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
                width, self.for_cpu, self.dtype, name=f"temporal_attention_{i}"
            )
            h = einops.rearrange(h + cross(q, k), "b t n d -> b (t n) d")
            block = DecoderBlock(self.config, self.mlp_dropout, self.dtype, name=f"block_{i}")
            x = block(x, h, rngs[i])
        x = nn.LayerNorm(epsilon=1e-5, name="ln")(x[:, 0].astype(jnp.float32))
        x = nn.Dropout(self.dropout)(x, deterministic=dropout_rng is None, rng=rngs[-1])
        with layers.full_precision():
            return nn.Dense(self.num_classes, name="output")(x)


class EVLModel(FrameModel):
    """The frozen backbone, and the `EVLDecoder` as head on the features of its last M blocks."""

    num_blocks: int = 4

    def features(self, frames: jax.Array, dropout_rng: jax.Array | None = None) -> list[Features]:
        """frames [B, T, H, W, 3] -> for each of the last M blocks: output, queries and keys."""
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

"""Defines AIM (Yang et al., ICLR 2023): spatial, temporal and joint adaptation of each block."""

from typing import ClassVar

import einops
import flax.linen as nn
import jax

from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.backbones.vit import Block
from dualpath_jax.models.methods.adapters import Adapter


class AIMHooks(BlockHooks):
    """Adapts one block by attention over time and three or four adapters.

    x = x + A_t(MHA_time(LN1(x)));  x = x + A_s(MHA(LN1(x)));  x = x + MLP(LN2(x)) + s A_j(LN2(x)).
    MHA_time applies the block's frozen attention over the T frames of each token. A_s includes a
    skip connection. With two temporal adapters, MHA_time reads A_in(LN1(x)), which also includes a
    skip connection.

    Attributes:
      adapter: template of all adapters, with scale 1.
      num_frames: T.
      scale: s.
      num_temporal_adapters: 1, or 2 (SSv2).
      drop_path: probability, in [0, 1), with which a clip loses A_t, and A_j; active when a
        "dropout" rng is given.
    """

    pointwise: ClassVar[bool] = True
    adapter: Adapter
    num_frames: int
    scale: float = 0.5
    num_temporal_adapters: int = 1
    drop_path: float = 0.2

    def setup(self):
        self.temporal = self.adapter.clone()
        self.spatial = self.adapter.clone(skip=True)
        self.joint = self.adapter.clone(scale=self.scale)
        if self.num_temporal_adapters == 2:
            self.temporal_in = self.adapter.clone(skip=True)
        # One draw for all tokens of a clip [B, T, N, D]; the remaining terms are scaled up.
        self.drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))

    def _drop(self, y: jax.Array) -> jax.Array:
        """Apply stochastic depth per clip to y [(B T), N, D]; the shape stays."""
        y = einops.rearrange(y, "(b t) n d -> b t n d", t=self.num_frames)
        y = self.drop(y, deterministic=not self.has_rng("dropout"))
        return einops.rearrange(y, "b t n d -> (b t) n d")

    def on_input(self, h: jax.Array, block: Block) -> jax.Array:
        """Add the adapted attention over time to the tokens h [(B T), N, D]."""
        x = einops.rearrange(h, "(b t) n d -> (b n) t d", t=self.num_frames)
        x = block.ln_1(x)
        if self.num_temporal_adapters == 2:
            x = self.temporal_in(x)
        y = self.temporal(block.attention(x))
        return h + self._drop(einops.rearrange(y, "(b n) t d -> (b t) n d", n=h.shape[1]))

    def after_attention(self, y: jax.Array) -> jax.Array:
        return self.spatial(y)

    def parallel_to_mlp(self, x: jax.Array) -> jax.Array:
        return self._drop(self.joint(x))

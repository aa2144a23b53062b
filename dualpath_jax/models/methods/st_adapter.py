"""ST-Adapter (ref. 55): an adapter with a depth-wise 3D convolution over time, rows and columns.

Public: `STAdapterHooks`.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks, gelu
from dualpath_jax.models.frame_model import patch_grid
from dualpath_jax.models.methods.adapters import DepthwiseConv


class STAdapterHooks(BlockHooks):
    """Eq. 6, or the form that its authors released.

    Eq. 6: s GELU(conv(LN(z) W_down)) W_up beside the MLP; W_up starts at zero. The class token of a
    frame goes through the same convolution as an image of one patch.
    Released: h + s conv(h W_down) W_up on the tokens that enter the block, patches only, without
    activation; the convolution starts at zero.

    Attributes:
      num_frames: T.
      width: R.
      kernel_size: (time, rows, columns) of the convolution.
      scale: s.
      released: the authors' form.
      class_tokens: how many tokens come before the patches, 1 or 0.
      dtype: of the computation.
    """

    num_frames: int
    width: int = 384
    kernel_size: tuple[int, int, int] = (3, 1, 1)
    scale: float = 1.0
    released: bool = False
    class_tokens: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def _adapt(self, x: jax.Array) -> jax.Array:
        """x [M, N, D] -> the adapter's term [M, N, D]."""
        zeros, default = nn.initializers.zeros, nn.initializers.lecun_normal()
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        down = nn.Dense(self.width, kernel_init=kaiming, dtype=self.dtype, name="down")
        init = zeros if self.released else default
        conv = DepthwiseConv(self.kernel_size, init, dtype=self.dtype, name="conv")
        init = default if self.released else zeros
        up = nn.Dense(x.shape[-1], kernel_init=init, dtype=self.dtype, name="up")

        def convolve(tokens, side):
            y = einops.rearrange(
                tokens, "(b t) (h w) r -> b t h w r", t=self.num_frames, h=side, w=side
            )
            return einops.rearrange(conv(y), "b t h w r -> (b t) (h w) r")

        first = self.class_tokens
        side = patch_grid(x.shape[1] - first)
        if self.released:
            y = up(convolve(down(x[:, first:]), side))
            return self.scale * jnp.pad(y, ((0, 0), (first, 0), (0, 0)))
        y = down(x)
        patches = convolve(y[:, first:], side)
        if first:
            patches = jnp.concatenate([convolve(y[:, :first], 1), patches], axis=1)
        return self.scale * up(gelu(patches))

    def on_input(self, h: jax.Array, block: Any) -> jax.Array:
        del block
        return h + self._adapt(h) if self.released else h

    def parallel_to_mlp(self, x: jax.Array) -> jax.Array | float:
        return 0.0 if self.released else self._adapt(x)

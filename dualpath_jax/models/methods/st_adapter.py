"""Defines ST-Adapter (ref. 55): an adapter with a depthwise convolution over space and time."""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks, gelu
from dualpath_jax.models.frame_model import patch_grid_side
from dualpath_jax.models.methods.adapters import DepthwiseConv


class STAdapterHooks(BlockHooks):
    """Adds an adapter with a 3D convolution to each block, as in eq. 6 or as its authors released.

    Eq. 6 adds s GELU(conv(LN(z) W_down)) W_up parallel to the MLP; W_up starts at zero. The class
    tokens pass through the same convolution as frames of one patch.
    The released code adds s conv(h W_down) W_up to the patches h that enter the block, without
    activation; the convolution starts at zero.

    Attributes:
      num_frames: T.
      width: R, the inner width.
      kernel_size: (time, rows, columns) of the convolution, odd numbers.
      scale: s.
      released: use the form of the released code instead of eq. 6.
      class_tokens: number of tokens before the patches, 1 or 0.
      dtype: compute dtype.
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
        """Map tokens x [M, N, D] to the adapter's term [M, N, D]."""
        zeros, default = nn.initializers.zeros, nn.initializers.lecun_normal()
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        down = nn.Dense(self.width, kernel_init=kaiming, dtype=self.dtype, name="down")
        init = zeros if self.released else default
        conv = DepthwiseConv(self.kernel_size, init, dtype=self.dtype, name="conv")
        init = default if self.released else zeros
        up = nn.Dense(x.shape[-1], kernel_init=init, dtype=self.dtype, name="up")

        def convolve(tokens, side):
            """Convolve tokens [M, side^2, R] over time, rows and columns; the shape stays."""
            y = einops.rearrange(
                tokens, "(b t) (h w) r -> b t h w r", t=self.num_frames, h=side, w=side
            )
            return einops.rearrange(conv(y), "b t h w r -> (b t) (h w) r")

        first = self.class_tokens
        side = patch_grid_side(x.shape[1] - first)
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

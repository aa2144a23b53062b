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

    Eq. 6 adds s GELU(conv(LN(z) W_down)) W_up parallel to the MLP; W_up starts at zero. Class
    token and registers pass through the same convolution, each as frames of one patch.
    The released code adds s conv(h W_down) W_up to the patches h that enter the block, without
    activation; the convolution starts at zero.

    Attributes:
      num_frames: T.
      width: R, the inner width.
      kernel_size: (time, rows, columns) of the convolution, odd numbers.
      scale: s.
      released: use the form of the released code instead of eq. 6.
      leading_tokens: number of tokens before the patches: class token and registers.
      dtype: compute dtype.
    """

    num_frames: int
    width: int = 384
    kernel_size: tuple[int, int, int] = (3, 1, 1)
    scale: float = 1.0
    released: bool = False
    leading_tokens: int = 1
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

        first = self.leading_tokens
        side = patch_grid_side(x.shape[1] - first)

        def convolve(patches):
            """Convolve patches [M, side^2, R] over time, rows and columns; the shape stays."""
            y = einops.rearrange(
                patches, "(b t) (h w) r -> b t h w r", t=self.num_frames, h=side, w=side
            )
            return einops.rearrange(conv(y), "b t h w r -> (b t) (h w) r")

        if self.released:
            y = up(convolve(down(x[:, first:])))
            return self.scale * jnp.pad(y, ((0, 0), (first, 0), (0, 0)))
        y = down(x)
        patches = convolve(y[:, first:])
        if first:
            sizes = {"t": self.num_frames, "n": first}
            leading = einops.rearrange(y[:, :first], "(b t) n r -> (b n) t 1 1 r", **sizes)
            leading = einops.rearrange(conv(leading), "(b n) t 1 1 r -> (b t) n r", **sizes)
            patches = jnp.concatenate([leading, patches], axis=1)
        return self.scale * up(gelu(patches))

    def on_input(self, h: jax.Array, block: Any) -> jax.Array:
        del block
        return h + self._adapt(h) if self.released else h

    def parallel_to_mlp(self, x: jax.Array) -> jax.Array | float:
        return 0.0 if self.released else self._adapt(x)

"""Defines Pro-tuning (ref. 54): convolutions predict a prompt from the output of each block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks, gelu
from dualpath_jax.models.frame_model import patch_grid_side
from dualpath_jax.models.methods.adapters import DepthwiseConv


class ProTuningHooks(BlockHooks):
    """Adds the prompt v = GELU(conv(h)) to the patches of a block's output h (eq. 5).

    conv consists of 1x1, 5x5 depthwise and 1x1 convolutions. Class token and registers stay
    unchanged. The last convolution starts at zero, therefore the method starts as the frozen
    backbone.

    Attributes:
      width: R, the number of channels between the 1x1 convolutions.
      leading_tokens: number of tokens before the patches: class token and registers.
      dtype: compute dtype.
    """

    width: int
    leading_tokens: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def on_output(self, h: jax.Array) -> jax.Array:
        """Add the prompt to the tokens h [M, N, D]; the shape stays."""
        images, tokens, channels = h.shape
        side = patch_grid_side(tokens - self.leading_tokens)
        v = nn.Dense(self.width, dtype=self.dtype, name="down")(h[:, self.leading_tokens :])
        v = v.reshape(images, side, side, self.width)
        v = DepthwiseConv((5, 5), dtype=self.dtype, name="conv")(v)
        zeros = nn.initializers.zeros
        v = nn.Dense(channels, kernel_init=zeros, dtype=self.dtype, name="up")(v)
        v = gelu(v).reshape(images, side * side, channels)
        return h + jnp.pad(v, ((0, 0), (self.leading_tokens, 0), (0, 0)))

"""Pro-tuning (ref. 54): a prompt predicted by convolutions from the output of each block.

Public: `ProTuningHooks`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks, gelu
from dualpath_jax.models.frame_model import patch_grid
from dualpath_jax.models.methods.adapters import DepthwiseConv


class ProTuningHooks(BlockHooks):
    """h + v, v = GELU(conv(h)), conv = 1x1, 5x5 depth-wise, 1x1 (eq. 5), over the patches.

    The class token is left out of the reshape and stays as it is. The last convolution starts at
    zero, so the method starts as the backbone.

    Attributes:
      width: R, channels between the 1x1 convolutions.
      class_tokens: how many tokens come before the patches, 1 or 0.
      dtype: of the computation.
    """

    width: int
    class_tokens: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def on_output(self, h: jax.Array) -> jax.Array:
        """h [M, N, D] -> [M, N, D]."""
        images, tokens, channels = h.shape
        side = patch_grid(tokens - self.class_tokens)
        v = nn.Dense(self.width, dtype=self.dtype, name="down")(h[:, self.class_tokens :])
        v = v.reshape(images, side, side, self.width)
        v = DepthwiseConv((5, 5), dtype=self.dtype, name="conv")(v)
        zeros = nn.initializers.zeros
        v = nn.Dense(channels, kernel_init=zeros, dtype=self.dtype, name="up")(v)
        v = gelu(v).reshape(images, side * side, channels)
        return h + jnp.pad(v, ((0, 0), (self.class_tokens, 0), (0, 0)))

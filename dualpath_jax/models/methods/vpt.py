"""Defines visual prompt tuning (VPT, ref. 37): learnable tokens next to those of the image."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.frame_model import FrameModel


def _prompt_init(patch_size: int) -> Any:
    """Return VPT's initializer, which draws uniformly from +-sqrt(6 / (3 P^2 + D))."""

    def init(rng, shape, dtype=jnp.float32):
        bound = math.sqrt(6.0 / (3 * patch_size**2 + shape[-1]))
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


class DeepPromptHooks(BlockHooks):
    """Places K learnable prompts before the tokens of every block, [e; h] (eq. 3).

    Each block has its own prompts; they are removed from its output.

    Attributes:
      num_prompts: K.
      patch_size: P in pixels, for the initializer.
    """

    num_prompts: int
    patch_size: int

    @nn.compact
    def on_input(self, h: jax.Array, block: Any) -> jax.Array:
        """Map tokens h [M, N, D] to prompts and tokens [M, K + N, D]."""
        del block
        shape = (self.num_prompts, h.shape[-1])
        prompts = self.param("prompts", _prompt_init(self.patch_size), shape).astype(h.dtype)
        return jnp.concatenate([jnp.broadcast_to(prompts, (h.shape[0], *shape)), h], axis=1)

    def on_output(self, h: jax.Array) -> jax.Array:
        """Remove the prompts: h [M, K + N, D] -> [M, N, D]."""
        return h[:, self.num_prompts :]


class ShallowPromptModel(FrameModel):
    """Implements VPT-shallow: K prompts before the patches pass through all blocks.

    They come after class token and registers, and the readout does not see them.

    Parameters: those of `FrameModel` and `prompts` [K, D].

    Attributes:
      num_prompts: K.
    """

    num_prompts: int = 10

    def setup(self):
        super().setup()
        shape = (self.num_prompts, self.config.width)
        self.prompts = self.param("prompts", _prompt_init(self.config.patch_size), shape)

    def embed(self, images: jax.Array) -> jax.Array:
        """Map images [M, H, W, 3] to tokens and prompts [M, N + K, D]."""
        h = super().embed(images)
        prompts = jnp.broadcast_to(self.prompts, (h.shape[0], *self.prompts.shape))
        first = self.config.num_leading_tokens
        return jnp.concatenate([h[:, :first], prompts.astype(h.dtype), h[:, first:]], axis=1)

    def pool(self, h: jax.Array) -> jax.Array:
        """Remove the prompts from tokens h [M, N + K, D], then pool them: [M, D]."""
        first = self.config.num_leading_tokens
        return super().pool(jnp.delete(h, slice(first, first + self.num_prompts), axis=1))

"""The temporal transformer classifier of sec. 3.1, shared by the methods without one of their own.

Public: `TemporalClassifier`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.layers import Sites
from dualpath_jax.models.vit import Block, ViTConfig


class TemporalClassifier(nn.Module):
    """One transformer block over the frames, then an FC on their average (sec. 3.1, ref. 39).

    The block has the backbone's width, heads, MLP and activation; learnable positions are added to
    the frame features before it. All in float32. 7.09M parameters without the FC at D = 768, T = 8.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
      num_prompts: learnable tokens put before the frames; they do not enter the average
        (VideoPrompt, ref. 39, without its text branch).
    """

    config: ViTConfig
    num_classes: int
    num_prompts: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """x [B, T, D] float32 -> logits [B, classes] float32. It has no dropout."""
        del dropout_rng
        normal = nn.initializers.normal(0.02)
        x = x + self.param("position", normal, x.shape[1:])
        if self.num_prompts:
            prompts = self.param("prompts", normal, (self.num_prompts, x.shape[-1]))
            prompts = jnp.broadcast_to(prompts, (x.shape[0], *prompts.shape))
            x = jnp.concatenate([prompts, x], axis=1)
        x = Block(self.config, name="block")(x, Sites(parent=None).bind({}))
        return nn.Dense(self.num_classes, name="output")(x[:, self.num_prompts :].mean(axis=1))

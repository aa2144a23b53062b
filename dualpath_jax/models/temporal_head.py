"""The temporal transformer classifier of sec. 3.1, shared by the methods without one of their own.

Public: `TemporalClassifier`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.registry import BackboneConfig
from dualpath_jax.models.backbones.vit import Block, ViTConfig


def block_config(config: BackboneConfig, width: int) -> ViTConfig:
    """Shape of the block for features of `width`: a ViT's own, or heads of 64 and an MLP of 4 D."""
    if isinstance(config, ViTConfig):
        return config
    return ViTConfig(
        name=f"temporal transformer of {config.name}",
        image_size=config.patch_size,
        patch_size=config.patch_size,
        width=width,
        depth=1,
        heads=max(1, width // 64),
        mlp_dim=4 * width,
        activation=config.activation,
        eps=config.eps,
    )


class TemporalClassifier(nn.Module):
    """One transformer block over the frames, then an FC on their average (sec. 3.1, ref. 39).

    The block has the shape of the backbone's (`block_config`); learnable positions are added to
    the frame features before it. All in float32. 7.09M parameters without the FC at D = 768, T = 8.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
      num_prompts: learnable tokens put before the frames; they do not enter the average
        (VideoPrompt, ref. 39, without its text branch).
    """

    config: BackboneConfig
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
        with layers.full_precision():
            block = Block(block_config(self.config, x.shape[-1]), name="block")
            x = block(x, layers.no_hooks())[:, self.num_prompts :].mean(axis=1)
            return nn.Dense(self.num_classes, name="output")(x)

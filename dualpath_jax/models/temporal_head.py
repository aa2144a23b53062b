"""Defines the temporal transformer classifier (sec. 3.1) of the methods without their own head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.contract import BackboneConfig
from dualpath_jax.models.backbones.vit import Block, ViTConfig


def block_config(config: BackboneConfig, width: int) -> ViTConfig:
    """Return the shape of the transformer block for features of width D = `width`.

    On a ViT it is the shape of the backbone's blocks; otherwise the heads have width 64 and the
    MLP has width 4 D.
    """
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
    """Applies one transformer block over the frames, then an FC on their average (sec. 3.1).

    The block has the shape of a backbone block (see `block_config`). Learnable positions are added
    to the frame features first. Everything is computed in float32.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
      num_prompts: number of learnable tokens placed before the frames; they do not enter the
        average (VideoPrompt, ref. 39, without its text branch).
    """

    config: BackboneConfig
    num_classes: int
    num_prompts: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map frame features x [B, T, D] float32 to logits [B, classes] float32.

        `dropout_rng` is ignored, because the head does not use dropout.
        """
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

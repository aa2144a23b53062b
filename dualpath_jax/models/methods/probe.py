"""Defines probes: small classifiers of the tokens that a frozen backbone makes of single frames.

Axes: B batch, T frames, N tokens of a frame (class token first), M = T N, D width, K heads.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import attention, layers
from dualpath_jax.models.backbones.contract import BackboneConfig
from dualpath_jax.models.frame_model import FrameModel
from dualpath_jax.models.methods.adapters import OrderedReadout
from dualpath_jax.models.temporal_head import block_config


class ProbeHead(nn.Module):
    """Maps the tokens of a clip to logits, in float32.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
    """

    config: BackboneConfig
    num_classes: int

    def compress(self, tokens: jax.Array) -> jax.Array:
        """Return tokens of which the head makes the same logits, fewer ones if it can."""
        return tokens


class LinearProbe(ProbeHead):
    """Applies one FC to two means over all frames: of the class tokens and of the patch tokens.

    A backbone without class tokens has only the second. Registers are not read.
    """

    def compress(self, tokens: jax.Array) -> jax.Array:
        """Return the means of tokens [B, T, N, D] as a clip of one frame: [B, 1, 2 or 1, D]."""
        x = tokens.astype(jnp.float32)
        groups = [x[:, :, self.config.num_leading_tokens :]]  # the patches
        if self.config.has_class_token:
            groups.insert(0, x[:, :, :1])
        return jnp.stack([group.mean(axis=(1, 2)) for group in groups], axis=1)[:, None]

    @nn.compact
    def __call__(self, tokens: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map tokens [B, T, N, D] to logits [B, classes] float32; `dropout_rng` is ignored."""
        del dropout_rng
        x = einops.rearrange(self.compress(tokens), "b 1 n d -> b (n d)")
        with layers.full_precision():
            return nn.Dense(self.num_classes, name="output")(x)


class HeadProjection(nn.Module):
    """Holds the parameters of a linear layer whose outputs are those of K attention heads.

    Attributes:
      width: D.
      heads: K.
      use_bias: have a bias.
    """

    width: int
    heads: int
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | float]:
        """Return the kernel [D, K, D/K], and the bias [D] or 0."""
        shape = (self.width, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:]) if self.use_bias else 0.0
        return einops.rearrange(kernel, "d (k e) -> d k e", k=self.heads), bias


class AttentiveProbe(ProbeHead):
    """Pools all tokens of a clip by the cross attention of one learned query, in one block.

    This is the attentive probe of V-JEPA (Bardes et al. 2024) without its LayerNorm of the tokens,
    which have passed that of the backbone, and without a projection of the query, which is learned
    itself. The tokens of a clip are a set: the head knows places as far as the backbone encodes
    them, but nothing of time.

    With a single query, keys and values of tokens need not be computed, see
    `attention.single_query_attention`. The head therefore takes 2 M K D multiply-accumulates a clip
    for attention instead of 2 M D^2.
    """

    @nn.compact
    def __call__(self, tokens: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map tokens [B, T, N, D] to logits [B, classes] float32; `dropout_rng` is ignored."""
        del dropout_rng
        x = einops.rearrange(tokens, "b t n d -> b (t n) d").astype(jnp.float32)
        width = x.shape[-1]
        block = block_config(self.config, width)
        query = self.param("query_token", nn.initializers.normal(0.02), (width,))
        key_kernel, _ = HeadProjection(width, block.heads, use_bias=False, name="key")()
        value_kernel, value_bias = HeadProjection(width, block.heads, name="value")()
        with layers.full_precision():
            y = attention.single_query_attention(
                query.reshape(1, block.heads, -1),
                x,
                key_kernel,
                value_kernel,
                value_bias.reshape(block.heads, -1),
            )
            z = query + nn.Dense(width, name="out")(einops.rearrange(y, "b k e -> b (k e)"))
            y = nn.LayerNorm(epsilon=block.eps, name="ln")(z)
            z = z + layers.Mlp(4 * width, block.activation, name="mlp")(y)
            return nn.Dense(self.num_classes, name="output")(z)


class OrderedProbe(ProbeHead):
    """Classifies the patch tokens of all frames in order, so that places and time are known.

    Attributes:
      width: channels of a token, see `OrderedReadout`.
    """

    width: int = 16

    @nn.compact
    def __call__(self, tokens: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map tokens [B, T, N, D] to logits [B, classes] float32; `dropout_rng` is ignored."""
        del dropout_rng
        patches = tokens[:, :, self.config.num_leading_tokens :]
        patches = einops.rearrange(patches, "b t n d -> (b t) n d")
        return OrderedReadout(self.width, self.num_classes, tokens.shape[1], name="readout")(
            patches
        )


class ProbeModel(FrameModel):
    """Feeds the tokens of the frozen backbone to a `ProbeHead`."""

    def features(self, frames: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Return the tokens [B, T, N, D] of frames [B, T, H, W, 3], after the final LayerNorm.

        They have the compute dtype.
        """
        del dropout_rng
        h = self.embed(einops.rearrange(frames, "b t h w c -> (b t) h w c"))
        x = self.backbone.token_features(self.backbone.encode(h))
        return einops.rearrange(x, "(b t) n d -> b t n d", t=self.num_frames)


def build_head(options: Any, config: BackboneConfig, num_classes: int) -> ProbeHead:
    """Build the head that `options`, a `config.model.probe`, describes.

    Args:
      options: `head`, and `width`, which only "ordered" reads.
      config: the backbone's shape.
      num_classes: of the data set.
    """
    if options.head == "ordered":
        return OrderedProbe(config, num_classes, options.width, parent=None)
    kind = {"linear": LinearProbe, "attentive": AttentiveProbe}[options.head]
    return kind(config, num_classes, parent=None)

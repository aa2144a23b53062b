"""Defines the model of all methods that see T single frames: backbone, hooks and head.

Axes: B batch, T frames, M = B T images, N tokens (class token first), D width, L blocks.
"""

import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.contract import BackboneConfig
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.backbones.registry import build_backbone


def patch_grid_side(num_patches: int) -> int:
    """Return the side of the square grid that `num_patches` patches form.

    Raises:
      ValueError: `num_patches` is not a square number.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"{num_patches} patches do not form a square grid: the method needs square images"
        )
    return side


class AverageClassifier(nn.Module):
    """Applies one FC to the average of the frame features (sec. 3.1), in float32.

    Attributes:
      num_classes: width of the output.
      dropout: dropout rate on the average, in [0, 1); active when `dropout_rng` is given.
    """

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map frame features x [B, T, D] float32 to logits [B, classes] float32."""
        x = x.mean(axis=1)
        x = nn.Dropout(self.dropout)(x, deterministic=dropout_rng is None, rng=dropout_rng)
        with layers.full_precision():
            return nn.Dense(self.num_classes, name="output")(x)


class FrameModel(nn.Module):
    """Runs each frame through the backbone, then a head on the T frame features.

    Parameters: `backbone`, `adapters` (the parameters of `hooks`, stacked [L, ...], if they have
    any), `head`.

    Attributes:
      config: the backbone's shape.
      num_frames: T.
      head: (frame features [B, T, D] float32, dropout_rng or None) -> logits [B, classes].
      hooks: the method's computations inside a block; None leaves the blocks unchanged.
      dtype: compute dtype of the transformer; frame features and head are float32.
      scan_blocks, remat: see `ViT`.
      cls_token_only: if the backbone reads out its class token, its last block computes only that.
    """

    config: BackboneConfig
    num_frames: int
    head: nn.Module
    hooks: BlockHooks | None = None
    dtype: Any = jnp.float32
    scan_blocks: bool = False
    remat: str = "none"
    cls_token_only: bool = True

    def setup(self):
        self.backbone = build_backbone(self.config, self.dtype, self.scan_blocks, self.remat)
        self.hook_params = None
        if self.hooks is not None and self.hooks.has_parameters:
            self.hook_params = self.param("adapters", self._init_adapters)

    def _init_adapters(self, rng: jax.Array) -> Any:
        """Initialize the parameters of `hooks` for all blocks, stacked [L, ...]."""
        hooks = self.hooks.clone(parent=None)
        return self.backbone.init_hooks(rng, hooks, self.num_frames, self.config.num_tokens)

    def start_from_backbone(self, params: Any) -> Any:
        """Return `params` unchanged: no parameter of the method starts at a backbone value."""
        return params

    def embed(self, images: jax.Array) -> jax.Array:
        """Map images [M, H, W, 3] to the tokens [M, N, D] that enter the first block."""
        return self.backbone.embed(images)

    def pool(self, h: jax.Array) -> jax.Array:
        """Map the tokens that leave the last block, [M, N, D], to frame features [M, D]."""
        return self.backbone.pool(h, project=False)

    def encode(self, frames: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map frames [B, T, H, W, 3] to the tokens that leave the last block, [(B T), N, D]."""
        h = self.embed(einops.rearrange(frames, "b t h w c -> (b t) h w c"))
        return self.backbone.encode(
            h, self.hooks, self.hook_params, dropout_rng, self.cls_token_only
        )

    def features(self, frames: jax.Array, dropout_rng: jax.Array | None = None) -> Any:
        """Return the head's input: pooled features [B, T, D] float32 of frames [B, T, H, W, 3].

        The feature of a frame is the backbone's readout before a projection to a joint space.
        """
        x = self.pool(self.encode(frames, dropout_rng)).astype(jnp.float32)
        return einops.rearrange(x, "(b t) d -> b t d", t=self.num_frames)

    def __call__(
        self,
        spatial: jax.Array,
        temporal: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the logits of a batch of clips; see `registry.Method.build`.

        Args:
          spatial: [B, T, H, W, 3] frames, normalized with the mean and std of the pretraining.
          temporal: must be None, because these methods do not use framesets.
          dropout_rng: key that switches on dropout and stochastic depth (training), or None.

        Returns:
          [B, classes] float32.

        Raises:
          ValueError: `temporal` is given, or `spatial` does not have T frames.
        """
        if temporal is not None:
            raise ValueError(
                "this method does not use framesets, but got an array `temporal` of shape "
                f"{temporal.shape}: pass None"
            )
        if spatial.shape[1] != self.num_frames:
            raise ValueError(
                f"the clips have {spatial.shape[1]} frames, but the model is built for "
                f"data.num_frames={self.num_frames}: the shape of spatial must be "
                f"[B, {self.num_frames}, H, W, 3]"
            )
        rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        return self.head(self.features(spatial, rngs[0]), rngs[1])


class TemporalPositionModel(FrameModel):
    """Adds learnable temporal positions to all tokens of a frame, as AIM and ZeroI2V do.

    The positions start at zero and are added together with the backbone's, before its `ln_pre`.
    Parameters: those of `FrameModel` and `temporal_position` [T, D].
    """

    def setup(self):
        super().setup()
        shape = (self.num_frames, self.config.width)
        self.temporal_position = self.param("temporal_position", nn.initializers.zeros, shape)

    def embed(self, images: jax.Array) -> jax.Array:
        """Map images [(B T), H, W, 3] to tokens [(B T), N, D]."""
        backbone = self.backbone
        position = backbone.position_embedding + self.temporal_position[:, None]  # [T, N, D]
        position = jnp.tile(position, (images.shape[0] // self.num_frames, 1, 1))
        return backbone.embed(images, position=position)

"""Methods that see T single frames: a backbone, what is tuned inside its blocks, a head.

Public: `FrameModel`, `AverageClassifier`, `patch_grid`.

Axes: B batch, T frames, M = B T images, N tokens (class token first), D width, L blocks.
"""

import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.backbones.registry import BackboneConfig, build_backbone


def patch_grid(tokens: int) -> int:
    """Side of the square that `tokens` patches make; ValueError when they make none."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} patches are not a square: the method needs square images")
    return side


class AverageClassifier(nn.Module):
    """One FC on the average of the frames (sec. 3.1), computed in float32.

    Attributes:
      num_classes: width of the output.
      dropout: rate on the average; active when `dropout_rng` is given.
    """

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """x [B, T, D] float32 -> logits [B, classes] float32."""
        x = x.mean(axis=1)
        x = nn.Dropout(self.dropout)(x, deterministic=dropout_rng is None, rng=dropout_rng)
        with layers.full_precision():
            return nn.Dense(self.num_classes, name="output")(x)


class FrameModel(nn.Module):
    """Each frame through the backbone, then a head on the T frame features.

    Parameters: `backbone`, `adapters` (those of `hooks`, stacked [L, ...]), `head`.

    Attributes:
      config: the backbone's shape.
      num_frames: T.
      head: (frame features [B, T, D] float32, dropout_rng or None) -> logits [B, classes].
      hooks: what the method does inside a block; None for the backbone as it is.
      dtype: compute dtype of the transformer; frame features and head are float32.
      scan_blocks, remat: see `ViT`.
      cls_token_only: where the backbone has a class token, compute no other token in its last block.
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
        if self.hooks is not None:
            self.hook_params = self.param("adapters", self._init_adapters)

    def _init_adapters(self, rng: jax.Array) -> Any:
        hooks = self.hooks.clone(parent=None)
        return self.backbone.init_hooks(rng, hooks, self.num_frames, self.config.num_tokens)

    def start_from_backbone(self, params: Any) -> Any:
        """`params` as they are: nothing starts at the backbone's values but the backbone."""
        return params

    def embed(self, images: jax.Array) -> jax.Array:
        """images [M, H, W, 3] -> the tokens that enter the first block [M, N, D]."""
        return self.backbone.embed(images)

    def features(self, frames: jax.Array, dropout_rng: jax.Array | None = None) -> Any:
        """What the head reads: LN'd class tokens, frames [B, T, H, W, 3] -> [B, T, D] float32."""
        h = self.embed(einops.rearrange(frames, "b t h w c -> (b t) h w c"))
        h = self.backbone.encode(h, self.hooks, self.hook_params, dropout_rng, self.cls_token_only)
        x = self.backbone.pool(h, project=False).astype(jnp.float32)
        return einops.rearrange(x, "(b t) d -> b t d", t=self.num_frames)

    def __call__(
        self,
        spatial: jax.Array,
        temporal: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of a batch of clips; see `tuning.Method.build`.

        Args:
          spatial: [B, T, H, W, 3], normalised as the weights want it.
          temporal: None; these methods take no framesets.
          dropout_rng: switches on dropout and stochastic depth (training).

        Returns:
          [B, classes] float32.
        """
        if temporal is not None:
            raise ValueError(
                f"this method takes no framesets, but got temporal of shape {temporal.shape}"
            )
        if spatial.shape[1] != self.num_frames:
            raise ValueError(
                f"clips of {spatial.shape[1]} frames, but the model is built for data.num_frames="
                f"{self.num_frames}: spatial must be [B, {self.num_frames}, H, W, 3]"
            )
        rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        return self.head(self.features(spatial, rngs[0]), rngs[1])

"""Defines ZeroI2V (Li et al., ECCV 2024): linear adapters, and heads that see other frames.

After training the adapters cost nothing: `merge.merge_hooks` computes them into the weights. The
heads only read keys and values of another frame; the last block must therefore compute those of all
tokens.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.adapters import Adapter


class FrameShiftHooks(BlockHooks):
    """Lets the first heads of each block attend to other frames.

    The first `heads_per_offset` heads of frame t take their keys and values from frame
    t + offsets[0], the next ones from t + offsets[1], and so on; the other heads stay in their
    frame. Where the clip has no such frame, a head stays in its frame.

    Attributes:
      num_frames: T.
      offsets: frames, positive for later ones.
      heads_per_offset: number of heads with the same offset.
    """

    pointwise: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    shifts_heads: ClassVar[bool] = True
    num_frames: int
    offsets: tuple[int, ...]
    heads_per_offset: int

    def shift_heads(self, x: jax.Array) -> jax.Array:
        """Map the keys or values of all frames, x [(B T), ..., K, d]; the shape stays."""
        clips = x.reshape(-1, self.num_frames, *x.shape[1:])
        first, parts = 0, []
        for offset in self.offsets:
            heads = clips[..., first : first + self.heads_per_offset, :]
            if offset < 0:
                moved = [heads[:, :-offset], heads[:, :offset]]
            else:
                moved = [heads[:, offset:], heads[:, -offset:]]
            parts.append(jnp.concatenate(moved, axis=1))
            first += self.heads_per_offset
        return jnp.concatenate([*parts, clips[..., first:, :]], axis=-2).reshape(x.shape)


class ZeroI2VHooks(FrameShiftHooks):
    """Adds linear adapters, x + s ((x W_down + b) W_up + c), around attention and MLP.

    Attributes:
      adapter: template of the four adapters, with skip and without activation.
    """

    has_parameters: ClassVar[bool] = True
    adapter: Adapter

    def setup(self):
        self.attention_in = self.adapter.clone()
        self.attention_out = self.adapter.clone()
        self.mlp_in = self.adapter.clone()
        self.mlp_out = self.adapter.clone()

    def before_attention(self, x: jax.Array) -> jax.Array:
        return self.attention_in(x)

    def after_attention(self, y: jax.Array) -> jax.Array:
        return self.attention_out(y)

    def before_mlp(self, x: jax.Array) -> jax.Array:
        return self.mlp_in(x)

    def after_mlp(self, y: jax.Array) -> jax.Array:
        return self.mlp_out(y)

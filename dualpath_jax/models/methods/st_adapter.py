"""Defines ST-Adapter (ref. 55): an adapter with a depthwise convolution over space and time."""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks, gelu
from dualpath_jax.models.frame_model import FrameModel, patch_grid_side
from dualpath_jax.models.methods.adapters import DepthwiseConv

_ZEROS, _DEFAULT = nn.initializers.zeros, nn.initializers.lecun_normal()
_KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def _convolve(conv: DepthwiseConv, patches: jax.Array, num_frames: int) -> jax.Array:
    """Convolve patches [(B T), side^2, R] over time, rows and columns; the shape stays."""
    side = patch_grid_side(patches.shape[1])
    y = einops.rearrange(patches, "(b t) (h w) r -> b t h w r", t=num_frames, h=side, w=side)
    return einops.rearrange(conv(y), "b t h w r -> (b t) (h w) r")


class STAdapterHooks(BlockHooks):
    """Adds s GELU(conv(LN(z) W_down)) W_up parallel to the MLP of each block (eq. 6).

    W_up starts at zero. Class token and registers pass through the same convolution, each as
    frames of one patch.

    Attributes:
      num_frames: T.
      width: R, the inner width.
      kernel_size: (time, rows, columns) of the convolution, odd numbers.
      scale: s.
      leading_tokens: number of tokens before the patches: class token and registers.
      dtype: compute dtype.
    """

    num_frames: int
    width: int = 384
    kernel_size: tuple[int, int, int] = (3, 1, 1)
    scale: float = 1.0
    leading_tokens: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def parallel_to_mlp(self, x: jax.Array) -> jax.Array:
        conv = DepthwiseConv(self.kernel_size, _DEFAULT, dtype=self.dtype, name="conv")
        up = nn.Dense(x.shape[-1], kernel_init=_ZEROS, dtype=self.dtype, name="up")
        y = nn.Dense(self.width, kernel_init=_KAIMING, dtype=self.dtype, name="down")(x)

        first = self.leading_tokens
        patches = _convolve(conv, y[:, first:], self.num_frames)
        if first:
            sizes = {"t": self.num_frames, "n": first}
            leading = einops.rearrange(y[:, :first], "(b t) n r -> (b n) t 1 1 r", **sizes)
            leading = einops.rearrange(conv(leading), "(b n) t 1 1 r -> (b t) n r", **sizes)
            patches = jnp.concatenate([leading, patches], axis=1)
        return self.scale * up(gelu(patches))


class ReleasedSTAdapter(nn.Module):
    """Adds s conv(h W_down) W_up to the patches h, without an activation.

    The convolution starts at zero. The attributes are those of `STAdapterHooks`.
    """

    num_frames: int
    width: int = 384
    kernel_size: tuple[int, int, int] = (3, 1, 1)
    scale: float = 1.0
    leading_tokens: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Map tokens h [(B T), N, D] to tokens of the same shape."""
        conv = DepthwiseConv(self.kernel_size, _ZEROS, dtype=self.dtype, name="conv")
        up = nn.Dense(h.shape[-1], kernel_init=_DEFAULT, dtype=self.dtype, name="up")
        first = self.leading_tokens
        y = nn.Dense(self.width, kernel_init=_KAIMING, dtype=self.dtype, name="down")(h[:, first:])
        y = up(_convolve(conv, y, self.num_frames))
        return h + self.scale * jnp.pad(y, ((0, 0), (first, 0), (0, 0)))


class ReleasedSTAdapterHooks(BlockHooks):
    """Adapts the tokens before attention, before the MLP or before both.

    This is the form of the code that ST-Adapter's authors released.

    Attributes:
      adapter: describes each adapter.
      places: "attention", "mlp" or both.
    """

    adapter: ReleasedSTAdapter
    places: tuple[str, ...]

    def setup(self):
        if "attention" in self.places:
            self.attention_adapter = self.adapter.clone()
        if "mlp" in self.places:
            self.mlp_adapter = self.adapter.clone()

    def on_input(self, h: jax.Array, block: Any) -> jax.Array:
        del block
        return self.attention_adapter(h) if "attention" in self.places else h

    def on_middle(self, z: jax.Array) -> jax.Array:
        return self.mlp_adapter(z) if "mlp" in self.places else z


class ReleasedSTAdapterModel(FrameModel):
    """Averages the tokens over the frames before the last LayerNorm, as the released code does."""

    def features(self, frames: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        """Map frames [B, T, H, W, 3] to the readout of the average frame, [B, 1, D] float32."""
        h = self.encode(frames, dropout_rng)
        h = einops.reduce(h, "(b t) ... -> b ...", "mean", t=self.num_frames)
        return self.pool(h).astype(jnp.float32)[:, None]

"""Defines the small trainable modules that adapt a frozen transformer."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models.backbones import kernels as kernels_lib
from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.block_loop import checkpoint_activation
from dualpath_jax.models.backbones.kernels import Kernels
from dualpath_jax.models.backbones.layers import BlockHooks, gelu


@dataclasses.dataclass(frozen=True)
class FramesetLayout:
    """Describes where the frames of a clip are among the tokens of its framesets.

    Attributes:
      num_framesets: G.
      grid: (w, h), frames across and down a frameset.
      side: patches along a side of a frame inside the frameset.
      leading_tokens: number of tokens before the patches: class token and registers.
    """

    num_framesets: int
    grid: tuple[int, int]
    side: int
    leading_tokens: int

    def to_frames(self, x: jax.Array) -> jax.Array:
        """Arrange patch tokens [(B G), N, R] by frames: [B, T, side, side, R]."""
        sizes = {"g": self.num_framesets, "w": self.grid[0], "h": self.grid[1], "r": self.side}
        return einops.rearrange(x, "(b g) (h r w c) k -> b (g h w) r c k", **sizes, c=self.side)

    def to_tokens(self, x: jax.Array) -> jax.Array:
        """Arrange frames [B, T, side, side, R] as patch tokens: [(B G), N, R]."""
        sizes = {"g": self.num_framesets, "w": self.grid[0], "h": self.grid[1]}
        return einops.rearrange(x, "b (g h w) r c k -> (b g) (h r w c) k", **sizes)


def _start_as_identity(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Initialize the kernel of a depthwise convolution over time so that it changes nothing."""
    del rng
    return jnp.zeros(shape, dtype).at[shape[0] // 2].set(1.0)


class Adapter(nn.Module):
    """Applies a bottleneck adapter: s W_up f(W_down x), with biases; its output starts at zero.

    With `time_kernel_size` K, a depthwise convolution over the K frames around a frame, at the same
    place in each, comes before f (ours, as in ST-Adapter); class token and registers skip it.

    Attributes:
      bottleneck: R, the inner width (paper: 128).
      scale: s, a constant factor on the output.
      dropout: dropout rate after the activation, in [0, 1); active when a "dropout" rng is given.
      layer_norm: normalize the input with the adapter's own LayerNorm.
      skip: add the input to the output.
      time_kernel_size: K, an odd number, or 0 for no convolution.
      layout: of the framesets whose tokens the adapter maps; only used with `time_kernel_size`.
      kernels: implementations for the hardware; `dense` computes the products.
      activation: f.
      down_init: initializer of W_down; Kaiming normal N(0, 2/fan_in) without truncation, unlike
        `he_normal`.
      dtype: compute dtype.
    """

    bottleneck: int = 128
    scale: float = 1.0
    dropout: float = 0.0
    layer_norm: bool = False
    skip: bool = False
    time_kernel_size: int = 0
    layout: FramesetLayout | None = None
    kernels: Kernels = kernels_lib.DEFAULT
    activation: Callable[[jax.Array], jax.Array] = gelu
    down_init: Any = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D], with `time_kernel_size` [(B G), N, D], to an array of the same shape."""

        def dense(features: int, **options: Any) -> nn.Dense:
            return self.kernels.dense(features, dtype=self.dtype, **options)

        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ln")(x) if self.layer_norm else x
        y = checkpoint_activation(
            dense(self.bottleneck, kernel_init=self.down_init, name="down")(y), "down"
        )
        if self.time_kernel_size:
            y = self._convolve(y)
        y = self.activation(y)
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        zeros = nn.initializers.zeros
        y = dense(x.shape[-1], kernel_init=zeros, name="up")(y)
        y = y * self.scale
        return x + y if self.skip else y

    def _convolve(self, y: jax.Array) -> jax.Array:
        """Convolve hidden activations y [(B G), N, R] over time; the shape stays."""
        first = self.layout.leading_tokens
        conv = DepthwiseConv(
            (self.time_kernel_size, 1, 1), _start_as_identity, dtype=self.dtype, name="conv"
        )
        patches = self.layout.to_tokens(conv(self.layout.to_frames(y[:, first:])))
        return jnp.concatenate([y[:, :first], patches], axis=1) if first else patches


class ParallelAdapterHooks(BlockHooks):
    """Adapts the spatial path: one adapter parallel to attention, one parallel to the MLP (eq. 7).

    Attributes:
      adapter: template of both adapters.
    """

    pointwise: ClassVar[bool] = True
    adapter: Adapter

    def setup(self):
        self.attention = self.adapter.clone()
        self.mlp = self.adapter.clone()

    def parallel_to_attention(self, x: jax.Array) -> jax.Array:
        return self.attention(x)

    def parallel_to_mlp(self, x: jax.Array) -> jax.Array:
        return self.mlp(x)


class SerialAdapterHooks(BlockHooks):
    """Adapts the temporal path: one adapter after attention, one after the MLP (eq. 9).

    Attributes:
      adapter: template of all adapters.
      serial_skip: use y + Adapter(y), which starts as the frozen backbone, instead of eq. 9's
        Adapter(y), which starts at zero, so that the path starts as the identity.
      pre_attention: add an adapter before attention (SSv2; the fifth of Table A1).
      pre_attention_residual: use x + Adapter(x) before attention instead of Adapter(x).
    """

    adapter: Adapter
    serial_skip: bool = False
    pre_attention: bool = False
    pre_attention_residual: bool = True

    @property
    def pointwise(self) -> bool:
        """Return whether no hook mixes tokens, see `BlockHooks`."""
        return not self.adapter.time_kernel_size

    def setup(self):
        self.attention = self.adapter.clone(skip=self.serial_skip)
        self.mlp = self.adapter.clone(skip=self.serial_skip)
        if self.pre_attention:
            self.before = self.adapter.clone(skip=self.pre_attention_residual)

    def before_attention(self, x: jax.Array) -> jax.Array:
        return self.before(x) if self.pre_attention else x

    def after_attention(self, y: jax.Array) -> jax.Array:
        return self.attention(checkpoint_activation(y, "branch"))

    def after_mlp(self, y: jax.Array) -> jax.Array:
        return self.mlp(checkpoint_activation(y, "branch"))


class MlpClassifier(nn.Module):
    """Applies Linear(2e -> e), GELU and Linear(e -> classes) in float32 (sec. 4.2).

    Attributes:
      hidden: e, the width of one path's features.
      num_classes: width of the output.
    """

    hidden: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map the features of both paths x [B, 2e] float32 to logits [B, classes] float32."""
        with layers.full_precision():
            x = gelu(nn.Dense(self.hidden, name="hidden")(x))
            return nn.Dense(self.num_classes, name="output")(x)


class DepthwiseConv(nn.Module):
    """Applies a depthwise convolution (stride 1, zero padding) as a sum of shifted inputs.

    On CPUs it is faster than `nn.Conv` with groups, which gives the same result; see
    docs/notes/measurements.md.

    Attributes:
      kernel_size: an odd size for each axis between batch and channels.
      kernel_init: initializer of the kernel [*kernel_size, 1, R], as in `nn.Conv`.
      dtype: dtype of the result; the sum is computed in float32.
    """

    kernel_size: tuple[int, ...]
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, ..., R] to an array of the same shape."""
        shape = (*self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:]).astype(self.dtype)
        padding = [(0, 0), *((size // 2, size // 2) for size in self.kernel_size), (0, 0)]
        padded = jnp.pad(x.astype(self.dtype), padding).astype(jnp.float32)
        total = bias.astype(jnp.float32)
        for tap in np.ndindex(*self.kernel_size):
            window = tuple(slice(i, i + n) for i, n in zip(tap, x.shape[1:-1], strict=True))
            total = total + padded[:, *window] * kernel[*tap, 0].astype(jnp.float32)
        return total.astype(self.dtype)


class OrderedReadout(nn.Module):
    """Summarizes the patch tokens of a clip's images in order: place and time are kept (ours).

    Each token is projected to `width` channels. After GELU, the channels of all tokens of a clip,
    one after the other, are projected to the features. With `frame_width`, the channels of the
    tokens of each frame are first projected to so many features of the frame, by the same weights
    for all frames, and GELU; then the features of all frames are projected.

    Attributes:
      width: channels of a token.
      features: e.
      num_images: G framesets, or T frames of a clip.
      frame_width: features of a frame, or 0.
      layout: where the frames are among the tokens of framesets; None if the images are frames.
    """

    width: int
    features: int
    num_images: int
    frame_width: int = 0
    layout: FramesetLayout | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map normalized patch tokens [(B images), N, D] to features [B, e] float32."""
        with layers.full_precision():
            x = gelu(nn.Dense(self.width, name="token")(tokens.astype(jnp.float32)))
            if self.layout is None or not self.frame_width:
                x = einops.rearrange(x, "(b i) n k -> b i (n k)", i=self.num_images)
            else:
                x = einops.rearrange(self.layout.to_frames(x), "b t r c k -> b t (r c k)")
            if self.frame_width:
                x = gelu(nn.Dense(self.frame_width, name="frame")(x))
            x = einops.rearrange(x, "b i k -> b (i k)")
            return nn.Dense(self.features, name="output")(x)

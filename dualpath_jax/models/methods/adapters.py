"""Small trainable modules that adapt a frozen transformer.

Public: `Adapter`, `ParallelAdapterHooks` (eq. 7), `SerialAdapterHooks` (eq. 9), `MlpClassifier`,
`DepthwiseConv`.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models.backbones import layers
from dualpath_jax.models.backbones.block_loop import checkpoint_activation
from dualpath_jax.models.backbones.layers import BlockHooks, gelu


class Adapter(nn.Module):
    """Bottleneck adapter: W_up GELU(W_down x), with biases; the output starts at zero.

    Attributes:
      bottleneck: R, the inner width (paper: 128).
      scale: s, a constant factor on the output.
      dropout: rate after the activation; active when a "dropout" rng is given.
      layer_norm: normalise the input by a LayerNorm of its own.
      skip: add the input to the output.
      for_cpu: see `layers.dense`.
    """

    bottleneck: int = 128
    scale: float = 1.0
    dropout: float = 0.0
    layer_norm: bool = False
    skip: bool = False
    for_cpu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""

        def dense(features: int, **options: Any) -> nn.Dense:
            return layers.dense(features, self.dtype, self.for_cpu, **options)

        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ln")(x) if self.layer_norm else x
        # Kaiming normal N(0, 2/fan_in), not truncated as `he_normal` is.
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        y = checkpoint_activation(
            dense(self.bottleneck, kernel_init=kaiming, name="down")(y), "down"
        )
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(gelu(y))
        zeros = nn.initializers.zeros
        y = dense(x.shape[-1], kernel_init=zeros, name="up")(y)
        y = y * self.scale
        return x + y if self.skip else y


class ParallelAdapterHooks(BlockHooks):
    """Spatial path: one adapter beside attention, one beside the MLP (eq. 7)."""

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
    """Temporal path: one adapter after attention, one after the MLP (eq. 9).

    Attributes:
      adapter: the form of each.
      serial_skip: y + Adapter(y) instead of eq. 9's Adapter(y), which starts as the identity path.
      pre_attention: one more adapter before attention (SSv2; Table A1's fifth).
      pre_attention_residual: x + Adapter(x) there, instead of Adapter(x).
    """

    pointwise: ClassVar[bool] = True
    adapter: Adapter
    serial_skip: bool = False
    pre_attention: bool = False
    pre_attention_residual: bool = True

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
    """Linear(2e -> e), GELU, Linear(e -> classes), computed in float32 (sec. 4.2)."""

    hidden: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, 2e] float32 -> logits [B, classes] float32."""
        with layers.full_precision():
            x = gelu(nn.Dense(self.hidden, name="hidden")(x))
            return nn.Dense(self.num_classes, name="output")(x)


class DepthwiseConv(nn.Module):
    """Depth-wise convolution with stride 1 and zero padding, as a sum of shifted inputs.

    `nn.Conv` with groups gives the same, 13 to 34 times more slowly on a CPU (3x1x1 and 3x3x3 on
    [16, 4, 8, 8, 96], forward and backward, measured with jax 0.10.2).

    Attributes:
      kernel_size: an odd size for each axis between batch and channels.
      kernel_init: as `nn.Conv`'s, for the kernel [*kernel_size, 1, R].
      dtype: of the result; the sum is float32.
    """

    kernel_size: tuple[int, ...]
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, ..., R] -> likewise."""
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

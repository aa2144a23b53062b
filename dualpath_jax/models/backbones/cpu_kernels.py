"""Layers and sums written so that XLA computes them fastest on a CPU (jax 0.10.2).

Public: `Dense` and `LayerNorm`, with the parameters and the results of Flax's, and what they
compute, `affine` and `layer_norm`; `row_max`, `row_sum`, `column_sum`.

XLA's CPU code takes a sum or a maximum of neighbouring numbers one after the other, and the sum of
a matrix's rows column by column. Here numbers are joined in pieces of `_PIECE` first, as many at a
time as the processor can, and rows are added by a product. Other devices get plain sums.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_PIECE = 32


def row_max(x: jax.Array) -> jax.Array:
    """Over the last axis: x [..., N] -> [..., 1]."""
    plain = functools.partial(jnp.max, axis=-1, keepdims=True)
    return jax.lax.platform_dependent(x, cpu=_row_max, default=plain)


def row_sum(x: jax.Array) -> jax.Array:
    """Over the last axis: x [..., N] -> [..., 1]."""
    plain = functools.partial(jnp.sum, axis=-1, keepdims=True)
    return jax.lax.platform_dependent(x, cpu=_row_sum, default=plain)


def column_sum(x: jax.Array) -> jax.Array:
    """Over all axes but the last: x [..., D] -> [D]."""
    rows = x.reshape(-1, x.shape[-1])
    plain = functools.partial(jnp.sum, axis=0)
    return jax.lax.platform_dependent(rows, cpu=_column_sum, default=plain)


def _row_max(x: jax.Array) -> jax.Array:
    length = x.shape[-1]
    starts = [max(0, min(i, length - _PIECE)) for i in range(0, length, _PIECE)]
    pieces = [x[..., start : start + _PIECE] for start in starts]  # the last two may overlap
    return functools.reduce(jnp.maximum, pieces).max(axis=-1, keepdims=True)


def _row_sum(x: jax.Array) -> jax.Array:
    whole = x.shape[-1] // _PIECE * _PIECE
    pieces = [x[..., start : start + _PIECE] for start in range(0, whole, _PIECE)]
    rest = x[..., whole:].sum(axis=-1, keepdims=True)
    return functools.reduce(jnp.add, pieces).sum(axis=-1, keepdims=True) + rest if whole else rest


def _column_sum(rows: jax.Array) -> jax.Array:
    ones = jnp.ones(len(rows), rows.dtype)
    return jnp.matmul(ones, rows, preferred_element_type=jnp.float32).astype(rows.dtype)


def _if_trained(parameter: Any) -> jax.Array | None:
    """Of a parameter with symbolic zeros: its value, or None where no gradient is asked for."""
    return parameter.value if parameter.perturbed else None


@jax.custom_vjp
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O] + bias [O].

    In the backward pass a product with a transposed factor takes up to twice as long where that is
    the larger one. Then the barriers make XLA turn round the smaller one, and what comes out.
    """
    return x @ kernel + bias


def _affine_forward(x: Any, kernel: Any, bias: Any) -> tuple[jax.Array, Any]:
    kept_x = x.value if kernel.perturbed else None  # a frozen kernel needs no gradient
    y = affine(x.value, kernel.value, bias.value)
    return y, (kept_x, kernel.value, _if_trained(bias))


def _affine_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, kernel, trained_bias = kept
    d_rows = dy.reshape(-1, dy.shape[-1])
    barrier = jax.lax.optimization_barrier
    if len(d_rows) < min(kernel.shape):
        dx = barrier(kernel @ barrier(d_rows.T)).T
    else:
        dx = d_rows @ kernel.T
    d_kernel = None
    if x is not None:
        rows = x.reshape(-1, x.shape[-1])
        tall = kernel.shape[0] > kernel.shape[1]
        d_kernel = barrier(d_rows.T @ rows).T if tall else rows.T @ d_rows
    d_bias = None if trained_bias is None else column_sum(dy)
    return dx.reshape(*dy.shape[:-1], -1), d_kernel, d_bias


affine.defvjp(_affine_forward, _affine_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Rows of x [..., D], shifted and scaled to mean 0 and variance 1, times scale [D] + bias [D].

    float32 in and out; `epsilon` is added to the variance.
    """
    return _normalise(x, scale, bias, epsilon)[0]


def _normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of `layer_norm`: the result, and the rows' mean and inverse standard deviation [..., 1]."""
    mean, mean_of_squares = (row_sum(y) / x.shape[-1] for y in (x, x * x))
    variance = jnp.maximum(0, mean_of_squares - mean * mean)
    factor = jax.lax.rsqrt(variance + epsilon)
    return (x - mean) * (factor * scale) + bias, mean, factor


def _layer_norm_forward(x: Any, scale: Any, bias: Any, epsilon: float) -> tuple[jax.Array, Any]:
    y, mean, factor = _normalise(x.value, scale.value, bias.value, epsilon)
    return y, (x.value, scale.value, mean, factor, _if_trained(scale), _if_trained(bias))


def _layer_norm_backward(epsilon: float, kept: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    del epsilon
    x, scale, mean, factor, trained_scale, trained_bias = kept
    normal, d_normal = (x - mean) * factor, dy * scale
    shift, slope = (row_sum(y) / x.shape[-1] for y in (d_normal, d_normal * normal))
    dx = (d_normal - shift - normal * slope) * factor
    d_scale = None if trained_scale is None else column_sum(dy * normal)
    d_bias = None if trained_bias is None else column_sum(dy)
    return dx, d_scale, d_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward, symbolic_zeros=True)


class Dense(nn.Dense):
    """`nn.Dense`, computed by `affine`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        return affine(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, computed by `layer_norm`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", self.bias_init, x.shape[-1:], self.param_dtype)
        arrays = (leaf.astype(jnp.float32) for leaf in (x, scale, bias))
        return layer_norm(*arrays, self.epsilon).astype(self.dtype)

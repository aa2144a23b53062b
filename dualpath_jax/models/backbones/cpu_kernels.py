"""Computes layers and sums in the form that XLA runs fastest on a CPU (jax 0.10.2).

`Dense` and `LayerNorm` have the parameters and the results of Flax's.

XLA's CPU code adds or compares neighboring numbers one by one, and it adds the rows of a matrix
column by column. Here numbers are first combined in vectors of `_VECTOR`, which the processor does
in parallel, and rows are added by a matrix product. Other devices get plain sums.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_VECTOR = 32


def row_max(x: jax.Array) -> jax.Array:
    """Compute the maximum over the last axis: x [..., N] -> [..., 1]."""
    plain = functools.partial(jnp.max, axis=-1, keepdims=True)
    return jax.lax.platform_dependent(x, cpu=_row_max, default=plain)


def row_sum(x: jax.Array) -> jax.Array:
    """Compute the sum over the last axis: x [..., N] -> [..., 1]."""
    plain = functools.partial(jnp.sum, axis=-1, keepdims=True)
    return jax.lax.platform_dependent(x, cpu=_row_sum, default=plain)


def column_sum(x: jax.Array) -> jax.Array:
    """Compute the sum over all axes except the last: x [..., D] -> [D]."""
    rows = x.reshape(-1, x.shape[-1])
    plain = functools.partial(jnp.sum, axis=0)
    return jax.lax.platform_dependent(rows, cpu=_column_sum, default=plain)


def _row_max(x: jax.Array) -> jax.Array:
    length = x.shape[-1]
    starts = [max(0, min(i, length - _VECTOR)) for i in range(0, length, _VECTOR)]
    pieces = [x[..., start : start + _VECTOR] for start in starts]  # the last two may overlap
    return functools.reduce(jnp.maximum, pieces).max(axis=-1, keepdims=True)


def _row_sum(x: jax.Array) -> jax.Array:
    aligned = x.shape[-1] // _VECTOR * _VECTOR
    pieces = [x[..., start : start + _VECTOR] for start in range(0, aligned, _VECTOR)]
    rest = x[..., aligned:].sum(axis=-1, keepdims=True)
    return functools.reduce(jnp.add, pieces).sum(axis=-1, keepdims=True) + rest if aligned else rest


def _column_sum(rows: jax.Array) -> jax.Array:
    ones = jnp.ones(len(rows), rows.dtype)
    return jnp.matmul(ones, rows, preferred_element_type=jnp.float32).astype(rows.dtype)


def _value_if_trained(parameter: Any) -> jax.Array | None:
    """Return the value of a `custom_vjp` argument, or None if its gradient is not needed."""
    return parameter.value if parameter.perturbed else None


@jax.custom_vjp
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Compute x [..., I] @ kernel [I, O] + bias [O].

    In the backward pass a product is slow if the transposed factor is the larger one. Barriers then
    make XLA transpose the smaller factor and the result instead.
    """
    return x @ kernel + bias


def _affine_forward(x: Any, kernel: Any, bias: Any) -> tuple[jax.Array, Any]:
    saved_x = x.value if kernel.perturbed else None  # a frozen kernel needs no gradient
    y = affine(x.value, kernel.value, bias.value)
    return y, (saved_x, kernel.value, _value_if_trained(bias))


def _affine_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    """Return the gradients of x, kernel and bias; None for a frozen kernel or bias."""
    x, kernel, trained_bias = saved
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
    """Normalize the rows of x [..., D] to mean 0 and variance 1, then apply scale and bias [D].

    All arrays are float32; `epsilon` is added to the variance.
    """
    return _normalize(x, scale, bias, epsilon)[0]


def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the result of `layer_norm`, and mean and inverse deviation [..., 1] of the rows."""
    mean, mean_of_squares = (row_sum(y) / x.shape[-1] for y in (x, x * x))
    variance = jnp.maximum(0, mean_of_squares - mean * mean)
    factor = jax.lax.rsqrt(variance + epsilon)
    return (x - mean) * (factor * scale) + bias, mean, factor


def _layer_norm_forward(x: Any, scale: Any, bias: Any, epsilon: float) -> tuple[jax.Array, Any]:
    y, mean, factor = _normalize(x.value, scale.value, bias.value, epsilon)
    return y, (
        x.value,
        scale.value,
        mean,
        factor,
        _value_if_trained(scale),
        _value_if_trained(bias),
    )


def _layer_norm_backward(epsilon: float, saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    """Return the gradients of x, scale and bias; None for a frozen scale or bias."""
    del epsilon
    x, scale, mean, factor, trained_scale, trained_bias = saved
    normal, d_normal = (x - mean) * factor, dy * scale
    shift, slope = (row_sum(y) / x.shape[-1] for y in (d_normal, d_normal * normal))
    dx = (d_normal - shift - normal * slope) * factor
    d_scale = None if trained_scale is None else column_sum(dy * normal)
    d_bias = None if trained_bias is None else column_sum(dy)
    return dx, d_scale, d_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward, symbolic_zeros=True)


class Dense(nn.Dense):
    """Applies `nn.Dense`, computed by `affine`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., I] to [..., O]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        return affine(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


class LayerNorm(nn.LayerNorm):
    """Applies `nn.LayerNorm`, computed by `layer_norm`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [..., D]."""
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", self.bias_init, x.shape[-1:], self.param_dtype)
        arrays = (leaf.astype(jnp.float32) for leaf in (x, scale, bias))
        return layer_norm(*arrays, self.epsilon).astype(self.dtype)

"""Attention of queries to keys and values, in the form that is fastest where it is computed.

Public: `attention`, `single_query_attention`, `flash_attention`, `can_use_flash_attention`, `has_flash_attention`,
`attention_weights`.

Axes: M images, N tokens (Q of them queries), K heads, d width of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import block_loop, cpu_kernels


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """Of queries [M, Q, K, d], keys [M, N, K, d]: float32 [M, K, Q, N], rows of keys sum to 1."""
    exp, total = _exp_of_products(*_heads_first(q * q.shape[-1] ** -0.5, k))
    return exp / total


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention: q [M, Q, K, d]; k, v [M, N, K, d] -> [M, Q, K, d]; softmax in float32.

    As `jax.nn.dot_product_attention`, but written so that little is done with arrays of
    [M, K, Q, N]: they are scaled and divided by their sums where they have d columns, and none is
    turned round for the backward pass. Forward and backward pass take two thirds of the time on a
    CPU. A TPU's step needs 0.368 GB for a clip with it, 0.344 without (v5e:4x4).
    """
    return _attend_forward(q, k, v)[0]


def _heads_first(*arrays: jax.Array) -> list[jax.Array]:
    return [x.swapaxes(1, 2) for x in arrays]


def _exp_of_products(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scaled queries [M, K, Q, d], keys [M, K, N, d]: softmax times its rows' sums, and those.

    float32, [M, K, Q, N] and [M, K, Q, 1].
    """
    products = jnp.einsum("mkqd,mknd->mkqn", q, k, preferred_element_type=jnp.float32)
    exp = jnp.exp(products - cpu_kernels.row_max(products))
    return exp, cpu_kernels.row_sum(exp)


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    q, k, v = _heads_first(q * q.shape[-1] ** -0.5, k, v)
    exp, total = _exp_of_products(q, k)
    y = jnp.einsum("mkqn,mknd->mkqd", exp.astype(v.dtype), v) / total
    # What is kept is used by the backward pass alone: XLA then computes and stores it once.
    heads = (block_loop.checkpoint_activation(x, "heads") for x in (q, k, v))
    weights = (block_loop.checkpoint_activation(x, "weights") for x in (exp, total))
    return y.astype(v.dtype).swapaxes(1, 2), (*heads, *weights)


def _attend_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v, in their dtype."""
    q, k, v, exp, total = kept
    dy = (dy.swapaxes(1, 2) / total).astype(dy.dtype)
    d_exp = jnp.einsum("mkqd,mknd->mkqn", dy, v)
    mean = cpu_kernels.row_sum(exp * d_exp) / total
    d_products = (exp * (d_exp - mean)).astype(q.dtype)
    dq = jnp.einsum("mkqn,mknd->mkqd", d_products, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("mkqn,mkqd->mknd", d_products, q)
    dv = jnp.einsum("mkqn,mkqd->mknd", exp.astype(dy.dtype), dy)
    return tuple(_heads_first(dq, dk, dv))


attention.defvjp(_attend_forward, _attend_backward)


def single_query_attention(
    q: jax.Array,
    x: jax.Array,
    key_kernel: jax.Array,
    value_kernel: jax.Array,
    value_bias: jax.Array,
) -> jax.Array:
    """`attention` of one query to the keys and values of x, which are not computed for it.

    Its product with a key is (x W) . q = x . (W q), and its sum of values (w x) W, so that W is
    multiplied with one row for each head instead of N. A key's bias adds the same to every product,
    which the softmax does not see; a value's is added once, as the weights sum to 1.

    Args:
      q: [M, K, d], the query.
      x: [M, N, D], what keys and values are projected from.
      key_kernel, value_kernel: [D, K, d].
      value_bias: [K, d].

    Returns:
      [M, K, d].
    """
    q = jnp.einsum("mkd,Dkd->mkD", q * q.shape[-1] ** -0.5, key_kernel)
    products = jnp.einsum("mkD,mnD->mkn", q, x, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(products).astype(x.dtype)
    y = jnp.einsum("mkn,mnD->mkD", weights, x)
    return jnp.einsum("mkD,Dkd->mkd", y, value_kernel) + value_bias


@functools.cache
def has_flash_attention() -> bool:
    """Whether JAX computes on NVIDIA GPUs for which cuDNN has a fused attention (since Ampere)."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0


def can_use_flash_attention(num_tokens: int, dtype: Any) -> bool:
    """Whether queries, keys and values of N tokens and such a dtype are for `flash_attention`."""
    long = num_tokens >= 64  # of 8 tokens it takes five times as long as XLA's (H200)
    half = dtype in (jnp.bfloat16, jnp.float16)
    return long and half and not block_loop.is_fsdp_sharded() and has_flash_attention()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, padding: int = 0) -> jax.Array:
    """`attention` by cuDNN on a GPU, which keeps no array of [M, K, N, N]; bfloat16 or float16.

    q, k, v [M, N, K, d] -> [M, N, K, d]. No query attends to the last `padding` keys. With a
    backward pass JAX takes even N alone (jax 0.10.2), so that odd ones get a key more there.
    """
    return _by_cudnn(q, k, v, padding)


def _by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, padding: int) -> jax.Array:
    lengths = jnp.full(q.shape[0], q.shape[1] - padding, jnp.int32) if padding else None
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _flash_attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, padding: int
) -> tuple[jax.Array, Any]:
    num_tokens = q.shape[1]
    odd = num_tokens % 2

    def even(*qkv):
        if odd:
            qkv = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in qkv)
        return _by_cudnn(*qkv, padding + odd)[:, :num_tokens]

    y, backward = jax.vjp(even, q, k, v)
    return y, jax.tree.map(lambda x: block_loop.checkpoint_activation(x, "attended"), backward)


flash_attention.defvjp(_flash_attend_forward, lambda padding, backward, dy: backward(dy))

"""Computes attention of queries to keys and values, in one form for each kind of hardware.

Axes: M images, N tokens (Q of them queries), K heads, d width of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones import block_loop, cpu_kernels


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return the weights of keys [M, N, K, d] for queries [M, Q, K, d]: float32 [M, K, Q, N].

    The weights of a query sum to 1 over the keys.
    """
    exp, total = _exp_of_products(*_heads_first(q * q.shape[-1] ** -0.5, k))
    return exp / total


@jax.custom_vjp
def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute attention, with its own backward pass that saves the weights.

    The result is that of `jax.nn.dot_product_attention`. Little is done with arrays of
    [M, K, Q, N]: scaling and the division by sums happen where there are d columns, and no such
    array is transposed for the backward pass. This is faster on CPUs and takes more memory, see
    docs/notes/measurements.md.

    Args:
      q: [M, Q, K, d].
      k: [M, N, K, d].
      v: [M, N, K, d].

    Returns:
      [M, Q, K, d] in the dtype of `v`; the softmax is computed in float32.
    """
    return _attend_forward(q, k, v)[0]


def _heads_first(*arrays: jax.Array) -> list[jax.Array]:
    return [x.swapaxes(1, 2) for x in arrays]


def _exp_of_products(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the unnormalized softmax of queries and keys, and its sums over keys.

    Args:
      q: scaled queries [M, K, Q, d].
      k: keys [M, K, N, d].

    Returns:
      float32 [M, K, Q, N] and [M, K, Q, 1].
    """
    products = jnp.einsum("mkqd,mknd->mkqn", q, k, preferred_element_type=jnp.float32)
    exp = jnp.exp(products - cpu_kernels.row_max(products))
    return exp, cpu_kernels.row_sum(exp)


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    """Return the result and the arrays that the backward pass needs."""
    q, k, v = _heads_first(q * q.shape[-1] ** -0.5, k, v)
    exp, total = _exp_of_products(q, k)
    y = jnp.einsum("mkqn,mknd->mkqd", exp.astype(v.dtype), v) / total
    # Only the backward pass uses the saved arrays: XLA then computes and stores them once.
    heads = (block_loop.checkpoint_activation(x, "heads") for x in (q, k, v))
    weights = (block_loop.checkpoint_activation(x, "weights") for x in (exp, total))
    return y.astype(v.dtype).swapaxes(1, 2), (*heads, *weights)


def _attend_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, ...]:
    """Return the gradients of q, k and v, in their dtype."""
    q, k, v, exp, total = saved
    dy = (dy.swapaxes(1, 2) / total).astype(dy.dtype)
    d_exp = jnp.einsum("mkqd,mknd->mkqn", dy, v)
    mean = cpu_kernels.row_sum(exp * d_exp) / total
    d_products = (exp * (d_exp - mean)).astype(q.dtype)
    dq = jnp.einsum("mkqn,mknd->mkqd", d_products, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("mkqn,mkqd->mknd", d_products, q)
    dv = jnp.einsum("mkqn,mkqd->mknd", exp.astype(dy.dtype), dy)
    return tuple(_heads_first(dq, dk, dv))


dot_product_attention.defvjp(_attend_forward, _attend_backward)


def single_query_attention(
    q: jax.Array,
    x: jax.Array,
    key_kernel: jax.Array,
    value_kernel: jax.Array,
    value_bias: jax.Array,
) -> jax.Array:
    """Compute attention of one query to the keys and values of x, without computing these.

    The query's product with a key is (x W) . q = x . (W q), and its sum of values is (w x) W.
    Therefore W is multiplied by one row for each head instead of N. The bias of the keys adds the
    same number to every product, which the softmax ignores; that of the values is added once,
    because the weights sum to 1.

    Args:
      q: [M, K, d], the query.
      x: [M, N, D], projected to keys and values.
      key_kernel: [D, K, d].
      value_kernel: [D, K, d].
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
    """Return whether cuDNN has a fused attention for JAX's device: NVIDIA GPUs since Ampere."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0


def can_use_flash_attention(num_tokens: int, dtype: Any) -> bool:
    """Return whether to use `flash_attention` for N tokens of this dtype on JAX's device."""
    long = num_tokens >= 64  # for few tokens XLA's attention is faster
    half = dtype in (jnp.bfloat16, jnp.float16)
    return long and half and not block_loop.is_fsdp_sharded() and has_flash_attention()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, padding: int = 0) -> jax.Array:
    """Compute attention by cuDNN on a GPU, which saves no array of [M, K, N, N].

    With a backward pass JAX accepts only even N (jax 0.10.2); odd ones get one more key.

    Args:
      q: [M, N, K, d], bfloat16 or float16.
      k: as q.
      v: as q.
      padding: no query attends to the last `padding` keys.

    Returns:
      [M, N, K, d].
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
    """Return the result and cuDNN's backward pass; odd N gets one more key."""
    num_tokens = q.shape[1]
    odd = num_tokens % 2

    def attend_even(*qkv):
        if odd:
            qkv = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in qkv)
        return _by_cudnn(*qkv, padding + odd)[:, :num_tokens]

    y, backward = jax.vjp(attend_even, q, k, v)
    return y, jax.tree.map(lambda x: block_loop.checkpoint_activation(x, "attended"), backward)


flash_attention.defvjp(_flash_attend_forward, lambda padding, backward, dy: backward(dy))


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, padding: int = 0) -> jax.Array:
    """Compute attention as JAX does: q, k, v [M, N, K, d] -> [M, N, K, d], without padding."""
    if padding:
        raise ValueError(f"plain_attention takes no padding tokens, but got {padding}")
    return jax.nn.dot_product_attention(q, k, v)  # float32 softmax, scale d^-1/2


def cpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, padding: int = 0) -> jax.Array:
    """Compute `dot_product_attention` of q, k, v [M, N, K, d], without padding."""
    if padding:
        raise ValueError(f"cpu_attention takes no padding tokens, but got {padding}")
    return dot_product_attention(q, k, v)


def gpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, padding: int = 0) -> jax.Array:
    """Compute `flash_attention` of q, k, v [M, N, K, d] where it fits, else the plain form."""
    if can_use_flash_attention(q.shape[1], q.dtype):
        return flash_attention(q, k, v, padding)
    return dot_product_attention(q, k, v)

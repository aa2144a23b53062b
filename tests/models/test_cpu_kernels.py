"""Tests that the CPU kernels equal the plain layers and compute only the needed gradients."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpath_jax.models.backbones import cpu_kernels, vit

TINY = vit.ViTConfig("tiny", 32, 8, 48, 2, 4, 96, 24)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 197])
def test_rows_and_columns(length):
    x = normal(2, 3, length)
    numpy = np.asarray(x, np.float64)
    sums = numpy.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(cpu_kernels.row_max(x), np.asarray(x).max(axis=-1, keepdims=True))
    np.testing.assert_allclose(cpu_kernels.row_sum(x), sums, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cpu_kernels.column_sum(x), numpy.sum(axis=(0, 1)), rtol=0, atol=1e-5)
    spoilt = x.at[0, 0, -1].add(1000.0)
    assert cpu_kernels.row_max(spoilt)[0, 0, 0] > 900
    assert cpu_kernels.row_sum(spoilt)[0, 0, 0] - sums[0, 0, 0] == pytest.approx(1000, abs=0.01)


@pytest.mark.parametrize(("platform", "slices"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_other_devices_get_plain_sums(platform, slices):
    traced = jax.jit(cpu_kernels.row_sum).trace(normal(2, 197))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.slice" in text) == slices


def gradients(function, arrays, dy, argnums):
    """Return the gradients of sum(function(*arrays) * dy)."""
    grad = jax.grad(lambda *arrays: (function(*arrays) * dy).sum(), argnums=argnums)
    return grad(*arrays)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_affine_and_its_gradients(rows, shape):
    """Check few and many rows, wide and tall kernels, which use different products."""
    arrays = normal(2, rows, shape[0]), normal(*shape, seed=1), normal(shape[1], seed=2)
    dy = normal(2, rows, shape[1], seed=3)

    def plain(x, kernel, bias):
        return x @ kernel + bias

    np.testing.assert_array_equal(cpu_kernels.affine(*arrays), plain(*arrays))
    want = gradients(plain, arrays, dy, (0, 1, 2))
    for ours, theirs in zip(
        gradients(cpu_kernels.affine, arrays, dy, (0, 1, 2)), want, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    other = gradients(cpu_kernels.affine, (arrays[0], 2 * arrays[1], arrays[2]), dy, (0,))
    assert abs(other[0] - want[0]).max() > 1
    traced = str(
        jax.make_jaxpr(lambda *arrays: gradients(cpu_kernels.affine, arrays, dy, (0, 1, 2)))(
            *arrays
        )
    )
    num_transposed = 2 * (2 * rows < min(shape)) + (shape[0] > shape[1])
    assert traced.count("optimization_barrier") == num_transposed


def test_layer_norm_and_its_gradients():
    arrays = 3 + 2 * normal(2, 5, 48), normal(48, seed=1), normal(48, seed=2)
    dy = normal(2, 5, 48, seed=3)

    def plain(x, scale, bias):
        params = {"params": {"scale": scale, "bias": bias}}
        return nn.LayerNorm(epsilon=1e-5).apply(params, x)

    def ours(x, scale, bias):
        return cpu_kernels.layer_norm(x, scale, bias, 1e-5)

    np.testing.assert_allclose(ours(*arrays), plain(*arrays), rtol=0, atol=2e-6)
    want = gradients(plain, arrays, dy, (0, 1, 2))
    for a, b in zip(gradients(ours, arrays, dy, (0, 1, 2)), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    other = gradients(lambda x, *rest: ours(x.at[..., 0].add(9.0), *rest), arrays, dy, (0,))
    assert abs(other[0] - want[0]).max() > 0.1


@pytest.mark.parametrize(("trained", "products"), [((0,), 1), ((0, 2), 2), ((0, 1, 2), 3)])
def test_frozen_parameters_get_no_gradient(trained, products):
    """Count the products: one each for the gradients of input, kernel and bias."""
    arrays = normal(40, 16), normal(16, 8), normal(8)

    def forward(*values):
        return cpu_kernels.affine(
            *(values[trained.index(i)] if i in trained else x for i, x in enumerate(arrays))
        )

    def backward(dy):
        return jax.vjp(forward, *(arrays[i] for i in trained))[1](dy)

    text = jax.jit(backward).lower(normal(40, 8)).as_text()
    assert text.count("stablehlo.dot_general") == products


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (cpu_kernels.Dense(24), nn.Dense(24)),
        (cpu_kernels.LayerNorm(epsilon=1e-6), nn.LayerNorm(epsilon=1e-6)),
    ],
)
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.04)])
def test_the_same_layers_as_flax(ours, theirs, dtype, atol):
    x = normal(3, 5, 48).astype(dtype)
    params = theirs.init(jax.random.key(1), x)
    our_params = ours.init(jax.random.key(1), x)
    for a, b in zip(jax.tree.leaves(our_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    params = jax.tree.map(lambda leaf: leaf + normal(*leaf.shape), params)
    got = ours.clone(dtype=dtype).apply(params, x)
    want = theirs.clone(dtype=dtype).apply(params, x)
    assert got.dtype == want.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got, want)), rtol=0, atol=atol)


@pytest.mark.parametrize(("remat", "computed"), [("none", 1), ("save_matmuls", 1), ("full", 2)])
def test_attention_is_exponentiated_once(remat, computed):
    """Count the exponentials of each block in both passes: one, or two with "full" remat."""
    model = vit.ViT(TINY, remat=remat)
    h = normal(2, TINY.num_tokens, TINY.width)
    params = model.init(jax.random.key(0), normal(2, 32, 32, 3))

    def loss(h):
        return (model.apply(params, h, method=vit.ViT.encode) ** 2).sum()

    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    text = jax.jit(jax.grad(loss), compiler_options=options).lower(h).compile().as_text()
    exponentials = re.findall(r"= f32\[2,4,17,17\]\S* exponential\(", text)
    assert len(exponentials) == TINY.depth * computed

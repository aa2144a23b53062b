"""Tests the products in 8 bits that scripts/int8_trial.py tries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.benchmarks import int8


@pytest.fixture
def factors():
    """Return rows [5, 32] and a kernel [32, 8] whose columns differ in size by up to 100."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 32), (32, 8)))
    return jnp.asarray(x), jnp.asarray(kernel * np.geomspace(0.1, 10, 8, dtype=np.float32))


def test_each_channel_has_its_scale(factors):
    _, kernel = factors
    values, scale = int8.quantize(kernel, 0)
    assert (values.dtype, scale.shape) == (jnp.int8, (1, 8))
    assert np.array_equal(np.abs(values).max(0), [127] * 8)
    error = jnp.abs(int8.dequantize(values, scale, jnp.float32) - kernel)
    assert (error <= scale / 2 * 1.001).all()
    # Twin: one scale for all channels loses the small ones.
    values, scale = int8.quantize(kernel.reshape(-1, 1), 0)
    lost = jnp.abs(int8.dequantize(values, scale, jnp.float32).reshape(kernel.shape) - kernel)
    assert lost[:, 0].max() > 10 * error[:, 0].max()


@pytest.mark.parametrize(("mode", "limit"), [("weights", 1e-5), ("activations", 0.02)])
def test_products(factors, mode, limit):
    x, kernel = factors
    values, scale = int8.quantize(kernel, 0)
    product = int8.PRODUCTS[mode]
    exact = x @ int8.dequantize(values, scale, jnp.float32)
    size = jnp.abs(exact).max()
    error = jnp.abs(product(x, values, scale) - exact).max() / size
    assert 1e-9 < error < limit  # 8 bits of both factors are not exact
    wrong = jnp.abs(product(x, -values, scale) - exact).max() / size
    assert wrong > 1
    gradient = jax.grad(lambda x: (product(x, values, scale) * exact).sum())(x)
    expected = exact @ int8.dequantize(values, scale, jnp.float32).T
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-2)


def test_only_kernels_of_frozen_layers_are_quantized():
    layer = {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))}
    blocks = {"attention": {"qkv": layer, "out": layer}, "ln_1": {"scale": jnp.ones((2, 4))}}
    blocks = int8._quantize_blocks(blocks)
    for name in ("qkv", "out"):
        shapes = {key: (leaf.shape, leaf.dtype) for key, leaf in blocks["attention"][name].items()}
        assert shapes == {
            "kernel": ((2, 4, 3), jnp.int8),
            "kernel_scale": ((2, 1, 3), jnp.float32),
            "bias": ((2, 3), jnp.float32),
        }
    assert blocks["ln_1"]["scale"].dtype == jnp.float32
    again = int8._quantize_blocks(blocks)  # a tree that has its scales keeps them
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, blocks))

"""cuDNN's attention on a GPU, tried without one: what JAX is asked for, and when."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dualpath_jax import sharding
from dualpath_jax.models import attend, vit

HEADS, WIDTH = 3, 24
on_any_device = jax.nn.dot_product_attention


@pytest.fixture
def asked(monkeypatch):
    """Number of tokens of each call for cuDNN, which is computed by JAX's own attention instead."""
    lengths = []

    def stand_in(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(q.shape[1])
        return on_any_device(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return lengths


def arrays(num_tokens):
    """q, k, v and a gradient, [2, N, 3, 8] float32."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, num_tokens, HEADS, 8)), jnp.float32) for _ in range(4)]


def gradients(function, q, k, v, dy):
    """Of q, k and v, one after the other."""
    gradient = jax.grad(lambda *qkv: (function(*qkv) * dy).sum(), argnums=(0, 1, 2))
    return np.concatenate([np.ravel(x) for x in gradient(q, k, v)])


@pytest.mark.parametrize(("num_tokens", "with_backward"), [(5, 6), (6, 6)])
def test_same_as_plain_attention(num_tokens, with_backward, asked):
    q, k, v, dy = arrays(num_tokens)
    np.testing.assert_allclose(
        attend.flash_attend(q, k, v), on_any_device(q, k, v), rtol=0, atol=1e-6
    )
    assert asked == [num_tokens]
    want = gradients(on_any_device, q, k, v, dy)
    np.testing.assert_allclose(gradients(attend.flash_attend, q, k, v, dy), want, rtol=0, atol=2e-6)
    assert asked == [num_tokens, with_backward]


def test_the_key_more_counts_where_it_is_not_hidden(monkeypatch):
    """Twin: an odd number of tokens without their length."""
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **_: on_any_device(q, k, v)
    )
    q, k, v, dy = arrays(5)
    difference = gradients(attend.flash_attend, q, k, v, dy) - gradients(on_any_device, q, k, v, dy)
    assert np.abs(difference).max() > 0.1


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX takes this machine for one with cuDNN, so that programs for a GPU can be lowered."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def lowered(function, num_tokens):
    """The program for a GPU of the gradient, as text."""
    x = jax.ShapeDtypeStruct((2, num_tokens, HEADS, 8), jnp.bfloat16)
    loss = jax.grad(lambda q, k, v: function(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(loss).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()


def test_jax_takes_197_tokens(with_cudnn):
    program = lowered(attend.flash_attend, 197)
    assert program.count("@__cudnn$fmhaSoftmax(") == 1
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert "2x198x3x8xbf16" in program
    assert "197x197" not in program  # no array of attention's weights


def test_jax_does_not_take_197_tokens_as_they_are(with_cudnn):
    """Twin, and what to look at when JAX is newer: then `flash_attend` is simpler without it."""
    with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 197"):
        lowered(lambda *qkv: on_any_device(*qkv, implementation="cudnn"), 197)


@pytest.mark.parametrize(
    ("platform", "version", "capability", "there"),
    [
        ("gpu", "PJRT C API\ncuda 12090", "8.0", True),
        ("gpu", "PJRT C API\ncuda 13000", "10.3", True),
        ("gpu", "PJRT C API\ncuda 12090", "7.5", False),
        ("gpu", "rocm 60000", "gfx942", False),
        ("cpu", "cpu", None, False),
        ("tpu", "TPU v5e", None, False),
    ],
)
def test_which_devices_have_it(platform, version, capability, there, monkeypatch):
    device = types.SimpleNamespace(
        platform=platform,
        client=types.SimpleNamespace(platform_version=version),
        compute_capability=capability,
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    attend.has_flash_attention.cache_clear()
    assert attend.has_flash_attention() == there
    attend.has_flash_attention.cache_clear()


@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "num_tokens", "class_only", "taken"),
    [
        (jnp.bfloat16, 65, False, [65]),
        (jnp.bfloat16, 9, False, []),
        (jnp.bfloat16, 65, True, []),
        (jnp.float32, 65, False, []),
    ],
)
def test_when_it_is_taken(dtype, num_tokens, class_only, taken, for_cpu, monkeypatch):
    """In half precision, on many tokens, of all of them."""
    used = []

    def recorder(q, k, v):
        used.append(q.shape[1])
        return v

    monkeypatch.setattr(attend, "has_flash_attention", lambda: True)
    monkeypatch.setattr(attend, "flash_attend", recorder)
    attention = vit.Attention(WIDTH, HEADS, for_cpu, dtype=dtype)
    x = jnp.ones((1, num_tokens, WIDTH), dtype)
    params = attention.init(jax.random.key(0), x)
    used.clear()
    attention.apply(params, x, class_only=class_only)
    assert used == taken


def test_not_where_fsdp_divides(monkeypatch):
    monkeypatch.setattr(attend, "has_flash_attention", lambda: True)
    x = jnp.ones((1, 65, HEADS, 8), jnp.bfloat16)
    assert attend.flash_fits(x)
    with sharding.using(sharding.make_mesh(fsdp=2)):
        assert not attend.flash_fits(x)

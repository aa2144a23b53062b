"""cuDNN's attention on a GPU, tried without one: what JAX is asked for, and when."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dualpath_jax.models.backbones import attention as attention_lib
from dualpath_jax.models.backbones import block_loop, vit
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.adapters import Adapter, ParallelAdapterHooks
from dualpath_jax.training import sharding

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
        attention_lib.flash_attention(q, k, v), on_any_device(q, k, v), rtol=0, atol=1e-6
    )
    assert asked == [num_tokens]
    want = gradients(on_any_device, q, k, v, dy)
    np.testing.assert_allclose(
        gradients(attention_lib.flash_attention, q, k, v, dy), want, rtol=0, atol=2e-6
    )
    assert asked == [num_tokens, with_backward]


def test_the_key_more_counts_where_it_is_not_hidden(monkeypatch):
    """Twin: an odd number of tokens without their length."""
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **_: on_any_device(q, k, v)
    )
    q, k, v, dy = arrays(5)
    difference = gradients(attention_lib.flash_attention, q, k, v, dy) - gradients(
        on_any_device, q, k, v, dy
    )
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
    program = lowered(attention_lib.flash_attention, 197)
    assert program.count("@__cudnn$fmhaSoftmax(") == 1
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert "2x198x3x8xbf16" in program
    assert "197x197" not in program  # no array of attention's weights


def test_jax_does_not_take_197_tokens_as_they_are(with_cudnn):
    """Twin, and what to look at when JAX is newer: then `flash_attend` is simpler without it."""
    with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 197"):
        lowered(lambda *qkv: on_any_device(*qkv, implementation="cudnn"), 197)


@pytest.fixture
def on_gpu(monkeypatch):
    """Models take this machine for one with a GPU, whose attention fits 10 tokens and more."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        attention_lib, "can_use_flash_attention", lambda num_tokens, dtype: num_tokens >= 10
    )


def gradient_in_training(scan=False, dtype=jnp.float32):
    """(Adapters of three blocks, function of them: their gradient by the class token.)"""
    config = vit.ViTConfig("tiny", 32, 8, WIDTH, 3, HEADS, 48)  # 17 tokens
    model = vit.ViT(config, dtype, scan, remat="cheap")
    hooks = ParallelAdapterHooks(Adapter(4, dtype=dtype, parent=None), parent=None)
    h = jax.random.normal(jax.random.key(0), (2, config.num_tokens, WIDTH)).astype(dtype)
    params = model.init(jax.random.key(1), h[:, :2], method=vit.ViT.encode)
    adapters = model.apply(params, jax.random.key(2), hooks, 1, 2, method=vit.ViT.init_hooks)
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), adapters
    )

    def loss(adapters):
        options = hooks, adapters, jax.random.key(4), True
        y = model.apply(params, h, *options, method=vit.ViT.encode)
        return (y.astype(jnp.float32) ** 2).sum()

    return moved, jax.grad(loss)


@pytest.mark.parametrize("scan", [False, True])
def test_training_adds_a_token_once_for_all_blocks(scan, request):
    adapters, gradient = gradient_in_training(scan)
    want = gradient(adapters)
    request.getfixturevalue("on_gpu")
    asked = request.getfixturevalue("asked")
    got = gradient_in_training(scan)[1](adapters)
    assert set(asked) == {18}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_the_token_more_counts_in_all_blocks_where_it_is_not_hidden(on_gpu, monkeypatch):
    """Twin of the test before it."""
    adapters, gradient = gradient_in_training()
    gradients = []
    for hidden in (True, False):
        monkeypatch.setattr(
            jax.nn,
            "dot_product_attention",
            lambda q, k, v, *, implementation, hidden=hidden, **lengths: on_any_device(
                q, k, v, **lengths if hidden else {}
            ),
        )
        gradients.append(jax.tree.leaves(gradient(adapters)))
    assert (
        max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(*gradients, strict=True)) > 0.01
    )


class OverFrames(BlockHooks):
    """Attention over the frames of a token, as in AIM, through the block's own."""

    pointwise = True
    padding = 0

    @nn.compact
    def on_input(self, h, block):
        scale = self.param("scale", nn.initializers.ones, (WIDTH,))
        x = block.ln_1(h).swapaxes(0, 1) * scale  # [N, frames, D]
        return h + block.attention(x, padding=self.padding).swapaxes(0, 1)


class OverFramesWithoutTheLast(OverFrames):
    padding = 1


def over_frames(hooks):
    """Output in training for twelve frames, on which attention fits `on_gpu`."""
    config = vit.ViTConfig("tiny", 32, 8, WIDTH, 3, HEADS, 48)
    model = vit.ViT(config)
    h = jax.random.normal(jax.random.key(0), (12, config.num_tokens, WIDTH))
    params = model.init(jax.random.key(1), h[:, :2], method=vit.ViT.encode)
    filled = hooks(parent=None)
    scales = {"scale": jnp.ones((3, WIDTH))}
    options = filled, scales, jax.random.key(4), True
    return model.apply(params, h, *options, method=vit.ViT.encode)


def test_the_token_more_is_none_of_the_frames(request):
    want = over_frames(OverFrames)
    request.getfixturevalue("on_gpu")
    asked = request.getfixturevalue("asked")
    np.testing.assert_allclose(over_frames(OverFrames), want, rtol=0, atol=1e-5)
    assert set(asked) == {12, 18}
    # Twin: the last frame taken for what is none.
    assert np.abs(over_frames(OverFramesWithoutTheLast) - want).max() > 0.01


@pytest.mark.parametrize(
    ("scan", "kept", "times"), [(False, True, 2), (False, False, 4), (True, True, 2)]
)
def test_what_it_returns_is_kept_where_blocks_are_written_out(
    scan, kept, times, on_gpu, with_cudnn, monkeypatch
):
    """Two of three blocks have it, and the second its backward pass; or one loop and its own."""
    if not kept:
        monkeypatch.setitem(block_loop._KEPT_WRITTEN_OUT, "gpu", block_loop._KEPT)
    adapters, gradient = gradient_in_training(scan, jnp.bfloat16)
    program = jax.jit(gradient).trace(adapters).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@__cudnn$fmhaSoftmax(") == times
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1


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
    attention_lib.has_flash_attention.cache_clear()
    assert attention_lib.has_flash_attention() == there
    attention_lib.has_flash_attention.cache_clear()


@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "num_tokens", "cls_token_only", "taken"),
    [
        (jnp.bfloat16, 65, False, [65]),
        (jnp.bfloat16, 9, False, []),
        (jnp.bfloat16, 65, True, []),
        (jnp.float32, 65, False, []),
    ],
)
def test_when_it_is_taken(dtype, num_tokens, cls_token_only, taken, for_cpu, monkeypatch):
    """In half precision, on many tokens, of all of them."""
    used = []

    def recorder(q, k, v, padding):
        used.append(q.shape[1])
        return v

    monkeypatch.setattr(attention_lib, "has_flash_attention", lambda: True)
    monkeypatch.setattr(attention_lib, "flash_attention", recorder)
    attention = vit.Attention(WIDTH, HEADS, for_cpu, dtype=dtype)
    x = jnp.ones((1, num_tokens, WIDTH), dtype)
    params = attention.init(jax.random.key(0), x)
    used.clear()
    attention.apply(params, x, cls_token_only=cls_token_only)
    assert used == taken


def test_not_where_fsdp_divides(monkeypatch):
    monkeypatch.setattr(attention_lib, "has_flash_attention", lambda: True)
    assert attention_lib.can_use_flash_attention(65, jnp.bfloat16)
    with sharding.with_mesh(sharding.make_mesh(fsdp=2)):
        assert not attention_lib.can_use_flash_attention(65, jnp.bfloat16)

"""Tests on a CPU how cuDNN's attention is called on a GPU: with which tokens, and when."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dualpath_jax.models.backbones import attention as attention_lib
from dualpath_jax.models.backbones import kernels as kernels_lib
from dualpath_jax.models.backbones import vit
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.adapters import Adapter, ParallelAdapterHooks
from dualpath_jax.training import sharding

HEADS, WIDTH = 3, 24
on_any_device = jax.nn.dot_product_attention


@pytest.fixture
def called_lengths(monkeypatch):
    """Return a list of each cuDNN call's number of tokens; plain attention replaces cuDNN."""
    lengths = []

    def stand_in(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(q.shape[1])
        return on_any_device(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return lengths


def arrays(num_tokens):
    """Return q, k, v and a gradient, each [2, N, 3, 8] float32."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, num_tokens, HEADS, 8)), jnp.float32) for _ in range(4)]


def gradients(function, q, k, v, dy):
    """Return the concatenated gradients of q, k and v."""
    gradient = jax.grad(lambda *qkv: (function(*qkv) * dy).sum(), argnums=(0, 1, 2))
    return np.concatenate([np.ravel(x) for x in gradient(q, k, v)])


@pytest.mark.parametrize(("num_tokens", "with_backward"), [(5, 6), (6, 6)])
def test_same_as_plain_attention(num_tokens, with_backward, called_lengths):
    q, k, v, dy = arrays(num_tokens)
    np.testing.assert_allclose(
        attention_lib.flash_attention(q, k, v), on_any_device(q, k, v), rtol=0, atol=1e-6
    )
    assert called_lengths == [num_tokens]
    want = gradients(on_any_device, q, k, v, dy)
    np.testing.assert_allclose(
        gradients(attention_lib.flash_attention, q, k, v, dy), want, rtol=0, atol=2e-6
    )
    assert called_lengths == [num_tokens, with_backward]


def test_unmasked_padding_key_changes_gradients(monkeypatch):
    """Check as a twin an odd number of tokens without their length."""
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
    """Make JAX assume that cuDNN is available, so that programs for a GPU can be lowered."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def lowered(function, num_tokens):
    """Return the gradient's program for a GPU as text."""
    x = jax.ShapeDtypeStruct((2, num_tokens, HEADS, 8), jnp.bfloat16)
    loss = jax.grad(lambda q, k, v: function(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(loss).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()


def test_jax_accepts_197_padded_tokens(with_cudnn):
    program = lowered(attention_lib.flash_attention, 197)
    assert program.count("@__cudnn$fmhaSoftmax(") == 1
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert "2x198x3x8xbf16" in program
    assert "197x197" not in program  # no array of attention's weights


def test_jax_rejects_197_tokens_without_padding(with_cudnn):
    """Check the twin; if it fails with a newer JAX, `flash_attention` needs no padding."""
    with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 197"):
        lowered(lambda *qkv: on_any_device(*qkv, implementation="cudnn"), 197)


@pytest.fixture
def on_gpu(monkeypatch):
    """Make models assume a GPU whose flash attention supports 10 tokens and more."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        attention_lib, "can_use_flash_attention", lambda num_tokens, dtype: num_tokens >= 10
    )


def gradient_in_training(scan=False, dtype=jnp.float32):
    """Return (adapters of three blocks, function of them that computes their gradient).

    The loss depends only on the class token.
    """
    config = vit.ViTConfig("tiny", 32, 8, WIDTH, 3, HEADS, 48)  # 17 tokens
    model = vit.ViT(config, dtype, scan, remat="save_matmuls")
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
    called_lengths = request.getfixturevalue("called_lengths")
    got = gradient_in_training(scan)[1](adapters)
    assert set(called_lengths) == {18}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_unmasked_padding_token_changes_gradients(on_gpu, monkeypatch):
    """Check the twin of the test before it."""
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
    """Applies the block's attention over the frames of a token, as AIM does."""

    pointwise = True

    @nn.compact
    def on_input(self, h, block):
        scale = self.param("scale", nn.initializers.ones, (WIDTH,))
        x = block.ln_1(h).swapaxes(0, 1) * scale  # [N, frames, D]
        return h + self.attend(block, x).swapaxes(0, 1)

    def attend(self, block, x):
        return block.attention(x)


class OverFramesWithoutTheLast(OverFrames):
    """Attends like the block over its tokens, whose last one is padding."""

    def attend(self, block, x):
        return block.attend(x)


def over_frames(hooks):
    """Return the output in training for twelve frames, enough for flash attention `on_gpu`."""
    config = vit.ViTConfig("tiny", 32, 8, WIDTH, 3, HEADS, 48)
    model = vit.ViT(config)
    h = jax.random.normal(jax.random.key(0), (12, config.num_tokens, WIDTH))
    params = model.init(jax.random.key(1), h[:, :2], method=vit.ViT.encode)
    filled = hooks(parent=None)
    scales = {"scale": jnp.ones((3, WIDTH))}
    options = filled, scales, jax.random.key(4), True
    return model.apply(params, h, *options, method=vit.ViT.encode)


def test_padding_token_is_not_taken_for_a_frame(request):
    want = over_frames(OverFrames)
    request.getfixturevalue("on_gpu")
    called_lengths = request.getfixturevalue("called_lengths")
    np.testing.assert_allclose(over_frames(OverFrames), want, rtol=0, atol=1e-5)
    assert set(called_lengths) == {12, 18}
    # Twin: the last frame is taken for padding.
    assert np.abs(over_frames(OverFramesWithoutTheLast) - want).max() > 0.01


@pytest.mark.parametrize(
    ("scan", "saved", "times"), [(False, True, 2), (False, False, 4), (True, True, 2)]
)
def test_outputs_are_saved_in_unrolled_blocks(scan, saved, times, on_gpu, with_cudnn, monkeypatch):
    """Count calls: two of three unrolled blocks use it, the second with a backward pass.

    A scanned model has one call in the forward loop and one in the backward loop.
    """
    if not saved:
        monkeypatch.setattr(kernels_lib, "GPU", kernels_lib.GPU_SCANNED)
    adapters, gradient = gradient_in_training(scan, jnp.bfloat16)
    program = jax.jit(gradient).trace(adapters).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@__cudnn$fmhaSoftmax(") == times
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize(
    ("platform", "version", "capability", "available"),
    [
        ("gpu", "PJRT C API\ncuda 12090", "8.0", True),
        ("gpu", "PJRT C API\ncuda 13000", "10.3", True),
        ("gpu", "PJRT C API\ncuda 12090", "7.5", False),
        ("gpu", "rocm 60000", "gfx942", False),
        ("cpu", "cpu", None, False),
        ("tpu", "TPU v5e", None, False),
    ],
)
def test_devices_with_flash_attention(platform, version, capability, available, monkeypatch):
    device = types.SimpleNamespace(
        platform=platform,
        client=types.SimpleNamespace(platform_version=version),
        compute_capability=capability,
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    attention_lib.has_flash_attention.cache_clear()
    assert attention_lib.has_flash_attention() == available
    attention_lib.has_flash_attention.cache_clear()


@pytest.mark.parametrize(
    "kernels", [kernels_lib.GPU, kernels_lib.GPU_SCANNED], ids=["unrolled", "scanned"]
)
@pytest.mark.parametrize(
    ("dtype", "num_tokens", "cls_token_only", "expected"),
    [
        (jnp.bfloat16, 65, False, [65]),
        (jnp.bfloat16, 9, False, []),
        (jnp.bfloat16, 65, True, []),
        (jnp.float32, 65, False, []),
    ],
)
def test_when_it_is_used(dtype, num_tokens, cls_token_only, expected, kernels, monkeypatch):
    """Check that it is used in half precision, on many tokens, for all queries."""
    used = []

    def recorder(q, k, v, padding):
        used.append(q.shape[1])
        return v

    monkeypatch.setattr(attention_lib, "has_flash_attention", lambda: True)
    monkeypatch.setattr(attention_lib, "flash_attention", recorder)
    attention = vit.Attention(WIDTH, HEADS, kernels=kernels, dtype=dtype)
    x = jnp.ones((1, num_tokens, WIDTH), dtype)
    params = attention.init(jax.random.key(0), x)
    used.clear()
    attention.apply(params, x, cls_token_only=cls_token_only)
    assert used == expected


def test_not_used_with_fsdp(monkeypatch):
    monkeypatch.setattr(attention_lib, "has_flash_attention", lambda: True)
    assert attention_lib.can_use_flash_attention(65, jnp.bfloat16)
    with sharding.with_mesh(sharding.make_mesh(fsdp=2)):
        assert not attention_lib.can_use_flash_attention(65, jnp.bfloat16)

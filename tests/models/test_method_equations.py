"""Compares tuning methods with references from their equations, in torch and plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

torch_methods = pytest.importorskip(
    "tests.helpers.torch_methods"
)  # torch is only for conversion and tests

from dualpath_jax.models.backbones import kernels as kernels_lib  # noqa: E402
from dualpath_jax.models.backbones import vit  # noqa: E402
from dualpath_jax.models.backbones.layers import no_hooks  # noqa: E402
from dualpath_jax.models.frame_model import FrameModel  # noqa: E402
from dualpath_jax.models.methods.evl import EVLDecoder, EVLModel, TemporalCrossAttention  # noqa: E402
from dualpath_jax.models.methods.probe import ProbeModel  # noqa: E402
from tests.helpers.method_cases import (  # noqa: E402
    CLASSES,
    FRAMES,
    TINY,
    apply,
    backbone,
    build_randomized,
    clips,
    tiny_config,
)

SIDE = 4  # patches along an image of TINY


def frozen_block(block, h):
    """Run a frozen block of the backbone without hooks."""
    return apply(vit.Block(TINY), block, h, method=lambda b, h: b(h, no_hooks()))


def pool(model, h):
    return model.pool(h, project=False)


def distance(a, b):
    """Return the largest absolute difference."""
    return np.max(np.abs(np.asarray(a) - b))


@pytest.mark.parametrize("case", torch_methods.METHODS)
def test_blocks_against_torch(case):
    model, params = build_randomized(tiny_config(case))
    h = np.random.default_rng(3).normal(size=(2, FRAMES, TINY.num_tokens, 48)).astype(np.float32)

    def encode(model, h):
        return model.backbone.encode(h, model.hooks, model.hook_params)

    ours = apply(model, params, h.reshape(-1, *h.shape[2:]), method=encode).reshape(h.shape)
    trees = (params["backbone"]["blocks"], params["adapters"])
    assert distance(ours, torch_methods.run(case, h, *trees)) < 1e-4
    for wrong in torch_methods.METHODS[case][1]:
        assert distance(ours, torch_methods.run(case, h, *trees, wrong)) > 1e-3, wrong


def test_aim_adds_temporal_positions_and_averages_the_frames():
    config = tiny_config("aim")
    model, params = build_randomized(config)
    frames, _ = clips(config)
    position = params["backbone"]["position_embedding"] + params["temporal_position"][:, None]
    images = frames.reshape(-1, 32, 32, 3)
    ours = apply(model, params, images, method=type(model).embed).reshape(2, FRAMES, 17, 48)
    for time in (0, FRAMES - 1):
        moved = params | {"backbone": params["backbone"] | {"position_embedding": position[time]}}
        moved["temporal_position"] = np.zeros_like(params["temporal_position"])
        expected = apply(model, moved, frames[:, time], method=FrameModel.embed)
        assert distance(ours[:, time], expected) < 1e-5
        assert distance(ours[:, time - 1], expected) > 1e-2
    features = apply(model, params, frames, method=type(model).features)
    fc = params["head"]["output"]
    expected = features.mean(axis=1) @ fc["kernel"] + fc["bias"]
    assert distance(apply(model, params, frames), expected) < 1e-5


def test_released_st_adapter_averages_tokens_before_the_last_norm():
    config = tiny_config("st_adapter_both")
    model, params = build_randomized(config)
    frames, _ = clips(config)
    h = apply(model, params, frames, method=type(model).encode)
    mean = h.reshape(2, FRAMES, *h.shape[1:]).mean(axis=1)
    expected = apply(vit.ViT(TINY), backbone(), mean, method=pool)
    features = apply(model, params, frames, method=type(model).features)
    assert distance(features, expected[:, None]) < 1e-5
    normed_first = apply(vit.ViT(TINY), backbone(), h, method=pool).reshape(2, FRAMES, -1)
    assert distance(features, normed_first.mean(axis=1, keepdims=True)) > 1e-3
    fc = params["head"]["output"]
    expected = features[:, 0] @ fc["kernel"] + fc["bias"]
    assert distance(apply(model, params, frames), expected) < 1e-5


@pytest.mark.parametrize("case", ["vpt", "vpt_shallow"])
def test_prompts(case):
    """Check [e; h] with new prompts at every block, or with prompts only at the first."""
    config = tiny_config(case)
    model, params = build_randomized(config)
    frames = clips(config)[0].reshape(-1, 32, 32, 3)
    h = apply(model, params, frames, method=FrameModel.embed)
    prompts = params["prompts"][None] if case == "vpt_shallow" else params["adapters"]["prompts"]
    for i in range(TINY.depth):
        if i < len(prompts):
            extra = np.broadcast_to(prompts[i], (len(h), 3, 48))
            h = np.concatenate([h, extra], axis=1)  # at the end: the order does not matter
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["backbone"]["blocks"])
        h = frozen_block(block, h)
        h = h[:, :17] if case == "vpt" else h
    expected = apply(vit.ViT(TINY), backbone(), h, method=pool)
    features = apply(model, params, clips(config)[0], method=type(model).features)
    assert distance(features, expected.reshape(2, FRAMES, 48)) < 1e-4
    assert distance(features, features[::-1]) > 1e-2


@pytest.mark.parametrize("case", ["adaptformer", "videoprompt"])
def test_temporal_classifier(case):
    """Check the order: positions, prompts before the frames, block, average of frames, FC."""
    model, params = build_randomized(tiny_config(case))
    head = params["head"]
    x = np.random.default_rng(0).normal(size=(2, FRAMES, 48)).astype(np.float32)

    def reference(x):
        tokens = [x + head["position"]]
        if case == "videoprompt":
            tokens.insert(0, np.broadcast_to(head["prompts"], (2, 3, 48)))
        y = frozen_block(head["block"], np.concatenate(tokens, axis=1))
        return y[:, -FRAMES:].mean(axis=1) @ head["output"]["kernel"] + head["output"]["bias"]

    logits = apply(model.head.clone(parent=None), head, x)
    assert logits.shape == (2, CLASSES)
    assert distance(logits, reference(x)) < 1e-5
    assert distance(logits, reference(x[:, ::-1])) > 1e-3  # order counts


def cross_attention(q, k, before, after):
    """Compute EVL's temporal cross attention in loops; q, k [B, T, N, K, d]."""
    batch, frames, tokens, heads, size = q.shape
    out = np.zeros((batch, frames, tokens, before.shape[1]))
    for b, t, i in np.ndindex(batch, frames, tokens - 1):
        for neighbor, table in ((t - 1, before), (t + 1, after)):
            if not 0 <= neighbor < frames:
                continue
            for head in range(heads):
                logits = k[b, neighbor, 1:, head] @ q[b, t, 1 + i, head] / np.sqrt(size)
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                for j in range(tokens - 1):
                    dr, dc = i // SIDE - j // SIDE, i % SIDE - j % SIDE
                    row = (dr + SIDE - 1) * (2 * SIDE - 1) + dc + SIDE - 1
                    out[b, t, 1 + i] += weights[j] * table[row] / heads
    return out


@pytest.mark.parametrize("kernels", [kernels_lib.DEFAULT, kernels_lib.CPU], ids=["default", "cpu"])
def test_temporal_cross_attention_against_loops(kernels):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 3, 17, 2, 4)).astype(np.float32)
    tables = {n: rng.normal(size=(49, 6)).astype(np.float32) for n in ("before", "after")}
    module = TemporalCrossAttention(6, kernels)
    ours = apply(module, tables, q, k)
    assert distance(ours, cross_attention(q, k, **tables)) < 1e-5
    assert distance(ours, cross_attention(q, k, tables["after"], tables["before"])) > 1e-2
    assert distance(ours, cross_attention(k, q, **tables)) > 1e-2
    assert not np.any(ours[:, :, 0])  # the class token
    started = module.init(jax.random.key(0), q, k)["params"]
    assert not np.any(started["before"])
    assert not np.any(started["after"])


def test_evl_reads_outputs_queries_and_keys_of_the_last_blocks():
    config = tiny_config("evl")
    model, params = build_randomized(config)
    frames = clips(config)[0]
    features = apply(model, params, frames, method=EVLModel.features)
    assert [[x.shape for x in feature] for feature in features] == [
        [(2, FRAMES, 17, 48), (2, FRAMES, 17, 4, 12), (2, FRAMES, 17, 4, 12)]
    ] * 2
    h = apply(model, params, frames.reshape(-1, 32, 32, 3), method=EVLModel.embed)
    blocks = backbone()["blocks"]
    for i in range(TINY.depth):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        x = np.asarray(h) - np.mean(h, axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        x = x * block["ln_1"]["scale"] + block["ln_1"]["bias"]
        qkv = x @ block["attention"]["qkv"]["kernel"] + block["attention"]["qkv"]["bias"]
        h = frozen_block(block, h)
        if i > 0:
            ours = features[i - 1]
            assert distance(ours[0].reshape(h.shape), h) < 1e-4
            assert distance(ours[1].reshape(*h.shape), qkv[..., :48]) < 1e-4
            assert distance(ours[2].reshape(*h.shape), qkv[..., 48:96]) < 1e-4


def decode(features, p):
    """Compute EVL's decoder in numpy from its description."""

    def norm(x, p):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    x = np.tile(p["query_token"], (len(features[0][0]), 1))  # [B, D]
    for i, (h, q, k) in enumerate(features):
        conv, y = p[f"temporal_conv_{i}"], h.copy()
        for t in range(FRAMES):
            for step in (-1, 0, 1):
                if 0 <= t + step < FRAMES:
                    y[:, t] += h[:, t + step] * conv["kernel"][step + 1, 0, 0]
        y += conv["bias"] + p[f"position_{i}"][:, None]
        y += cross_attention(q, k, **p[f"temporal_attention_{i}"])
        block = p[f"block_{i}"]
        query = linear(norm(x, block["ln_query"]), block["query"]).reshape(-1, 4, 12)
        kv = linear(norm(y.reshape(len(x), -1, 48), block["ln_features"]), block["key_value"])
        key, value = np.moveaxis(kv.reshape(len(x), -1, 2, 4, 12), 2, 0)
        logits = np.einsum("bkd,bnkd->bkn", query, key) / np.sqrt(12)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("bkn,bnkd->bkd", weights, value).reshape(-1, 48)
        x = x + linear(attended, block["out"])
        y = linear(norm(x, block["ln_mlp"]), block["hidden"])
        x = x + linear(y / (1 + np.exp(-1.702 * y)), block["output"])
    return linear(norm(x, p["ln"]), p["output"])


def test_evl_decoder_against_numpy():
    config = tiny_config("evl")
    model, params = build_randomized(config)
    features = apply(model, params, clips(config)[0], method=EVLModel.features)
    features = [tuple(np.asarray(x) for x in feature) for feature in features]
    ours = apply(EVLDecoder(TINY, CLASSES), params["head"], features)
    assert distance(ours, decode(features, params["head"])) < 1e-4
    assert distance(ours, apply(model, params, clips(config)[0])) < 1e-4
    # Twin: features in the other order.
    assert distance(ours, decode(features[::-1], params["head"])) > 1e-3
    assert ours.dtype == jnp.float32


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def layer_norm(x, p):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear_probe(tokens, p):
    """Compute the linear probe of tokens [B, T, N, D]."""
    class_tokens, patches = tokens[:, :, 0], tokens[:, :, 1:].reshape(len(tokens), -1, 48)
    means = [class_tokens.mean(axis=1), patches.mean(axis=1)]
    return linear(np.concatenate(means, axis=-1), p["output"])


def attentive_probe(tokens, p):
    """Compute the attentive probe with the keys and values of every token, head by head."""
    logits = []
    for clip in tokens.reshape(len(tokens), -1, 48):
        keys, values = clip @ p["key"]["kernel"], linear(clip, p["value"])
        pooled = []
        for head in range(4):
            part = slice(12 * head, 12 * head + 12)
            weights = np.exp(keys[:, part] @ p["query_token"][part] / np.sqrt(12))
            pooled.append(weights / weights.sum() @ values[:, part])
        z = p["query_token"] + linear(np.concatenate(pooled), p["out"])
        y = linear(layer_norm(z, p["ln"]), p["mlp"]["hidden"])
        z = z + linear(y / (1 + np.exp(-1.702 * y)), p["mlp"]["output"])
        logits.append(linear(z, p["output"]))
    return np.stack(logits)


def ordered_probe(tokens, p):
    """Compute the ordered probe: low-width patch tokens, frame by frame, place by place."""
    y = linear(tokens[:, :, 1:], p["readout"]["token"])
    y = 0.5 * y * (1 + special.erf(y / np.sqrt(2)))
    y = np.stack([np.concatenate([token for frame in clip for token in frame]) for clip in y])
    return linear(y, p["readout"]["output"])


@pytest.mark.parametrize("head", [linear_probe, attentive_probe, ordered_probe])
def test_probe_heads_against_numpy(head):
    """Check the logits; twins: other places of the tokens, and only `ordered` knows of time."""
    config = tiny_config(f"probe_{head.__name__.removesuffix('_probe')}")
    model, params = build_randomized(config)
    frames, _ = clips(config)
    tokens = np.asarray(apply(model, params, frames, method=ProbeModel.features))
    assert tokens.shape == (2, FRAMES, 17, 48)
    logits = apply(model, params, frames)
    assert distance(logits, head(tokens, params["head"])) < 1e-5
    moved = distance(logits, head(tokens[:, :, [1, 0, *range(2, 17)]], params["head"]))
    assert moved < 1e-5 if head == attentive_probe else moved > 1e-3
    reversed_in_time = distance(logits, apply(model, params, frames[:, ::-1]))
    assert reversed_in_time > 1e-2 if head == ordered_probe else reversed_in_time < 1e-5


def test_probe_takes_all_tokens_after_the_last_norm():
    """Check the first frame's tokens; twin: those before the norm."""
    model, params = build_randomized(tiny_config("probe_linear"))
    frames, _ = clips(tiny_config("probe_linear"))
    tokens = apply(model, params, frames, method=ProbeModel.features)[:, 0]
    h = apply(model, params, frames[:, 0], method=FrameModel.embed)
    for i in range(TINY.depth):
        h = frozen_block(jax.tree.map(lambda leaf, i=i: leaf[i], backbone()["blocks"]), h)
    assert distance(tokens, layer_norm(np.asarray(h), backbone()["ln_post"])) < 1e-4
    assert distance(tokens, h) > 1e-1

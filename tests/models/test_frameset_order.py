"""Tests what DualPath has beyond the paper: differences, convolutions, readouts in time order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dualpath_jax.data.framesets import tile_framesets
from dualpath_jax.models import preprocess
from dualpath_jax.models.backbones import swin
from dualpath_jax.models.methods.adapters import Adapter, FramesetLayout, OrderedReadout
from tests.models.test_dualpath import init, tiny_inputs, tiny_model

GRID = (2, 2)
LAYOUT = FramesetLayout(num_framesets=2, grid=GRID, side=2, leading_tokens=1)
DATA = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "grid": GRID}


def clip_frames(count=8, side=6):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def reference_differences(frames, kind):
    """Return what each frame is in a frameset, float64 [T, fh, fw, 3], one frame at a time."""
    frames = frames.astype(np.float64) / 255 / np.array(DATA["std"])
    if kind == "minus_previous":
        return np.stack([frames[t] - frames[max(t - 1, 0)] for t in range(len(frames))])
    mean = sum(frames) / len(frames)
    differences = np.stack([frame - mean for frame in frames])
    return np.abs(differences) if kind == "abs_minus_mean" else differences


@pytest.mark.parametrize("kind", ["minus_mean", "minus_previous", "abs_minus_mean"])
def test_differences_are_those_of_the_clips_frames(kind):
    frames = clip_frames()
    framesets = tile_framesets(frames, GRID).numpy()
    expected = tile_framesets(reference_differences(frames, kind), GRID).numpy()
    batch = {"spatial": frames[None, :1], "temporal": framesets[None]}
    data = ConfigDict(DATA | {"frameset_input": kind})
    _, found = preprocess.model_inputs(batch, data, jnp.float32)
    assert np.abs(found[0] - expected).max() < 1e-5
    by_frameset = np.concatenate(  # the mean is of the clip's frames, not of a frameset's
        [tile_framesets(reference_differences(part, kind), GRID) for part in np.split(frames, 2)]
    )
    assert np.abs(found[0] - by_frameset).max() > 0.1
    rgb = preprocess.model_inputs(batch, ConfigDict(DATA | {"frameset_input": "rgb"}), jnp.float32)
    assert np.abs(rgb[1][0] - expected).max() > 0.1


def test_layout_finds_the_frames_that_were_tiled():
    frames = np.random.default_rng(0).normal(size=(8, 2, 2, 3)).astype(np.float32)
    tokens = tile_framesets(frames, GRID).numpy().reshape(2, 16, 3)
    assert np.array_equal(LAYOUT.to_frames(tokens)[0], frames)
    assert np.array_equal(LAYOUT.to_tokens(frames[None]), tokens)


def test_convolution_is_over_time_at_the_same_place():
    adapter = Adapter(bottleneck=5, time_kernel_size=3, layout=LAYOUT)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 17, 4)).astype(np.float32)  # one clip of two framesets
    params = adapter.init(jax.random.key(0), x)["params"]
    plain = {name: leaf for name, leaf in params.items() if name != "conv"}
    params["up"]["kernel"] = plain["up"]["kernel"] = rng.normal(size=(5, 4)).astype(np.float32)
    same = adapter.apply({"params": params}, x)
    without = Adapter(bottleneck=5).apply({"params": plain}, x)
    assert np.abs(same - without).max() < 1e-6  # it starts as the identity

    kernel = rng.normal(size=(3, 1, 1, 1, 5)).astype(np.float32)
    params["conv"]["kernel"] = kernel
    y = adapter.apply({"params": params}, x)
    hidden = x @ params["down"]["kernel"] + params["down"]["bias"]
    frames = np.asarray(LAYOUT.to_frames(hidden[:, 1:]))[0]
    padded = np.concatenate([0 * frames[:1], frames, 0 * frames[:1]])
    mixed = sum(padded[k : k + 8] * kernel[k, 0, 0, 0] for k in range(3))
    patches = np.asarray(LAYOUT.to_tokens(mixed[None]))
    hidden = np.concatenate([hidden[:, :1], patches], axis=1)
    expected = jax.nn.gelu(hidden, approximate=False) @ params["up"]["kernel"]
    assert np.abs(y - expected - params["up"]["bias"]).max() < 1e-5
    assert np.abs(y[:, 1:] - same[:, 1:]).max() > 0.1
    assert np.abs(y[:, 0] - same[:, 0]).max() < 1e-6  # class tokens pass it by


def test_readout_sees_order_and_the_class_token_does_not():
    readout = OrderedReadout(width=3, features=6, num_framesets=2)
    tokens = np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32)
    params = readout.init(jax.random.key(0), tokens)
    y = readout.apply(params, tokens)
    assert y.shape == (2, 6)
    frames = LAYOUT.to_frames(tokens)
    reversed_clips = readout.apply(params, LAYOUT.to_tokens(frames[:, ::-1]))
    assert np.abs(y - reversed_clips).max() > 0.1
    swapped = readout.apply(params, tokens.reshape(2, 2, 16, 8)[::-1].reshape(4, 16, 8))
    assert np.abs(y[::-1] - swapped).max() < 1e-6  # clips do not mix


@pytest.mark.parametrize("framesets", [1, 2])
def test_the_model_trains_every_new_parameter(framesets):
    model = tiny_model(time_kernel_size=3, readout_width=4, num_framesets=framesets)
    params = init(model, framesets)
    inputs = tiny_inputs(framesets)

    def loss(params):
        return (model.apply({"params": params}, *inputs) ** 2).sum()

    moved = jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), params)
    gradients = jax.grad(loss)(moved)
    assert params["readout"]["output"]["kernel"].shape == (framesets * 16 * 4, 24)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        {name: gradients[name] for name in ("temporal", "readout", "classifier")}
    ):
        assert np.abs(leaf).max() > 0, path
    conv = gradients["temporal"]["adapters"]["mlp"]["conv"]["kernel"]
    assert conv.shape == (3, 3, 1, 1, 1, 16)  # blocks first


def test_spatial_dropout_is_by_clip_and_only_in_training():
    model = tiny_model(spatial_dropout=0.5)
    params = init(model)
    spatial, temporal = (np.repeat(x[:1], 64, axis=0) for x in tiny_inputs())

    def logits(model, rng=None):
        return np.asarray(model.apply({"params": params}, spatial, temporal, rng))

    without_path = {key: leaf for key, leaf in params.items() if key != "spatial"}
    dropped = np.asarray(
        tiny_model(spatial_path=False).apply({"params": without_path}, spatial, temporal)
    )
    kept = logits(tiny_model())
    assert np.abs(kept - dropped).max() > 1e-3
    assert np.abs(logits(model) - kept).max() < 1e-6
    trained = logits(model, jax.random.key(3))
    is_dropped = np.abs(trained - dropped).max(axis=1) < 1e-5
    is_kept = np.abs(trained - kept).max(axis=1) < 1e-5
    assert np.all(is_dropped ^ is_kept)
    assert 20 <= is_dropped.sum() <= 44
    assert np.abs(logits(tiny_model(), jax.random.key(3)) - kept).max() < 1e-6


def test_bad_geometry_is_named():
    with pytest.raises(ValueError, match="time_kernel_size=2 must be odd"):
        init(tiny_model(time_kernel_size=2))
    with pytest.raises(
        ValueError, match="4 pixels .* are not a multiple of 8, the patches of tiny"
    ):
        init(tiny_model(time_kernel_size=3, frame_size=4, grid=(8, 8)))
    shape = swin.SwinConfig("custom-swin", 32, 4, 24, (2, 2), 2, 48, 4)
    with pytest.raises(ValueError, match="custom-swin does not have global attention: leave"):
        init(tiny_model(config=shape, readout_width=4))

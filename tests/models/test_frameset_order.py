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
    if kind == "motion":
        differences = frames - np.median(frames, axis=0)
        differences -= np.stack([np.median(d, axis=(0, 1)) for d in differences])[:, None, None]
        gray = np.abs(differences).mean(axis=-1)
        gray = gray / (np.sqrt((gray**2).mean()) + 1e-3)
        last = len(frames) - 1
        triples = [(gray[max(t - 1, 0)], gray[t], gray[min(t + 1, last)]) for t in range(last + 1)]
        return np.stack([np.stack(triple, axis=-1) for triple in triples])
    if kind == "minus_previous":
        return np.stack([frames[t] - frames[max(t - 1, 0)] for t in range(len(frames))])
    mean = sum(frames) / len(frames)
    differences = np.stack([frame - mean for frame in frames])
    return np.abs(differences) if kind == "abs_minus_mean" else differences


@pytest.mark.parametrize("kind", ["minus_mean", "minus_previous", "abs_minus_mean", "motion"])
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


def test_motion_ignores_exposure_and_strength_and_shows_direction():
    frames = np.full((1, 8, 6, 6, 3), 0.2, np.float32)
    frames += np.random.default_rng(0).normal(0, 0.01, (1, 1, 6, 6, 3)).astype(np.float32)
    for t in range(6):
        frames[:, t, :, t] += 0.5  # a bar moves to the right, in 6 of 8 frames

    def motion(frames, kind="motion"):
        framesets = tile_framesets(frames[0], (4, 2)).numpy()[None]
        data = ConfigDict(DATA | {"grid": (4, 2), "frameset_input": kind})
        framesets = preprocess.subtract_static(framesets, data)
        return np.asarray(framesets).reshape(2, 6, 4, 6, 3).swapaxes(1, 2).reshape(8, 6, 6, 3)

    found = motion(frames)
    assert found[2, 0, 1:4].argmax(axis=-1).tolist() == [0, 1, 2]  # behind red, in front blue
    back = motion(frames[:, ::-1])
    assert back[5, 0, 1:4].argmax(axis=-1).tolist() == [2, 1, 0]
    exposed = frames + np.linspace(0, 0.3, 8, dtype=np.float32)[:, None, None, None]
    # The frame that is the median of a pixel changes where the bar passes.
    assert np.abs(motion(exposed) - found).max() < 0.1 * found.max()
    plain, plain_exposed = (motion(x, "abs_minus_mean") for x in (frames, exposed))
    assert np.abs(plain_exposed - plain).max() > 0.3 * plain.max()
    fainter = frames.mean(axis=1, keepdims=True) + (frames - frames.mean(axis=1, keepdims=True)) / 3
    assert np.abs(motion(fainter) - found).max() < 2e-2 * found.max()


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
    assert np.abs(y[:, 0] - same[:, 0]).max() < 1e-6  # class tokens skip it


@pytest.mark.parametrize("frame_width", [0, 5])
def test_readout_sees_order_and_the_class_token_does_not(frame_width):
    readout = OrderedReadout(3, 6, num_images=2, frame_width=frame_width, layout=LAYOUT)
    tokens = np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32)
    params = readout.init(jax.random.key(0), tokens)
    y = readout.apply(params, tokens)
    assert y.shape == (2, 6)
    frames = LAYOUT.to_frames(tokens)
    reversed_clips = readout.apply(params, LAYOUT.to_tokens(frames[:, ::-1]))
    assert np.abs(y - reversed_clips).max() > 0.1
    swapped = readout.apply(params, tokens.reshape(2, 2, 16, 8)[::-1].reshape(4, 16, 8))
    assert np.abs(y[::-1] - swapped).max() < 1e-6  # clips do not mix


def test_readout_treats_all_frames_alike():
    readout = OrderedReadout(3, 6, num_images=2, frame_width=5, layout=LAYOUT)
    tokens = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
    params = readout.init(jax.random.key(0), tokens)
    dense = params["params"]
    shapes = {name: layer["kernel"].shape for name, layer in dense.items()}
    assert shapes == {"token": (8, 3), "frame": (2 * 2 * 3, 5), "output": (8 * 5, 6)}

    def apply(name, x):
        return x @ dense[name]["kernel"] + dense[name]["bias"]

    def gelu(x):
        return np.asarray(jax.nn.gelu(x, approximate=False))

    frames = np.asarray(LAYOUT.to_frames(tokens))[0]
    features = [gelu(apply("frame", gelu(apply("token", frame)).reshape(-1))) for frame in frames]
    expected = apply("output", np.concatenate(features))
    found = readout.apply(params, tokens)[0]
    assert np.abs(found - expected).max() < 1e-5
    swapped = apply("output", np.concatenate(features[::-1]))
    assert np.abs(found - swapped).max() > 0.01


@pytest.mark.parametrize("framesets", [1, 2])
def test_the_model_trains_every_new_parameter(framesets):
    model = tiny_model(
        time_kernel_size=3,
        readout_width=4,
        readout_frame_width=3 * (framesets - 1),
        num_framesets=framesets,
    )
    params = init(model, framesets)
    inputs = tiny_inputs(framesets)

    def loss(params):
        return (model.apply({"params": params}, *inputs) ** 2).sum()

    moved = jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), params)
    gradients = jax.grad(loss)(moved)
    num_inputs = 16 * 4 if framesets == 1 else 32 * 3  # channels of patches, features of frames
    assert params["readout"]["output"]["kernel"].shape == (num_inputs, 24)
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
    with pytest.raises(ValueError, match="readout_frame_width=3 needs frames of whole patches"):
        init(tiny_model(readout_width=4, readout_frame_width=3, frame_size=4, grid=(8, 8)))
    with pytest.raises(ValueError, match="readout_frame_width=3 needs model.readout_width"):
        init(tiny_model(readout_frame_width=3))
    shape = swin.SwinConfig("custom-swin", 32, 4, 24, (2, 2), 2, 48, 4)
    with pytest.raises(ValueError, match="custom-swin does not have global attention: leave"):
        init(tiny_model(config=shape, readout_width=4))

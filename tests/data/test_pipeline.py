"""Checks the batches of the pipeline: shapes, order, pixels, and that each video comes once."""

import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from dualpath_jax.data import (
    augment,
    clip_assembly,
    clip_spec,
    frame_ops,
    frame_sampling,
    index_sampler,
    pipeline,
    randaugment_ops,
)
from dualpath_jax.data.clip_spec import ClipInputs, Views
from dualpath_jax.data.video_dataset import FRAME_FEATURES, VideoDataset


def decode_frame(record):
    """Return the pixels of a frame record."""
    jpeg = tf.io.parse_single_example(record, FRAME_FEATURES)["image"].numpy()
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def take_batches(batches, n):
    """Return the next `n` batches."""
    return [next(batches) for _ in range(n)]


def is_same(a, b):
    """Return whether two batches are equal."""
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_batch_contract(config):
    config.data.num_frames = 32
    dataset = VideoDataset(config.data.dir, "train")
    batch = next(pipeline.train_batches(dataset, config.data, 0, 0, 1))
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "spatial": ((8, 2, 32, 32, 3), "uint8"),
        "temporal": ((8, 2, 32, 32, 3), "uint8"),
        "label": ((8,), "int32"),
        "mask": ((8,), "float32"),
        "example_id": ((8,), "int64"),
    }
    assert batch["mask"].tolist() == [1] * 8
    assert batch["label"].tolist() == dataset.labels[batch["example_id"]].tolist()


def test_batches_follow_the_order(config):
    dataset = VideoDataset(config.data.dir, "train")
    batches = take_batches(pipeline.train_batches(dataset, config.data, 3, 0, 6), 6)
    for step, batch in enumerate(batches):
        expected, _ = index_sampler.train_indices(3, step, 8, len(dataset))
        assert batch["example_id"].tolist() == expected.tolist()


def test_resuming_gives_the_same_batches(config):
    dataset = VideoDataset(config.data.dir, "train")
    straight = take_batches(pipeline.train_batches(dataset, config.data, 0, 0, 8), 8)
    resumed = take_batches(pipeline.train_batches(dataset, config.data, 0, 5, 8), 3)
    assert all(is_same(a, b) for a, b in zip(straight[5:], resumed, strict=True))
    # Twin: the same examples have other crops in the next epoch.
    first = {
        int(i): s for b in straight[:5] for i, s in zip(b["example_id"], b["spatial"], strict=True)
    }
    later = {
        int(i): s for b in straight[5:] for i, s in zip(b["example_id"], b["spatial"], strict=True)
    }
    assert any(not np.array_equal(first[i], later[i]) for i in later)
    other = next(pipeline.train_batches(dataset, config.data, 1, 0, 8))
    assert not is_same(straight[0], other)


def test_late_step_reads_only_its_videos(config, monkeypatch):
    """Check step 1,000,000, in one process and in one of two."""
    dataset = VideoDataset(config.data.dir, "train")
    read, read_frames = [], dataset.read_frames
    monkeypatch.setattr(
        dataset,
        "read_frames",
        lambda video, frames: read.append(video) or read_frames(video, frames),
    )
    far = 1_000_000
    expected = index_sampler.train_indices(0, far, 8, len(dataset))[0].tolist()
    next(pipeline.train_batches(dataset, config.data, 0, far, far + 1))
    assert read == expected
    read.clear()
    next(pipeline.train_batches(dataset, config.data, 0, far, far + 1, 1, 2))
    assert read == expected[4:]
    # Twin: the next step reads others.
    read.clear()
    next(pipeline.train_batches(dataset, config.data, 0, far + 1, far + 2))
    assert read != expected


def test_hosts_share_the_batch(config):
    dataset = VideoDataset(config.data.dir, "train")
    whole = next(pipeline.train_batches(dataset, config.data, 0, 0, 1))
    parts = [next(pipeline.train_batches(dataset, config.data, 0, 0, 1, i, 4)) for i in range(4)]
    assert is_same(whole, {key: np.concatenate([p[key] for p in parts]) for key in whole})
    with pytest.raises(ValueError, match="batch size 8 is not divisible by 3 hosts"):
        pipeline.train_batches(dataset, config.data, 0, 0, 1, 0, 3)


def test_pixels_of_a_test_clip(config):
    """Compare the pipeline with frames that PIL decodes and this test crops and tiles."""
    dataset = VideoDataset(config.data.dir, "test")
    batch = next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 8))
    frames = frame_sampling.segment_indices(int(dataset.num_frames[2]), 16)
    stored = [decode_frame(record) for record in dataset.read_frames(2, frames)]
    assert stored[0].shape == (72, 72, 3)
    for k, time in enumerate((4, 12)):
        expected = tf.image.resize(stored[time], (32, 32), method="area").numpy().round()
        difference = np.abs(batch["spatial"][2, 0, k].astype(int) - expected)
        assert difference.max() <= 1
    for time in (0, 4, 6, 12, 15):
        expected = tf.image.resize(stored[time], (8, 8), method="area").numpy().round()
        row, column = divmod(time, 4)
        cell = batch["temporal"][2, 0, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        difference = np.abs(cell.astype(int) - expected)
        assert 0.05 < difference.mean() <= 2  # all of them are decoded at 1/4


def test_crop_and_flip_reach_both_inputs(config, monkeypatch):
    dataset = VideoDataset(config.data.dir, "test")
    plain = next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 8))
    flipped = augment.Crop(0, 0, 72, 72, flip=True)
    monkeypatch.setattr(augment, "eval_crop", lambda *_: flipped)
    mirrored = next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 8))

    def is_close(a, b):  # mirroring reverses the sums of the resize, which may differ by rounding
        return np.abs(a.astype(int) - b).max() <= 1

    assert is_close(mirrored["spatial"], plain["spatial"][..., ::-1, :])
    assert not is_close(mirrored["spatial"], plain["spatial"])
    cells = plain["temporal"][0, 0, 0].reshape(4, 8, 4, 8, 3)
    expected = cells[:, :, :, ::-1].reshape(32, 32, 3)  # each frame mirrored, order kept
    assert is_close(mirrored["temporal"][0, 0, 0], expected)


def set_augmentation(config, layers=0, erasing=0.0):
    """Set crops of whole frames, and RandAugment and erasing as given; return config.data."""
    config.data.crop_scale, config.data.crop_ratio = (1.0, 1.0), (1.0, 1.0)
    config.data.randaugment_layers, config.data.erasing_probability = layers, erasing
    return config.data


def test_randaugment_in_the_batch(config):
    dataset = VideoDataset(config.data.dir, "train")
    config.data.randaugment_layers, config.data.erasing_probability = 4, 0.5
    batches = take_batches(pipeline.train_batches(dataset, config.data, 0, 0, 10), 10)
    shapes = {key: (value.shape, value.dtype.name) for key, value in batches[0].items()}
    assert shapes == {
        "spatial": ((8, 2, 32, 32, 3), "uint8"),
        "temporal": ((8, 1, 32, 32, 3), "uint8"),
        "label": ((8,), "int32"),
        "mask": ((8,), "float32"),
        "example_id": ((8,), "int64"),
        "ops": ((8, 4), "int32"),
        "op_values": ((8, 4), "float32"),
        "tables": ((8, 3, 256), "uint8"),
    }
    # A late start gives the same draw; another epoch (five steps) or seed gives another.
    assert is_same(batches[2], next(pipeline.train_batches(dataset, config.data, 0, 2, 10)))
    ops = {int(i): o for b in batches[:5] for i, o in zip(b["example_id"], b["ops"], strict=True)}
    later = {int(i): o for b in batches[5:] for i, o in zip(b["example_id"], b["ops"], strict=True)}
    assert sum(not np.array_equal(ops[i], later[i]) for i in ops) > 30
    other = next(pipeline.train_batches(dataset, config.data, 1, 0, 10))
    assert not np.array_equal(other["ops"], batches[0]["ops"])
    # Only the operations of `TABLES` change the tables.
    for batch in batches:
        for op, table in zip(batch["ops"], batch["tables"], strict=True):
            if not set(op) & {randaugment_ops.OPS.index(name) for name in randaugment_ops.TABLES}:
                assert (table == np.arange(256)).all()
            elif randaugment_ops.OPS.index("invert") in op:
                assert (table != np.arange(256)).any()
    assert "ops" not in next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 8))


def test_all_frames_and_framesets_are_warped_alike(config, monkeypatch):
    dataset = VideoDataset(config.data.dir, "train")
    data = set_augmentation(config, layers=1)
    rotate = (np.array([randaugment_ops.OPS.index("rotate")], np.int32), np.array([25], np.float32))
    nothing = (np.zeros(1, np.int32), np.zeros(1, np.float32))
    monkeypatch.setattr(randaugment_ops, "draw_ops", lambda *_: nothing)
    plain = next(pipeline.train_batches(dataset, data, 0, 0, 1))
    monkeypatch.setattr(randaugment_ops, "draw_ops", lambda *_: rotate)
    batch = next(pipeline.train_batches(dataset, data, 0, 0, 1))

    def measure_differences(clip, a, b):
        """Return the mean differences between `b` and `a` rotated by PIL, by frame and cell."""
        fill = tuple(round(255 * x) for x in clip_spec.normalization(data)[0])
        differences = []
        for k, time in enumerate((4, 12)):
            frame = Image.fromarray(a["spatial"][clip, k])
            frame = np.asarray(frame.rotate(25, Image.Resampling.BILINEAR, fillcolor=fill))
            differences.append(np.abs(frame.astype(int) - b["spatial"][clip, k]).mean())
            row, column = divmod(time, 4)
            window = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            small = Image.fromarray(a["temporal"][clip, 0][window])
            small = np.asarray(small.rotate(25, Image.Resampling.BILINEAR, fillcolor=fill))
            differences.append(np.abs(small.astype(int) - b["temporal"][clip, 0][window]).mean())
        return np.array(differences)

    for clip in range(8):
        # PIL's filter differs a little; no rotation changes much.
        unrotated = measure_differences(clip, plain, plain)
        assert (measure_differences(clip, plain, batch) < 0.5 * unrotated).all()


def test_both_inputs_are_erased_alike(config, monkeypatch):
    dataset = VideoDataset(config.data.dir, "train")
    data = set_augmentation(config)
    plain = next(pipeline.train_batches(dataset, data, 0, 0, 1))
    box = np.array([1, 2, 4, 3], np.int32)  # in pixels of a frame of 8 in a frameset
    monkeypatch.setattr(augment, "random_erasing", lambda *_: box)
    data.erasing_probability = 1.0
    erased = next(pipeline.train_batches(dataset, data, 0, 0, 1))
    color = [round(255 * x) for x in clip_spec.normalization(data)[0]]
    spatial = plain["spatial"].copy()
    spatial[:, :, 4:20, 8:20] = color
    assert np.array_equal(erased["spatial"], spatial)
    cells = plain["temporal"].reshape(8, 1, 4, 8, 4, 8, 3).copy()
    cells[:, :, :, 1:5, :, 2:5] = color
    assert np.array_equal(erased["temporal"], cells.reshape(8, 1, 32, 32, 3))
    assert not np.array_equal(erased["temporal"], plain["temporal"])


def test_labels_of_mirrored_clips(config, tmp_path):
    dataset = VideoDataset(config.data.dir, "train")
    left, right = "Moving something to the left", "Moving something to the right"
    assert dataset.class_names[:2] == [left, right]
    data = set_augmentation(config)
    plain = take_batches(pipeline.train_batches(dataset, data, 0, 0, 5), 5)
    data.flip = True
    with pytest.raises(ValueError, match="'Moving something to the left' into"):
        pipeline.train_batches(dataset, data, 0, 0, 5)
    swap = tmp_path / "swap.json"
    swap.write_text(json.dumps([[left, right]]))
    data.label_swap = str(swap)
    flipped = take_batches(pipeline.train_batches(dataset, data, 0, 0, 5), 5)
    mirrored = 0
    for a, b in zip(plain, flipped, strict=True):
        for i in range(8):
            is_flipped = not np.array_equal(a["spatial"][i], b["spatial"][i])
            mirrored += is_flipped
            label = int(a["label"][i])
            assert b["label"][i] == (1 - label if is_flipped and label < 2 else label)
            if is_flipped:
                assert np.array_equal(a["spatial"][i][:, :, ::-1], b["spatial"][i])
    assert 10 < mirrored < 30


@pytest.mark.parametrize(("batch_size", "hosts"), [(8, 1), (8, 4), (5, 1)])
def test_evaluation_has_every_video_once(config, batch_size, hosts):
    dataset = VideoDataset(config.data.dir, "test")
    assert len(dataset) == 21
    seen, padding = [], 0
    for host in range(hosts):
        for batch in pipeline.eval_batches(
            dataset, config.data, Views(2, 3), batch_size, host, hosts
        ):
            assert batch["spatial"].shape == (batch_size // hosts, 6, 2, 32, 32, 3)
            assert np.array_equal(batch["mask"] == 1, batch["example_id"] >= 0)
            seen += batch["example_id"][batch["mask"] == 1].tolist()
            padding += int((batch["mask"] == 0).sum())
    assert sorted(seen) == list(range(21))
    assert padding == -21 % batch_size


def test_views_differ(config):
    dataset = VideoDataset(config.data.dir, "test")
    config.data.num_frames, config.data.grid, config.data.num_spatial_frames = 4, (2, 2), 2
    config.data.frame_scale = 2
    batch = next(pipeline.eval_batches(dataset, config.data, Views(2, 1), 8))
    assert not np.array_equal(batch["temporal"][:, 0], batch["temporal"][:, 1])


def test_no_stream_has_an_autotuner():
    """Check the option: the end of a stream would wait for the autotuner, up to a minute."""
    numbers = tf.data.Dataset.range(20)
    stream = clip_assembly.parallel_map(numbers, lambda number: number + 1).batch(5).prefetch(2)
    assert stream.options().autotune.enabled is False
    assert np.concatenate(list(stream.as_numpy_iterator())).tolist() == list(range(1, 21))
    # Twin: TensorFlow enables it by default.
    assert numbers.map(lambda number: number + 1).options().autotune.enabled is not False


def test_a_graph_is_built_once(config, monkeypatch):
    """Check that passes over data of one format share a graph: training and evaluation."""
    built, assemble = [], clip_assembly._assemble
    monkeypatch.setattr(
        clip_assembly, "_assemble", lambda *args: built.append(1) or assemble(*args)
    )
    clip_assembly._traced.cache_clear()
    dataset = VideoDataset(config.data.dir, "train")
    for _ in range(2):
        next(pipeline.train_batches(dataset, config.data, 0, 0, 1))
        next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 8))
    assert len(built) == 1
    config.data.image_size = 64  # twin: another format
    next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 8))
    assert len(built) == 2


class CountedReads:
    """Wraps a data set and records the frames that are read of each video."""

    def __init__(self, dataset):
        self._dataset, self.read = dataset, []

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def __len__(self):
        return len(self._dataset)

    def read_frames(self, video_index, frame_indices):
        self.read.append(len(frame_indices))
        return self._dataset.read_frames(video_index, frame_indices)


@pytest.mark.parametrize(
    ("inputs", "keys", "read", "decoded"),
    [
        (ClipInputs.BOTH_PATHS, ["spatial", "temporal"], 16, {(2, 32), (16, 8)}),
        (ClipInputs.SPATIAL_PATH, ["spatial"], 2, {(2, 32)}),
        (ClipInputs.TEMPORAL_PATH, ["temporal"], 16, {(16, 8)}),
        (ClipInputs.ALL_FRAMES, ["spatial"], 16, {(16, 32)}),
    ],
)
def test_an_input_that_is_not_taken_costs_nothing(config, monkeypatch, inputs, keys, read, decoded):
    """Check which frames are read, and the (number, size) of those that the graph decodes.

    The other inputs are as with both paths.
    """
    found, decode = set(), frame_ops.decode_crops

    def counted(jpegs, box, ratio, size):
        found.add((len(jpegs), size))
        return decode(jpegs, box, ratio, size)

    monkeypatch.setattr(frame_ops, "decode_crops", counted)
    dataset = CountedReads(VideoDataset(config.data.dir, "train"))
    clip_assembly._traced.cache_clear()
    train = next(pipeline.train_batches(dataset, config.data, 0, 0, 1, inputs=inputs))
    views = next(pipeline.eval_batches(dataset, config.data, Views(1, 1), 8, inputs=inputs))
    assert found == decoded
    assert set(dataset.read) == {read}
    both = next(pipeline.train_batches(dataset, config.data, 0, 0, 1))
    for batch in (train, views):
        assert [key for key in ("spatial", "temporal") if key in batch] == keys
    if inputs == ClipInputs.ALL_FRAMES:
        train["spatial"] = train["spatial"][:, [4, 12]]
    assert is_same(train, {key: both[key] for key in train})


@pytest.mark.parametrize("inputs", [ClipInputs.SPATIAL_PATH, ClipInputs.TEMPORAL_PATH])
def test_augmentation_of_one_input(config, inputs):
    """Check that RandAugment and erasing work on each path by itself."""
    config.data.randaugment_layers, config.data.erasing_probability = 2, 1.0
    dataset = VideoDataset(config.data.dir, "train")
    one, both = (
        next(pipeline.train_batches(dataset, config.data, 0, 0, 1, inputs=i))
        for i in (inputs, ClipInputs.BOTH_PATHS)
    )
    for key in ("ops", "op_values", "example_id"):
        assert np.array_equal(one[key], both[key])
    assert one["tables"].shape == (8, 3, 256)
    if inputs == ClipInputs.TEMPORAL_PATH:  # both draw the box in its pixels
        assert is_same(one, {key: both[key] for key in one})


def test_keys_of_inputs_that_are_not_taken_are_not_checked(config):
    """Check frames that no frameset holds, and more spatial frames than frames."""
    config.data.num_frames, config.data.frame_scale = 15, 5
    clip = clip_spec.build_clip_format(config.data, ClipInputs.SPATIAL_PATH)
    assert clip.framesets is None
    assert clip.stored_frames.tolist() == [3, 11]
    with pytest.raises(ValueError, match="num_frames=15 is not divisible by the 16 frames"):
        clip_spec.build_clip_format(config.data, ClipInputs.TEMPORAL_PATH)
    config.data.num_frames, config.data.frame_scale, config.data.num_spatial_frames = 16, 4, 99
    clip = clip_spec.build_clip_format(config.data, ClipInputs.TEMPORAL_PATH)
    assert (clip.num_spatial_frames, clip.stored_frames.tolist()) == (0, list(range(16)))
    with pytest.raises(ValueError, match="num_spatial_frames=99"):
        clip_spec.build_clip_format(config.data, ClipInputs.SPATIAL_PATH)
    config.data.num_frames, config.data.grid = 1, (1, 1)
    config.data.frameset_input = "minus_mean"
    with pytest.raises(ValueError, match="minus_mean of data.num_frames=1 is zero everywhere"):
        clip_spec.build_clip_format(config.data, ClipInputs.TEMPORAL_PATH)


def test_bad_values_are_named(config):
    config.data.sampling = "sparse"
    with pytest.raises(ValueError, match="'sparse'"):
        clip_spec.build_clip_format(config.data)
    config.data.sampling, config.data.num_frames = "dense", 64
    with pytest.raises(ValueError, match="data.sampling_interval"):
        clip_spec.build_clip_format(config.data)

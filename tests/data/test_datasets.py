"""Tests the annotation readers: the splits, classes and files of the listed videos."""

import json
import re

import pytest

from dualpath_jax.data.datasets.registry import DATASETS, Video, list_videos
from dualpath_jax.data.datasets.validation_split import GroupBy, split_by_hash


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    return folder


def ids(listing, split):
    return [video.id for video in listing.splits[split]]


# ----- checks common to all data sets


def test_known_names(videos):
    assert list(DATASETS) == ["k400", "ssv2", "hmdb51", "ucf101", "diving48", "folder", "csv"]
    known = "k400, ssv2, hmdb51, ucf101, diving48, folder, csv"
    with pytest.raises(ValueError, match=f"unknown data set 'ssv3': known are {known}"):
        list_videos("ssv3", str(videos))


def test_bad_arguments(videos, tmp_path):
    with pytest.raises(ValueError, match="no folder of videos .*nowhere.*--videos"):
        list_videos("folder", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="validation_fraction is 1.0"):
        list_videos("folder", str(videos), None, 1.0)
    for dataset in ("k400", "ssv2", "hmdb51", "ucf101", "diving48", "csv"):
        with pytest.raises(ValueError, match="--annotations is missing; it is"):
            list_videos(dataset, str(videos))


def test_one_class_or_one_split_gives_a_notice(tmp_path):
    """Check the notices, and that two classes with two videos each give none."""
    touch(tmp_path / "one" / "run", "1.mp4")
    class_notice, split_notice = list_videos("folder", str(tmp_path / "one")).notices
    assert class_notice.startswith("'run' is the only class")
    assert split_notice.startswith("'train' is the only split")
    for name in ("run", "walk"):
        touch(tmp_path / "two" / name, "1.mp4", "2.mp4")
    assert list_videos("folder", str(tmp_path / "two")).notices == []


# ----- Something-Something-v2

LABELS = {"Moving something up": "1", "Holding something": "0", "Something falling": "2"}


def entry(id_, template):
    return {"id": id_, "label": "moving a cup", "template": template, "placeholders": ["a cup"]}


def write_ssv2(root, prefix="", **files):
    root.mkdir(exist_ok=True)
    default = {
        "labels": LABELS,
        "train": [entry("2", "Moving [something] up"), entry("10", "Holding [something]")],
        "validation": [entry("3", "[Something] falling")],
    }
    for name, content in (default | files).items():
        (root / f"{prefix}{name}.json").write_text(json.dumps(content))
    return str(root)


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2(videos, tmp_path, prefix):
    touch(videos, "2.webm", "3.mp4")
    listing = list_videos("ssv2", str(videos), write_ssv2(tmp_path / "a", prefix))
    assert listing.class_names == [
        "Holding something",
        "Moving something up",
        "Something falling",
    ]
    assert listing.splits == {
        "train": [Video("2", "2.webm", 1), Video("10", "10.webm", 0)],  # 10 does not exist
        "validation": [Video("3", "3.mp4", 2)],
    }
    assert listing.notices == [
        "1 classes have no training video and cannot be learned: 'Something falling'",
        "the annotations have 3 classes, but ssv2 as published has 174",
    ]


def test_ssv2_test_split(videos, tmp_path):
    bare = [{"id": "7"}, {"id": "8"}]
    annotations = write_ssv2(tmp_path / "a", test=bare)
    listing = list_videos("ssv2", str(videos), annotations)
    assert list(listing.splits) == ["train", "validation"]
    assert "2 entries of" in listing.notices[0]
    (tmp_path / "a" / "test-answers.csv").write_text(
        "7;Holding something\n8;Moving [something] up\n"
    )
    listing = list_videos("ssv2", str(videos), annotations)
    assert listing.splits["test"] == [Video("7", "7.webm", 0), Video("8", "8.webm", 1)]
    null = write_ssv2(tmp_path / "a", test=[entry("7", None), entry("8", None)])
    assert list_videos("ssv2", str(videos), null).splits == listing.splits
    assert len(listing.notices) == 2  # a class without training videos, the number of classes
    full = write_ssv2(tmp_path / "b", test=[entry("9", "Moving [something] up")])
    assert list_videos("ssv2", str(videos), full).splits["test"] == [Video("9", "9.webm", 1)]


def test_ssv2_errors(videos, tmp_path):
    def error(match, **files):
        annotations = write_ssv2(tmp_path / "a", **files)
        with pytest.raises(ValueError, match=match):
            list_videos("ssv2", str(videos), annotations)

    error(
        r"video 5 in .*train.json has template 'Eating \[something\]'",
        train=[entry("5", "Eating [something]")],
    )
    error("video 5 .* has template None", train=[{"id": "5"}])
    error("an entry of .*train.json has no 'id': .*looks like Diving48", train=[{"vid_name": "5"}])
    error("no two templates may be the same", labels={"a [b]": "0", "a b": "1"})
    error("labels must be 0..1, each once", labels={"a": "0", "b": "2"})
    error("a label is not a number", labels={"a": "zero"})
    error("holds a list, not a dict", labels=[])
    error("video '2' occurs twice in split 'train'", train=[entry("2", "Holding [something]")] * 2)
    error("has no videos", train=[], validation=[])
    write_ssv2(tmp_path / "a")
    (tmp_path / "a" / "train.json").write_text("[{")
    with pytest.raises(ValueError, match="train.json is not valid JSON"):
        list_videos("ssv2", str(videos), str(tmp_path / "a"))
    (tmp_path / "a" / "train.json").unlink()
    with pytest.raises(ValueError, match="there is no train.json"):
        list_videos("ssv2", str(videos), str(tmp_path / "a"))


# ----- class folders


def test_folder_with_splits(videos):
    touch(videos, "train/b/1.mp4", "train/a a/-2.mp4", "val/b/3.mp4", "test/c/[4].mp4")
    listing = list_videos("folder", str(videos))
    assert listing.class_names == ["a a", "b", "c"]
    assert listing.splits == {
        "test": [Video("test/c/[4].mp4", "test/c/[4].mp4", 2)],
        "train": [
            Video("train/a a/-2.mp4", "train/a a/-2.mp4", 0),
            Video("train/b/1.mp4", "train/b/1.mp4", 1),
        ],
        "validation": [Video("val/b/3.mp4", "val/b/3.mp4", 1)],
    }
    touch(videos, "validation/b/3.mp4")
    with pytest.raises(ValueError, match="test, train, val, validation: two are the same split"):
        list_videos("folder", str(videos))


def test_folder_without_splits(videos):
    touch(videos, *(f"a/{i}.mp4" for i in range(10)), "b/x.mp4", "b/y.mp4", "c/only.mp4")
    touch(videos, ".hidden", "stray.txt", "a/.DS_Store", "a/deep/z.mp4", "b/notes.txt")
    listing = list_videos("folder", str(videos))
    assert listing.class_names == ["a", "b", "c"]
    per_class = {
        split: [sum(video.label == k for video in found) for k in range(3)]
        for split, found in listing.splits.items()
    }
    assert per_class == {"train": [9, 2, 1], "validation": [2, 1, 0]}
    assert "c/only.mp4" in ids(listing, "train")
    both = ids(listing, "train") + ids(listing, "validation")
    assert len(both) == len(set(both)) == 15
    assert "b/notes.txt" in both
    assert "a/deep/z.mp4" in both
    [notice] = listing.notices
    assert "'stray.txt'" in notice
    assert list_videos("folder", str(videos)) == listing


@pytest.mark.parametrize("name", ["valid", "Val", "VALIDATION"])
def test_spellings_of_split_folders(videos, name):
    touch(videos, "Training/a/1.mp4", f"{name}/a/2.mp4", "testing/a/3.mp4")
    listing = list_videos("folder", str(videos))
    assert {split: ids(listing, split) for split in listing.splits} == {
        "train": ["Training/a/1.mp4"],
        "validation": [f"{name}/a/2.mp4"],
        "test": ["testing/a/3.mp4"],
    }


def test_other_folders_beside_splits_are_described(videos):
    """Check the message; in the twin a class that is called "train" holds videos."""
    touch(videos, "train/a/1.mp4", "val/a/2.mp4", "extra/3.mp4")
    with pytest.raises(ValueError, match="split folders train, val, and also the folder 'extra'"):
        list_videos("folder", str(videos))
    touch(videos / "twin", "train/1.mp4", "car/2.mp4", "car/3.mp4", "train/4.mp4", "train/@x/y")
    assert list_videos("folder", str(videos / "twin")).class_names == ["car", "train"]


def test_folders_inside_of_class_folders(videos):
    """Check that all videos below a class folder are of its class, and what is said of it."""
    touch(videos, "a/anna/1.mp4", "a/bob/x/1.mp4", "b/1.mp4", "b/@eaDir/1.jpg", "b/carl/2.mp4")
    listing = list_videos("folder", str(videos), None, 0.0)
    assert listing.class_names == ["a", "b"]
    assert ids(listing, "train") == ["a/anna/1.mp4", "a/bob/x/1.mp4", "b/1.mp4", "b/carl/2.mp4"]
    assert listing.notices == [
        "1 folder whose name begins with @ is ignored: 'b/@eaDir'",
        "the 2 videos in the folders of 'a', such as 'anna', all count as one class; if these "
        "folders are the classes, pass --class_level=2",
    ]


@pytest.mark.parametrize(
    ("names", "level", "classes", "ids_", "ignored"),
    [
        (["@eaDir/walk/x.jpg", "run/2.mp4", "walk/1.mp4"], 1, ["run", "walk"], None, "@eaDir"),
        (["@eaDir/x.jpg", "train/a/1.mp4", "val/a/2.mp4"], 1, ["a"], ["train/a/1.mp4"], "@eaDir"),
        (["train/@eaDir/x.jpg", "train/a/1.mp4"], 1, ["a"], ["train/a/1.mp4"], "train/@eaDir"),
        (["g/@eaDir/t.jpg", "g/walk/1.mp4"], 2, ["walk"], ["g/walk/1.mp4"], "g/@eaDir"),
        (
            ["walk/v1/img_1.jpg", "walk/v1/img_2.jpg", "walk/v1/@eaDir/img_1.jpg/t.jpg"],
            *(1, ["walk"], ["walk/v1"], "walk/v1/@eaDir"),
        ),
    ],
)
def test_folders_of_network_drives(videos, names, level, classes, ids_, ignored):
    """Check that folders such as @eaDir are ignored at all levels, with one notice of all."""
    touch(videos, *names)
    listing = list_videos("folder", str(videos), None, 0.0, class_level=level)
    assert listing.class_names == classes
    assert ids(listing, "train") == (ids_ or names[1:])
    assert listing.notices[0] == f"1 folder whose name begins with @ is ignored: {ignored!r}"


@pytest.mark.parametrize("splits", [False, True])
def test_groups_of_class_folders(videos, splits):
    names = ["day1/walk/1.mp4", "day2/run/3.mp4", "day2/walk/2.mp4", "day1/note.txt"]
    prefixes = ("train/", "val/") if splits else ("",)
    touch(videos, *(prefix + name for prefix in prefixes for name in names))
    listing = list_videos("folder", str(videos), None, 0.0, class_level=2)
    assert listing.class_names == ["run", "walk"]  # of both days
    assert ids(listing, "train") == [prefixes[0] + name for name in names[:3]]
    assert [video.label for video in listing.splits["train"]] == [1, 0, 1]
    assert list(listing.splits) == ["train", "validation"][: len(prefixes)]
    place = videos / prefixes[0] / "day1"
    assert listing.notices[0] == (f"1 file outside class folders in {place} is ignored: 'note.txt'")
    # Twin: at the first level, days are classes.
    assert list_videos("folder", str(videos), None, 0.0).class_names == ["day1", "day2"]
    with pytest.raises(ValueError, match=r"--class_level=3: .* has no folders at level 3, such as"):
        list_videos("folder", str(videos), None, 0.0, class_level=3)


def test_a_group_without_class_folders_is_noted(videos):
    touch(videos, "day1/walk/1.mp4", "day2/2.mp4")
    listing = list_videos("folder", str(videos), None, 0.0, class_level=2)
    assert listing.class_names == ["walk"]
    assert listing.notices[:2] == [
        f"1 file outside class folders in {videos}/day2 is ignored: '2.mp4'",
        "'day2' holds no folders at level 2 and is ignored",
    ]


@pytest.mark.parametrize(
    ("names", "bad"),
    [
        (["walk/train/1.mp4", "walk/validation/2.mp4"], "'walk' in .* holds 2 folders such as"),
        (["run/train/1.mp4", "walk/train/2.mp4"], "'run' in .* holds the folder 'train', the "),
        (["run/a/1.mp4", "walk/Val/2.mp4", "walk/train/2.mp4"], "'walk' in .* such as 'Val', the"),
        (["rail/train/1.mp4", "road/car/2.mp4"], None),  # twin: a class of this name
    ],
)
def test_split_folders_inside_of_groups(videos, names, bad):
    touch(videos, *names)
    if bad:
        with pytest.raises(ValueError, match=f"class folder {bad}.*split folders are expected"):
            list_videos("folder", str(videos), None, 0.0, class_level=2)
        return
    listing = list_videos("folder", str(videos), None, 0.0, class_level=2)
    assert listing.class_names == ["car", "train"]


def test_a_level_of_classes_without_effect_is_refused(videos):
    with pytest.raises(ValueError, match="--class_level=2 has no effect on 'csv', whose classes"):
        list_videos("csv", str(videos), str(videos), class_level=2)


def test_split_folders_inside_of_class_folders(videos):
    touch(videos, "a/train/1.mp4", "a/test/2.mp4", "b/train/3.mp4")
    message = "class folder 'a' .* holds 2 folders such as 'test', the name of a split: split fold"
    with pytest.raises(ValueError, match=message):
        list_videos("folder", str(videos))


def test_images_in_a_class_folder(videos):
    touch(videos, "a/1/img_1.jpg", "a/1/img_2.jpg", "b/img_1.jpg", "b/img_2.jpg")
    with pytest.raises(ValueError, match="class folder 'b' .* holds images: put the images of"):
        list_videos("folder", str(videos))
    for name in ("img_1.jpg", "img_2.jpg"):
        (videos / "b" / name).unlink()
    touch(videos, "b/7/img_1.jpg")
    (videos / "b" / "8").mkdir()  # will be in the list of bad videos: a folder without images
    assert ids(list_videos("folder", str(videos), None, 0.0), "train") == ["a/1", "b/7", "b/8"]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ("clip.mp4", "the video 'clip.mp4'"),
        ("preview.gif", "the video 'preview.gif'"),
        ("thumbs/1.jpg", "the folder 'thumbs'"),
        ("notes.txt", None),  # twin
    ],
)
def test_images_next_to_folders_or_videos(videos, other, what):
    touch(videos, "walk/v1/img_1.jpg", f"walk/v1/{other}", "walk/2.mp4")
    index = list_videos("folder", str(videos), None, 0.0)
    if what and "thumbs" not in other:  # a single image is a preview
        assert ids(index, "train") == ["walk/2.mp4", f"walk/v1/{other}"]
        assert index.notices[0] == f"the image 'img_1.jpg' next to {what} in 'walk/v1' is ignored"
    touch(videos, "walk/v1/img_2.jpg")
    if what is None:
        found = list_videos("folder", str(videos), None, 0.0)
        assert ids(found, "train") == ["walk/2.mp4", "walk/v1"]
        return
    message = f"'walk/v1' in .* holds images and also {what}: keep only the images in the folder"
    with pytest.raises(ValueError, match=message):
        list_videos("folder", str(videos), None, 0.0)


def test_a_folder_that_contains_itself(videos):
    touch(videos, "a/1.mp4", "b/2.mp4")
    (videos / "a" / "loop").symlink_to(videos / "a")
    with pytest.raises(ValueError, match="nested more than 10 folders deep; is one of them a link"):
        list_videos("folder", str(videos))


@pytest.mark.parametrize("other", ["Jump", "JUMP", "jumped"])
def test_classes_equal_but_for_case(videos, other):
    """Check that both problems are named; the twin has another name."""
    touch(videos, "train/jump/1.mp4", f"val/{other}/2.mp4", "train/run/1.mp4")
    listing = list_videos("folder", str(videos))
    if other == "jumped":
        assert listing.notices == [
            f"1 classes have no training video and cannot be learned: {other!r}"
        ]
        return
    unlearnt, similar = listing.notices
    assert unlearnt == f"1 classes have no training video and cannot be learned: {other!r}"
    assert similar.startswith(f"classes {other!r} and 'jump' differ only in case or")


def test_classes_equal_but_for_their_unicode_form(videos):
    touch(videos, "train/caf\u00e9/1.mp4", "val/cafe\u0301/2.mp4")
    assert "or in the Unicode form of a letter" in list_videos("folder", str(videos)).notices[-1]


def test_words_that_casefolding_would_mix_up(videos):
    touch(videos, "Masse/1.mp4", "Masse/2.mp4", "Ma\u00dfe/1.mp4", "Ma\u00dfe/2.mp4")
    assert list_videos("folder", str(videos)).notices == []


def test_folder_fraction_zero_and_empty(videos):
    with pytest.raises(ValueError, match="no class folders"):
        list_videos("folder", str(videos))
    (videos / "empty class").mkdir()
    touch(videos, "a/1.mp4", "a/2.mp4")
    with pytest.raises(ValueError, match="class folder 'empty class' in .* holds no video; "):
        list_videos("folder", str(videos))
    (videos / "empty class").rmdir()
    listing = list_videos("folder", str(videos), None, 0.0)
    assert ids(listing, "train") == ["a/1.mp4", "a/2.mp4"]
    assert list(listing.splits) == ["train"]


def test_split_by_hash_is_fixed():
    """Check the exact ids: they must be the same on every machine and in every release."""
    split = split_by_hash([Video(f"v{i}", f"v{i}.mp4", i % 2) for i in range(20)], 0.2)
    assert [video.id for video in split["validation"]] == ["v0", "v7", "v11", "v16"]


# ----- CSV lists


def test_csv_file(videos, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(
        "path,label\na b/1, x.mp4,jump\n-2.mp4,run\n\n/abs/3.mp4, run \n"
        '"q,4.mp4","hop, skip"\n5.mp4,jump\n'
    )
    listing = list_videos("csv", str(videos), str(path), 0.0)
    assert listing.class_names == ["hop, skip", "jump", "run"]
    assert listing.splits["train"] == [
        Video("a b/1, x.mp4", "a b/1, x.mp4", 1),
        Video("-2.mp4", "-2.mp4", 2),
        Video("/abs/3.mp4", "/abs/3.mp4", 2),
        Video("q,4.mp4", "q,4.mp4", 0),
        Video("5.mp4", "5.mp4", 1),
    ]
    split = list_videos("csv", str(videos), str(path), 0.5).splits
    assert {name: len(found) for name, found in split.items()} == {"train": 3, "validation": 2}
    path.write_text("[x]/1.mp4,run\n")
    assert list_videos("csv", str(videos), str(path), 0.0).splits["train"][0].id == "[x]/1.mp4"


def test_csv_numbers_and_kinetics_lists(videos, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("a b.mp4 3\nc.mp4,0\n")
    listing = list_videos("csv", str(videos), str(path), 0.0)
    assert listing.class_names == ["0", "1", "2", "3"]
    assert listing.notices == ["2 classes have no video, such as '1'"]
    assert listing.splits["train"] == [Video("a b.mp4", "a b.mp4", 3), Video("c.mp4", "c.mp4", 0)]


@pytest.mark.parametrize("validation", ["validation.csv", "val.csv"])
def test_csv_folder(videos, tmp_path, validation):
    touch(tmp_path / "lists", "unused")
    (tmp_path / "lists" / "train.csv").write_text("1.mp4,a\n2.mp4,b\n")
    (tmp_path / "lists" / validation).write_text("3.mp4,b\n")
    (tmp_path / "lists" / "test.csv").write_text("1.mp4,a\n")
    listing = list_videos("csv", str(videos), str(tmp_path / "lists"))
    assert {name: [video.id for video in found] for name, found in listing.splits.items()} == {
        "train": ["1.mp4", "2.mp4"],
        "validation": ["3.mp4"],
        "test": ["1.mp4"],
    }
    assert listing.notices == ["1 videos are in several splits, such as '1.mp4'"]
    other = {"validation.csv": "val.csv", "val.csv": "validation.csv"}[validation]
    (tmp_path / "lists" / other).write_text("4.mp4,b\n")
    with pytest.raises(ValueError, match=r"validation.csv and another list of .* 'validation'"):
        list_videos("csv", str(videos), str(tmp_path / "lists"))
    (tmp_path / "lists" / other).unlink()
    (tmp_path / "lists" / "test.csv").write_text("9.mp4,c\n")
    with pytest.raises(ValueError, match="'9.mp4' of split 'test' has label 'c'"):
        list_videos("csv", str(videos), str(tmp_path / "lists"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.mp4\n", "line 1: 'a.mp4' is not `path,label`"),
        ("a b.mp4 run\n", "is not `path,label`"),
        ("a.mp4,x\nb.mp4,\n", "line 2: 'b.mp4,' is not"),
        ("a.mp4,x\na.mp4,y\n", "video 'a.mp4' occurs twice"),
        ("a.mp4,01\n", "label '01' is written with leading zeros"),
        ("path,label\n", "has no videos"),
        ("label,youtube_id,time_start\n", "list.csv is not a list .*looks like Kinetics, --data"),
        ("video,label\na.mp4,0\nb.mp4,1\n", "'video' has label 'label', .*headings must be"),
        ("a.mp4 0\nb, c.mp4 1\n", "video 'b' has label 'c.mp4 1', where others have whole numbers"),
        ('[{"vid_name": "a"}]\n', "is not a list of `path,label`; it looks like Diving48"),
        ("", "has no videos"),
    ],
)
def test_csv_errors(videos, tmp_path, text, match):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        list_videos("csv", str(videos), str(tmp_path / "list.csv"), 0.0)


def test_csv_heading(videos, tmp_path):
    """Check that a heading is left out; the twin has a first video that is missing."""
    touch(videos, *(f"{i}.mp4" for i in range(4)))
    path = tmp_path / "list.csv"
    lines = "".join(f"{i}.mp4,{'ab'[i % 2]}\n" for i in range(4))
    path.write_text("video_name,tag\n" + lines)
    listing = list_videos("csv", str(videos), str(path), 0.0)
    assert listing.class_names == ["a", "b"]
    assert ids(listing, "train") == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert listing.notices[0].endswith("'video_name,tag', is taken for a heading")
    path.write_text("clip.name,class\n0.mp4,a\n1.mp4,b\ngone.mp4,a\n")  # a file is missing
    assert list_videos("csv", str(videos), str(path), 0.0).class_names == ["a", "b"]
    for first in ("gone.mp4,a", "gone,a", "gone.mp4,c"):
        path.write_text(f"{first}\n{lines}")
        listing = list_videos("csv", str(videos), str(path), 0.0)
        assert ids(listing, "train")[0] == first.split(",")[0]


def test_csv_with_the_label_first(videos, tmp_path):
    touch(videos, "1.mp4", "2.mp4")
    path = tmp_path / "list.csv"
    path.write_text("tag,file\na,1.mp4\nb,2.mp4\n")
    with pytest.raises(ValueError, match="has lines `label,path`, such as 'b,2.mp4'; write `path"):
        list_videos("csv", str(videos), str(path), 0.0)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "latin-1"])
def test_csv_in_another_encoding(videos, tmp_path, encoding):
    """Check the error; the twin is the same list in UTF-8, with bytes of any kind in a path."""
    text = "1.mp4,\u00e9t\u00e9\n" if encoding == "latin-1" else "1.mp4,\u8df3\u8dc3\n"
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="line 1: .*not text in UTF-8; convert the list, such as"):
        list_videos("csv", str(videos), str(path), 0.0)
    path.write_bytes(b"\xff" + text.encode())
    assert list_videos("csv", str(videos), str(path), 0.0).class_names == [text[6:-1]]


def test_csv_lists_in_capitals(videos, tmp_path):
    (tmp_path / "Train.CSV").write_text("1.mp4,a\n2.mp4,a\n")
    (tmp_path / "valid.csv").write_text("3.mp4,a\n")
    assert list(list_videos("csv", str(videos), str(tmp_path)).splits) == ["train", "validation"]


# ----- recordings that a split keeps together


def segments(label, **counts):
    """Return `counts` videos "NAME_NUMBER.mp4" of each recording."""
    names = [f"{name}_{i:03d}" for name, count in counts.items() for i in range(count)]
    return [Video(f"{name}.mp4", f"{name}.mp4", label) for name in names]


def split_recordings(videos, fraction):
    """Return the recordings of train and validation, and how many videos validation has."""
    groups = {video.id: video.id.rsplit("_", 1)[0] for video in videos}
    split = split_by_hash(videos, fraction, groups)
    assert sorted(v.id for part in split.values() for v in part) == sorted(v.id for v in videos)
    train, validation = ({groups[v.id] for v in split[s]} for s in ("train", "validation"))
    assert not train & validation
    return train, validation, split["validation"]


@pytest.mark.parametrize(
    ("sizes", "fraction", "count"),
    [
        ({"a": 30, "b": 10, "c": 10, "d": 10, "e": 40}, 0.2, 20),
        ({"a": 7, "b": 5, "c": 3}, 0.5, 8),
        ({"a": 90, "b": 10}, 0.5, 10),  # there is nothing nearer
        ({"a": 50, "b": 50}, 0.1, 50),  # each split gets one
        ({"a": 9}, 0.3, 0),  # a class of one recording
        ({"a": 3, "b": 3, "c": 3, "d": 1}, 0.1, 1),
    ],
)
def test_split_of_groups_is_as_near_as_possible(sizes, fraction, count):
    assert len(split_recordings(segments(0, **sizes), fraction)[2]) == count


def test_split_of_groups_takes_sizes_in_proportion():
    """Check that validation has neither only the large recordings nor only the small ones."""
    sizes = {f"large{i}": 10 for i in range(10)} | {f"small{i}": 1 for i in range(100)}
    _, validation, videos = split_recordings(segments(0, **sizes), 0.2)
    assert len(videos) == 40
    assert sum(name.startswith("large") for name in validation) == 2


def test_split_of_groups_over_classes():
    """Check a recording with videos of two classes, and that the split is the same in any order."""
    videos = segments(0, a=4, b=4, c=4) + [
        Video(f"{name}_{i}x.mp4", f"{name}_{i}x.mp4", 1) for name in "abd" for i in range(3)
    ]
    train, validation, found = split_recordings(videos, 0.34)
    assert {label: sum(v.label == label for v in found) for label in (0, 1)} == {0: 4, 1: 3}
    assert split_recordings(videos[::-1], 0.34)[1] == validation
    assert len(train | validation) == 4


def test_split_without_groups_is_that_of_groups_of_one():
    videos = segments(0, a=40)
    alone = {video.id: video.id for video in videos}
    assert split_by_hash(videos, 0.2, alone) == split_by_hash(videos, 0.2)
    # Without them, segments of a recording are divided.
    split = split_by_hash(segments(0, a=10, b=10), 0.5)
    shared = [{v.id.split("_")[0] for v in split[name]} for name in ("train", "validation")]
    assert shared == [{"a", "b"}, {"a", "b"}]


@pytest.mark.parametrize(
    ("group_by", "path", "group"),
    [
        ("folder:1", "day3/camera1/17.mp4", "camera1"),
        ("folder:2", "/data/day3/camera1/17.mp4", "day3"),
        ("name:(.+)_", "x/abc_01_002.mp4", "abc_01"),
        ("name:subject[0-9]+", "take2_subject7_walk.mp4", "subject7"),
        ("name:(.+)_[0-9]+_[0-9]+", "x_y_000010_000020.mp4", "x_y"),
        ("name:(.+)_", "abc.mp4", None),
        ("column:who", "abc.mp4", "me"),
    ],
)
def test_group_of(group_by, path, group):
    assert GroupBy.parse(group_by).group_of(Video(path, path, 0, "me")) == group
    assert str(GroupBy.parse(group_by)) == f"--group_by={group_by}"


@pytest.mark.parametrize(
    "text", ["", "folder", "folder:0", "folder:-1", "folder:a", "name:", "column", "file:1"]
)
def test_unknown_groupings(text):
    with pytest.raises(ValueError, match=f"--group_by={text} is not folder:LEVEL, name:REGEX or "):
        GroupBy.parse(text)
    with pytest.raises(ValueError, match="not a regular expression: missing"):
        GroupBy.parse("name:(.+")


def test_group_by_name(videos):
    """Check that list_videos keeps recordings whole, and reports what it did."""
    touch(videos, *(f"{c}/{r}_{i}.mp4" for c in ("a", "b") for r in "pqrs" for i in range(5)))
    touch(videos, "a/single.mp4")
    listing = list_videos("folder", str(videos), None, 0.25, GroupBy.parse("name:(.+)_"))
    recordings = [{i.split("/")[1][0] for i in ids(listing, s)} for s in ("train", "validation")]
    assert "".join(sorted(recordings[0] | recordings[1])) == "pqrs"
    grouped = [video for video in ids(listing, "validation") if "_" in video]
    assert len({video.split("/")[1][0] for video in grouped}) * 10 == len(grouped) == 10
    assert listing.notices == [
        "--group_by=name:(.+)_ makes 5 groups of 41 videos; the largest, 'p', has 10",
        "1 file names do not match --group_by=name:(.+)_, such as 'a/single.mp4'; each is a group "
        "of its own",
    ]


def test_group_by_column(videos, tmp_path):
    path = tmp_path / "list.csv"
    rows = [f"p{i % 4},{i}.mp4,{'ab'[i // 4 % 2]}" for i in range(16)]
    path.write_text("\n".join(["person,path,label", *rows]) + "\n")
    by_person = GroupBy.parse("column:person")
    listing = list_videos("csv", str(videos), str(path), 0.25, by_person)
    assert listing.class_names == ["a", "b"]
    found = {split: {video.group for video in v} for split, v in listing.splits.items()}
    assert len(found["validation"]) == 1
    assert len(found["train"] - found["validation"]) == 3
    with pytest.raises(ValueError, match="first line of .* path, label, who, and lacks who"):
        list_videos("csv", str(videos), str(path), 0.25, GroupBy.parse("column:who"))
    with pytest.raises(ValueError, match="--group_by=column:person needs --dataset=csv: 'folder'"):
        list_videos("folder", str(videos), None, 0.25, by_person)
    path.write_text("person,path,label\np1,1.mp4,a\np1,2.mp4\n")
    with pytest.raises(ValueError, match="line 3: 'p1,2.mp4' lacks one of path, label, person"):
        list_videos("csv", str(videos), str(path), 0.25, by_person)


def test_group_by_without_effect(videos):
    touch(videos, "a/p_1.mp4", "a/p_2.mp4", "b/q_1.mp4")
    by_name = GroupBy.parse("name:(.+)_")
    with pytest.raises(ValueError, match="has no effect with --validation_fraction=0"):
        list_videos("folder", str(videos), None, 0.0, by_name)
    with pytest.raises(ValueError, match=r"name:\(\.\+\)x has no effect: no two of the 3 videos"):
        list_videos("folder", str(videos), None, 0.2, GroupBy.parse("name:(.+)x"))
    with pytest.raises(ValueError, match="puts all 3 videos into one group, '_'"):
        list_videos("folder", str(videos), None, 0.2, GroupBy.parse("name:_"))
    with pytest.raises(ValueError, match="folder:2: video 'a/p_1.mp4' has 1 folders"):
        list_videos("folder", str(videos), None, 0.2, GroupBy.parse("folder:2"))
    touch(videos / "split", "train/a/p_1.mp4", "train/a/p_2.mp4", "test/a/p_3.mp4")
    with pytest.raises(ValueError, match="because the annotations divide .* test, train"):
        list_videos("folder", str(videos / "split"), None, 0.2, by_name)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["abc_001", "abc_002", "def_001"], "name:(.+)[_-][a-z]?\\d+$"),
        (["v_a_g01_c01", "v_a_g01_c02", "v_a_g02_c01"], "name:(.+)[_-][a-z]?\\d+$"),
        (["x_000010_000020", "x_000020_000030", "y_000000_000010"], "\\d{4,}[_-]\\d{4,}$"),
        (["video_clip3", "video_clip4", "other_clip1"], "(?:clip|segment"),
        (["run_001", "run_002", "run_003"], ""),  # one number per video of the class
        (["1", "2", "3"], ""),
        (["abc_1", "def_1", "ghi_1"], ""),
    ],
)
def test_names_of_segments_give_a_notice(videos, names, group):
    touch(videos, *(f"{c}/{name}.mp4" for c in ("a", "b") for name in names))
    notices = list_videos("folder", str(videos)).notices
    if not group:
        assert notices == []
        return
    (notice,) = notices
    assert notice.startswith(f"names such as '{names[0]}.mp4' and '{names[1]}.mp4' suggest")
    assert group in notice
    remedy = re.search(r"--group_by='(.+)' ", notice).group(1)
    grouped = list_videos("folder", str(videos), None, 0.2, GroupBy.parse(remedy))
    assert "makes 2 groups of 6 videos" in grouped.notices[0]  # and no notice of segments
    assert len(grouped.notices) == 1
    assert list_videos("folder", str(videos), None, 0.0).notices[1:] == []

"""Tests the readers of Kinetics-400, HMDB51 and Diving48 on files in their published form."""

import json

import pytest

from dualpath_jax.data.datasets.registry import Video, list_videos


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "my videos ü"
    folder.mkdir()
    return folder


@pytest.fixture
def annotations(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    return folder


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


# ----- Kinetics-400

HEADER = "label,youtube_id,time_start,time_end,split"
TRAIN = f"""{HEADER},is_cc
skiing crosscountry,-abc_1,1,11,train,0
skiing (not slalom or crosscountry),_d-e,120,130,train,1
"massaging person's head",-abc_1,20,30,train,0
"""
VAL = f"{HEADER}\nskiing slalom,xyz,0,10,val\n"


def read_k400(videos, annotations):
    return list_videos("k400", str(videos), str(annotations))


def test_k400(videos, annotations):
    write(annotations, train__csv=TRAIN, val__csv=VAL)
    # Folder names lack brackets and quotes; their order differs from that of the labels.
    touch(videos, "skiing_crosscountry/-abc_1_000001_000011.mp4")
    touch(videos, "skiing not slalom or crosscountry/_d-e_000120_000130.mp4")
    touch(videos, "-abc_1_000020_000030.mp4", "some notes.txt")
    listing = read_k400(videos, annotations)
    assert listing.class_names == [
        "massaging person's head",
        "skiing (not slalom or crosscountry)",
        "skiing crosscountry",
        "skiing slalom",
    ]
    assert listing.splits == {
        "train": [
            Video("-abc_1_000001_000011", "skiing_crosscountry/-abc_1_000001_000011.mp4", 2),
            Video(
                "_d-e_000120_000130",
                "skiing not slalom or crosscountry/_d-e_000120_000130.mp4",
                1,
            ),
            Video("-abc_1_000020_000030", "-abc_1_000020_000030.mp4", 0),
        ],
        "validation": [Video("xyz_000000_000010", "xyz_000000_000010.mp4", 3)],  # not there
    }
    assert listing.notices == [
        "1 classes have no training video and cannot be learned: 'skiing slalom'",
        "the annotations have 4 classes, but k400 as published has 400",
    ]
    stripped = [name.translate({ord(c): None for c in "'()"}) for name in listing.class_names]
    assert sorted(stripped) != stripped  # the folders' order would be wrong


def test_k400_has_400_classes_in_the_order_of_raw_labels(videos, annotations):
    """Check the order of 400 labels, of which 308 and 309 swap when spelled as folder names."""
    labels = [f"a{i:03d}" for i in range(308)] + ["s (not t)", "s b"]
    labels += [f"t{i:03d}" for i in range(90)]
    rows = [f"{label},id{i},0,10,train" for i, label in enumerate(reversed(labels))]
    write(annotations, train__csv="\n".join([HEADER, *rows]))
    listing = read_k400(videos, annotations)
    assert listing.class_names == labels
    assert [video.label for video in listing.splits["train"]] == list(range(399, -1, -1))
    assert [notice.split(";")[0] for notice in listing.notices] == ["'train' is the only split"]
    assert sorted(label.replace("(", "") for label in labels).index("s b") == 308  # not 309
    write(annotations, val__csv=f"{HEADER}\none more,id,0,10,val\n")
    with pytest.raises(ValueError, match="has 401 classes, but Kinetics-400 has 400; .*-600 or"):
        read_k400(videos, annotations)


def test_k400_variants(videos, annotations):
    """Check any order of columns, and test files without and with labels."""
    write(
        annotations,
        train__csv="split,time_end,is_cc,time_start,label,youtube_id\ntrain,11,0,1,run,a\n",
        validate__csv=f"\ufeff{HEADER}\nrun,b,1,11,validate\n",
        test__csv="youtube_id,time_start,time_end,split\n-c,1,11,test\nd,1,11,test\n",
    )
    touch(videos, "x/a_000001_000011.webm", "y/b_000001_000011.mp4", "b_000001_000011.mp4")
    listing = read_k400(videos, annotations)
    assert listing.splits == {
        "train": [Video("a_000001_000011", "x/a_000001_000011.webm", 0)],
        "validation": [Video("b_000001_000011", "b_000001_000011.mp4", 0)],
    }
    assert listing.notices[0].startswith("2 rows of ")
    assert "test.csv have no label and are left out" in listing.notices[0]
    assert listing.notices[1].startswith("1 video files below ")
    assert listing.notices[1].endswith("not used, such as 'y/b_000001_000011.mp4'")
    with pytest.raises(ValueError, match=r"no row of .*test.csv' has a label; add train.csv"):
        read_k400(videos, annotations / "test.csv")
    write(annotations, test__csv=f"{HEADER}\nrun,-c,1,11,test\n")
    listing = read_k400(videos, annotations)
    assert listing.splits["test"] == [Video("-c_000001_000011", "-c_000001_000011.mp4", 0)]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.mp4,3\n", "has no column youtube_id, time_start.*looks like a list of `path,label`"),
        (f"{HEADER}\nrun,a,1,x,train\n", "line 2: a time is not a whole number .*'x'"),
        (f"{HEADER}\nrun,a,1,11,dev\n", "line 2: split is 'dev', not train, val or test"),
        (f"{HEADER}\nrun,a,1\n", "line 2: split is ''"),
        (f"{HEADER}\nrun,,1,11,train\n", "line 2: youtube_id is empty"),
        (f"{HEADER}\nrun,a,1,11,train\nwalk,a,1,11,train\n", "'a_000001_000011' occurs twice"),
        ("", "has no column"),
    ],
)
def test_k400_errors(videos, annotations, text, match):
    write(annotations, train__csv=text)
    with pytest.raises(ValueError, match=match):
        read_k400(videos, annotations)


# ----- HMDB51

NAMES = ["a [b] (c).d.avi", "x y_#1.avi", "-z.avi", "unused.avi"]
ROLES = {"1": "1120", "2": "1210", "3": "2110"}  # of NAMES in each division


def write_hmdb51(folder, classes=("sword_exercise", "sword", "brush_hair")):
    for name in classes:
        for division, roles in ROLES.items():
            lines = [f"{file} {role} \n" for file, role in zip(NAMES, roles, strict=True)]
            (folder / f"{name}_test_split{division}.txt").write_text("".join(lines))


def read_hmdb51(videos, annotations):
    return list_videos("hmdb51", str(videos), str(annotations))


def test_hmdb51(videos, annotations):
    write_hmdb51(annotations)
    listing = read_hmdb51(videos, annotations)
    assert listing.class_names == ["brush_hair", "sword", "sword_exercise"]
    files = sorted(path.name for path in annotations.iterdir())
    assert files[3].startswith("sword_exercise_")  # file names have another order than classes
    first_two = {
        split: [(video.path, video.label) for video in videos][:2]
        for split, videos in listing.splits.items()
    }
    a, x, z = (f"brush_hair/{name}" for name in NAMES[:3])
    assert first_two == {
        "train1": [(a, 0), (x, 0)],
        "test1": [(z, 0), (f"sword/{NAMES[2]}", 1)],
        "train2": [(a, 0), (z, 0)],
        "test2": [(x, 0), (f"sword/{NAMES[1]}", 1)],
        "train3": [(x, 0), (z, 0)],
        "test3": [(a, 0), (f"sword/{NAMES[0]}", 1)],
    }
    sizes = {split: len(videos) for split, videos in listing.splits.items()}
    assert sizes == {"train1": 6, "test1": 3, "train2": 6, "test2": 3, "train3": 6, "test3": 3}
    assert list(listing.videos_to_store()) == ["all"]
    assert len(listing.videos_to_store()["all"]) == 9  # each video once, without unused.avi
    assert listing.notices == ["the annotations have 3 classes, but hmdb51 as published has 51"]
    for name in list(annotations.iterdir()):
        if not name.name.endswith("split2.txt"):
            name.unlink()
    assert list(read_hmdb51(videos, annotations).splits) == ["train2", "test2"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.avi 3\n", "sword_test_split1.txt, line 1: 'a.avi 3' is not `<file> <0|1|2>`"),
        ("a.avi\n", "line 1: 'a.avi' is not"),
        ("a.avi 1\n\na.avi 2\n", "line 3: 'a.avi' occurs twice"),
        ("a.avi 0\n", "sword_test_split1.txt lists no video of its class"),
        ("", "sword_test_split1.txt lists no video of its class"),
        (None, "there is no .*sword_test_split1.txt, but other classes have"),
    ],
)
def test_hmdb51_errors(videos, annotations, text, match):
    write_hmdb51(annotations)
    path = annotations / "sword_test_split1.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_hmdb51(videos, annotations)


# ----- UCF101


def write_ucf101(folder):
    (folder / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    names = [f"{c}/v_{c}_g{g}_c01.avi" for c in ("ApplyEyeMakeup", "Archery") for g in "123"]
    for division in (1, 2, 3):
        lines = {"train": [], "test": []}
        for name in names:
            role = "test" if f"_g{division}_" in name else "train"
            number = f" {1 + name.startswith('Archery')}" if role == "train" else ""
            lines[role].append(f"{name}{number}\r\n")  # as published
        for role, texts in lines.items():
            (folder / f"{role}list0{division}.txt").write_text("".join(texts))


def read_ucf101(videos, annotations):
    return list_videos("ucf101", str(videos), str(annotations))


def test_ucf101(videos, annotations):
    write_ucf101(annotations)
    listing = read_ucf101(videos, annotations)
    assert listing.class_names == ["ApplyEyeMakeup", "Archery"]
    assert list(listing.splits) == ["train1", "test1", "train2", "test2", "train3", "test3"]
    assert [(video.path, video.label) for video in listing.splits["test2"]] == [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g2_c01.avi", 0),
        ("Archery/v_Archery_g2_c01.avi", 1),
    ]
    assert [video.label for video in listing.splits["train1"]] == [0, 0, 1, 1]
    assert len(listing.videos_to_store()["all"]) == 6  # each video once
    assert listing.notices == ["the annotations have 2 classes, but ucf101 as published has 101"]


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("classInd.txt", "2 Archery\n", "line 1: '2 Archery' is not `1 <class>`"),
        ("classInd.txt", "1 A\n2 A\n", "line 2: '2 A' is not `2 <class>`"),
        ("classInd.txt", None, "there is no classInd.txt in"),
        ("trainlist02.txt", "Archery/a.avi 1\n", "trainlist02.txt, line 1: .* number of another"),
        ("trainlist02.txt", "Fencing/a.avi 1\n", "is not `<class>/<file>` of a class of classInd"),
        ("testlist01.txt", "Archery\n", "testlist01.txt, line 1: 'Archery' is not"),
        ("testlist03.txt", None, "there is trainlist03.txt in .*, but no testlist03.txt"),
    ],
)
def test_ucf101_errors(videos, annotations, file, text, match):
    write_ucf101(annotations)
    path = annotations / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_ucf101(videos, annotations)


# ----- Diving48

VOCABULARY = [["Back", "15som", "05Twis", f"FREE{i}"] for i in range(48)]


def dive(name, label):
    return {"vid_name": name, "label": label, "start_frame": 0, "end_frame": 90}


def write_diving48(folder, train=None, test=None, vocabulary=VOCABULARY, version="V2_"):
    train = [dive(f"-v{i}", i) for i in range(48)] if train is None else train
    test = [dive("_8Vy3dlHg2w_00000", 47)] if test is None else test
    (folder / f"Diving48_{version}train.json").write_text(json.dumps(train))
    (folder / f"Diving48_{version}test.json").write_text(json.dumps(test))
    (folder / "Diving48_vocab.json").write_text(json.dumps(vocabulary))


def read_diving48(videos, annotations):
    return list_videos("diving48", str(videos), str(annotations))


def test_diving48(videos, annotations):
    write_diving48(annotations)
    listing = read_diving48(videos, annotations)
    assert listing.class_names == [f"Back 15som 05Twis FREE{i}" for i in range(48)]
    assert listing.splits["train"] == [Video(f"-v{i}", f"-v{i}.mp4", i) for i in range(48)]
    name = "_8Vy3dlHg2w_00000"
    assert listing.splits["test"] == [Video(name, f"{name}.mp4", 47)]
    assert len(listing.notices) == 2
    assert listing.notices[0].endswith("has 48 videos, but that of Diving48 V2 has 15027")


def test_diving48_v1_is_refused(videos, annotations):
    write_diving48(annotations, version="")
    match = r"Diving48_train.json is of Diving48 V1, .*download V2 \(Diving48_V2_train.json\)"
    with pytest.raises(ValueError, match=match):
        read_diving48(videos, annotations)
    write_diving48(annotations)  # V2 in the same folder
    assert len(read_diving48(videos, annotations).splits["train"]) == 48


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"train": [dive("a", 48)]}, "video 'a' of split 'train' has label 48; there are 48"),
        ({"train": [dive("a", "x")]}, "video 'a' in .* has label 'x', which is not a class index"),
        ({"train": [dive("a", 1)] * 2}, "video 'a' occurs twice in split 'train'"),
        ({"test": [{"label": 3}]}, "an entry of .*V2_test.json has no 'vid_name'"),
        ({"train": [{"id": "1", "template": "x"}]}, "no 'vid_name'"),
        ({"test": {}}, "V2_test.json holds a dict, not a list"),
        ({"vocabulary": [["a", "b"]]}, r"class 0 is \['a', 'b'\], not a list of four parts"),
    ],
)
def test_diving48_errors(videos, annotations, files, match):
    write_diving48(annotations, **files)
    with pytest.raises(ValueError, match=match):
        read_diving48(videos, annotations)


# ----- annotations of another data set


def write_ssv2(folder):
    write(folder, labels__json="{}", train__json='[{"id": "1", "template": "x"}]')


def write_k400(folder):
    write(folder, train__csv=TRAIN)


def write_list(folder):
    write(folder, mine__csv="a/b c.mp4,3\n")


WRITERS = {
    "k400": (write_k400, "Kinetics"),
    "ssv2": (write_ssv2, "Something-Something-v2"),
    "hmdb51": (write_hmdb51, "HMDB51"),
    "ucf101": (write_ucf101, "UCF101"),
    "diving48": (write_diving48, "Diving48"),
    "csv": (write_list, "a list of `path,label`"),
}


@pytest.mark.parametrize("asked", WRITERS)
@pytest.mark.parametrize("given", WRITERS)
def test_the_wrong_data_set_is_named(videos, annotations, asked, given):
    if asked == given:
        return
    writer, name = WRITERS[given]
    writer(annotations)
    with pytest.raises(ValueError, match=f"; it looks like {name}, --dataset={given}$"):
        list_videos(asked, str(videos), str(annotations))


def test_other_data_sets_are_named(videos, annotations):
    write(annotations, trainlist01__txt="x")
    with pytest.raises(ValueError, match="; it looks like UCF101"):
        read_hmdb51(videos, annotations)
    (annotations / "trainlist01.txt").rename(annotations / "else.txt")
    with pytest.raises(ValueError, match="test_split1.txt in .*annotations'$"):  # without a hint
        read_hmdb51(videos, annotations)

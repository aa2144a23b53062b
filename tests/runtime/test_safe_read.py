"""Tests that untrusted files are read within limits, and refused with an error that names them."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.data import augment
from dualpath_jax.data.datasets import ssv2
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation import video_decoder
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.runtime import safe_read
from dualpath_jax.training import adapter_file, checkpoint
from dualpath_jax.weights import convert, source_files
from tests.fuzz.annotation_target import Annotations
from tests.fuzz.records_target import Records
from tests.fuzz.sandbox import write_case
from tests.fuzz.weights_target import BACKBONES, Adapters, Backbones, Checkpoints
from tests.training.test_checkpoint import METADATA

# ---------------------------------------------------------------- text and JSON


def test_size_is_checked_before_reading(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[]")
    os.truncate(path, safe_read.MAX_JSON_BYTES + 1)  # sparse: it takes no disk
    monkeypatch.setattr(safe_read.json, "loads", None)  # must not be called
    message = "a.json has 8,388,609 bytes, more than the limit of 8,388,608"
    with pytest.raises(ValueError, match=message):
        safe_read.read_json(path, list)


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json is not a regular file"):
        safe_read.read_json(tmp_path / "a.json", list)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"[" * 51 + b"]" * 51, "nested deeper than 50 levels"),
        (b"\xff[]", "is not text in UTF-8"),
        (b"[1,", r"a.json is not valid JSON \(.*download it again"),
        (b"{}", "a.json holds a dict, not a list"),
    ],
)
def test_json_errors(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        safe_read.read_json(tmp_path / "a.json", list)


def test_deepest_accepted_json(tmp_path):
    content = b"\xef\xbb\xbf" + b"[" * 50 + b"]" * 50
    (tmp_path / "a.json").write_bytes(content)
    assert len(safe_read.read_json(tmp_path / "a.json", list)) == 1


# ---------------------------------------------------------------- annotations


@pytest.fixture
def annotations(tmp_path):
    """Return a function that writes and lists a data set's annotations, one text replaced."""

    def write(kind, old="", new=""):
        (case,) = (case for case in Annotations(tmp_path).seeds() if case.kind == kind)
        files = {
            name: content.replace(old.encode(), new.encode())
            for name, content in case.files.items()
        }
        write_case(dataclasses.replace(case, files=files), tmp_path)
        return list_videos(
            kind.partition("_")[0], str(tmp_path / "videos"), str(tmp_path / "annotations")
        )

    return write


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("k400", "-abc_ab1", "../../evil"),
        ("k400", "-abc_ab1", "/evil"),
        ("ssv2", '"id": "1"', '"id": "../evil"'),
        ("hmdb51", "a_wave.avi", "../../evil.avi"),
        ("diving48", "0Ms1_001", "/evil"),
    ],
)
def test_files_outside_the_videos_folder_are_refused(annotations, kind, old, new):
    assert annotations(kind).splits
    with pytest.raises(ValueError, match="evil.*outside the folder of videos"):
        annotations(kind, old, new)


def test_a_list_may_name_files_anywhere(annotations):
    listing = annotations("csv", "a/1.mp4", "/elsewhere/1.mp4")
    assert listing.splits["train"][0].path == "/elsewhere/1.mp4"


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("csv_numbers", "c.mp4 1", "c.mp4 99999999999", "label '99999999999' is not a class index"),
        ("ssv2", '"id": "1"', '"id": "\\ud800"', "is not valid text: surrogates not allowed"),
        ("ssv2", '"template": "Holding [something]"', '"template": 5', "has template 5"),
        (
            "ssv2",
            '"Folding something": "1"',
            '"Folding something": 1e999',
            "a label is not a number",
        ),
        ("k400", "abseiling", "a" * 200_000, "train.csv is not valid CSV .field larger"),
    ],
)
def test_annotation_errors(annotations, kind, old, new, message):
    with pytest.raises(ValueError, match=message):
        annotations(kind, old, new)


def test_cyclic_links(annotations, tmp_path):
    """Check that links to their own folder are not followed: two of them make 2^40 paths."""
    (tmp_path / "videos").mkdir()
    for name in ("one", "two"):
        (tmp_path / "videos" / name).symlink_to(tmp_path / "videos")
    listing = annotations("k400")
    assert listing.splits["train"][0].path == "a/-abc_ab0_000000_000010.mp4"


def test_label_swap_must_be_pairs(tmp_path):
    path = tmp_path / "swap.json"
    path.write_text('["ab"]')  # would unpack into two names
    with pytest.raises(ValueError, match="must be a JSON file like"):
        augment.read_label_swaps(str(path))


# ---------------------------------------------------------------- weights


def _edit_metadata(data, key, edit):
    """Return the bytes of a safetensors file after `edit` changed the JSON in its metadata."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    content = json.loads(header["__metadata__"][key])
    edit(content)
    header["__metadata__"][key] = json.dumps(content)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _write_backbone(tmp_path, kind, edit):
    """Write a converted backbone with edited metadata; return its path."""
    (case,) = (case for case in Backbones(tmp_path).seeds() if case.kind == kind)
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(_edit_metadata(case.files[path.name], convert.CONVERTED_KEY, edit))
    return path


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("swin", "window_size", 1000, "window_size is 1000, but at most 64 is supported"),
        ("swin", "image_size", 2**19, "image_size is 524288, but at most 4096 is supported"),
        ("vit", "heads", 0, "impossible backbone: invalid fields heads"),
        ("vit", "width", "8", "impossible backbone: invalid fields width"),
        ("vit", "surplus", 1, "impossible backbone: invalid fields surplus"),
        ("vit", "eps", 2**64, "impossible backbone: invalid fields eps"),
        ("vit", "another", None, "impossible backbone: invalid fields another"),
    ],
)
def test_impossible_backbone_configs(tmp_path, kind, key, value, message):
    convert.load_backbone(_write_backbone(tmp_path, kind, lambda meta: None), BACKBONES[kind])
    path = _write_backbone(tmp_path, kind, lambda meta: meta["config"].update({key: value}))
    with pytest.raises(ValueError, match=message):
        convert.load_backbone(path, BACKBONES[kind])


def test_weights_beyond_the_limit_are_not_read(tmp_path, monkeypatch):
    path = _write_backbone(tmp_path, "vit", lambda meta: None)
    monkeypatch.setattr(convert, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than the limit of 1,000"):
        convert.load_backbone(path, BACKBONES["vit"])
    monkeypatch.setattr(source_files, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than the limit of 1,000"):
        convert.convert_checkpoint(path, tmp_path / "out")


def _load_seed_checkpoint(tmp_path, kind, name="weights.safetensors"):
    """Return the arrays of a valid checkpoint and a path for a damaged one."""
    (case,) = (case for case in Checkpoints(tmp_path).seeds() if case.kind == kind)
    return safetensors.numpy.load(case.files[name]), tmp_path / name


def test_impossible_stage_number(tmp_path):
    arrays, path = _load_seed_checkpoint(tmp_path, "timm-swin")
    arrays["layers.999999999.blocks.0.norm1.weight"] = np.ones(8, np.float16)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(
        ValueError, match="belongs to stage 999999999, but at most 16 are supported"
    ):
        convert.convert_checkpoint(path, tmp_path / "out")


def test_empty_weights(tmp_path):
    arrays, path = _load_seed_checkpoint(tmp_path, "openai")
    arrays["visual.conv1.weight"] = np.ones((8, 3, 0, 4), np.float16)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match="visual.conv1.weight is empty"):
        convert.convert_checkpoint(path, tmp_path / "out", activation="gelu")


def _check_torch_file_is_refused(tmp_path, make_state, message):
    """Check that converting a torch file of the state dict raises a matching error."""
    torch = pytest.importorskip("torch")
    torch.save(make_state(torch), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")


def test_a_small_tensor_expanded_to_a_large_one(tmp_path):
    def state(torch):
        return {"visual.proj": torch.zeros(1).expand(2**40)}

    _check_torch_file_is_refused(tmp_path, state, "claims to hold 4,398,046,511,104")


def test_state_dict_with_numbers_as_names(tmp_path):
    _check_torch_file_is_refused(
        tmp_path, lambda torch: {1: torch.zeros(1)}, "entries are not tensors: 1"
    )


def test_a_compressed_archive_that_fills_the_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(ValueError, match="claims to hold 10,000,000"):
        convert.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_paths_in_archives(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr(name, b"")
    with pytest.raises(ValueError, match="contains paths outside the archive"):
        convert.convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")


@pytest.mark.parametrize(("key", "value"), [("class_names", [1]), ("method", None), ("step", "5")])
def test_damaged_adapter_metadata(tmp_path, key, value):
    (case,) = Adapters(tmp_path).seeds()
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(case.files[path.name])
    assert adapter_file.read_adapter(str(path))[1]["step"] == 5
    edit = lambda metadata: metadata.update({key: value})  # noqa: E731
    path.write_bytes(_edit_metadata(case.files[path.name], "dualpath_jax", edit))
    with pytest.raises(ValueError, match=f"is damaged: its {key}"):
        adapter_file.read_adapter(str(path))


@pytest.mark.parametrize("limit", [12, 2**30])
def test_checkpoint_size_limit(tmp_path, monkeypatch, limit):
    metadata = dict.fromkeys(("method", "backbone_name", "backbone_sha256", "class_names"), "x")
    metadata["config"] = {"seed": 0}
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    checkpoints.save(1, {"a": np.ones((2, 2), np.float32)}, metadata)
    checkpoints.save(2, {"a": np.ones((2, 2), np.float32)}, {"method": "x"})
    checkpoints.save(3, {"a": np.ones((2, 2), np.float32)}, metadata | {"config": {"data": 3}})
    checkpoints.wait()
    for step in (2, 3):
        with pytest.raises(
            checkpoint.DamagedCheckpoint, match="not written by this package: (Key|Attr)"
        ):
            checkpoints.read(step)
    monkeypatch.setattr(checkpoint, "_MAX_BYTES", limit)
    if limit > 16:
        np.testing.assert_array_equal(checkpoints.read(1)[0]["a"], np.ones((2, 2)))
    else:
        with pytest.raises(checkpoint.DamagedCheckpoint, match="claims 16 bytes"):
            checkpoints.read(1)
    checkpoints.close()


# ---------------------------------------------------------------- prepared data


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "class_names.json",
            b'"b"',
            b"2",
            "class_names.json is damaged: it must be a list of names",
        ),
        ("class_names.json", b',\n "b"', b"", "impossible label of video b'v1'"),
        ("dataset_info.json", b'"4"', b'"5"', "has 4 videos instead of 5"),
        ("dataset_info.json", b'"4"', b'"-4"', "is damaged: a split is"),
        ("frames/dataset_info.json", b'"7"', b'"6"', "impossible frames of video b'v3'"),
        ("frames/dataset_info.json", b'"7"', b'"99999999999999"', "is damaged: a split is"),
    ],
)
def test_prepared_data_is_checked_when_it_is_opened(tmp_path, name, old, new, message):
    (tmp_path / "seeds").mkdir()
    (case,) = Records(tmp_path / "seeds").seeds()
    changed = case.files[f"data/{name}"].replace(old, new)
    assert changed != case.files[f"data/{name}"]
    write_case(dataclasses.replace(case, files=case.files | {f"data/{name}": changed}), tmp_path)
    with pytest.raises(ValueError, match=message):
        VideoDataset(str(tmp_path / "data"), "train")


# ---------------------------------------------------------------- pipes, sockets and links


def make_special(path, kind):
    """Make a special file instead of the one at `path`."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    else:
        path.symlink_to(path.name)


SPECIAL = {
    "pipe": "not a regular file, but a named pipe",
    "socket": "not a regular file, but a socket",
    "loop": "symbolic links",
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused_at_once(kind, tmp_path):
    path = tmp_path / "file.safetensors"
    make_special(path, kind)
    readers = [
        lambda: safe_read.read_json(path, dict),
        lambda: safe_read.read_lines(path),
        lambda: safe_read.read_bytes(path),
        lambda: safe_read.open_binary(path, 10),
        lambda: convert.convert_checkpoint(path, tmp_path / "out.safetensors"),
    ]
    for read in readers:
        with pytest.raises((ValueError, OSError), match=SPECIAL[kind]):
            read()
    missing = "no backbone at|no adapter file" if kind == "loop" else SPECIAL[kind]
    for read in (
        lambda: convert.load_backbone(path, BACKBONES["vit"]),
        lambda: adapter_file.read_adapter(str(path)),
    ):
        with pytest.raises((ValueError, OSError), match=missing):
            read()


def test_a_pipe_that_replaces_a_file_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a")
    monkeypatch.setattr(safe_read, "check_size", lambda *_: None)  # it was a file at that time
    with pytest.raises(ValueError, match="a is not a regular file, but a named pipe"):
        safe_read.open_binary(tmp_path / "a", 10)


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_in_checkpoints_and_prepared_data(kind, tmp_path, demo_data):
    workdir, data = tmp_path / "run", tmp_path / "data"
    made = checkpoint.Checkpoints(str(workdir))
    made.save(1, {"kernel": np.zeros(4, np.float32)}, METADATA)
    made.close()
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "metadata/metadata"):
        shutil.copytree(workdir, tmp_path / "copy")
        make_special(tmp_path / "copy/checkpoints/1" / name, kind)
        with pytest.raises((ValueError, OSError), match=SPECIAL[kind]):
            checkpoint.Checkpoints(str(tmp_path / "copy"), read_only=True)
        shutil.rmtree(tmp_path / "copy")
    names = [
        p.relative_to(demo_data) for p in demo_data.rglob("*-train*") if "prepare" not in p.parts
    ]
    assert len(names) == 2
    for name in (*names, "class_names.json", "dataset_info.json"):
        shutil.copytree(demo_data, data)
        make_special(data / name, kind)
        message = f"{SPECIAL[kind]}|is missing|no prepared videos in|Unable to open"
        with pytest.raises((ValueError, OSError), match=message):
            VideoDataset(str(data), "train").read_frames(0, [0])
        shutil.rmtree(data)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_costs_only_itself(kind, tmp_path):
    folder = tmp_path / "videos" / "class"
    folder.mkdir(parents=True)
    make_special(folder / "a.mp4", kind)
    (folder / "b.mp4").write_bytes(b"no video")
    index = list_videos("folder", str(tmp_path / "videos"), validation_fraction=0)
    assert [video.path for video in index.splits["train"]] == ["class/a.mp4", "class/b.mp4"]
    with pytest.raises(video_decoder.VideoError, match=SPECIAL[kind]):
        video_decoder.video_to_jpegs(str(folder / "a.mp4"), 32, 90, video_decoder.DecodeLimits())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    seed = Checkpoints(tmp_path).seeds()[0]
    write_case(seed, tmp_path)
    path, out = tmp_path / "weights.safetensors", tmp_path / "out.safetensors"
    convert.convert_checkpoint(path, out)  # as it is
    state = safetensors.numpy.load_file(path)
    state["visual.proj"].flat[3] = value
    safetensors.numpy.save_file(state, path)
    out.unlink()
    message = r"values that are not numbers \(NaN\) or infinite in projection"
    with pytest.raises(ValueError, match=message):
        convert.convert_checkpoint(path, out, activation="quick_gelu", heads=1)
    assert not out.exists()


# ---------------------------------------------------------------- memory for JSON


def _peak_per_byte(path, read) -> float:
    """Return the peak of the memory that `read` allocates, in sizes of the file."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            read()
        return tracemalloc.get_traced_memory()[1] / path.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("entry", ["{}", "[]", '{"id":[[],[],[]]}', '"\U0001f600"'])
@pytest.mark.parametrize("name", ["train.json", "labels.json"])
def test_memory_for_json_is_bounded(entry, name, tmp_path):
    """Check lists of many small values, for which Python needs 30 times the size of the text."""
    path = tmp_path / name
    with path.open("w") as file:
        file.write("[" + ",".join([entry] * (12_000_000 // len(entry.encode()))) + "]")
    readers = {
        "train.json": lambda: sum(1 for _ in safe_read.iterate_json_list(path)),
        "labels.json": lambda: safe_read.read_json(path, list),
    }
    if name == "train.json":  # counting millions of entries under tracemalloc is slow
        path.write_text(f"[{','.join([entry] * 20_000)}]" + " " * 12_000_000)
    assert _peak_per_byte(path, readers[name]) < 4


def test_videos_need_less_than_four_times_their_annotations(tmp_path):
    path = tmp_path / "train.json"
    entries = [
        {"id": str(i), "label": f"putting cup number {i} on a table", "template": "Putting [a cup]"}
        for i in range(20_000)
    ]
    path.write_text(json.dumps(entries))
    (tmp_path / "labels.json").write_text('{"Putting a cup": "0"}')
    (tmp_path / "validation.json").write_text("[]")
    found = []
    peak = _peak_per_byte(path, lambda: found.append(ssv2.read_ssv2(tmp_path, str(tmp_path))))
    assert [video.id for video in found[0].splits["train"]] == [str(i) for i in range(20_000)]
    assert peak < 4


@pytest.mark.parametrize("text", ["[]", " [ ]\n", "[1]", '[{"a": [1, 2]}, "]", null]', "[1,\n2 ]"])
def test_lists_are_read_entry_by_entry(text, tmp_path, monkeypatch):
    path = tmp_path / "list.json"
    path.write_text(text)
    assert list(safe_read.iterate_json_list(path)) == json.loads(text)
    long = [{"id": str(i), "text": "x" * (i % 50)} for i in range(3000)]
    path.write_text(json.dumps(long, indent=1))
    monkeypatch.setattr(safe_read, "_ENTRY_CHARS", 200)
    assert list(safe_read.iterate_json_list(path)) == long


@pytest.mark.parametrize(
    "text", ["", "{}", "[1", "[1,", "[1,]", "[1 2]", "[1] 2", "[,1]", "[" * 60 + "]" * 60, "[nul]"]
)
def test_lists_that_are_not_json_are_refused(text, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="(not valid JSON|nested deeper|holds a dict)"):
        list(safe_read.iterate_json_list(path))


def test_headers_of_safetensors_have_a_limit(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((90 * 2**20).to_bytes(8, "little") + b"{" + b" " * 100)
    with pytest.raises(ValueError, match="its header claims 94,371,840 bytes"):
        adapter_file.read_adapter(str(path))

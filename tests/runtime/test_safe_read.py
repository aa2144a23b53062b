"""Tests that untrusted files are read within limits, and refused with an error that names them."""

import dataclasses
import json
import os
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.data import augment
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.runtime import safe_read
from dualpath_jax.training import adapter_file, checkpoint
from dualpath_jax.weights import convert, source_files
from tests.fuzz.annotation_target import Annotations
from tests.fuzz.records_target import Records
from tests.fuzz.sandbox import write_case
from tests.fuzz.weights_target import BACKBONES, Adapters, Backbones, Checkpoints

# ---------------------------------------------------------------- text and JSON


def test_size_is_checked_before_reading(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[]")
    os.truncate(path, safe_read.MAX_TEXT_BYTES + 1)  # sparse: it takes no disk
    monkeypatch.setattr(safe_read.json, "loads", None)  # must not be called
    message = "a.json has 536,870,913 bytes, more than the limit of 536,870,912"
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
    with pytest.raises(ValueError, match="more than any backbone"):
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

"""Tests preparation with real clips from the folder that DUALPATH_TEST_VIDEOS names.

The folder holds class folders and MANIFEST.tsv.
"""

import csv
import dataclasses
import json
import os
import pathlib

import pytest
import tensorflow_datasets as tfds

from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation.dry_run import check_videos
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset
from dualpath_jax.data.video_dataset import VideoDataset
from tests.helpers.runs import build_run

CLIPS = os.environ.get("DUALPATH_TEST_VIDEOS")
pytestmark = pytest.mark.skipif(
    not CLIPS, reason="set DUALPATH_TEST_VIDEOS to a folder of class folders with MANIFEST.tsv"
)
# Words in the notes of the manifest -> beginning of the reason in bad_videos.jsonl.
REASONS = {
    "NO_VIDEO": "no video stream, only audio",
    "OPEN_FAIL ": "cannot be opened as a video",
    "header_frames": "no frame could be decoded",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("clips") / "out")
    index = list_videos("folder", CLIPS)
    options = PrepareOptions(short_side=112, progress=False)
    return out, index, prepare_dataset(index, CLIPS, out, options)


def read_manifest():
    with open(os.path.join(CLIPS, "MANIFEST.tsv"), encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}


def read_table(out):
    builder = tfds.builder_from_directory(out)
    rows = [row for split in builder.info.splits for row in builder.as_data_source(split)]
    return {row["id"].decode(): row for row in rows}


def test_all_are_stored_or_bad(prepared):
    out, index, counts = prepared
    assert "MANIFEST.tsv" in index.notices[0]
    files = read_manifest()
    lines = pathlib.Path(out, "bad_videos.jsonl").read_text().splitlines()
    reasons = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    assert set(reasons) == {name for name in files if files[name]["frames_decoded"] == "0"}
    for name, reason in reasons.items():
        expected = next(text for note, text in REASONS.items() if note in files[name]["note"])
        assert reason.startswith(expected)
    total = counts["total"]
    assert (total.listed, total.found, total.bad) == (len(files), len(files), len(reasons))
    assert total.stored + total.bad == total.listed
    assert set(read_table(out)) == set(files) - set(reasons)


def test_frame_counts_and_sizes(prepared):
    out, _, _ = prepared
    files, rows = read_manifest(), read_table(out)
    damaged = {name for name in rows if "DECODE_ERR" in files[name]["note"]}
    for name, row in rows.items():
        decoded, count = int(files[name]["frames_decoded"]), int(row["num_frames"])
        if name in damaged:  # the manifest counts to the first damaged packet
            listed = int(files[name]["note"].rpartition("header_frames=")[2])
            assert decoded < count < listed
        else:
            assert count == decoded
    assert {name for name, row in rows.items() if row["truncated"]} == damaged
    lines = pathlib.Path(out, "truncated_videos.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == damaged
    for name, row in rows.items():
        sides = [int(files[name][side]) for side in ("height", "width")]
        if files[name]["rotation_deg"] in ("90", "-90"):
            sides.reverse()
        scale = min(1.0, 112 / min(sides))
        assert [row["height"], row["width"]] == [round(side * scale) for side in sides]


def test_check_reports_the_same(prepared, capsys):
    out, index, counts = prepared
    checked = check_videos(index, CLIPS, short_side=112, progress=False)
    for name, count in counts.items():
        assert dataclasses.replace(checked[name], num_bytes=count.num_bytes) == count
        assert checked[name].num_bytes == pytest.approx(count.num_bytes, rel=0.05)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    written = [pathlib.Path(out, f"{name}_videos.jsonl") for name in ("bad", "truncated")]
    assert sorted(printed) == sorted(line for p in written for line in p.read_text().splitlines())


def test_classes_are_the_folders(prepared):
    out, _, counts = prepared
    folders = sorted(path.name for path in pathlib.Path(CLIPS).iterdir() if path.is_dir())
    stored = 0
    for split in ("train", "validation"):
        dataset = VideoDataset(out, split)
        assert dataset.class_names == folders
        for id_, label in zip(dataset.ids, dataset.labels, strict=True):
            assert id_.split("/")[0] == folders[label]
        stored += len(dataset)
    assert stored == counts["total"].stored


@pytest.mark.slow
def test_two_steps_of_training(prepared, demo_backbone, tmp_path):
    """Train the folder configuration, with the demo's tiny backbone, on these clips."""
    from configs import finetune

    out, _, _ = prepared
    config = finetune.get_config()
    config.data.dir = out
    config.data.image_size = 32
    config.model.scan_blocks = True
    config.data.batch_size = config.eval.batch_size = 8
    config.data.num_spatial_frames = 2
    config.backbone.name, config.backbone.checkpoint = "custom", str(demo_backbone)
    shape = {"patch_size": 8, "width": 96, "depth": 4, "heads": 2, "mlp_dim": 384}
    config.backbone.update({**shape, "projection_dim": 64})
    config.model.dtype = "float32"
    config.num_train_steps = 2
    dataset, validation = VideoDataset(out, "train"), VideoDataset(out, "validation")
    run = build_run(config, str(tmp_path), dataset)
    run.train(dataset, validation)
    run.evaluate_and_write(validation)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step"] == 2
    assert results["num_videos"] == len(validation)
    assert results["views"] == "16x1x1"

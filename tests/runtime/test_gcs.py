"""Tests the real readers and writers of Cloud Storage against a fake server."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from configs import demo
from dualpath_jax.commands import export_adapter
from dualpath_jax.data.video_dataset import UnreadableVideo, VideoDataset
from dualpath_jax.demo import setup
from dualpath_jax.runtime import gcs as gcs_lib
from dualpath_jax.training.inputs import check_inputs, check_workdir, open_datasets
from dualpath_jax.weights import convert
from tests.data.test_video_dataset import NUM_FRAMES, write_data
from tests.helpers.compiling_once import compiling_once
from tests.helpers.fake_gcs import FakeGcs
from tests.helpers.runs import build_run

SHARD = "bucket/my data/frames/frames-train.array_record-00000-of-00003"
BACKBONE = "backbone.safetensors"

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Start the fake server and point all clients in this process to it."""
    with FakeGcs(tmp_path_factory.mktemp("gcs")) as gcs, pytest.MonkeyPatch.context() as patch:
        for key, value in gcs.environment.items():
            patch.setenv(key, value)
        yield gcs


@pytest.fixture
def gcs(service, tmp_path):
    """Put a small data set into gs://bucket/my data and tmp_path/data; return the server."""
    write_data(tmp_path / "data")
    service.objects.clear()
    service.denied.clear()
    service.upload_folder(tmp_path / "data", "bucket/my data")
    return service


def test_videos_are_read_from_gs(gcs, tmp_path):
    local = VideoDataset(str(tmp_path / "data"), "train")
    gcs.requests.clear()
    remote = VideoDataset("gs://bucket/my data", "train")
    assert remote.ids == local.ids
    assert remote.class_names == local.class_names
    np.testing.assert_array_equal(remote.num_frames, NUM_FRAMES)
    for video, count in enumerate(NUM_FRAMES):
        frames = [count - 1, *range(count)]
        assert remote.read_frames(video, frames) == local.read_frames(video, frames)
    requested = {path.split("?")[0].rpartition("%2F")[2] for _, path in gcs.requests}
    assert {"videos-train.array_record-00000-of-00001", "class_names.json"} <= requested
    assert {
        SHARD.rpartition("/")[2],
        SHARD.rpartition("/")[2].replace("00000-", "00002-"),
    } <= requested


@pytest.mark.parametrize("after_opening", [False, True])
def test_a_shard_without_access_is_not_an_unreadable_video(gcs, after_opening):
    dataset = VideoDataset("gs://bucket/my data", "train")
    if after_opening:
        dataset.read_frames(0, [0])
    gcs.denied.add(SHARD)
    with pytest.raises(OSError, match=f"cannot read from Cloud Storage: .*no access to {SHARD}"):
        dataset.read_frames(0, [1])


def test_a_damaged_record_in_gs_is_an_unreadable_video(gcs):
    data = bytearray(gcs.objects[SHARD])
    data[70:80] = b"0123456789"
    gcs.put(SHARD, data)
    with pytest.raises(UnreadableVideo, match="hash mismatch"):
        VideoDataset("gs://bucket/my data", "train").read_frames(0, [0])


def test_missing_data(gcs):
    with pytest.raises(FileNotFoundError, match="no prepared videos in gs://bucket/none"):
        VideoDataset("gs://bucket/none", "train")
    del gcs.objects["bucket/my data/videos-train.array_record-00000-of-00001"]
    with pytest.raises(
        OSError, match="cannot read the table of videos gs://bucket/my data/v.*: .*no such"
    ):
        VideoDataset("gs://bucket/my data", "train")


def test_converted_weights_go_to_gs_and_come_back(gcs, tmp_path):
    local = convert.convert_checkpoint(setup.BACKBONE, tmp_path / BACKBONE)
    remote = convert.convert_checkpoint(setup.BACKBONE, "gs://bucket/new/b.safetensors")
    assert remote["sha256"] == local["sha256"]
    assert gcs.objects["bucket/new/b.safetensors"] == (tmp_path / BACKBONE).read_bytes()
    assert not [name for name in gcs.objects if name.endswith(".tmp")]
    _, _, info = convert.load_backbone("gs://bucket/new/b.safetensors", local["config"])
    assert info == convert.load_backbone(tmp_path / BACKBONE, local["config"])[2]


def test_a_bucket_that_refuses(gcs):
    pytest.importorskip("google.cloud.storage")
    gcs.denied.add("bucket/runs/x/.writable")
    with pytest.raises(OSError, match="cannot write to --workdir=gs://bucket/runs/x: cannot reach"):
        check_workdir("gs://bucket/runs/x")
    check_workdir("gs://bucket/runs/y")


def test_missing_client_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(ValueError, match=r'--workdir=gs://b .* pip install "\.\[gcs\]"'):
        gcs_lib.check_gcs_installed("gs://b", "--workdir")
    gcs_lib.check_gcs_installed("/b", "--workdir")


def small_config(root):
    """Return the config of the demo's model on the small data set in `root`."""
    config = demo.get_config()
    config.data.source = "folder"
    config.data.dir = f"{root}/my data" if root.startswith("gs://") else f"{root}/data"
    config.data.flip = False
    config.data.num_frames, config.data.num_spatial_frames, config.data.grid = 4, 2, (2, 2)
    config.data.frame_scale = 2
    config.data.image_size = 32
    config.data.batch_size = config.eval.batch_size = 8
    config.eval.split = "train"
    config.backbone.checkpoint = f"{root}/{BACKBONE}"
    config.model.scan_blocks, config.model.temporal_path = True, False
    config.log_every_steps = 1
    config.num_train_steps = 4
    config.eval.every_epochs = 4  # two steps
    config.checkpoint.every_steps = 2
    config.checkpoint.keep = 1
    return config


def train_and_evaluate(config, workdir):
    """Train and evaluate as the command line does; return the results."""
    check_workdir(workdir)
    check_inputs(config)
    dataset, eval_dataset = open_datasets(config)
    with compiling_once():
        run = build_run(config, workdir, dataset)
        run.train(dataset, eval_dataset)
        return run.evaluate_and_write(eval_dataset)


def untimed_entries(text):
    """Return the entries of metrics.jsonl without the values that depend on time."""
    entries = [json.loads(line) for line in text.splitlines()]
    timing = {"clips_per_second", "data_wait"}
    return [{key: entry[key] for key in entry.keys() - timing} for entry in entries]


@pytest.mark.slow
def test_a_run_in_gs_is_the_run_on_disk(gcs, tmp_path, capsys):
    pytest.importorskip("google.cloud.storage")
    convert.convert_checkpoint(setup.BACKBONE, tmp_path / BACKBONE)
    gcs.put(f"bucket/{BACKBONE}", (tmp_path / BACKBONE).read_bytes())
    config = small_config(str(tmp_path))
    local = train_and_evaluate(config, str(tmp_path / "run"))
    remote_config = small_config("gs://bucket")
    remote = train_and_evaluate(remote_config, "gs://bucket/runs/one")
    assert {**remote, "dataset": local["dataset"]} == local
    assert json.loads(gcs.objects["bucket/runs/one/results.json"]) == remote
    metrics = gcs.objects["bucket/runs/one/metrics.jsonl"].decode()
    assert untimed_entries(metrics) == untimed_entries(
        (tmp_path / "run" / "metrics.jsonl").read_text()
    )
    assert [entry["step"] for entry in untimed_entries(metrics)] == [1, 2, 2, 3, 4]
    events = [data for name, data in gcs.objects.items() if "events.out.tfevents" in name]
    assert b"train/loss" in b"".join(events)
    assert not os.path.exists("gs:")  # a local folder of that name
    # The best and the newest.
    assert saved_steps(gcs) == saved_steps_on_disk(tmp_path / "run") == {2, 4}

    # A damaged newest checkpoint is set aside; the run resumes from the one before.
    newest = "bucket/runs/one/checkpoints/4/metadata/metadata"
    gcs.put(newest, gcs.objects[newest].replace(b"sha256", b"SHA256"))
    again = train_and_evaluate(remote_config, "gs://bucket/runs/one")
    assert again == remote
    assert "bucket/runs/one/damaged_checkpoints/4-0/metadata/metadata" in gcs.objects
    assert "resumed from gs://bucket/runs/one/checkpoints/2\n" in capsys.readouterr().out

    message = export_adapter.export("gs://bucket/runs/one", "gs://bucket/a.safetensors", "latest")
    assert message.startswith("wrote gs://bucket/a.safetensors: ")
    remote_config.init_from = "gs://bucket/a.safetensors"
    dataset, _ = open_datasets(remote_config)
    run = build_run(remote_config, "gs://bucket/runs/two", dataset)
    run.restore_for_evaluation()
    assert "evaluating gs://bucket/a.safetensors\n" in capsys.readouterr().out
    assert run.evaluate(dataset).top1 == remote["top1"]


def saved_steps(gcs):
    """Return the steps of the checkpoints in Cloud Storage."""
    prefix = "bucket/runs/one/checkpoints/"
    names = [name.removeprefix(prefix) for name in gcs.objects if name.startswith(prefix)]
    return {int(name.split("/")[0]) for name in names if name}


def saved_steps_on_disk(workdir):
    """Return the steps of the checkpoints on disk."""
    return {int(name) for name in os.listdir(workdir / "checkpoints")}

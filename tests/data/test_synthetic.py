"""Checks `data.synthetic`: batches like those of the pipeline, and a run without files."""

import json
import subprocess
import sys

import numpy as np
import pytest

from configs import demo
from dualpath_jax.data import augment, pipeline, synthetic
from dualpath_jax.data.clip_spec import ClipInputs
from dualpath_jax.training.inputs import check_inputs, choose_train_batches, open_datasets
from tests.helpers.processes import ROOT, make_environment

TINY = [
    f"--config={ROOT}/configs/demo.py",
    "--config.data.source=ssv2",
    "--config.num_train_steps=2",
    "--config.log_every_steps=1",
    "--config.data.batch_size=8",
    "--config.data.image_size=16",
    "--config.data.num_frames=4",
    "--config.data.grid=(2, 2)",
    "--config.data.frame_scale=2",
    "--config.eval.batch_size=8",
    "--config.backbone.depth=1",
    "--config.backbone.width=32",
    "--config.backbone.mlp_dim=32",
    "--config.model.scan_blocks=True",
]


@pytest.fixture
def data():
    """Return the data section of a configuration."""
    config = demo.get_config()
    config.data.batch_size = 4
    config.data.image_size = 32
    return config.data


@pytest.mark.parametrize("inputs", ClipInputs)
def test_batches_equal_those_of_the_pipeline(data, inputs):
    videos = synthetic.make_synthetic_split(data, 20)
    batches = list(synthetic.train_batches(videos, data, 0, 3, 10, 1, 2, inputs=inputs))
    assert len(batches) == 7
    assert all(batch is batches[0] for batch in batches)  # no batch is made for a step
    real = next(pipeline.train_batches(videos, data, 0, 0, 10, 1, 2, inputs=inputs))
    assert batches[0].keys() == real.keys()
    for key, value in real.items():
        assert np.array_equal(batches[0][key], value)
        assert batches[0][key].dtype == value.dtype


@pytest.mark.parametrize(("source", "classes"), [("k400", 400), ("ssv2", 174), ("folder", 2)])
def test_number_of_classes(data, source, classes):
    data.source = source
    assert len(synthetic.make_synthetic_split(data, 3).class_names) == classes


def test_class_names_for_a_label_swap(data):
    data.source, data.flip, data.label_swap = "ssv2", True, "ssv2"
    names = synthetic.make_synthetic_split(data, 3).class_names
    assert len(names) == 174
    assert {name for pair in augment.SSV2_LABEL_SWAP for name in pair} <= set(names)
    data.flip = False
    assert "0" in synthetic.make_synthetic_split(data, 3).class_names


def test_no_frame_is_read_for_a_step(data):
    videos = synthetic.make_synthetic_split(data, 20)
    read, original = [], videos.read_frames
    videos.read_frames = lambda *args: read.append(args) or original(*args)

    def count_reads(make):
        read.clear()
        assert len(list(make(videos, data, 0, 0, 5))) == 5
        return len(read)

    assert count_reads(choose_train_batches(data)) == 20  # twin: the pipeline reads every clip
    data.synthetic = True
    assert count_reads(choose_train_batches(data)) == 4


@pytest.mark.slow
def test_a_run_without_files(tmp_path):
    command = [sys.executable, "-m", "dualpath_jax.main", *TINY, "--config.data.synthetic=True"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=make_environment()
    )
    assert result.returncode == 0, result.stderr
    assert "random custom weights; the device is timed, scores mean nothing" in result.stdout
    assert "step 2/2  loss " in result.stdout
    results = json.loads((tmp_path / "runs" / "demo_synthetic" / "results.json").read_text())
    assert results["synthetic"] is True
    assert results["num_videos"] == 8
    assert results["backbone_sha256"] == "random"  # no real run resumes from it
    assert not (tmp_path / "data").exists()


def test_other_runs_need_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = demo.get_config()
    with pytest.raises(FileNotFoundError, match="no prepared data in .* and no converted custom"):
        check_inputs(config)
    with pytest.raises(FileNotFoundError, match="no prepared videos"):
        open_datasets(config)
    config.data.synthetic = True
    check_inputs(config)
    assert [len(split) for split in open_datasets(config)] == [1000, 40]

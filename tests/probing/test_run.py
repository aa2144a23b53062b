"""Tests the command: features once, results, adapter files, and what is refused before work."""

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dualpath_jax.commands import probe
from dualpath_jax.config import loading
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.inference import trained_model
from dualpath_jax.probing import options, run
from dualpath_jax.probing.features import FOLDER
from tests.helpers.runs import build_run

QUICK = ["--steps=3", "--batch_size=8", "--learning_rates", "0.01", "0.1", "--weight_decays=0.1"]


@pytest.fixture
def overrides(demo_data, demo_backbone):
    """Return arguments for the demo's small data: two frames of 16 pixels."""
    values = {
        "data.source": "ssv2",  # prepared already
        "data.dir": demo_data,
        "backbone.checkpoint": demo_backbone,
        "data.image_size": 16,
        "data.num_frames": 2,
        "eval.batch_size": 8,
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


@pytest.fixture
def command(monkeypatch, overrides, capsys):
    """Return a function that runs the command in this process: status, output, errors."""
    monkeypatch.setattr(probe.environment, "disable_async_dispatch", lambda: None)
    monkeypatch.setattr(probe.console, "protect_streams", lambda **_: None)

    def call(workdir, *arguments):
        line = ["probe", "--config=demo", *overrides, *QUICK, f"--workdir={workdir}", *arguments]
        monkeypatch.setattr(sys, "argv", line)
        status = 0
        try:
            probe.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def stored(workdir):
    """Return name and time of change of the files of features."""
    return {path.name: path.stat().st_mtime_ns for path in (workdir / FOLDER).iterdir()}


def test_command(command, tmp_path, config):
    """Check results and files; a second call takes the features, and those of others it does not."""
    status, output, _ = command(tmp_path)
    assert status == 0
    lines = output.splitlines()
    assert lines[0].startswith("features: 40 train, 8 validation, 21 test clips, ")
    assert lines[0].endswith(" to compute")
    assert lines[-1] == f"wrote {tmp_path}/probe.json"
    results = json.loads((tmp_path / "probe.json").read_text())
    assert [row["head"] for row in results["heads"]] == list(options.HEADS)
    assert (results["views"], results["num_clips"], results["num_steps"]) == ("2x1x1", 40, 3)
    for row, line in zip(results["heads"], lines[-4:-1], strict=True):
        assert line.split()[0] == row["head"]
        assert row["validation"]["split"] == results["chosen_by"] == "validation"
        assert (row["final"]["split"], row["final"]["num_videos"]) == ("test", 21)
        low, high = row["final"]["interval"]
        assert 0 <= low <= row["final"]["top1"] <= high <= 1
        assert f"{row['final']['top1']:.4f} ({low:.3f} to {high:.3f})" in line
        assert row["learning_rate"] in (0.01, 0.1)
    files = stored(tmp_path)
    assert list(files) and len(files) == 3

    status, output, _ = command(tmp_path, "--heads", "linear")
    assert status == 0
    assert output.splitlines()[0].endswith(", computed before")
    assert stored(tmp_path) == files
    again = json.loads((tmp_path / "probe.json").read_text())
    assert again["heads"] == results["heads"][:1]

    # An adapter file of a head is evaluated as any other.
    config.data.image_size, config.data.num_frames = 16, 2
    config.model.method, config.model.probe.head = "probe", "linear"
    tuned = build_run(config, str(tmp_path), VideoDataset(config.data.dir, "train"))
    tuned.init_from_adapter(str(tmp_path / "probe_linear.safetensors"))
    scores = tuned.evaluate(VideoDataset(config.data.dir, "test"))
    assert scores.top1 == pytest.approx(results["heads"][0]["final"]["top1"], abs=1 / 21 + 1e-6)
    loaded = trained_model.load(str(tmp_path / "probe_ordered.safetensors"))
    assert (loaded.step, loaded.config.model.probe.head) == (3, "ordered")
    assert len(loaded.class_names) == 8


def test_other_backbone_other_settings_other_data(
    command, tmp_path, demo_backbone, demo_data, monkeypatch
):
    """Check that features of others are computed again, with a line that says why."""
    arguments = ("--heads", "linear")
    assert command(tmp_path, *arguments)[0] == 0
    files = stored(tmp_path)

    def changed(*more):
        status, output, _ = command(tmp_path, *arguments, *more)
        assert status == 0
        reasons = [line for line in output.splitlines() if line.endswith(": computed again")]
        before = dict(files)
        files.update(stored(tmp_path))
        return reasons, {name for name in before if files[name] != before[name]}

    assert changed() == ([], set())  # twin
    assert changed("--config.seed=1") == ([], set())  # nor does a plain pass depend on this
    reasons, written = changed("--config.data.sampling=dense", "--config.data.sampling_interval=1")
    assert "data.sampling='segments', now 'dense'" in reasons[0]
    assert len(reasons) == len(written) == 3
    reasons, written = changed("--augmented_passes=2")
    assert "augmented_passes=None, now 2" in "".join(reasons)
    assert any(name.startswith("train-") for name in written)
    weights = load_file(demo_backbone)
    weights["ln_post/scale"] = weights["ln_post/scale"] * np.float32(1.5)
    from safetensors import safe_open

    with safe_open(demo_backbone, "numpy") as file:
        save_file(weights, tmp_path / "other.safetensors", metadata=file.metadata())
    reasons, written = changed(f"--config.backbone.checkpoint={tmp_path / 'other.safetensors'}")
    assert len(reasons) == len(written) == 3
    assert all("backbone=" in reason for reason in reasons)


def test_the_disk_is_too_small(command, tmp_path, monkeypatch):
    """Check the error, and that it comes before the work; twin: a larger disk is enough."""
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, _, errors = command(tmp_path, "--heads", "linear")
    assert status == 2
    assert errors.startswith("error: the features of 40 train, 8 validation, 21 test clips need ")
    assert f"and {tmp_path} has 10 kB free: choose a --workdir on a larger disk" in errors
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optimizer.learning_rate=1", "has no effect on a probe: use --learning_rates"),
        ("--config.data.batch_size=8", "has no effect on a probe: use --batch_size"),
        ("--config.data.randaugment_layers=2", "it is for --augmented_passes=1 or more"),
        ("--config.model.adapter_bottleneck=8", "has no effect on a probe: leave it out"),
        ("--config.eval.split=train", "data.train_split=train is also the split to choose by"),
        ("--config.eval.split=nothing", "no videos of split 'nothing'"),
        ("--config.data.dir=nothing", "no prepared data in nothing"),
        ("--workdir=gs://bucket/run", "a probe keeps its features on a local disk"),
        ("--learning_rates=0", "argument --learning_rates: 0.0 is not positive"),
        ("--heads=none", "argument --heads: invalid choice: 'none'"),
        ("--augmented_passes=-1", "--augmented_passes=-1 must be at least 0"),
    ],
)
def test_refused_before_work(command, tmp_path, argument, message):
    status, _, errors = command(tmp_path, argument)
    assert status == 2
    assert message in errors
    assert not (tmp_path / FOLDER).exists()


def test_configuration_of_a_probe():
    """Check the frames of a probe of another method; its own, and those that are set, stay."""
    config = loading.load_config("finetune", ["--config.data.num_frames=32"])
    assert options.as_probe(config).data.num_frames == 8
    assert options.as_probe(config, ["data.num_frames", "model.method"]).data.num_frames == 32
    config.model.method = "probe"
    assert options.as_probe(config).data.num_frames == 32
    dense = options.as_probe(loading.load_config("k400_vitb"))
    assert (dense.data.num_frames, dense.data.sampling_interval) == (8, 8)
    assert dense.model.method == "probe"


def test_size_of_the_features():
    """Check ViT-B/16 with 8 frames: 2.4 MB a clip in bfloat16."""
    config = loading.load_config("finetune")
    clip = 8 * 197 * 768 * 2 + 4
    assert run.estimate_bytes(config, 180, 0) == 180 * clip
    config.eval.spatial_crops = 3
    assert run.estimate_bytes(config, 0, 10) == 10 * (3 * (clip - 4) + 4)


def test_an_interrupted_computation_continues(command, tmp_path, monkeypatch):
    """Check that a probe that was stopped gives the same results as one that was not."""
    write, calls = run.FeatureCache.write, []

    def stop(self, spec, *rest):
        calls.append(spec.split)
        if spec.split == "test" and len(calls) == 3:
            raise KeyboardInterrupt
        write(self, spec, *rest)

    monkeypatch.setattr(run.FeatureCache, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path / "a", "--heads", "linear")
    assert len(stored(tmp_path / "a")) == 2
    assert command(tmp_path / "a", "--heads", "linear")[0] == 0
    assert calls == ["train", "validation", "test", "test"]
    assert command(tmp_path / "b", "--heads", "linear")[0] == 0
    results = [(tmp_path / name / "probe.json").read_text() for name in "ab"]
    assert results[0] == results[1]

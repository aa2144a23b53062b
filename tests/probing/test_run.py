"""Tests the command: features once, results, adapter files, and what is refused before work."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dualpath_jax import launch
from dualpath_jax.commands import probe
from dualpath_jax.config import loading
from dualpath_jax.data import pipeline
from dualpath_jax.data.clip_spec import ClipInputs, Views
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.inference import trained_model
from dualpath_jax.probing import features, options, results, run
from dualpath_jax.probing.features import FOLDER
from dualpath_jax.probing.results import HeadResult, ProbeResults, ProbeScores
from dualpath_jax.training import sharding

QUICK = ["--steps=3", "--batch_size=8", "--learning_rates", "0.01", "0.1", "--weight_decays=0.1"]


def two_devices(fsdp):
    """Replace `sharding.make_mesh`: fewer devices are faster here."""
    return Mesh(np.array(jax.devices()[:2]).reshape(-1, fsdp), sharding.AXES)


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
        "eval.spatial_crops": 1,  # not the three that baselines have on this data set
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


@pytest.fixture
def command(monkeypatch, overrides, capsys):
    """Return a function that runs the command in this process: status, output, errors."""
    monkeypatch.setattr(probe.environment, "disable_async_dispatch", lambda: None)
    monkeypatch.setattr(probe.console, "protect_streams", lambda **_: None)
    monkeypatch.setattr(run.sharding, "make_mesh", two_devices)

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


def test_command(command, tmp_path):
    """Check results and files; a second call takes the features of the first."""
    status, output, _ = command(tmp_path)
    assert status == 0
    lines = output.splitlines()
    assert lines[0].startswith("features: 40 train, 8 validation, 21 test clips, ")
    assert lines[0].endswith(" to compute")
    assert lines[-1] == f"wrote {tmp_path}/probe.json"
    written = json.loads((tmp_path / "probe.json").read_text())
    assert [row["head"] for row in written["heads"]] == list(options.HEADS)
    assert (written["views"], written["num_clips"], written["num_steps"]) == ("2x1x1", 40, 3)
    for row, line in zip(written["heads"], lines[-4:-1], strict=True):
        assert line.split()[0] == row["head"]
        assert row["validation"]["split"] == written["chosen_by"] == "validation"
        assert (row["final"]["split"], row["final"]["num_videos"]) == ("test", 21)
        low, high = row["final"]["interval"]
        assert 0 <= low <= row["final"]["top1"] <= high <= 1
        assert f"{row['final']['top1']:.4f} (95%: {low:.3f} to {high:.3f})" in line
        assert row["learning_rate"] in (0.01, 0.1)
    files = stored(tmp_path)
    assert len(files) == 3

    status, output, _ = command(tmp_path, "--heads", "linear")
    assert status == 0
    assert output.splitlines()[0].endswith(", computed before")
    assert stored(tmp_path) == files
    again = json.loads((tmp_path / "probe.json").read_text())
    assert again["heads"] == written["heads"][:1]

    # The adapter files are those of ordinary models of the method.
    loaded = trained_model.load(str(tmp_path / "probe_ordered.safetensors"))
    assert (loaded.step, loaded.config.model.probe.head) == (3, "ordered")
    test = VideoDataset(loaded.config.data.dir, "test")
    batches = pipeline.eval_batches(
        test, loaded.config.data, Views(1, 1), 21, inputs=ClipInputs.ALL_FRAMES
    )
    logits = loaded._logits(loaded.params, trained_model.model_arrays(next(batches)))[:, 0]
    top1 = (logits.argmax(axis=1) == test.labels).mean()
    assert top1 == pytest.approx(written["heads"][2]["final"]["top1"], abs=1 / 21 + 1e-6)


def build_probe(overrides, *more, **values):
    """Return the probe of a command line, before it computes anything."""
    arguments = [*overrides, *more]
    keys = loading.find_overridden_keys(arguments)
    config = options.as_probe(loading.load_config("demo", arguments), keys)
    return run._Probe.build(config, run.ProbeOptions(**values))


def identities(overrides, *more, **values):
    """Return the identity of the features of each split, by split."""
    built = build_probe(overrides, *more, **values)
    return {split: built.spec(split).identity for split in built.datasets}


def test_identity_of_features(overrides, demo_data, tmp_path):
    """Check which settings change the features of which split."""
    plain = identities(overrides)
    assert list(plain) == ["train", "validation", "test"]
    same = ("--config.seed=1", "--config.optimizer.b1=0.5", "--config.data.randaugment_layers=2")
    assert identities(overrides, *same, num_steps=5, heads=("linear",)) == plain
    for change in (
        "data.num_frames=4",
        "data.image_size=32",
        "data.sampling=dense --config.data.sampling_interval=1",
        "data.mean=(0.5,0.5,0.5) --config.data.keep_normalization=True",
        "model.dtype=bfloat16",
    ):
        other = identities(overrides, *f"--config.{change}".split())
        assert all(other[split] != plain[split] for split in plain), change
    views = identities(overrides, "--config.eval.temporal_views=2")
    assert [views[split] == plain[split] for split in plain] == [True, False, False]
    augmented = identities(overrides, augmented_passes=2)
    assert [augmented[split] == plain[split] for split in plain] == [False, True, True]
    for more in ("--config.seed=1", "--config.data.crop_scale=(0.5,1.0)"):
        assert identities(overrides, more, augmented_passes=2) != augmented
    moved = tmp_path / "moved"  # the same data elsewhere has the same features
    shutil.copytree(demo_data, moved)
    assert identities(overrides, f"--config.data.dir={moved}") == plain
    identity = json.loads((moved / "identity.json").read_text())
    identity["frames"]["test"][0]["sha256"] = "0" * 64  # other frames
    (moved / "identity.json").write_text(json.dumps(identity))
    other = identities(overrides, f"--config.data.dir={moved}")
    assert [other[split] == plain[split] for split in plain] == [True, True, False]


def test_features_of_another_backbone_are_computed_again(
    overrides, tmp_path, demo_backbone, capsys, monkeypatch
):
    """Check augmented passes, too; twin: another seed leaves the features of evaluation."""
    monkeypatch.setattr(run.sharding, "make_mesh", two_devices)

    def load(*more):
        built = build_probe(overrides, *more, augmented_passes=2)
        return run._load_features(built, tmp_path), capsys.readouterr().out

    first, output = load()
    assert output.startswith("features: 80 train, 8 validation, 21 test clips, ")
    assert {split: len(rows) for split, rows in first.items()} == {
        "train": 80,
        "validation": 8,
        "test": 21,
    }
    passes = first["train"].labels.reshape(2, 40)
    assert passes[0].tolist() != passes[1].tolist()
    assert sorted(passes[0]) == sorted(passes[1])
    files = stored(tmp_path)
    _, output = load("--config.seed=1")
    assert output.splitlines()[0].endswith(
        "train-00000.safetensors was made with seed=0, now 1: computed again"
    )
    assert [file for file, time in stored(tmp_path).items() if files[file] != time] == [
        "train-00000.safetensors"
    ]
    weights = load_file(demo_backbone)
    weights["ln_post/scale"] = weights["ln_post/scale"] * np.float32(1.5)
    with safe_open(demo_backbone, "numpy") as file:
        save_file(weights, tmp_path / "other.safetensors", metadata=file.metadata())
    other = f"--config.backbone.checkpoint={tmp_path / 'other.safetensors'}"
    again, output = load("--config.seed=1", other)
    assert len(re.findall(r"was made with backbone='\w+', now '\w+': computed again", output)) == 3
    assert not np.array_equal(again["test"].read([0]), first["test"].read([0]))


def test_the_disk_is_too_small(command, tmp_path, monkeypatch):
    """Check the error, and that it comes before the work; twin: a larger disk is enough."""
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, _, errors = command(tmp_path, "--heads", "linear")
    assert status == 2
    assert "error: the features of 40 train, 8 validation, 21 test clips need " in errors
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


@pytest.mark.parametrize("augmented_passes", [0, 1])
def test_an_interrupted_computation_continues(augmented_passes, overrides, tmp_path, monkeypatch):
    """Check that it begins after the last file, and its features; files have 8 clips here."""
    compute, starts = run._Probe.compute, []
    monkeypatch.setattr(run.sharding, "make_mesh", two_devices)
    monkeypatch.setattr(features, "_SHARD_BYTES", 1)

    def load(name):
        (tmp_path / name).mkdir(exist_ok=True)
        built = build_probe(overrides, augmented_passes=augmented_passes)
        return run._load_features(built, tmp_path / name)

    def stop(self, spec, first_row):
        starts.append((spec.split, first_row))
        for number, batch in enumerate(compute(self, spec, first_row)):
            if len(starts) == 1 and number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(run._Probe, "compute", stop)
    with pytest.raises(KeyboardInterrupt):
        load("a")
    assert set(stored(tmp_path / "a")) == {f"train-0000{i}.safetensors" for i in range(3)}
    resumed = load("a")
    assert starts == [("train", 0), ("train", 24), ("validation", 0), ("test", 0)]
    whole = load("b")
    for split in whole:
        rows = range(len(whole[split]))
        assert np.array_equal(resumed[split].read(rows), whole[split].read(rows))
        assert np.array_equal(resumed[split].labels, whole[split].labels)


def test_runs_print_the_probes_of_their_workdir(config, tmp_path, capsys, monkeypatch):
    """Check the line below the score; twin: none without probe.json, or with a damaged one."""
    scores = ProbeScores("test", 0.25, (0.1, 0.4), 0.25, 21)
    heads = tuple(
        HeadResult(head, 0.1, 0.1, 5, "", scores, scores) for head in ("linear", "ordered")
    )
    probe_results = ProbeResults(heads, "8x1x1", 40, 0, 3, "custom", "", "data", "validation")
    assert probe_results.best is heads[0]
    assert results.describe_probe(str(tmp_path)) == ""
    probe_results.write(str(tmp_path))
    assert results.read_results(str(tmp_path)) == probe_results
    monkeypatch.setattr(launch, "_run_split", lambda *_: print("the score"))
    launch.train_and_evaluate(config, str(tmp_path), training=False)
    line = "test  top-1 of probes, without tuning: linear 0.2500, ordered 0.2500\n"
    assert f"the score\n{line}" in capsys.readouterr().out
    (tmp_path / "probe.json").write_text("{")
    assert results.describe_probe(str(tmp_path)) == ""


def test_the_file_of_the_backbone_says_which_it_is(overrides):
    """Check that a config without a name or normalization takes those of the file."""
    config = loading.load_config("demo", overrides)
    for key in config.backbone:
        if key != "checkpoint":
            config.backbone[key] = None
    config.data.mean = config.data.std = None
    built = run._Probe.build(options.as_probe(config), run.ProbeOptions())
    named = build_probe(overrides)
    assert built.config.backbone.name == "custom"
    assert (built.config.backbone.width, built.backbone) == (96, named.backbone)
    assert built.config.data.mean == named.config.data.mean

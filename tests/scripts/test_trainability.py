"""Tests scripts/trainability.py: its tables, and that only a usable rate fits the clips."""

import collections
import json
import re
import sys

import numpy as np
import pytest

from scripts import trainability


@pytest.mark.slow
def test_script(config, monkeypatch, capsys):
    arguments = ["--config=demo", "--clips=8", "--steps=25", "--rates", "1e-9", "1e-2"]
    settings = {
        "data.source": "ssv2",
        "data.dir": config.data.dir,
        "data.batch_size": 8,
        "data.image_size": 32,
        "backbone.checkpoint": config.backbone.checkpoint,
        "optimizer.warmup_epochs": 0,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["trainability.py", *arguments, *overrides])
    trainability.main()
    printed = capsys.readouterr().out
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [result["learning_rate"] for result in results] == [1e-9, 1e-2]
    slow, fast = (result["loss"] for result in results)
    assert slow > 1.5 > 1.0 > fast
    assert results[0]["first_step_below_0.1"] is None
    rows = re.findall(r"^  (temporal/adapters|classifier) +([\d.e+ -]+)$", printed, re.MULTILINE)
    counts = [(name, len(norms.split())) for name, norms in rows]
    assert set(counts) == {("temporal/adapters", 4), ("classifier", 1)}  # four blocks
    assert len(re.findall(r"^step (?:0|10): loss", printed, re.MULTILINE)) == 4


def test_random_weights_are_of_the_backbones_shape(config, monkeypatch):
    seen = []

    def fake_fit(config, dataset, clips, steps, branch_scale):
        seen.append((config.data.synthetic, len(clips["label"]), steps, branch_scale))
        return {}

    monkeypatch.setattr(trainability, "fit", fake_fit)
    arguments = ["--config=demo", "--backbone=random", "--clips=3", "--steps=2"]
    data = ["--config.data.source=ssv2", f"--config.data.dir={config.data.dir}"]
    checkpoint = f"--config.backbone.checkpoint={config.backbone.checkpoint}"
    monkeypatch.setattr(sys, "argv", ["trainability.py", *arguments, *data, checkpoint])
    trainability.main()
    assert seen == [(True, 3, 2, 1.0)]


@pytest.mark.parametrize("key", ["optimizer.learning_rate", "optimizer.label_smoothing"])
def test_keys_that_the_script_sets_are_refused(key, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainability.py", "--config=demo", f"--config.{key}=0.2"])
    with pytest.raises(SystemExit) as end:
        trainability.main()
    assert end.value.code == 2
    assert f"--config.{key} is set by the script: " in capsys.readouterr().err


@pytest.mark.parametrize(("count", "expected"), [(3, {1: 3}), (11, {1: 5, 2: 3}), (99, {5: 8})])
def test_clips_are_of_all_classes(config, count, expected):
    dataset, clips = trainability.load_clips(config, count)  # of 8 classes with 5 videos each
    videos_of_class = collections.Counter(clips["label"].tolist())
    assert collections.Counter(videos_of_class.values()) == expected
    assert len(clips["temporal"]) == len(clips["mask"]) == clips["mask"].sum()
    assert len(clips["label"]) <= len(dataset) <= 40


def test_branches_are_scaled():
    block = {"out": {"kernel": np.ones(2), "bias": np.ones(1)}, "qkv": {"kernel": np.ones(3)}}
    frozen = {"backbone": {"blocks": {"0": {"attention": block, "mlp": {"output": block["out"]}}}}}
    scaled = trainability.scale_branches(frozen, 30.0)["backbone"]["blocks"]["0"]
    assert scaled["attention"]["out"]["bias"].tolist() == [30]
    assert scaled["mlp"]["output"]["kernel"].tolist() == [30, 30]
    assert scaled["attention"]["qkv"]["kernel"].tolist() == [1, 1, 1]

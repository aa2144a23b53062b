"""Runs the command line as a process: wrong input, and complete tiny runs."""

import json
import os
import subprocess
import sys

import pytest

from configs import hmdb51_vitb
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset
from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.inputs import expand_splits
from tests.helpers.processes import ROOT, make_environment
from tests.helpers.video_files import write_video


def run_main(*args, cwd=ROOT):
    """Run dualpath_jax.main with arguments; return the finished process."""
    command = [sys.executable, "-m", "dualpath_jax.main", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=make_environment())


def test_missing_data_and_weights_are_named(tmp_path):
    result = run_main(f"--config={ROOT}/configs/ssv2_vitb.py", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = result.stderr[result.stderr.index("error:") :].strip().splitlines()
    assert errors[0].startswith("error: no prepared data in data/ssv2 and no converted ViT-B/16")
    assert errors[1].strip().startswith("python scripts/prepare_dataset.py --dataset=ssv2")
    assert errors[2].strip().startswith("python scripts/convert_clip.py")
    assert (tmp_path / "runs" / "ssv2_vitb").is_dir()


def test_unknown_key():
    result = run_main("--config=configs/demo.py", "--config.optimizer.learning_rte=1")
    assert result.returncode == 2
    assert (
        "error: the configuration has no key 'optimizer.learning_rte': did you mean "
        "optimizer.learning_rate?" in result.stderr
    )
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs /proc, a folder that nobody can write to")
def test_unwritable_workdir():
    result = run_main("--config=configs/demo.py", "--workdir=/proc/nowhere")
    assert result.returncode == 2
    assert "error: cannot write to --workdir=/proc/nowhere" in result.stderr


def test_missing_config():
    result = run_main("--config=configs/nothing.py")
    assert result.returncode == 2
    assert "error: there is no config file 'configs/nothing.py'; packaged are " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config=configs/diving48_vitb.py:x",
            "--config: this file takes no :VARIANT after its name",
        ),
        ("--config.data.batch_size=four", "flag --config.data.batch_size=four: invalid literal"),
        ("--confg=x", "Unknown command line flag 'confg'"),
    ],
)
def test_wrong_flags(flag, message):
    result = run_main("--config=configs/demo.py", flag)
    assert result.returncode == 2
    assert f"error: {message}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_train_then_evaluate(demo_data, demo_backbone, tmp_path):
    args = [
        "--config=configs/demo.py",
        f"--workdir={tmp_path}",
        "--config.data.source=ssv2",
        f"--config.data.dir={demo_data}",
        f"--config.backbone.checkpoint={demo_backbone}",
        "--config.num_train_steps=4",
        "--config.log_every_steps=2",
        "--config.eval.every_epochs=0",
        "--config.data.image_size=32",
        "--config.data.batch_size=8",
        "--config.eval.batch_size=8",
        "--config.model.scan_blocks=True",
    ]
    result = run_main(*args)
    assert result.returncode == 0, result.stderr
    assert "classifier/hidden" in result.stdout  # the table of parameters
    assert "step 4/4  loss " in result.stdout
    first = json.loads((tmp_path / "results.json").read_text())
    assert Checkpoints(str(tmp_path), read_only=True).best_step() == 4
    assert first["num_videos"] == 21
    assert json.loads((tmp_path / "config.json").read_text())["num_train_steps"] == 4
    predictions = (tmp_path / "predictions" / "00000-of-00001.jsonl").read_text()
    # The workdir alone says how to evaluate; what is set in addition is named.
    again = run_main("--mode=eval", tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"configuration: {tmp_path}/config.json\n" in again.stdout
    assert json.loads((tmp_path / "results.json").read_text()) == first
    assert (tmp_path / "predictions" / "00000-of-00001.jsonl").read_text() == predictions
    other = run_main(
        *("--mode=eval", f"--workdir={tmp_path}", "--config.eval.split=validation"),
    )
    assert other.returncode == 0, other.stderr
    assert f"{tmp_path}/config.json, with eval.split='validation' instead of 'test'" in other.stdout
    assert json.loads((tmp_path / "results.json").read_text())["num_videos"] == 8
    over = run_main(*args, "--start_over")
    assert over.returncode == 0, over.stderr
    assert (
        f"--start_over: moved {tmp_path}/checkpoints to {tmp_path}/old_checkpoints" in over.stdout
    )
    assert "step 2/4  loss " in over.stdout
    assert json.loads((tmp_path / "results.json").read_text()) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --config is missing: name a config file, such as --config=finetune"),
        (("--mode=eval",), "error: name the run to evaluate by its folder, or a config file"),
        (("--mode=eval", "docs"), "error: docs has no config.json: it is not the folder of a tr"),
        (("--config=docs/config.json",), "error: there is no saved configuration 'docs/config.js"),
    ],
)
def test_no_configuration(arguments, message):
    result = run_main(*arguments)
    assert (result.returncode, result.stderr[: len(message)]) == (2, message)


def test_start_over_belongs_to_training():
    result = run_main("--config=configs/demo.py", "--mode=eval", "--start_over")
    assert result.returncode == 2
    assert "--start_over belongs to --mode=train, not to --mode=eval" in result.stderr


def test_expand_splits():
    config = hmdb51_vitb.get_config()

    def list_runs(split):
        config.data.split = split
        return [(c.data.train_split, c.eval.split, w) for c, w in expand_splits(config, "runs/x")]

    assert list_runs(None) == [("train1", "test1", "runs/x")]
    assert list_runs("2") == [("train2", "test2", "runs/x")]
    assert list_runs("all") == [(f"train{i}", f"test{i}", f"runs/x/split{i}") for i in (1, 2, 3)]
    assert config.data.train_split == "train1"  # unchanged
    with pytest.raises(ValueError, match="unknown data.split='4': known are 1, 2, 3, all"):
        list_runs("4")


@pytest.mark.slow
def test_all_splits_of_hmdb51(demo_backbone, tmp_path):
    """Train and evaluate the three splits and write their mean."""
    videos, lists, data = tmp_path / "videos", tmp_path / "lists", tmp_path / "data"
    lists.mkdir()
    files = [f"{i}.avi" for i in range(6)]
    for i, name in enumerate(["sit", "situp"]):
        for file in files:
            write_video(videos / name / file, 8 + i)
        for division, roles in {1: "111122", 2: "112211", 3: "221111"}.items():
            lines = [f"{file} {role}\n" for file, role in zip(files, roles, strict=True)]
            (lists / f"{name}_test_split{division}.txt").write_text("".join(lines))
    listing = list_videos("hmdb51", str(videos), str(lists))
    options = PrepareOptions(short_side=32, progress=False)
    prepare_dataset(listing, str(videos), str(data), options)
    args = [
        "--config=configs/demo.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.source=hmdb51",
        f"--config.data.dir={data}",
        "--config.data.image_size=32",
        "--config.data.batch_size=8",
        "--config.eval.batch_size=8",
        f"--config.backbone.checkpoint={demo_backbone}",
        "--config.num_train_steps=2",
        "--config.model.scan_blocks=True",
        "--config.model.temporal_path=False",
    ]
    result = run_main(*args, "--config.data.split=all")
    assert result.returncode == 0, result.stderr
    assert "mean of 3 splits  top-1 " in result.stdout
    mean = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(mean["splits"]) == ["test1", "test2", "test3"]
    for i in (1, 2, 3):
        single = json.loads((tmp_path / "run" / f"split{i}" / "results.json").read_text())
        assert single == mean["splits"][f"test{i}"]
        assert single["num_videos"] == 4
    for score in ("top1", "top5", "mean_class_accuracy"):
        values = [single[score] for single in mean["splits"].values()]
        assert mean[score] == pytest.approx(sum(values) / 3)
    # The workdir alone says that all splits are evaluated.
    again = run_main("--mode=eval", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == mean
    # Twin: a missing split is an error that names the existing ones.
    wrong = run_main(*args, "--config.data.train_split=train4", f"--workdir={tmp_path / 'other'}")
    assert wrong.returncode == 2
    assert "no videos of split 'train4'" in wrong.stderr
    assert "it has train1, test1, train2, test2, train3, test3" in wrong.stderr

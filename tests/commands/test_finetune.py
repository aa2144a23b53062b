"""Runs `dualpath finetune` on a few small videos: from the folder to the report."""

import contextlib
import io
import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from dualpath_jax import cli
from dualpath_jax.analysis import cost_estimate
from dualpath_jax.commands import finetune
from dualpath_jax.config import schema
from dualpath_jax.data.preparation import prepare
from dualpath_jax.report import run_reader
from dualpath_jax.training.checkpoint import Checkpoints
from tests.helpers.video_files import write_video

# Settings that make the training small.
SMALL = (
    *("--config.num_epochs=4", "--config.eval.every_epochs=1", "--config.data.image_size=32"),
    *("--config.early_stopping_evaluations=0", "--config.log_every_steps=1"),
    "--config.data.randaugment_layers=0",
)


def write_videos(root, number=6):
    """Write videos of two classes, dark and bright, into class folders with a test split."""
    for split, count in (("train", number), ("test", 2)):
        for name, level in (("dark", 20), ("bright", 220)):
            for i in range(count):
                frames = [np.full((48, 64, 3), level + i, np.uint8)] * 8
                write_video(root / split / name / f"{'abcdefgh'[i]}.avi", frames)


def run(monkeypatch, *arguments):
    """Run the command in this process; return its status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["dualpath finetune", *map(str, arguments)])
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            finetune.main()
        except SystemExit as end:
            status = end.code
    return status, output.getvalue(), errors.getvalue()


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """Keep the signals and streams of this process as they are."""
    monkeypatch.setattr(cli.preemption, "install_sigterm_handler", lambda: None)
    monkeypatch.setattr(cli.console, "protect_streams", lambda is_log: None)


@pytest.mark.slow
def test_from_a_folder_to_a_report(tmp_path, monkeypatch):
    """Interrupt the preparation, continue, and read all that was printed and written."""
    videos, out = tmp_path / "videos", tmp_path / "run"
    write_videos(videos)
    arguments = (videos, "--backbone=demo", f"--out={out}", *SMALL)
    with monkeypatch.context() as patch:

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(prepare, "_store_shards", interrupt)
        status, output, errors = run(monkeypatch, *arguments)
    assert (status, errors) == (130, "stopped; run the same command again to continue\n")
    assert "  2 classes; videos: 10 train, 2 validation, 4 test\n" in output
    assert "  method dualpath, recommended by docs/comparison.md\n" in output
    assert "estimate\n  preparing: " in output
    status, output, errors = run(monkeypatch, *arguments)
    assert status == 0, errors
    assert f"their preparation in {out}/data has begun: it is not repeated" in output
    for text in (
        f"--workdir={out} --checkpoint=best NEW_VIDEOS\n",
        f"wrote {out}/report.html",
        "test  top-1 ",
    ):
        assert text in output
    # All settings are in config.json; the best checkpoint by validation was tested.
    config = json.loads((out / "config.json").read_text())
    assert (config["num_epochs"], config["data"]["image_size"]) == (4, 32)
    assert (config["optimizer"]["learning_rate"], config["backbone"]["width"]) == (0.001, 96)
    assert config["data"]["dir"] == f"{out}/data"
    results = json.loads((out / "results.json").read_text())
    assert (results["split"], results["num_videos"]) == ("test", 4)
    assert results["step"] == Checkpoints(str(out), read_only=True).best_step()
    [record] = run_reader.read_runs([str(out)])
    assert record.missing == []
    assert {entry["split"] for entry in record.evaluations} == {"validation"}


def test_a_backbone_is_asked_for(tmp_path, monkeypatch):
    write_videos(tmp_path / "videos", 2)
    status, _, errors = run(monkeypatch, tmp_path / "videos")
    assert status == 2
    assert errors.startswith("error: --backbone is missing, the pretrained image model that is ")
    status, _, errors = run(monkeypatch, tmp_path / "videos", "--backbone=nothing.pt")
    assert (status, errors) == (
        2,
        "error: there is no --backbone=nothing.pt: name a file of weights, or demo\n",
    )
    status, _, errors = run(monkeypatch, tmp_path, "--backbone=demo", "--method=nothing")
    assert status == 2
    assert errors.startswith("error: unknown --method=nothing: known are dualpath, full, linear")


def test_tries_come_before_the_training(tmp_path, monkeypatch):
    """Check that --tune is refused before any work; in the twin tries came before."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    arguments = (tmp_path / "videos", "--backbone=demo", f"--out={tmp_path / 'run'}", "--tune")
    for more in ((), ("--plan",)):
        status, output, errors = run(monkeypatch, *arguments, *more)
        assert (status, output) == (2, "")
        assert errors == (
            f"error: the training in {tmp_path}/run has begun without --tune: choose another "
            "--out, or leave --tune out\n"
        )
    (tmp_path / "run" / "tune.json").write_text("{}")
    assert "there is no folder of videos" in run(monkeypatch, *arguments)[2]


def test_uneven_classes_are_weighted(tmp_path, monkeypatch):
    write_videos(tmp_path / "videos", 3)
    for path in (tmp_path / "videos" / "train" / "dark").iterdir():
        for i in range(5):
            shutil.copyfile(path, path.with_name(f"copy{i}-{path.name}"))
    arguments = (tmp_path / "videos", "--backbone=demo", f"--out={tmp_path / 'run'}", "--plan")
    status, output, _ = run(monkeypatch, *arguments)
    assert status == 0
    assert "  uneven classes: balanced weights; mean_class_accuracy decides\n" in output


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    write_videos(tmp_path / "videos", 2)
    usage = shutil.disk_usage(tmp_path)
    arguments = (tmp_path / "videos", "--backbone=demo", f"--out={tmp_path / 'run'}", "--plan")
    status, output, _ = run(monkeypatch, *arguments)
    assert status == 0
    assert output.splitlines()[-1].startswith("  disk: about ")
    assert "uneven classes" not in output
    small = types.SimpleNamespace(total=usage.total, used=usage.used, free=1000)
    monkeypatch.setattr(finetune.shutil, "disk_usage", lambda path: small)
    status, _, errors = run(monkeypatch, *arguments)
    assert status == 2
    assert f"error: the disk of {tmp_path}/run is too small: frames (" in errors
    assert "features of the probes (" in errors
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(("devices", "steps"), [(1, 8), (2, 4), (8, 1)])
def test_parts_of_a_batch_have_clips_for_every_device(devices, steps, monkeypatch):
    config = schema.get_config()
    config.data.batch_size = 8
    cost = cost_estimate.Cost(0.0, 0.0, 0.0, 1e12, 0.0)  # no part fits
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert cost_estimate.fit_accumulation(config, cost, 1e9) == steps
    assert config.optimizer.accumulation_steps == steps
    assert 8 % (devices * steps) == 0

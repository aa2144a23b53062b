"""The command line, as a process: the owner's command, bad input, a whole tiny run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*args, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dualpath_jax.main", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_owners_command_names_what_is_missing(tmp_path):
    result = run(f"--config={ROOT}/configs/ssv2_vitb.py", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = result.stderr[result.stderr.index("error:") :].strip().splitlines()
    assert errors[0].startswith("error: no prepared data in data/ssv2 and no converted ViT-B/16")
    assert errors[1].strip().startswith("python scripts/prepare_dataset.py --dataset=ssv2")
    assert errors[2].strip().startswith("python scripts/convert_clip.py")
    assert (tmp_path / "runs" / "ssv2_vitb").is_dir()


def test_unknown_key():
    result = run("--config=configs/demo.py", "--config.optimizer.learning_rte=1")
    assert result.returncode != 0
    assert "learning_rte" in result.stderr
    assert "learning_rate" in result.stderr  # the remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="needs /proc as a folder that nobody can write")
def test_unwritable_workdir():
    result = run("--config=configs/demo.py", "--workdir=/proc/nowhere")
    assert result.returncode == 2
    assert "error: cannot write to --workdir=/proc/nowhere" in result.stderr


def test_missing_config():
    result = run("--config=configs/nothing.py")
    assert result.returncode != 0
    assert "configs/nothing.py" in result.stderr


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
    ]
    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert "classifier/hidden" in result.stdout  # the table of parameters
    assert "step 4/4  loss " in result.stdout
    first = json.loads((tmp_path / "results.json").read_text())
    assert first["num_videos"] == 21
    assert json.loads((tmp_path / "config.json").read_text())["num_train_steps"] == 4
    again = run(*args, "--mode=eval")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == first

"""Commands of the pages, run word for word in a folder of their own: those that need no download.

CI runs the README's first two commands and its faults in full, and test_tpu_pod.py those of pods.
"""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from documents import PAGES, ROOT, commands
from video_files import write_video

# Command of a page, what is put behind it to make it short, and what it says. In this order: later
# ones use what earlier ones wrote.
RUN = (
    (
        "python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo",
        "--config.num_train_steps=2 --quiet",
        "wrote runs/demo/results.json",
    ),
    (
        "python scripts/export_adapter.py --workdir=runs/demo --out=demo.safetensors",
        "",
        "wrote demo.safetensors: 264,168 parameters of dualpath",
    ),
    (
        "python scripts/show_batch.py --config=configs/demo.py --step=3 --clips=2 --zoom=3 "
        "--out=batch.png",
        "",
        "wrote batch.png: 2 clips of step 3",
    ),
    (
        "python scripts/prepare_dataset.py --dataset=folder --videos=VIDEOS --out=data/mine",
        "",
        "total: listed 6, found 6, stored 6, bad 0",
    ),
    (
        "python scripts/prepare_dataset.py --dataset=folder --videos=VIDEOS --check",
        "",
        "the frames would take about",
    ),
    (
        "python -m dualpath_jax.main --config=configs/ssv2_vitb.py --mode=check",
        "",
        "98,809,774",
    ),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo_data):
    """A folder as a checkout is, with a small demo set and six videos of one's own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("dualpath_jax", "configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(demo_data, folder / "data" / "demo")
    for number in range(6):
        write_video(folder / "VIDEOS" / f"class {number % 2}" / f"{number}.mp4", 20)
    return folder


@pytest.mark.slow
def test_commands_run(place):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    for command, more, said in RUN:
        words = [sys.executable, *shlex.split(f"{command} {more}")[1:]]
        done = subprocess.run(
            words, cwd=place, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert said in done.stdout, f"{command}: {done.stdout}"
    assert "step 2/2" not in done.stdout


def test_they_stand_in_the_pages():
    found = {command for page in PAGES for command in commands(page)}
    assert {command for command, _, _ in RUN} <= found
    assert "python scripts/export_adapter.py --workdir=runs/other" not in found

"""Checks the picture of a training batch."""

import pathlib
import subprocess
import sys

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dualpath_jax.analysis import batch_figure
from dualpath_jax.data.randaugment_ops import OPS

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_script(*args):
    """Run scripts/show_batch.py; return the finished process."""
    command = [sys.executable, "scripts/show_batch.py", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_picture_of_a_batch(demo_data, tmp_path):
    out = tmp_path / "batch.png"
    args = ("--config=configs/demo.py", f"--data_dir={demo_data}", f"--out={out}")
    result = run_script(*args, "--clips=3", "--zoom=2")
    assert result.returncode == 0, result.stderr
    assert "3 clips of step 0" in result.stdout
    picture = np.asarray(Image.open(out))
    # Three rows of 16 + 128 + 8 pixels; two frames and a frameset of 128 pixels each.
    assert picture.shape == (3 * 152, 480, 3)
    assert picture[20, 128:136].min() == 255  # the gap between pictures
    assert picture[16:144, :128].std() > 0


def test_picture_of_a_method_without_framesets(demo_data, tmp_path):
    config = tmp_path / "linear.py"
    config.write_text(
        "from configs import demo\n\n\ndef get_config():\n    config = demo.get_config()\n"
        "    config.model.method = 'linear'\n    config.data.num_frames = 3\n"
        "    config.data.randaugment_layers = 4\n"
        "    config.data.erasing_probability = 0.5\n    return config\n"
    )
    out = tmp_path / "batch.png"
    result = run_script(f"--config={config}", f"--data_dir={demo_data}", f"--out={out}", "--zoom=3")
    assert result.returncode == 0, result.stderr
    # Eight rows of 16 + 192 + 8 pixels; three frames of 192 pixels each.
    assert np.asarray(Image.open(out)).shape == (8 * 216, 3 * 200, 3)


def test_colors_are_those_that_the_model_gets():
    batch = {
        "spatial": np.full((1, 2, 4, 4, 3), 60, np.uint8),
        "temporal": np.full((1, 1, 4, 4, 3), 60, np.uint8),
        "ops": np.array([[OPS.index("invert"), 0, OPS.index("brightness")]], np.int32),
        "op_values": np.array([[0, 0, 0.5]], np.float32),
        "tables": np.tile(255 - np.arange(256, dtype=np.uint8), (1, 3, 1)),
    }
    shown = batch_figure.apply_color_operations(batch)
    assert set(shown["spatial"].ravel().tolist() + shown["temporal"].ravel().tolist()) == {98}
    assert batch_figure.format_operations(batch, 0) == "; invert; brightness 0.5"
    del batch["ops"]
    assert batch_figure.apply_color_operations(batch) is batch
    assert batch_figure.format_operations(batch, 0) == ""


def test_missing_data(tmp_path):
    result = run_script("--config=configs/demo.py", "--data_dir=nowhere", "--out=x.png")
    assert result.returncode == 2
    assert "error: no prepared videos in nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_differences_are_shown_as_the_model_gets_them():
    frames = np.full((1, 1, 4, 4, 3), 100, np.uint8)
    frames[0, 0, :2, :2] = 160  # one of four frames is brighter; the mean is 115
    data = ConfigDict({"mean": (0.4,) * 3, "std": (0.25,) * 3, "grid": (2, 2)})
    expected = {"rgb": (160, 100), "abs_minus_mean": (45, 15), "minus_mean": (150, 120)}
    for kind, (bright, others) in expected.items():
        data.frameset_input = kind
        shown = batch_figure.draw_differences({"temporal": frames}, data)["temporal"]
        assert shown[0, 0, 0, 0].tolist() == [bright] * 3
        assert shown[0, 0, 3, 3].tolist() == [others] * 3
    data.frameset_input = "motion"
    frames[0, 0, :2, :2] = 100
    frames[0, 0, 0, 0] = 160  # one pixel of the first frame is brighter
    shown = batch_figure.draw_differences({"temporal": frames}, data)["temporal"][0, 0]
    assert shown[0, 0].tolist() == [255, 255, 0]  # the first frame is its own frame before
    assert shown[0, 2].tolist() == [255, 0, 0]
    assert shown[3, 3].tolist() == [0, 0, 0]

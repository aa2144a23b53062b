"""Tests that an exported model gives the same logits in a process without this package."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow as tf

import dualpath_jax
from dualpath_jax.data import frame_ops, framesets
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.inference import export, frame_inputs, trained_model
from dualpath_jax.training.checkpoint import Checkpoints
from scripts import export_model as script
from tests.helpers.runs import build_run

TOLERANCE = 1e-4
NO_SAVED_MODEL = jax.__version_info__ >= (0, 12)
# Reads each export as the model card describes; arguments: folder, frames, output file.
READER_PROGRAM = """
import os
import sys
sys.modules["dualpath_jax"] = None  # an import of it fails, also where it is installed
import numpy as np
import jax.export
import tensorflow as tf
folder, frames, out = sys.argv[1:]
frames = np.load(frames)
code = open(folder + "/model.stablehlo", "rb").read()
exported = jax.export.deserialize(code)
logits = {"stablehlo": exported.call(frames)}
assert "_jax_" + jax.__version__.replace(".", "_") + "_date_20" in exported.fun_name
if os.path.exists(folder + "/saved_model"):
    loaded = tf.saved_model.load(folder + "/saved_model")
    assert jax.__version__ in loaded.export_info().numpy().decode()
    logits["saved_model"] = loaded.logits(frames)["logits"].numpy()
assert not any(name.startswith("dualpath_jax.") for name in sys.modules)
np.savez(out, **{k: np.asarray(v) for k, v in logits.items()})
"""


@pytest.fixture
def model(config, tmp_path):
    """Return the model of a run whose trained parameters differ from their initial values."""
    dataset = VideoDataset(config.data.dir, "test")
    run = build_run(config, str(tmp_path / "run"), dataset)
    moved = jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size)).reshape(x.shape), run.state)
    checkpoints = Checkpoints(run.workdir)
    checkpoints.save(3, run.state.replace(trainable=moved.trainable), run.metadata())
    checkpoints.close()
    return trained_model.load(run.workdir)


@pytest.mark.slow
def test_exports_load_without_this_package(model, tmp_path):
    out = tmp_path / "exported"
    formats = [name for name in export.FORMATS if export.find_format_problem(name) is None]
    assert formats == ["stablehlo", "saved_model"][: 1 if NO_SAVED_MODEL else 2]
    # Videos of 20 frames, larger than what the model sees, of which it takes three crops.
    model.config.eval.spatial_crops = 3
    shape = export.FrameShape(20, 50, 70)
    export.export_model(model, str(out), formats, shape=shape)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, *shape.shape), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", frames)
    files = map(str, (out, tmp_path / "frames.npy", tmp_path / "out.npz"))
    command = [sys.executable, "-c", READER_PROGRAM, *files]
    subprocess.run(command, check=True, cwd=tmp_path)
    views = np.stack([model.logits_of_frames(video) for video in frames])
    assert views.shape == (3, 3, 8)
    want = np.asarray(frame_inputs.mean_logits(views))
    means = np.stack([trained_model.mean_probabilities(video) for video in views])
    np.testing.assert_allclose(jax.nn.softmax(want), means, atol=1e-6)
    with np.load(tmp_path / "out.npz") as logits:
        for name in formats:
            assert np.abs(logits[name] - want).max() <= TOLERANCE, name
            assert np.abs(logits[name][::-1] - want).max() > TOLERANCE  # other clips differ
            # The probabilities are those of `predict`.
            probabilities = np.asarray(jax.nn.softmax(logits[name]))
            for row, prediction in zip(probabilities, model.predict(list(frames)), strict=True):
                classes = [model.class_names.index(name) for name in prediction.class_names]
                assert np.abs(row[classes] - prediction.probabilities).max() <= TOLERANCE
    names = json.loads((out / "class_names.json").read_text())
    assert names == model.class_names
    assert not list(out.glob("*.tmp"))


def test_predictions_of_arrays(model):
    """Check frames that are as large as a clip's, so that nothing is scaled; and lists."""
    videos = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 32, 3), dtype=np.uint8)
    clips = {
        "spatial": videos[:1, None, [4, 12]],
        "temporal": framesets.tile_framesets(
            frame_ops.resize(tf.constant(videos[0]), 8), (4, 4)
        ).numpy()[None, None],
    }
    logits = model.logits_of_frames(videos[0])
    np.testing.assert_allclose(logits, model.logits(clips), atol=1e-5)
    predictions = model.predict(list(videos))
    assert predictions[0] == trained_model.Prediction.from_logits(logits, model.class_names, 5)
    assert predictions[1] == model.predict(videos[1]) != predictions[0]
    with pytest.raises(ValueError, match="frames of dtype float64 are not uint8"):
        model.predict([videos[0], videos[1] / 255])


def test_model_card(model):
    results = {"top1": 0.5, "split": "test", "step": model.step}
    shape = export.default_shape(model)
    card = export.format_model_card(model, ["stablehlo"], 2, results, shape)
    assert "- `frames`: uint8 [2, 16, 32, 32, 3], RGB, 0..255: 16 frames of each video" in card
    assert "frames = np.zeros((2, 16, 32, 32, 3), np.uint8)  # your videos" in card
    assert "logits = program.call(frames)" in card
    assert "Top-1 0.5000" in card
    assert "saved_model" not in card
    assert f"with jax {jax.__version__} and dualpath_jax {dualpath_jax.__version__}" in card
    for other in (None, results | {"step": model.step + 1}):
        assert "has not been evaluated" in export.format_model_card(model, [], None, other, shape)


@pytest.mark.skipif(not NO_SAVED_MODEL, reason="this jax writes what TensorFlow reads")
def test_a_format_that_nothing_could_read_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="cannot read a SavedModel .* --formats stablehlo"):
        export.export_model(model, str(tmp_path / "out"), ["saved_model"])
    assert not (tmp_path / "out").exists()


def test_bad_input(model, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        ValueError, match="unknown format 'onnx': choose from stablehlo, saved_model"
    ):
        export.export_model(model, str(tmp_path), ["onnx"])
    with pytest.raises(ValueError, match="--batch_size=0 must be at least 1"):
        export.export_model(model, str(tmp_path), ["stablehlo"], batch_size=0)
    monkeypatch.setattr(sys, "argv", ["export_model.py", "--workdir=nowhere", "--out=x"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    assert "error: no checkpoints in nowhere" in capsys.readouterr().err
    assert not pathlib.Path("x").exists()

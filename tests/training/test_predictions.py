"""Checks the predictions that an evaluation writes for each video."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpath_jax import evaluate
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.training import predictions, sharding
from tests.helpers.runs import build_run

HEADER = {"step": 3, "split": "test", "views": "16x1x1", "class_names": ["a", "b"]}
RESULTS = {"step": 3, "split": "test", "views": "16x1x1", "num_videos": 3}


def write(workdir, ids=("x", "y", "z"), header=HEADER):
    """Write the predictions of three videos, given with a row of padding."""
    writer = predictions.PredictionWriter(str(workdir), header, ids)
    writer.add(
        np.array([0, 1, 2, -1]),
        np.array([0, 1, 0, 0], np.int32),
        np.array([[0, 1], [0, 1], [0, 1], [1, 0]], np.int32),
        np.array([[0.75, 0.25]] * 4, np.float32),
    )
    writer.close()


def test_rows_without_padding(tmp_path):
    write(tmp_path, ["x", "<y>\udc80", "z"])  # ids may hold any bytes
    names, rows = predictions.read_predictions(tmp_path, RESULTS)
    assert names == ["a", "b"]
    assert [row["id"] for row in rows] == ["x", "<y>\udc80", "z"]
    assert rows[1] == {
        "id": "<y>\udc80",
        "label": 1,
        "classes": [0, 1],
        "probabilities": [0.75, 0.25],
    }


def test_predictions_of_other_processes_are_removed(tmp_path, monkeypatch):
    for process in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(jax, "process_index", lambda process=process: process)
            write(tmp_path)
    folder = tmp_path / predictions.FOLDER
    names = ["00000-of-00002.jsonl", "00001-of-00002.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    both = RESULTS | {"num_videos": 6}
    assert len(predictions.read_predictions(tmp_path, both)[1]) == 6
    write(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["00000-of-00001.jsonl"]


def test_files_of_others_stay(tmp_path):
    """Check notes, a folder and a link to a file outside; a link itself is ours by its name."""
    folder, outside = tmp_path / predictions.FOLDER, tmp_path / "outside.jsonl"
    (folder / "00000-of-00003.jsonl").mkdir(parents=True)
    (folder / "00000-of-00003.jsonl" / "inside").write_text("x")
    (folder / "notes.txt").write_text("notes")
    (folder / "more-of-them.jsonl").write_text("notes")
    outside.write_text("outside")
    (folder / "00001-of-00002.jsonl").symlink_to(outside)
    write(tmp_path)
    names = ["00000-of-00001.jsonl", "00000-of-00003.jsonl", "more-of-them.jsonl", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "00000-of-00003.jsonl" / "inside").read_text() == "x"
    assert outside.read_text() == "outside"
    (folder / "00000-of-00003.jsonl" / "inside").unlink()
    (folder / "00000-of-00003.jsonl").rmdir()
    assert len(predictions.read_predictions(tmp_path, RESULTS)[1]) == 3


def test_predictions_of_another_evaluation_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no predictions in .*--mode=eval writes them"):
        predictions.read_predictions(tmp_path, RESULTS)
    write(tmp_path)
    with pytest.raises(ValueError, match="belongs to {'step': 3.*run --mode=eval again"):
        predictions.read_predictions(tmp_path, RESULTS | {"step": 4})
    with pytest.raises(ValueError, match="holds 3 videos, results.json counts 4"):
        predictions.read_predictions(tmp_path, RESULTS | {"num_videos": 4})
    file = next((tmp_path / predictions.FOLDER).iterdir())
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match="jsonl is damaged"):
        predictions.read_predictions(tmp_path, RESULTS)


def compile_step(step, mesh, out_shardings):
    """Return the program of a step on eight rows of logits, sharded by row, as text."""
    shapes = {
        "logits": jax.ShapeDtypeStruct(
            (8, 2, 7), jnp.float32, sharding=sharding.batch_sharding(mesh)
        ),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=sharding.batch_sharding(mesh)),
        "mask": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding.batch_sharding(mesh)),
    }
    return jax.jit(step, out_shardings=out_shardings).lower(shapes).compile().as_text()


def test_only_sums_cross_devices():
    mesh = sharding.make_mesh()

    def step(batch):
        sums = evaluate.eval_step_sums(batch["logits"], batch["label"], batch["mask"])
        return sums, predictions.top_predictions(batch["logits"])

    text = compile_step(step, mesh, evaluate.eval_out_shardings(mesh))
    assert "all-reduce" in text
    assert "all-gather" not in text
    # Twin: every device gets all rows.
    assert "all-gather" in compile_step(step, mesh, sharding.replicated_sharding(mesh))


def test_a_run_writes_each_video_once(config, tmp_path):
    config.model.temporal_path = False  # compiles sooner
    dataset = VideoDataset(config.data.dir, "test")
    run = build_run(config, str(tmp_path), dataset)
    results = run.evaluate_and_write(dataset)
    names, rows = predictions.read_predictions(tmp_path, results)
    assert names == dataset.class_names
    assert [row["id"] for row in rows] == dataset.ids
    assert [row["label"] for row in rows] == dataset.labels.tolist()
    hits = [row["classes"][0] == row["label"] for row in rows]
    assert sum(hits) / 21 == results["top1"]
    top5_hits = [row["label"] in row["classes"] for row in rows]
    assert sum(top5_hits) / 21 == results["top5"]
    assert all(row["probabilities"] == sorted(row["probabilities"])[::-1] for row in rows)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_failed_evaluation_writes_nothing(tmp_path):
    def evaluate_and_fail(state, writer):
        writer.add(np.array([0]), np.array([0]), np.array([[0]]), np.array([[1.0]]))
        raise OSError("no")

    config = types.SimpleNamespace(
        eval=types.SimpleNamespace(split="test", temporal_views=1, spatial_crops=1),
        data=types.SimpleNamespace(num_frames=8),
    )
    evaluator = types.SimpleNamespace(
        experiment=types.SimpleNamespace(config=config, class_names=["a"], workdir=tmp_path),
        dataset=types.SimpleNamespace(ids=["x"]),
        evaluate=evaluate_and_fail,
    )
    with pytest.raises(OSError, match="no"):
        evaluate.evaluate_and_write(evaluator, types.SimpleNamespace(step=1))
    assert not (tmp_path / predictions.FOLDER).exists()

"""Executes the notebooks of docs/notebooks, all cells of each in one namespace."""

import json

import matplotlib
import numpy as np
import pytest

from dualpath_jax.probing import run as probing
from tests.helpers.documents import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def read_cells(path, kind):
    """Return the sources of the cells of a kind, "code" or "markdown"."""
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def run_cells(path):
    """Execute the code cells of a notebook; return its namespace."""
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(read_cells(path, "code")):
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
    return namespace


@pytest.mark.slow
def test_finetune(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    monkeypatch.setattr(probing, "_MIN_STEPS", 2)  # many devices and programs without optimization
    monkeypatch.setattr(probing, "_MIN_EPOCHS", 1)
    [path] = [path for path in NOTEBOOKS if path.name == "finetune.ipynb"]
    names = run_cells(path)
    output = capsys.readouterr().out
    assert "2 classes; videos: 16 train, 4 validation" in output
    assert "tuned model  top-1 " in output
    assert (tmp_path / "notebook" / "run" / "report.html").exists()
    # What the exported program says is what the model says of these frames.
    prediction = names["model"].predict(names["frames"][0])
    expected = dict(zip(prediction.class_names, prediction.probabilities, strict=True))
    actual = dict(zip(names["model"].class_names, names["probabilities"].tolist(), strict=True))
    assert actual == {name: pytest.approx(expected[name], abs=1e-4) for name in actual}
    assert np.ptp(names["probabilities"]) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_form(path):
    """Check the format, that no output is stored, and that links lead to files."""
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    for source in read_cells(path, "markdown"):
        for target in source.split("](")[1:]:
            file = target.partition(")")[0].partition("#")[0]
            assert (path.parent / file).exists(), file


def test_a_failing_cell_is_noticed(tmp_path):
    cells = [{"cell_type": "code", "source": ["x = 1\n"]}]
    cells += [{"cell_type": "code", "source": ["assert x == 2"]}]
    (tmp_path / "wrong.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(AssertionError):
        run_cells(tmp_path / "wrong.ipynb")

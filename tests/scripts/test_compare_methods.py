"""Tests the choices and the resuming of the comparison of methods, without training."""

import json

import numpy as np
import pytest

from dualpath_jax.config import schema
from scripts import compare_methods, show_comparison


def test_the_better_side_of_the_learning_rate_is_followed():
    """Check the rates that are tried, and the best; the twin falls on the other side."""

    def tried(scores):
        calls = []
        best = compare_methods.choose_rate(lambda rate: (calls.append(rate), scores[rate])[1])
        return calls, best

    assert tried({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.4}) == ([1e-3, 3e-3, 1e-2], 3e-3)
    assert tried({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7, 3e-2: 0.8}) == ([1e-3, 3e-3, 1e-2, 3e-2], 3e-2)
    assert tried({1e-3: 0.6, 3e-3: 0.5, 3e-4: 0.7, 1e-4: 0.1}) == ([1e-3, 3e-3, 3e-4, 1e-4], 3e-4)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({400: 0.5, 800: 0.51}, 400),
        ({400: 0.5, 800: 0.52, 1600: 0.53}, 800),
        ({400: 0.5, 800: 0.6, 1600: 0.7}, 1600),
    ],
)
def test_steps_are_doubled_while_that_pays(scores, chosen):
    assert compare_methods.choose_steps(scores.__getitem__) == chosen


@pytest.mark.parametrize("name", compare_methods.CONTESTANTS)
def test_contestants_differ_only_in_their_method(name):
    """Check that data and augmentation are equal, and that the literal form has no key of ours."""
    run = compare_methods.Run("paths", name, 1e-3, 400)
    config, first = (
        compare_methods.run_config(run),
        compare_methods.run_config(compare_methods.Run("paths", "dualpath", 1e-3, 400)),
    )
    schema.check_values(config)
    for key in ("batch_size", "crop_scale", "randaugment_layers", "flip", "sampling", "dir"):
        assert config.data[key] == first.data[key]
    assert config.optimizer == first.optimizer
    assert config.backbone == first.backbone
    ours = (config.data.frameset_input, config.model.readout_width, config.model.time_kernel_size)
    recipes = ("dualpath", "dualpath_differences")
    assert (ours == ("rgb", 0, 0)) == (name not in recipes)


@pytest.fixture
def trained(monkeypatch):
    """Return a list of the trainings and evaluations; results are made up from the settings."""
    calls = []

    def train_and_score(run, split, workdir):
        calls.append((run.contestant, run.learning_rate, run.steps, run.seed, split))
        top1 = {1e-3: 0.25, 3e-3: 0.5}.get(run.learning_rate, 0.0) + (run.steps == 800) / 4
        return {"top1": top1, "trainable_params": 7, "correct": "1" * 3 + "0"}

    monkeypatch.setattr(compare_methods, "train_and_score", train_and_score)
    return calls


def test_what_is_in_the_file_is_not_trained_again(trained, tmp_path):
    results = compare_methods.Results(tmp_path / "results.jsonl", tmp_path)
    compare_methods.compare(results, ["paths"], ["linear"], [0, 1])
    once = list(trained)
    assert once == [
        *(("linear", rate, 400, 0, "validation") for rate in (1e-3, 3e-3, 1e-2)),
        *(("linear", 3e-3, steps, 0, "validation") for steps in (800, 1600)),
        *(("linear", 3e-3, 800, seed, split) for seed in (0, 1) for split in ("train", "test")),
    ]
    compare_methods.compare(results, ["paths"], ["linear"], [0, 1])
    assert trained == once
    compare_methods.compare(results, ["paths"], ["linear"], [0, 1, 2])  # twin
    assert trained[len(once) :] == [("linear", 3e-3, 800, 2, split) for split in ("train", "test")]


def test_the_short_form_takes_rates_that_are_known(trained, tmp_path, monkeypatch):
    known = tmp_path / "known.jsonl"
    row = {"data": "paths", "contestant": "linear", "learning_rate": 3e-3, "split": "test"}
    known.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(compare_methods, "RESULTS", known)
    results = compare_methods.Results(tmp_path / "results.jsonl", tmp_path)
    compare_methods.compare_shortly(results, ["linear"], [0])
    assert trained == [("linear", 3e-3, 400, 0, split) for split in ("train", "test")]
    with pytest.raises(ValueError, match="no learning rate of evl"):
        compare_methods.compare_shortly(results, ["evl"], [0])


def make_results(correct):
    """Return test and training results on `paths`: contestant -> [seeds, videos] of 0 and 1."""
    return [
        {
            "data": "paths",
            "contestant": name,
            "learning_rate": 1e-3,
            "steps": 400,
            "seed": seed,
            "split": split,
            "top1": float(np.mean(row)),
            "trainable_params": 1000 * len(name),
            "correct": "".join(map(str, row)),
        }
        for name, rows in correct.items()
        for seed, row in enumerate(rows)
        for split in ("train", "test")
    ]


def test_intervals_and_paired_differences():
    rng = np.random.default_rng(0)
    first = (rng.random((3, 500)) < 0.7).astype(int)
    same, worse = first.copy(), first.copy()
    worse[:, :100] = 0
    results = make_results({"dualpath": first, "evl": same, "linear": worse})
    best, second, third = show_comparison.summarize(results, "paths")
    assert best["contestant"] == "dualpath"
    assert best["difference"] is None
    low, high = best["interval"]
    assert low < best["test"] < high
    assert 0.04 < high - low < 0.12
    assert second["difference"] == 0
    assert np.ptp(second["difference_interval"]) < 0.08
    assert third["difference"] == pytest.approx(worse.mean() - first.mean())
    low, high = third["difference_interval"]
    assert low < third["difference"] < high < 0
    # Of one seed and the same videos, nothing is left but zero: the videos are paired.
    alone = show_comparison.bootstrap_interval(first[:1], first[:1])
    assert alone == (0, 0)


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    results = make_results({"dualpath": [[1, 1, 1, 0]], "linear": [[1, 0, 0, 0]]})
    results.append({"contestant": "linear", "split": "costs", "gmacs": 0.25, "step_time": 0.5})
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in results))
    monkeypatch.setattr("sys.argv", ["show_comparison.py", f"--results={path}"])
    show_comparison.main()
    out = capsys.readouterr().out
    assert "| `linear` | 6,000 | 0.250 | 0.50 | 0.001 | 400 | 1 | 0.250 | 0.250 (0.0" in out
    assert out.index("`dualpath` |") < out.index("`linear` |")
    figure = tmp_path / "figure.png"
    monkeypatch.setattr("sys.argv", ["", f"--results={path}", f"--figure={figure}"])
    show_comparison.main()
    assert figure.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr("sys.argv", ["", f"--results={path}", "--figure=x.png", "--set=demo"])
    with pytest.raises(SystemExit):
        show_comparison.main()
    assert "no test results of demo" in capsys.readouterr().err

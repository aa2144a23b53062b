"""Checks the points, the record and the table of `dualpath curve`; trainings are replaced."""

import json
import os
import pathlib
import re
import sys

import jax
import pytest

from dualpath_jax import cli, launch
from dualpath_jax.analysis import cost_estimate
from dualpath_jax.commands import curve
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import prepare
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.probing import run as probing
from dualpath_jax.probing.results import HeadResult, ProbeResults, ProbeScores
from tests.helpers.video_files import write_video


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare five training videos of one class, three of another, and two test videos."""
    folder = tmp_path_factory.mktemp("curve")
    videos = {"train": [(i, int(i > 4)) for i in range(8)], "test": [(8, 0), (9, 1)]}
    for number in range(10):
        write_video(folder / f"{number}.avi", 2)
    index = DatasetIndex(
        ["a", "b"],
        {k: [Video(f"v{i}", f"{i}.avi", label) for i, label in v] for k, v in videos.items()},
    )
    prepare.prepare_dataset(
        index, str(folder), str(folder / "data"), prepare.PrepareOptions(progress=False)
    )
    return folder / "data"


@pytest.fixture
def command(prepared, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command with replaced trainings, and what these got."""
    begun = []

    def train(config, workdir, training):
        begun.append((pathlib.Path(os.path.relpath(workdir, tmp_path / "out")), config))
        if config.model.method == "linear":
            raise KeyboardInterrupt
        top1 = {"dualpath": 0.5, "st_adapter": 0.25}[config.model.method]
        results = {"split": config.eval.split, "top1": top1, "num_videos": 40}
        pathlib.Path(workdir).mkdir(parents=True)
        text = json.dumps(results | {"trainable_params": 7})
        (pathlib.Path(workdir) / "results.json").write_text(text)

    def probe(config, workdir, options):
        begun.append((pathlib.Path(os.path.relpath(workdir, tmp_path / "out")), config))
        validation = ProbeScores("validation", 0.5, (0.2, 0.8), 0.5, 2)
        final = ProbeScores("test", 1.0, (0.9, 1.0), 1.0, 40)
        head = HeadResult("linear", 1e-3, 0.1, 5, "x", validation, final)
        steps = options.num_steps or 300
        return ProbeResults((head,), "8x1x1", 4, 0, steps, "", "", "", "validation")

    monkeypatch.setattr(launch, "train_and_evaluate", train)
    monkeypatch.setattr(probing, "run_probe", probe)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    cost = cost_estimate.Cost(0.0, 0.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr(cost_estimate, "estimate_cost", lambda config, num_classes: cost)
    monkeypatch.setattr(cli.preemption, "install_sigterm_handler", lambda: None)
    monkeypatch.setattr(cli.console, "protect_streams", lambda is_log: None)
    monkeypatch.setattr(curve.environment, "disable_async_dispatch", lambda: None)

    def call(*arguments):
        line = [f"--data={prepared}", "--backbone=demo", f"--out={tmp_path / 'out'}", *arguments]
        monkeypatch.setattr(sys, "argv", ["dualpath curve", *line])
        status = 0
        try:
            curve.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call, begun


def test_points_follow_the_videos(prepared, capsys, monkeypatch):
    dataset = VideoDataset(str(prepared), "train")
    points = list(curve.make_points(dataset, ["probe", "linear"], [2, 4, 8, None], 1))
    assert [(point.method, point.shots, point.num_clips) for point in points] == [
        *(("probe", 2, 4), ("linear", 2, 4)),
        *(("probe", 4, 7), ("linear", 4, 7)),  # all three of the small class
        *(("probe", None, 8), ("linear", None, 8)),
    ]
    assert not any(point.uneven for point in points)  # five and three videos
    monkeypatch.setattr(curve.small_sets, "UNEVEN", 1.6)
    uneven = [point.uneven for point in curve.make_points(dataset, ["linear"], [2, 4, None], 1)]
    assert uneven == [False, False, True]
    assert points[0].folder == "probe/shots_2_seed0"
    assert points[-1].folder == "linear/shots_all_seed0"
    note = "note: --shots 8 are left out: the largest class has 5 training videos\n"
    assert capsys.readouterr().out == note
    with pytest.raises(ValueError, match="--shots 8: the largest class has 5 training videos; cho"):
        list(curve.make_points(dataset, ["probe"], [8], 1))


def test_a_curve_is_recorded_and_continued(command, tmp_path):
    call, begun = command
    status, _, errors = call("--shots", "all", "2", "--methods", "probe", "dualpath", "linear")
    assert (status, errors) == (130, "stopped; run the same command again to continue\n")
    status, output, errors = call("--shots", "2", "all", "--seeds=2")
    assert status == 0, errors
    assert "12 trainings, of which 2 are finished\n" in output  # those before the interruption
    folders = [str(folder) for folder, _ in begun]
    assert folders[:4] == ["probe", "dualpath/shots_2_seed0", "linear/shots_2_seed0"] + [
        "st_adapter/shots_2_seed0"
    ]
    assert len(begun) == 3 + 10
    _, config = begun[1]
    assert (config.data.shots, config.seed, config.eval.split) == (2, 0, "test")
    assert (config.eval.every_epochs, config.eval.checkpoint) == (0, "latest")
    assert config.num_epochs == 120  # as dualpath finetune chooses for four videos
    assert config.data.frameset_input == "motion"
    _, config = begun[-1]
    assert (config.data.shots, config.seed, config.model.method) == (None, 1, "st_adapter")
    rows = [json.loads(line) for line in (tmp_path / "out" / "curve.jsonl").open()]
    assert rows[0]["head"] == "linear"
    expected = {"method": "st_adapter", "shots": 2, "seed": 0, "clips": 4, "steps": 120}
    expected |= {"top1": 0.25, "split": "test", "learning_rate": 0.01}
    assert expected.items() <= rows[2].items()
    assert (
        output.splitlines()[-8:-1]
        == [
            "| videos of each class | training videos | probe | dualpath | st_adapter |",
            "|---|---|---|---|---|",
            "| 2 | 4 | 1.0000 (95%: 0.912 to 1.000) | 0.5000 (95%: 0.352 to 0.648) | "
            "0.2500 (95%: 0.142 to 0.402) |",
            "| all | 8 | 1.0000 (95%: 0.912 to 1.000) | 0.5000 (95%: 0.352 to 0.648) | "
            "0.2500 (95%: 0.142 to 0.402) |",
            "",
            "top-1 on test videos, 2 seeds",
            f"wrote {tmp_path}/out/curve.png",
        ]
        or output.splitlines()[-7:]
    )
    assert (tmp_path / "out" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    # Once more: nothing is trained. Twin: with other settings, old results are not mixed in.
    assert call("--shots", "2")[0] == 0
    assert len(begun) == 13
    status, _, errors = call("--config.data.num_frames=4")
    assert status == 2
    assert "has results of other settings (overrides [], now ['--config.data.num_frames=4'])" in (
        errors
    )


def test_a_short_curve(command, tmp_path):
    call, begun = command
    status, _, errors = call("--short", "--methods", "dualpath", "--config.num_epochs=900")
    assert status == 0, errors
    [(_, config)] = begun  # 8 shots are more than there are
    assert (config.data.shots, config.num_train_steps) == (2, 100)
    assert config.optimizer.warmup_epochs == pytest.approx(12 * 100 / 450)


@pytest.mark.parametrize("override", [False, True])
def test_each_training_fits_into_the_memory(command, monkeypatch, override):
    """Check that batches are computed in parts; in the twin the user sets the number of parts."""
    call, begun = command
    cost = cost_estimate.Cost(0.0, 0.0, 0.0, 1e15, 0.0)  # no part fits
    monkeypatch.setattr(cost_estimate, "estimate_cost", lambda config, num_classes: cost)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    keys = ["--config.optimizer.accumulation_steps=2"] * override
    assert call("--shots", "2", "--methods", "probe", "dualpath", *keys)[0] == 0
    parts = [config.optimizer.accumulation_steps for _, config in begun]
    assert parts == ([2, 2] if override else [1, 8])


def test_results_of_other_inputs(command, prepared, tmp_path):
    """Check that results of replaced data or weights are not mixed in."""
    call, begun = command
    assert call("--shots", "2", "--methods", "dualpath")[0] == 0
    path = tmp_path / "out" / "curve.jsonl"
    row = json.loads(path.read_text())
    assert sorted(row["inputs"]) == [
        "the backbone",
        *("the frames of test videos", "the frames of train videos"),
        *("the list of test videos", "the list of train videos"),
    ]
    for name, words in (
        ("the backbone", r"\(changed: the backbone\): choose another --out"),
        ("the frames of test videos", r"\(changed: the frames of test videos\): choose"),
    ):
        changed = row | {"inputs": row["inputs"] | {name: "0"}}
        path.write_text(json.dumps(changed) + "\n")
        status, _, errors = call("--shots", "2", "--methods", "dualpath")
        assert (status, len(begun)) == (2, 1)
        assert re.search(f"has results of other settings {words}", errors)
    del row["inputs"]  # twin: an older version did not write them
    path.write_text(json.dumps(row) + "\n")
    assert call("--shots", "2", "--methods", "dualpath")[0] == 0


def test_a_note_where_there_is_no_test_split(command, prepared, tmp_path):
    """Check that a probe that is chosen on the evaluated videos is reported."""
    call, begun = command
    splits = {"train": range(8), "validation": (8, 9)}
    index = DatasetIndex(
        ["a", "b"],
        {k: [Video(f"v{i}", f"{i}.avi", i % 2) for i in v] for k, v in splits.items()},
    )
    options = prepare.PrepareOptions(progress=False)
    prepare.prepare_dataset(index, str(prepared.parent), str(tmp_path / "data"), options)
    note = (
        "note: there is no test split: all methods are evaluated on the validation videos, by "
        "which the probe is also chosen; its accuracy is then too high\n"
    )
    data = f"--data={tmp_path / 'data'}"
    status, output, _ = call("--shots", "2", "--methods", "probe", data)
    assert (status, note in output) == (0, True)
    assert begun[0][1].eval.split == "validation"
    # Twins: no probe; a test split.
    other = f"--out={tmp_path / 'other'}"
    status, output, _ = call("--shots", "2", "--methods", "dualpath", data, other)
    assert (status, note in output) == (0, False)
    other = f"--out={tmp_path / 'third'}"
    status, output, _ = call("--shots", "2", "--methods", "probe", other)
    assert (status, note in output) == (0, False)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.data.shots=3", "--config.data.shots is set by the command: use --shots"),
        ("--shots=0", "--shots 0 is neither a number of videos above 0 nor all"),
        ("--shots=few", "--shots few is neither a number of videos above 0 nor all"),
    ],
)
def test_wrong_options(command, option, message):
    call, begun = command
    status, _, errors = call(option)
    assert (status, begun) == (2, [])
    assert f"error: {message}" in errors


def test_a_damaged_record(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "curve.jsonl").write_text('{"top1": "high"}\n')
    status, _, errors = command[0]()
    assert status == 2
    assert "curve.jsonl has a line that is not a result: " in errors

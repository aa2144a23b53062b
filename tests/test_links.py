"""Checks that no command writes through a link in a folder that it did not make itself."""

import fnmatch
import hashlib
import os
import pathlib
import shutil

import pytest

from dualpath_jax import launch
from dualpath_jax.analysis import image_grid
from dualpath_jax.commands import export_adapter, report
from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation import dry_run, prepare
from dualpath_jax.demo import setup
from dualpath_jax.inference import export
from dualpath_jax.runtime import file_lock, files
from dualpath_jax.training import inputs, metrics_logger
from tests.helpers.small_config import small_config

INDEX = DatasetIndex(["a"], {"train": [Video("v", "v.mp4", 0)]})
WORKDIR_NAMES = [
    *(".lock", "config.json", "environment.json", "results.json", "metrics.jsonl"),
    *("events.out.tfevents.1.host", "predictions", "checkpoints", "old_checkpoints"),
    *("damaged_checkpoints", "compiled_programs", ".shared", "split1"),
]
PREPARED_NAMES = [
    *("prepare", "frames", "class_names.json", "frame_format.json", "identity.json"),
    *("dataset_info.json", "features.json", "label.labels.txt", "missing_videos.txt"),
    *("bad_videos.jsonl", "truncated_videos.jsonl", "videos-train.array_record-00000-of-00001"),
    "incomplete-videos-train.array_record-00000-of-00001",
]


@pytest.fixture
def outside(tmp_path):
    """Make a folder with a file, which nobody may change."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder/precious.jsonl").write_text("precious")
    (folder / "file").write_text("precious")
    before = _digest(folder)
    yield folder
    assert _digest(folder) == before


def _digest(folder: pathlib.Path) -> list[tuple]:
    """Return name, inode, and digest of the content of everything below a folder."""
    return [
        (
            str(path),
            path.stat().st_ino,
            path.is_file() and hashlib.sha256(path.read_bytes()).digest(),
        )
        for path in sorted(folder.rglob("*"))
    ]


def _link(path: pathlib.Path, outside: pathlib.Path, kind: str) -> None:
    """Make `path` a link to a file, to a folder, or to nothing yet, outside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside / kind)


# ---------------------------------------------------------------- workdirs


@pytest.mark.parametrize("training", [True, False])
def test_runs_refuse_links_in_workdirs(training, outside, tmp_path):
    config = small_config("none", "none")
    for number, name in enumerate([*WORKDIR_NAMES, "checkpoints/5/state/ocdbt.process_0"]):
        for kind in ("file", "folder", "new"):
            workdir = tmp_path / f"{number}-{kind}"
            _link(workdir / name, outside, kind)
            with pytest.raises(ValueError, match=f"{name}' is a link to '{outside / kind}'"):
                launch.train_and_evaluate(config, str(workdir), training)


def test_a_run_behind_links_writes_only_known_names(config, outside, tmp_path):
    """Check that a workdir may be a link below a linked folder, and refuses links afterwards."""
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/demo").symlink_to(tmp_path / "disk/real")
    workdir = tmp_path / "runs/demo"
    launch.train_and_evaluate(config, str(workdir), training=True)
    written = {path.name for path in (tmp_path / "disk/real").iterdir()}
    assert {"results.json", "predictions", "checkpoints", "metrics.jsonl", ".lock"} <= written
    for name in written:  # so that all of them are checked
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in inputs.WORKDIR_ENTRIES), name
    for name in ("results.json", "predictions"):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        _link(path, outside, "folder" if name == "predictions" else "file")
        with pytest.raises(ValueError, match=f"{name}' is a link"):
            launch.train_and_evaluate(config, str(workdir), training=False)
        path.unlink()
    out = tmp_path / "adapter.safetensors"
    _link(out, outside, "file")
    with pytest.raises(ValueError, match="adapter.safetensors' is a link"):
        export_adapter.export(str(workdir), str(out), "latest")
    arguments = report.parser().parse_args([f"--workdir={workdir}", f"--out={out}"])
    with pytest.raises(ValueError, match="adapter.safetensors' is a link"):
        report.make_report(arguments)


def test_hard_links_keep_their_content(tmp_path):
    """Check that a backup made of hard links (`cp -al`) is not changed by the next run."""
    workdir, backup = tmp_path / "run", tmp_path / "backup"
    workdir.mkdir()
    backup.mkdir()
    for name in (".lock", "metrics.jsonl"):
        (workdir / name).write_text("old\n")
        os.link(workdir / name, backup / name)
    with file_lock.exclusive_lock(str(workdir), "--workdir"):
        logger = metrics_logger.MetricsLogger(str(workdir), 5, 1)
        logger._unwritten.append("new\n")
        assert logger.flush()
    assert (workdir / "metrics.jsonl").read_text() == "old\nnew\n"
    assert [(backup / name).read_text() for name in (".lock", "metrics.jsonl")] == ["old\n"] * 2


# ---------------------------------------------------------------- data folders and outputs


@pytest.mark.parametrize("name", PREPARED_NAMES)
@pytest.mark.parametrize("kind", ["file", "folder", "new"])
def test_preparation_refuses_links(name, kind, outside, tmp_path):
    _link(tmp_path / "out" / name, outside, kind)
    with pytest.raises(ValueError, match=f"{name}' is a link"):
        prepare.prepare_dataset(INDEX, str(tmp_path), str(tmp_path / "out"))


def test_prepared_names_are_complete(demo_data):
    for path in demo_data.iterdir():
        assert any(fnmatch.fnmatchcase(path.name, p) for p in prepare._OUT_ENTRIES), path.name


@pytest.mark.parametrize(
    "name", [".setup.lock", "raw", "raw/labels/train.json", "generated_set.txt"]
)
def test_generated_sets_refuse_links(name, outside, tmp_path):
    _link(tmp_path / "out" / name, outside, "folder" if name == "raw" else "file")
    config = small_config(tmp_path / "out", "none")
    config.data.source = "demo"
    with pytest.raises(ValueError, match=f"{name}' is a link"):
        setup.ensure_generated(config)


@pytest.mark.parametrize("name", ["model.stablehlo", "saved_model", "class_names.json"])
def test_export_refuses_links(name, outside, tmp_path):
    _link(tmp_path / "out" / name, outside, "folder")
    with pytest.raises(ValueError, match=f"{name}' is a link"):
        export.export_model(None, str(tmp_path / "out"), [])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "text"),
        lambda path: image_grid.write_png(path, image_grid.Image.new("RGB", (2, 2))),
        lambda path: image_grid.write_gif(path, [image_grid.Image.new("RGB", (2, 2))]),
        lambda path: files.check_output_file("--features", path),
        lambda path: dry_run._open_output(path),
        lambda path: metrics_logger._append(path, "text"),
        lambda path: os.close(files.open_in_place(path, os.O_WRONLY | os.O_CREAT)),
    ],
)
def test_writers_refuse_links(write, outside, tmp_path):
    for kind in ("file", "folder", "new"):
        path = tmp_path / f"{kind}.png"
        _link(path, outside, kind)
        with pytest.raises(ValueError, match=f"{kind}.png' is a link to '{outside / kind}'"):
            write(str(path))


def test_temporary_names_cannot_be_guessed(tmp_path, monkeypatch, outside):
    """Check that a link in place of the temporary file is an error, even if its name is known."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    _link(tmp_path / f"a.incomplete-{'0' * 16}.txt", outside, "file")
    with pytest.raises((OSError, ValueError), match="is a link|exists"):
        files.write_text(tmp_path / "a.txt", "text")
    assert not (tmp_path / "a.txt").exists()


def test_links_to_a_folder_of_ones_own_are_followed(tmp_path):
    """Check the twin: a folder that is a link, and names that are not written."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/notes").symlink_to(tmp_path)
    inputs.check_workdir(str(tmp_path / "run"))
    files.write_text(tmp_path / "run/results.json", "{}")
    assert (tmp_path / "disk/results.json").read_text() == "{}"
    assert sorted(os.listdir(tmp_path / "disk")) == ["notes", "results.json"]

"""Checks runs that are killed, stopped, or started again with other settings."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from dualpath_jax import evaluate, train
from dualpath_jax.commands import export_adapter
from dualpath_jax.config.schema import check_values
from dualpath_jax.config.values import format_views
from dualpath_jax.data import pipeline
from dualpath_jax.models import preprocess
from dualpath_jax.runtime import preemption
from dualpath_jax.runtime.preemption import EXIT_CODE, Preempted, PreemptionGuard
from dualpath_jax.training import adapter_file, metrics_logger
from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.inputs import check_workdir
from tests.chaos import same_run
from tests.helpers.processes import ROOT, make_environment
from tests.helpers.small_config import small_config
from tests.test_train import build, leaves, run_all


def is_same(a, b):
    """Return whether two pytrees are equal bit for bit."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])] == []


def set_six_steps(config):
    """Set six steps, with checkpoints after 2, 4 and 6; return `config`."""
    config.num_train_steps = 6
    config.checkpoint.every_steps = 2
    config.log_every_steps = 1
    return config


@pytest.fixture(scope="module")
def uninterrupted(demo_data, demo_backbone, tmp_path_factory):
    """Train six steps; return the run and its folder."""
    folder = tmp_path_factory.mktemp("straight")
    return run_all(set_six_steps(small_config(demo_data, demo_backbone)), folder), folder


@pytest.fixture
def straight(uninterrupted, config, tmp_path):
    """Return the run of six steps, copied to tmp_path/straight, and set `config` like its own."""
    set_six_steps(config)
    run, folder = uninterrupted
    shutil.copytree(folder, tmp_path / "straight")
    return run


class Killed(BaseException):
    """Stands for the death of the process, which no code handles."""


def make_deadly_shard_batch(deadline):
    """Return a `train.shard_batch` that ends the run after `deadline` steps."""
    calls, shard = [], train.shard_batch

    def shard_or_die(batch, mesh):
        calls.append(1)
        if len(calls) > deadline:
            raise Killed
        return shard(batch, mesh)

    return shard_or_die


def kill_after(config, workdir, monkeypatch, deadline):
    """End a run after `deadline` steps, when its checkpoints are on disk.

    The death of a process also ends the threads that write; here they would disturb the next run.
    """
    save = Checkpoints.save

    def save_at_once(self, *args, **options):
        save(self, *args, **options)
        self.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_at_once)
        patch.setattr(train, "shard_batch", make_deadly_shard_batch(deadline))
        with pytest.raises(Killed):
            run_all(config, workdir)


def test_death_at_any_step_changes_nothing(config, straight, tmp_path, monkeypatch):
    """Compare metrics and state bit for bit after several deaths, with and without a checkpoint.

    They happen in the second step, with nothing saved, in the fourth, in the fifth, which follows a
    checkpoint, and in the sixth.
    """
    for deadline in (1, 3, 2, 1):
        kill_after(config, tmp_path / "killed", monkeypatch, deadline)
    assert Checkpoints(str(tmp_path / "killed"), read_only=True).latest_step() > 0
    resumed = run_all(config, tmp_path / "killed")
    assert is_same(resumed.state, straight.state)
    assert same_run.read_metric_entries(tmp_path / "killed") == same_run.read_metric_entries(
        tmp_path / "straight"
    )
    # Twin: other data is not the same.
    change_batches(monkeypatch, lambda dataset, data, seed: (dataset, data, seed + 1))
    assert not is_same(run_all(config, tmp_path / "other").state, straight.state)


def test_logged_values_are_means_also_after_a_death(config, straight, tmp_path, monkeypatch):
    """Log after steps 4 and 6; the process dies in step 4, and resumes after step 2."""
    config.log_every_steps = 4
    kill_after(config, tmp_path / "killed", monkeypatch, 3)
    run_all(config, tmp_path / "killed")
    entries = same_run.read_metric_entries(tmp_path / "killed")
    steps = same_run.read_metric_entries(tmp_path / "straight")  # has each step
    assert [entry["step"] for entry in entries] == [4, 6]
    for key in ("loss", "accuracy"):
        values = [entry[key] for entry in steps]
        assert entries[0][key] == pytest.approx(np.mean(values[:4]), rel=1e-12)
        assert entries[1][key] == pytest.approx(np.mean(values[4:]), rel=1e-12)
    # Twins: the last step, and the steps since the death, have another loss.
    losses = [entry["loss"] for entry in steps]
    assert abs(losses[3] - entries[0]["loss"]) > 1e-3
    assert abs(np.mean(losses[2:4]) - entries[0]["loss"]) > 1e-3


@pytest.mark.parametrize("saved", [None, [], {"steps": "2", "sums": {}}, {"steps": 2, "sums": 3}])
def test_means_of_other_versions(saved):
    """Check a checkpoint without sums, or with others; steps that are not finite do not count."""
    means = metrics_logger.RunningMeans(saved)
    means.add({"loss": 2.0, "gradient_norm": 5.0})
    means.add({"loss": np.nan, "gradient_norm": 1.0})
    assert means.to_json() == {"sums": {"loss": 2.0}, "steps": 1}
    means.add({"loss": 3.0, "gradient_norm": 5.0})
    assert (means.take(), means.take()) == ({"loss": 2.5}, {})


def change_batches(monkeypatch, change):
    """Make training read its batches with the arguments change(dataset, data, seed)."""
    batches = pipeline.train_batches

    def changed(*args, **kwargs):
        return batches(*change(*args[:3]), *args[3:], **kwargs)

    monkeypatch.setattr(pipeline, "train_batches", changed)


@pytest.mark.slow
def test_augmented_accumulated_and_at_the_edge_of_an_epoch(config, tmp_path, monkeypatch):
    """Check 40 videos by 16: an epoch ends within the third batch, another with the fifth."""
    swap = [["Moving something to the left", "Moving something to the right"]]
    (tmp_path / "swap.json").write_text(json.dumps(swap))
    config.data.batch_size = 16
    config.data.crop_scale = (0.3, 1.0)
    config.data.flip, config.data.label_swap = True, str(tmp_path / "swap.json")
    config.data.randaugment_layers, config.data.erasing_probability = 2, 0.5
    config.optimizer.accumulation_steps = 2
    config.num_train_steps = 6
    config.checkpoint.every_steps = config.log_every_steps = 1
    straight = run_all(config, tmp_path / "straight")
    for deadline in (2, 1, 2):  # in the third, fourth and sixth step
        kill_after(config, tmp_path / "killed", monkeypatch, deadline)
    assert is_same(run_all(config, tmp_path / "killed").state, straight.state)
    assert same_run.read_metric_entries(tmp_path / "killed") == same_run.read_metric_entries(
        tmp_path / "straight"
    )
    # Twin: augmentation changes what is learned.
    plain = config.data.copy_and_resolve_references()
    plain.flip = False
    change_batches(monkeypatch, lambda dataset, data, seed: (dataset, plain, seed))
    assert not is_same(run_all(config, tmp_path / "other").state, straight.state)


def refuse_entries(monkeypatch, steps):
    """Refuse the entries of metrics.jsonl for these steps, as a full disk does."""
    append = metrics_logger._append

    def full(path, text):
        if json.loads(text.splitlines()[-1])["step"] in steps:
            raise OSError(28, "No space left on device")
        append(path, text)

    monkeypatch.setattr(metrics_logger, "_append", full)


def test_entries_that_a_full_disk_refused_are_not_lost(config, straight, tmp_path, monkeypatch):
    """Check that no checkpoint is newer than the entries: a killed run then writes them again."""
    with monkeypatch.context() as patch:
        refuse_entries(patch, {4, 5})
        kill_after(config, tmp_path / "killed", patch, 5)
    assert [entry["step"] for entry in same_run.read_metric_entries(tmp_path / "killed")] == [
        1,
        2,
        3,
    ]
    assert Checkpoints(str(tmp_path / "killed"), read_only=True).latest_step() == 2
    with monkeypatch.context() as patch:
        refuse_entries(patch, {4, 5})
        run = run_all(config, tmp_path / "alive")  # room again at step 6
    assert Checkpoints(str(tmp_path / "alive"), read_only=True).latest_step() == 6
    assert is_same(run.state, straight.state)
    run_all(config, tmp_path / "killed")
    for name in ("killed", "alive"):
        assert same_run.read_metric_entries(tmp_path / name) == same_run.read_metric_entries(
            tmp_path / "straight"
        )
    # Twin: at the end, missing entries are an error.
    refuse_entries(monkeypatch, {5, 6})
    with pytest.raises(OSError, match=r"of step 6, could not be written.*checkpoints/4"):
        run_all(config, tmp_path / "full")


def test_a_clock_that_is_set_changes_nothing(config, straight, tmp_path, monkeypatch):
    """Set the wall clock by years before every step; `every_minutes` uses a monotonic clock."""
    config.checkpoint.every_minutes = 1.0
    workdir, now, offsets = tmp_path / "clock", time.time, iter([3e8, -4e8, 1e9, 0.0, -1e9, 5e8])
    shard, offset = train.shard_batch, [0.0]

    def set_clock(batch, mesh):
        offset[0] = next(offsets)
        return shard(batch, mesh)

    saved = []
    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + offset[0])
        patch.setattr(train, "shard_batch", set_clock)
        patch.setattr(Checkpoints, "save", lambda *args: (saved.append(args[1]), save(*args)))
        run = run_all(config, workdir)
    assert saved == [2, 4, 6]
    assert is_same(run.state, straight.state)
    assert same_run.read_metric_entries(workdir) == same_run.read_metric_entries(
        tmp_path / "straight"
    )
    # The newest checkpoint is found by its step, not by the times of its files.
    for number, path in enumerate(sorted(workdir.rglob("*"))):
        os.utime(path, (4e9 - 1e6 * number,) * 2)
    assert Checkpoints(str(workdir), read_only=True).latest_step() == 6
    # Twin: the monotonic clock counts.
    past = time.monotonic() - 61
    assert train.synced_elapsed_seconds(past) >= 61


def test_a_torn_last_line_of_metrics_is_dropped(config, straight, tmp_path):
    path = tmp_path / "straight" / "metrics.jsonl"
    before = same_run.read_metric_entries(tmp_path / "straight")
    with path.open("a") as file:
        file.write('{"step": 7, "split": "train"}\n{"step": 6, "lo')
    run_all(config, tmp_path / "straight")
    assert same_run.read_metric_entries(tmp_path / "straight") == before


def test_odd_lines_of_metrics_are_dropped_with_a_warning(tmp_path, caplog):
    good = [{"step": 1, "split": "train", "loss": 0.5}, {"step": 2, "split": "test", "top1": 1.0}]
    odd = ["[]", '{"split": "train"}', '{"step": "2", "split": "train"}', "\xff\x00", "1"]
    odd += ['{"step": 1, "split": "train", "loss": "low"}', "[" * 100_000]
    path = epath.Path(tmp_path) / "metrics.jsonl"
    lines = [json.dumps(good[0]), *odd, json.dumps(good[1]), '{"step": 3, "spl']
    path.write_text("\n".join(lines))
    assert metrics_logger.read_entries(path) == good
    expected = "metrics.jsonl: line 2 and 6 more are not entries of this program and were left out"
    assert expected in caplog.text
    logger = metrics_logger.MetricsLogger(str(tmp_path), 5, 8)
    logger.resume(1, evaluated=False)
    assert path.read_text() == json.dumps(good[0]) + "\n"
    caplog.clear()
    path.write_text(json.dumps(good[0]) + '\n{"step": 3, "spl')  # the process died
    assert (metrics_logger.read_entries(path), caplog.text) == (good[:1], "")


def test_stop_request(config, straight, tmp_path, monkeypatch):
    """Check that SIGTERM ends a run after the current step, which is saved and resumed from."""
    monkeypatch.setattr(PreemptionGuard, "should_stop", lambda self, step: step == 3)
    with pytest.raises(Preempted, match="checkpoints/3"):
        run_all(config, tmp_path / "stopped")
    assert Checkpoints(str(tmp_path / "stopped"), read_only=True).latest_step() == 3
    monkeypatch.undo()
    resumed = run_all(config, tmp_path / "stopped")
    assert is_same(resumed.state, straight.state)
    assert same_run.read_metric_entries(tmp_path / "stopped") == same_run.read_metric_entries(
        tmp_path / "straight"
    )


def test_guard_records_a_signal():
    with PreemptionGuard() as guard:
        assert not guard.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.should_stop(2)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process
    with PreemptionGuard() as guard:
        assert not guard.should_stop(1)


def test_stop_request_when_an_evaluation_is_due(config, tmp_path, monkeypatch):
    """Check that the next start evaluates first, and adds the scores to the checkpoint."""
    config.num_train_steps = 8
    config.eval.every_epochs = 1
    run_all(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(PreemptionGuard, "should_stop", lambda self, step: step == 5)
        with pytest.raises(Preempted, match="checkpoints/5"):
            run_all(config, tmp_path / "stopped")
    assert [e["step"] for e in same_run.read_metric_entries(tmp_path / "stopped")] == [5]
    run_all(config, tmp_path / "stopped")
    assert same_run.read_metric_entries(tmp_path / "stopped") == same_run.read_metric_entries(
        tmp_path / "straight"
    )
    both = [Checkpoints(str(tmp_path / n), read_only=True) for n in ("stopped", "straight")]
    assert [c.has_scores(5) for c in both] == [True, True]
    assert both[0].best_step() == both[1].best_step()
    # A third start evaluates nothing again.
    run_all(config, tmp_path / "stopped")
    assert same_run.read_metric_entries(tmp_path / "stopped") == same_run.read_metric_entries(
        tmp_path / "straight"
    )


@pytest.mark.parametrize(
    ("owner", "name"), [(evaluate.Evaluator, "evaluate"), (Checkpoints, "add_scores")]
)
def test_death_in_an_evaluation(owner, name, config, tmp_path, monkeypatch):
    """Check that training resumes from the checkpoint, which was saved without its scores.

    The process dies in the evaluation, or after it, before the scores are added.
    """
    config.num_train_steps = 8
    config.eval.every_epochs = 1
    run_all(config, tmp_path / "straight")

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            run_all(config, tmp_path / "ended")
    ended = Checkpoints(str(tmp_path / "ended"), read_only=True)
    assert (ended.latest_step(), ended.has_scores(5)) == (5, False)
    run_all(config, tmp_path / "ended")
    assert same_run.read_metric_entries(tmp_path / "ended") == same_run.read_metric_entries(
        tmp_path / "straight"
    )
    assert Checkpoints(str(tmp_path / "ended"), read_only=True).has_scores(5)


def test_ctrl_c(capfd):
    """Check that it is recorded like SIGTERM, with an exit code that starts no command again."""
    before = signal.getsignal(signal.SIGINT)
    with PreemptionGuard() as guard:
        assert guard.stop_exception is Preempted
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.should_stop(1)
        assert issubclass(guard.stop_exception, Preempted)
        assert guard.stop_exception.exit_code == 130 != EXIT_CODE
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one
    assert signal.getsignal(signal.SIGINT) is before
    assert "again to end the process at once" in capfd.readouterr().err


def test_previous_handler_while_nothing_is_to_save():
    """Check that SIGTERM calls the handler from before the guard in `exit_on_sigterm` only."""
    handled = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    try:
        with PreemptionGuard() as guard:
            with guard.exit_on_sigterm():
                os.kill(os.getpid(), signal.SIGTERM)
                assert (handled, guard.stop_requested) == ([signal.SIGTERM], False)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (len(handled), guard.stop_requested) == (1, True)
            with guard.exit_on_sigterm():  # requested before: a second signal ends the process
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_closed_terminal(monkeypatch):
    """Check that SIGHUP, which comes several times, is recorded, and stays ignored under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with PreemptionGuard() as guard:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert (guard.stop_requested, guard.stop_exception) == (True, Preempted)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    with PreemptionGuard() as guard:  # a session that ends sends SIGTERM after it
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert (guard.stop_requested, guard.stop_exception) == (True, Preempted)
    # Of several processes, each passes it on to JAX's service, which handles SIGTERM.
    received = []
    own = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        monkeypatch.setattr(preemption, "_num_processes", lambda: 2)
        with PreemptionGuard():
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGTERM]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with PreemptionGuard():
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, own)
        signal.signal(signal.SIGHUP, before)


def test_an_evaluation_is_ended_at_once(config, tmp_path, monkeypatch):
    """Check that SIGTERM ends it, with its checkpoint on disk and without scores."""
    config.num_train_steps = 8
    config.eval.every_epochs = 1

    def die(*_):
        raise Killed

    before = signal.signal(signal.SIGTERM, die)  # stands for `exit_at_once`
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                evaluate.Evaluator, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
            )
            with pytest.raises(Killed):
                run_all(config, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    assert (checkpoints.latest_step(), checkpoints.has_scores(5)) == (5, False)


def test_stop_request_at_the_end(config, straight, tmp_path, monkeypatch):
    """Check a signal in the last step, or while it is saved: the next start only evaluates."""
    close = Checkpoints.close

    def close_with_signal(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    for name, owner, patched in (
        ("step", PreemptionGuard, ("should_stop", lambda self, step: step == 6)),
        ("saving", Checkpoints, ("close", close_with_signal)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, *patched)
            with pytest.raises(Preempted, match="stopped; saved .*checkpoints/6"):
                run_all(config, tmp_path / name)
        resumed = run_all(config, tmp_path / name)
        assert is_same(resumed.state, straight.state)
        assert same_run.read_metric_entries(tmp_path / name) == same_run.read_metric_entries(
            tmp_path / "straight"
        )


def test_stop_request_outside_of_the_loop():
    program = (
        "import os, signal; from dualpath_jax.runtime import preemption; "
        "signal.signal(signal.SIGTERM, preemption.exit_at_once); "
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == EXIT_CODE
    assert "stopped by SIGTERM; the same command resumes" in result.stderr


BUSY = """
import hashlib, os, signal, sys, threading, time
from dualpath_jax.runtime import preemption
preemption.install_sigterm_handler()
if sys.argv[1] == "recorded":
    signal.signal(signal.SIGTERM, lambda *_: print("handled"))
def send_signals():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send_signals, daemon=True).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)  # a minute in C, without Python's lock
print("done")
"""


@pytest.mark.parametrize(
    ("handler", "status"), [("exit_at_once", EXIT_CODE), ("recorded", 128 + signal.SIGTERM)]
)
def test_stop_request_while_a_program_computes(handler, status):
    """Check that the process ends although Python's handlers wait for the computation.

    One signal is enough for `exit_at_once`; another handler needs a second one.
    """
    result = subprocess.run(
        [sys.executable, "-c", BUSY, handler],
        capture_output=True,
        text=True,
        env=make_environment(),
    )
    assert (result.returncode, result.stdout) == (status, "")


def test_changed_settings(config, straight, tmp_path, capsys):
    workdir = tmp_path / "straight"
    config.num_train_steps = 8
    config.optimizer.learning_rate = 1e-4
    with pytest.raises(ValueError, match="was trained with other settings") as caught:
        run_all(config, workdir)
    assert "num_train_steps: 6 -> 8" in str(caught.value)
    assert "optimizer.learning_rate: 0.003 -> 0.0001" in str(caught.value)
    config.resume_changed = True
    assert int(run_all(config, workdir).state.step) == 8
    assert "with other settings:\n  num_train_steps: 6 -> 8" in capsys.readouterr().out
    # Settings of `SAFE_CHANGES` may change without `resume_changed`.
    config.resume_changed = False
    config.log_every_steps = 3
    assert int(run_all(config, workdir).state.step) == 8


def test_changed_data(config, straight, tmp_path):
    """Check other frames, and other training videos, which an evaluation ignores."""
    workdir = tmp_path / "straight"
    run, _ = build(config, workdir)
    run.replace(frame_format=dataclasses.replace(run.frame_format, fps=10.0))
    with pytest.raises(ValueError, match="frame_format of the data set: .*'fps': None.*'fps': 10"):
        run.restore_for_evaluation()
    run, _ = build(config, workdir)
    run.replace(num_videos=41)
    run.restore_for_evaluation()
    checkpoints = Checkpoints(str(workdir))
    with pytest.raises(ValueError, match="num_videos of the data set: 40 -> 41"):
        run.restore_for_training(checkpoints)
    run.replace(num_videos=40)
    assert run.restore_for_training(checkpoints) == 6


def test_evaluation_leaves_a_workdir_as_it_is(config, straight, tmp_path):
    """Check that it leaves a checkpoint that is being written, and a damaged one."""
    workdir = tmp_path / "straight"
    writing = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    writing.mkdir()
    run, _ = build(config, workdir)
    run.restore_for_evaluation()
    assert is_same(run.state, straight.state)
    for path in (workdir / "checkpoints" / "6" / "metadata").iterdir():
        path.write_bytes(b"{}")
    with pytest.raises(ValueError, match="checkpoints/6 cannot be read.*moves it out of the way"):
        run.restore_for_evaluation()
    assert writing.exists()
    assert not (workdir / "damaged_checkpoints").exists()


def poison(monkeypatch, steps):
    """Make loss and gradient NaN in these steps, counted from 0."""
    batches, shard = pipeline.train_batches, train.shard_batch

    def numbered(*args, **kwargs):
        first = args[3]
        return ({**b, "step": first + i} for i, b in enumerate(batches(*args, **kwargs)))

    def poisoned(batch, mesh):
        value = np.nan if batch.pop("step") in steps else 0
        return shard(batch | {"poison": np.full(len(batch["label"]), value, np.float32)}, mesh)

    inputs = preprocess.model_inputs

    def add_poison(batch, data, dtype):
        spatial, temporal = inputs(batch, data, dtype)
        if "poison" in batch:
            spatial += batch["poison"][:, None, None, None, None]
        return spatial, temporal

    monkeypatch.setattr(pipeline, "train_batches", numbered)
    monkeypatch.setattr(train, "shard_batch", poisoned)
    monkeypatch.setattr(preprocess, "model_inputs", add_poison)


@pytest.mark.parametrize("name", ["train_batches", "eval_batches"])
def test_an_error_closes_the_stream_of_batches(config, tmp_path, monkeypatch, name):
    """Check it while the traceback lives, as it does until Python ends, which would abort."""
    batches, closed = getattr(pipeline, name), []

    def recorded(*args, **kwargs):
        try:
            yield from batches(*args, **kwargs)
        finally:
            closed.append(name)

    def fail(*_, **__):
        raise FloatingPointError("stop")

    monkeypatch.setattr(pipeline, name, recorded)
    if name == "train_batches":
        monkeypatch.setattr(train, "shard_batch", fail)
    else:
        config.num_train_steps, config.eval.every_epochs = 6, 1
        monkeypatch.setattr(evaluate, "shard_batch", fail)
    with pytest.raises(FloatingPointError, match="stop") as caught:
        run_all(config, tmp_path)
    assert caught.tb is not None
    assert closed == [name]


def test_non_finite_steps_are_skipped_up_to_a_limit(config, tmp_path, monkeypatch):
    config.num_train_steps = 6
    config.log_every_steps = 1
    config.optimizer.max_skipped_steps = 2
    with monkeypatch.context() as patch:
        poison(patch, {1, 3})
        run = run_all(config, tmp_path / "two")
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves(run.state.trainable).values())
    assert int(run.state.skipped) == 2
    entries = same_run.read_metric_entries(tmp_path / "two")
    assert [e["skipped_steps"] for e in entries] == [0, 1, 1, 2, 2, 2]
    rates = [float(run.schedule(taken)) for taken in (0, 0, 1, 1, 2, 3)]
    assert [e["learning_rate"] for e in entries] == pytest.approx(rates, rel=1e-6)
    assert len(set(rates)) == 3  # the only step of warm-up, and the one after it, have the peak
    poison(monkeypatch, {1, 3, 4})  # one more
    with pytest.raises(FloatingPointError, match=r"step 5, more than .*max_skipped_steps=2 times"):
        run_all(config, tmp_path / "three")


def test_skipped_steps_are_counted_across_interruptions(config, tmp_path, monkeypatch):
    config.num_train_steps = 6
    config.log_every_steps, config.checkpoint.every_steps = 1, 2
    config.optimizer.max_skipped_steps = 2
    poison(monkeypatch, {1, 3})
    straight = run_all(config, tmp_path / "straight")
    kill_after(config, tmp_path / "killed", monkeypatch, 3)
    resumed = run_all(config, tmp_path / "killed")
    assert int(resumed.state.skipped) == 2
    assert is_same(resumed.state, straight.state)
    assert same_run.read_metric_entries(tmp_path / "killed") == same_run.read_metric_entries(
        tmp_path / "straight"
    )


def test_best_checkpoint(config, tmp_path):
    config.num_train_steps = 11
    config.eval.every_epochs = 1
    config.checkpoint.keep = 1
    run_all(config, tmp_path)
    scores = {
        e["step"]: e["top1"] for e in same_run.read_metric_entries(tmp_path) if e["split"] == "test"
    }
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    assert set(scores) == {5, 10}
    assert checkpoints.best_step() == max(scores, key=scores.get)
    config.eval.checkpoint = "best"
    run, _ = build(config, tmp_path)
    run.restore_for_evaluation()
    assert int(run.state.step) == checkpoints.best_step()
    final = dict.fromkeys(("top1", "top5", "mean_class_accuracy", "num_videos"), 2.0)
    origin = {"split": "test", "views": format_views(config)}
    train.record_final_scores(run.experiment, final | origin | {"step": 11})
    assert Checkpoints(str(tmp_path), read_only=True).best_step() == 11
    # Another score may choose another step.
    checkpoints = Checkpoints(str(tmp_path), keep=5)
    for step, values in ((10, (0.9, 0.1)), (11, (0.1, 0.9))):
        names = ("top1", "mean_class_accuracy")
        checkpoints._scores[step] = dict(zip(names, values, strict=True)) | origin
    assert [checkpoints.best_step(c) for c in (None, "top1", names[1])] == [10, 10, 11]
    config.eval.checkpoint = "worst"
    with pytest.raises(ValueError, match="'worst': known are latest, best"):
        check_values(config)


def test_exported_parameters_start_another_run(config, straight, tmp_path, capsys):
    path = str(tmp_path / "adapter.safetensors")
    message = export_adapter.export(str(tmp_path / "straight"), path, "latest")
    assert f"{straight.trainable_params:,} parameters of dualpath" in message
    config.init_from = path
    run, dataset = build(config, tmp_path / "next")
    before = leaves(run.state.trainable)
    run.init_from_adapter(path)
    assert is_same(run.state.trainable, straight.state.trainable)
    assert int(run.state.step) == 0
    # With other classes, the layer that predicts them keeps its fresh parameters.
    run, _ = build(config, tmp_path / "next")
    run.replace(class_names=[*run.class_names[:-1], "Something else"])
    run.init_from_adapter(path)
    after, trained = leaves(run.state.trainable), leaves(straight.state.trainable)
    fresh = {name for name in after if np.array_equal(after[name], before[name])}
    assert fresh == {"classifier/output/kernel", "classifier/output/bias"}
    assert all(np.array_equal(after[n], trained[n]) for n in after.keys() - fresh)
    assert "these parameters start anew: classifier/output/" in capsys.readouterr().out
    # The file is evaluated without a run; with a run that did not start from it, it is ambiguous.
    run, _ = build(config, tmp_path / "nothing")
    run.restore_for_evaluation()
    assert is_same(run.state.trainable, straight.state.trainable)
    run.replace(class_names=[*run.class_names[:-1], "Something else"])
    with pytest.raises(
        ValueError, match="predicts 8 classes, but the data set has 8 different ones"
    ):
        run.restore_for_evaluation()
    run, _ = build(config, tmp_path / "straight")
    with pytest.raises(ValueError, match="config.init_from=.* is ambiguous"):
        run.restore_for_evaluation()
    capsys.readouterr()
    assert run.restore_for_training(Checkpoints(run.workdir)) == 6  # a training ignores the file
    assert f"init_from={path} is ignored: the run in" in capsys.readouterr().out
    config.data.grid = (2, 2)
    run, _ = build(config, tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"trained with other settings:\n  data.grid: .* -> "):
        run.restore_for_evaluation()
    config.data.grid = (4, 4)
    config.init_from, config.eval.checkpoint = None, "best"
    run, _ = build(config, tmp_path / "straight")
    with pytest.raises(ValueError, match="no checkpoint in .* was evaluated by a training"):
        run.restore_for_evaluation()


def test_exported_parameters_know_what_they_belong_to(config, straight, tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    export_adapter.export(str(tmp_path / "straight"), path, "latest")
    config.model.temporal_path = False
    run, _ = build(config, tmp_path / "next")
    with pytest.raises(ValueError, match="does not build: temporal/"):
        run.init_from_adapter(path)
    config.model.method = "linear"
    run, _ = build(config, tmp_path / "next")
    with pytest.raises(ValueError, match="method 'dualpath', this run has 'linear'"):
        run.init_from_adapter(path)
    with pytest.raises(ValueError, match="is a folder: python scripts/export_adapter"):
        run.init_from_adapter(str(tmp_path / "straight"))
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        adapter_file.read_adapter(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="not an adapter file of this package"):
        adapter_file.read_adapter(config.backbone.checkpoint)
    with pytest.raises(ValueError, match="no checkpoints in"):
        export_adapter.export(str(tmp_path / "none"), path, "latest")
    with pytest.raises(ValueError, match="evaluated during training"):
        export_adapter.export(str(tmp_path / "straight"), path, "best")


@pytest.mark.slow
def test_processes(config, straight, tmp_path):
    """Check kill -9, SIGTERM, and a second program in the same workdir, with real processes."""
    workdir = tmp_path / "killed"
    command = [sys.executable, "-m", "dualpath_jax.main", "--config=configs/demo.py"]
    for key in ("data.source", "data.dir", "data.batch_size", "data.image_size"):
        command.append(f"--config.{key}={config[key.split('.')[0]][key.split('.')[1]]}")
    command += [
        f"--workdir={workdir}",
        f"--config.backbone.checkpoint={config.backbone.checkpoint}",
        "--config.eval.batch_size=8",
        "--config.model.scan_blocks=True",
        "--config.model.temporal_path=False",
        "--config.num_train_steps=4000",
        "--config.checkpoint.every_steps=5",
        "--config.log_every_steps=5",
    ]

    def start():
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=make_environment()
        )

    def saved_steps():
        folder = workdir / "checkpoints"
        return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())

    def wait_for_checkpoints(number):
        end = time.monotonic() + 300
        while len(saved_steps()) < number or process.poll() is not None:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)

    process = start()
    wait_for_checkpoints(2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process = start()
    before = max(saved_steps())
    while max(saved_steps()) == before:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
    second = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=make_environment()
    )
    assert second.returncode == 2
    assert f"--workdir={workdir} is in use by process {process.pid}" in second.stderr
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE
    assert f"resumed from {workdir}/checkpoints/" in out
    assert f"stopped; saved {workdir}/checkpoints/{max(saved_steps())}" in err
    assert check_workdir(str(workdir)) is None

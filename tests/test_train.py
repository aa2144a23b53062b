"""Checks training: updates, frozen weights, accumulation, and errors before any work."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event

from dualpath_jax import evaluate, launch, train
from dualpath_jax.analysis import batch_figure
from dualpath_jax.analysis.confidence import confidence_interval
from dualpath_jax.config import schema
from dualpath_jax.data import pipeline
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import param_tree
from dualpath_jax.report import run_reader
from dualpath_jax.training import early_stopping, sharding
from dualpath_jax.training.checkpoint import Checkpoints
from dualpath_jax.training.inputs import check_inputs
from dualpath_jax.training.optimizer import count_train_steps, make_schedule
from dualpath_jax.training.step import choose_loss_fn, make_train_step
from tests.helpers.compiling_once import compiling_once
from tests.helpers.runs import build_run


def build(config, workdir):
    """Return the run of a configuration and its training split."""
    dataset = VideoDataset(config.data.dir, "train")
    with compiling_once():
        return build_run(config, str(workdir), dataset), dataset


def run_all(config, workdir):
    """Train to the last step and return the run."""
    run, dataset = build(config, workdir)
    with compiling_once():
        run.train(dataset, VideoDataset(config.data.dir, "test"))
    return run


def leaves(tree):
    """Return the arrays of a pytree by path."""
    return {name: np.asarray(leaf) for name, leaf in param_tree.flatten(tree).items()}


def test_twenty_steps_change_only_trainable_parameters(config, tmp_path):
    config.num_train_steps = 20
    run, dataset = build(config, tmp_path)
    frozen, before = leaves(run.frozen), leaves(run.state.trainable)
    run.train(dataset, VideoDataset(config.data.dir, "test"))
    after = leaves(run.state.trainable)
    assert all(np.array_equal(frozen[n], leaf) for n, leaf in leaves(run.frozen).items())
    assert len(frozen) == 20
    assert before.keys() == after.keys()
    assert not [n for n in after if np.array_equal(before[n], after[n])]
    assert int(run.state.step) == 20
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"learning_rate", "clips_per_second", "data_wait", "gradient_norm"} <= lines[0].keys()
    assert list(tmp_path.glob("events.out.tfevents.*"))
    start = json.loads((tmp_path / "environment.json").read_text())
    assert (start["first_step"], start["num_train_steps"]) == (0, 20)
    assert start["devices"] == {"cpu": 8}


def test_no_optimizer_slot_for_a_frozen_leaf(config, tmp_path):
    run, _ = build(config, tmp_path)
    slots = [n for n in param_tree.flatten(run.state.opt_state) if "/mu/" in n or "/nu/" in n]
    trainable = leaves(run.state.trainable)
    assert len(slots) == 2 * len(trainable)
    assert not [name for name in slots if "backbone" in name]
    # Twin: an optimizer without the mask has them.
    params = param_tree.merge(run.state.trainable, run.frozen)
    assert [n for n in param_tree.flatten(optax.adamw(1e-3).init(params)) if "backbone" in n]


def test_class_weights_by_hand(config):
    """Check the loss of four clips of three classes with 1, 2 and 5 of 8 videos."""
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [1, 1, 2]]))
    labels = np.array([0, 1, 2, 2])

    class Model:
        def apply(self, params, *inputs):
            return jnp.asarray(logits)

    images = np.zeros((4, 2, 32, 32, 3), np.uint8)
    batch = {"spatial": images, "temporal": images, "label": labels}
    config.optimizer.label_smoothing = 0.0
    training = np.array([0, 1, 1, 2, 2, 2, 2, 2])
    losses = []
    for config.data.class_weights in ("none", "balanced"):
        loss_fn = choose_loss_fn(config, training, num_classes=4)  # the fourth has no video
        losses.append(float(loss_fn(Model(), config, None, batch, None)[0]))
    terms = -np.log([0.5, 0.8, 0.6, 0.5])
    weights = np.array([8 / (3 * 1), 8 / (3 * 2), 8 / (3 * 5), 8 / (3 * 5)])
    assert losses == pytest.approx([terms.mean(), (weights * terms).mean()], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 0.1


def test_weight_decay_is_only_on_kernels(config, tmp_path):
    """Check updates for zero gradients, with which AdamW only decays weights."""
    config.optimizer.clip_norm = None
    config.optimizer.warmup_epochs = 0.0
    run, _ = build(config, tmp_path)
    trainable = jax.tree.map(jnp.ones_like, run.state.trainable)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = run.optimizer.update(
        zeros, run.optimizer.init(param_tree.merge(trainable, run.frozen)), trainable
    )
    moved = {name for name, leaf in leaves(updates).items() if np.any(leaf)}
    assert moved == {name for name in leaves(trainable) if name.endswith("/kernel")}


def test_schedule():
    """Check each step of the warm-up: none has rate 0, and the last one has the peak."""
    optimizer = dataclasses.make_dataclass("O", ["learning_rate", "warmup_epochs"])(2.0, 3.0)
    schedule = make_schedule(optimizer, 100, 5.0)
    warmup = [float(schedule(step)) for step in range(15)]
    assert warmup == pytest.approx([2.0 * (step + 1) / 15 for step in range(15)])
    assert float(schedule(15)) == pytest.approx(2.0)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)
    assert float(schedule(15 + 85 // 2)) == pytest.approx(1.0, abs=0.05)
    # A run shorter than the warm-up still reaches the peak.
    assert float(make_schedule(optimizer, 10, 5.0)(4)) == pytest.approx(2.0)
    for epochs in (0.0, 0.2):  # no warm-up, and one step
        optimizer.warmup_epochs = epochs
        assert float(make_schedule(optimizer, 100, 5.0)(0)) == pytest.approx(2.0)


def test_accumulation_equals_one_batch(config, tmp_path):
    config.data.batch_size = 16
    run, dataset = build(config, tmp_path)
    batch = next(pipeline.train_batches(dataset, config.data, 0, 0, 1))
    batch = sharding.shard_batch(batch, run.mesh)
    params = param_tree.merge(run.state.trainable, run.frozen)
    mask = param_tree.trainable_mask(params, lambda name: not name.startswith("backbone"))
    sgd = optax.masked(optax.sgd(1.0), mask)  # the parameters then change by the gradients
    state = run.state.replace(opt_state=sgd.init(params))
    results = []
    for parts in (1, 2):
        config.optimizer.accumulation_steps = parts
        step = jax.jit(make_train_step(run.model, config, sgd, run.mesh))
        results.append(step(state, run.frozen, batch))
    one, two = (leaves(new.trainable) for new, _ in results)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=2e-5, err_msg=name)
    losses = [float(metrics["loss"]) for _, metrics in results]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # Twin: half of the batch gives other gradients.
    half = {key: np.tile(value[:8], (2,) + (1,) * (value.ndim - 1)) for key, value in batch.items()}
    other, _ = step(state, run.frozen, sharding.shard_batch(half, run.mesh))
    name = "classifier/output/bias"
    assert np.abs(leaves(other.trainable)[name] - one[name]).max() > 1e-3


def test_evaluations_share_one_program(config, tmp_path, monkeypatch):
    made, make = [], evaluate.jit_eval_step
    monkeypatch.setattr(evaluate, "jit_eval_step", lambda *args: made.append(1) or make(*args))
    run, dataset = build(config, tmp_path)
    evaluator = evaluate.Evaluator(run.experiment, dataset)
    scores = [evaluator.evaluate(run.state) for _ in range(2)]
    assert scores[0] == scores[1]
    assert made == [1]


@pytest.mark.parametrize(("batch_size", "reduced"), [(64, 24), (8, 8)])
def test_evaluation_batch_is_not_larger_than_the_split(
    batch_size, reduced, config, tmp_path, monkeypatch
):
    """Check 21 videos on eight devices."""
    sizes, batches = [], pipeline.eval_batches

    def record_batches(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            sizes.append(len(batch["label"]))
            yield batch

    monkeypatch.setattr(pipeline, "eval_batches", record_batches)
    config.eval.batch_size = batch_size
    run, _ = build(config, tmp_path)
    scores = run.evaluate(VideoDataset(config.data.dir, "test"))
    assert (scores.num_videos, set(sizes)) == (21, {reduced})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eval.spatial_crops", 2, "unknown eval.spatial_crops=2: known are 1, 3"),
        ("eval.temporal_views", 0, r"eval.temporal_views=0 must be in \[1, 1024\]"),
        ("data.sampling_interval", 0, "data.sampling_interval=0 must be 1 or more"),
        ("model.adapter_bottleneck", 0, r"model.adapter_bottleneck=0 must be in \[1, 65536\]"),
        ("model.adapter_dropout", 1.0, r"model.adapter_dropout=1.0 must be in \[0, 1\)"),
        ("optimizer.clip_norm", 0.0, "optimizer.clip_norm=0.0 must be above 0"),
        ("optimizer.accumulation_steps", 0, "optimizer.accumulation_steps=0 must be 1 or more"),
        ("backbone.heads", 4, r"backbone.heads=4, but .* has 2, set by .*convert_clip.py --heads"),
    ],
)
def test_values_out_of_range_are_refused_before_training(key, value, message, config, tmp_path):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        build(config, tmp_path)


def test_a_finished_run_only_evaluates(config, tmp_path, capsys):
    run_all(config, tmp_path)
    again = run_all(config, tmp_path)
    assert int(again.state.step) == 5
    assert f"resumed from {tmp_path}/checkpoints/5" in capsys.readouterr().out


def test_results(config, tmp_path):
    run = run_all(config, tmp_path)
    run.evaluate_and_write(VideoDataset(config.data.dir, "test"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_videos"] == 21
    assert results["top1"] * 21 == pytest.approx(round(results["top1"] * 21))
    assert results["views"] == "16x1x1"
    assert results["step"] == 5
    assert results["dataset"] == config.data.dir
    assert results["trainable_params"] == param_tree.count_params(run.state.trainable)
    assert results["total_params"] - results["trainable_params"] == param_tree.count_params(
        run.frozen
    )
    assert len(results["backbone_sha256"]) == 64
    assert {"top5", "mean_class_accuracy"} <= results.keys()
    # An evaluation of the checkpoint gives the same.
    other, _ = build(config, tmp_path)
    other.restore_for_evaluation()
    scores = other.evaluate(VideoDataset(config.data.dir, "test"))
    assert scores.top1 == results["top1"]


def test_seed_sets_everything(config, tmp_path):
    runs = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        config.seed = seed
        runs.append(leaves(run_all(config, tmp_path / name).state.trainable))
    name = "classifier/hidden/kernel"
    assert np.array_equal(runs[0][name], runs[1][name])
    assert not np.array_equal(runs[0][name], runs[2][name])


def test_non_finite_loss_stops_and_names_the_last_checkpoint(config, tmp_path, monkeypatch):
    config.num_train_steps = 8
    config.checkpoint.every_steps = 3
    run, dataset = build(config, tmp_path)
    batches = pipeline.train_batches(dataset, config.data, 0, 0, 8)

    def poisoned(*_, **__):
        for step, batch in enumerate(batches):
            # Step 5 computes with a broken frozen weight.
            if step == 4:
                run.frozen["backbone"]["ln_post"]["bias"] *= np.nan
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 5.*checkpoints/3") as caught:
        run.train(dataset, dataset)
    assert "optimizer.learning_rate" in str(caught.value)
    assert Checkpoints(str(tmp_path)).latest_step() == 3


def test_checkpoints_of_another_run_are_refused(config, tmp_path):
    run_all(config, tmp_path)
    run, _ = build(config, tmp_path)
    checkpoints = Checkpoints(str(tmp_path))
    for key, value, match in (
        ("backbone_sha256", "0" * 64, "backbone_sha256"),
        ("method", "linear", "'linear'"),
        (
            "class_names",
            [*run.class_names[:3], "Jumping", *run.class_names[4:]],
            "class 3.*Jumping",
        ),
        ("class_names", run.class_names[:-1], "class 7"),
    ):
        with pytest.raises(ValueError, match=match):
            checkpoints.restore(5, run.state, {**run.metadata(), key: value})
    config.model.adapter_bottleneck = 32
    other, _ = build(config, tmp_path)
    with pytest.raises(ValueError, match="config.json"):
        other.restore_for_evaluation()


def test_evaluation_without_a_checkpoint(config, tmp_path):
    run, _ = build(config, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        run.restore_for_evaluation()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("data.batch_size", 12, "data.batch_size=12 must be a multiple of 8 devices"),
        ("eval.batch_size", 0, "eval.batch_size=0"),
        ("data.image_size", 36, "image_size 36 is not divisible by patch_size 8"),
        ("data.frame_scale", 3, "image_size=32 is not divisible by frame_scale=3"),
        ("data.num_frames", 20, "num_frames=20"),
        ("data.num_spatial_frames", 17, "num_spatial_frames=17"),
        ("backbone.width", 192, "width"),
        ("model.dtype", "float16", "'float16'"),
        ("model.method", "nothing", "'nothing'"),
        ("model.temporal_position", "none", "'none'"),
    ],
)
def test_bad_values_are_named_before_training(config, tmp_path, key, value, match):
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ValueError, match=match):
        build(config, tmp_path)


def test_frameset_that_does_not_divide_by_the_patch(config, tmp_path):
    config.data.grid, config.data.num_frames = (3, 3), 9
    config.data.sampling_interval = 1
    config.data.frame_scale = 8
    with pytest.raises(ValueError, match=r"frameset width of 3 frames x 4 pixels.*patch size 8"):
        build(config, tmp_path)


def test_missing_inputs_are_named_with_both_commands(config):
    config.data.dir, config.backbone.checkpoint = "nowhere/data", "nowhere/weights.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        check_inputs(config)
    message = str(caught.value)
    assert "scripts/prepare_dataset.py --dataset=ssv2" in message
    assert "--out=nowhere/data" in message
    assert "scripts/convert_clip.py --checkpoint=FILE --out=nowhere/weights.safetensors" in message


@pytest.mark.parametrize(("first", "traces"), [(1, 1), (4, 1), (5, 0)])
def test_profile_is_written(first, traces, config, tmp_path, capsys):
    """Check two profiled steps; of those from step 4 on, only one is left of five."""
    config.num_train_steps = 5
    config.profile.first_step, config.profile.num_steps = first, 2
    run_all(config, tmp_path)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == traces
    assert capsys.readouterr().out.count("profiler trace written") == traces


def test_evaluation_during_training(config, tmp_path, monkeypatch):
    """Check its scores, and that it shares its program with the evaluation at the end."""
    made, make = [], evaluate.jit_eval_step
    monkeypatch.setattr(evaluate, "jit_eval_step", lambda *args: made.append(1) or make(*args))
    config.eval.every_epochs = 1
    config.num_train_steps = 11
    with compiling_once():
        launch.train_and_evaluate(config, str(tmp_path), True)
    assert made == [1]
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 11
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["split"] == "test"]
    assert [line["step"] for line in scores] == [5, 10, 11]  # the last one is the final score
    assert all(line["num_videos"] == 21 for line in scores)
    results = json.loads((tmp_path / "results.json").read_text())
    assert scores[-1].items() <= (results | {"split": "test"}).items()
    assert results["top1_interval"] == list(confidence_interval(results["top1"], 21))
    # The same command only evaluates again: no entry is added.
    with compiling_once():
        launch.train_and_evaluate(config, str(tmp_path), True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(lines)


def read_events(workdir):
    """Return the (step, value) pairs of a workdir's TensorBoard events, by tag."""
    events = {}
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        for event in map(Event.FromString, tf.compat.v1.io.tf_record_iterator(str(path))):
            for value in event.summary.value:
                events.setdefault(value.tag, []).append((event.step, value.tensor))
    return events


def test_tensorboard_has_the_first_batch_and_the_scores(config, tmp_path, monkeypatch):
    config.eval.every_epochs = None  # ten times, so here at every step
    config.num_train_steps, config.log_every_steps = 3, 2
    config.data.randaugment_layers = 2
    with compiling_once():
        launch.train_and_evaluate(config, str(tmp_path), True)
        launch.train_and_evaluate(config, str(tmp_path), True)
    events = read_events(tmp_path)
    assert [step for step, _ in events["test/top1"]] == [1, 2, 3]
    assert [step for step, _ in events["train/loss"]] == [2, 3]
    [(step, tensor)] = events["train/batch"]
    width, height, png = tensor.string_val
    image = tf.io.decode_png(png).numpy()
    assert (step, int(width), int(height)) == (0, 480, 8 * (32 + 16 + 8))
    dataset = VideoDataset(config.data.dir, "train")
    batch = next(pipeline.train_batches(dataset, config.data, config.seed, 0, 1))
    drawn = batch_figure.draw_batch(batch, config.data, dataset.class_names)
    np.testing.assert_array_equal(image, np.asarray(drawn))


def score_by_step(monkeypatch, top1s):
    """Make evaluations return a top-1 by the step of the state; return the evaluated steps."""
    steps, real = [], evaluate.Evaluator.evaluate

    def evaluate_state(self, state, predictions=None):
        steps.append(int(state.step))
        scores = real(self, state, predictions)
        return dataclasses.replace(scores, top1=top1s.get(steps[-1], 0.0))

    monkeypatch.setattr(evaluate.Evaluator, "evaluate", evaluate_state)
    return steps


def test_early_stopping_and_the_best_checkpoint(config, tmp_path, monkeypatch, capsys):
    """Check a training whose top-1 rises until step 2: it ends after step 4, also if it resumes."""
    config.eval.every_epochs = None
    config.num_train_steps, config.log_every_steps = 10, 2
    config.eval.checkpoint = "best"
    config.early_stopping_evaluations = 2
    steps = score_by_step(monkeypatch, {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 10: 0.9})
    with compiling_once():
        with monkeypatch.context() as patch:  # the process dies in step 4
            patch.setattr(train, "shard_batch", fail_in_step(4))
            with pytest.raises(FloatingPointError, match="step 4"):
                launch.train_and_evaluate(config, str(tmp_path / "run"), True)
        launch.train_and_evaluate(config, str(tmp_path / "run"), True)
    assert steps == [1, 2, 3, 4, 4, 2]  # at the end the last state, then the best
    output = capsys.readouterr().out
    assert "top1 on test has not risen above 0.5000 for 2 evaluations" in output
    results = (tmp_path / "run" / "results.json").read_text()
    assert (json.loads(results)["step"], json.loads(results)["top1"]) == (2, 0.5)
    steps.clear()
    with compiling_once():  # the same command evaluates again; --mode=eval takes the best
        launch.train_and_evaluate(config, str(tmp_path / "run"), True)
        assert steps == [4, 2]
        launch.train_and_evaluate(config, str(tmp_path / "run"), False)
    assert steps == [4, 2, 2]
    assert (tmp_path / "run" / "results.json").read_text() == results
    [run] = run_reader.read_runs([str(tmp_path / "run")])
    assert run.missing == []


def fail_in_step(number):
    """Return a `train.shard_batch` that fails in step `number`, counted from 1."""
    calls, shard = [], train.shard_batch

    def shard_or_fail(batch, mesh):
        calls.append(1)
        if len(calls) == number:
            raise FloatingPointError(f"step {number}")
        return shard(batch, mesh)

    return shard_or_fail


@pytest.mark.parametrize(
    ("scores", "patience", "stops"),
    [
        ([0.1, 0.2, 0.2, 0.1], 2, True),
        ([0.1, 0.2, 0.2, 0.1], 3, False),  # the first of them was a new best
        ([0.1, 0.2, 0.2, 0.1], 0, False),
        ([0.2, 0.1], 2, False),  # no score before them
        ([], 1, False),
    ],
)
def test_when_a_training_stops_early(scores, patience, stops):
    assert early_stopping.stops_early(scores, patience) is stops


def test_loop_schedule():
    config = schema.get_config()
    config.log_every_steps, config.checkpoint.every_steps = 4, 5
    config.eval.every_epochs = 2
    loop = train.make_loop_schedule(config, num_train_steps=11, steps_per_epoch=1.6)
    steps = range(1, 12)
    assert [step for step in steps if loop.should_log(step)] == [4, 8, 11]
    assert [step for step in steps if loop.should_evaluate(step)] == [3, 6, 9]
    assert [step for step in steps if loop.should_save(step)] == [3, 5, 6, 9, 10, 11]
    config.eval.every_epochs = None
    loop = train.make_loop_schedule(config, num_train_steps=50, steps_per_epoch=1.6)
    assert [step for step in range(1, 51) if loop.should_evaluate(step)] == [*range(5, 50, 5)]
    config.data.synthetic = True
    loop = train.make_loop_schedule(config, num_train_steps=50, steps_per_epoch=1.6)
    assert not any(loop.should_evaluate(step) for step in range(1, 51))
    config.data.synthetic = False
    config.eval.every_epochs = 0
    loop = train.make_loop_schedule(config, num_train_steps=11, steps_per_epoch=1.6)
    assert not any(loop.should_evaluate(step) for step in steps)
    assert [step for step in steps if loop.should_save(step)] == [5, 10, 11]
    config.early_stopping_evaluations = 3
    with pytest.raises(ValueError, match="early_stopping_evaluations=3 needs evaluations"):
        train.make_loop_schedule(config, num_train_steps=11, steps_per_epoch=1.6)
    config.early_stopping_evaluations = 0
    assert [loop.should_save(4, seconds) for seconds in (899.0, 900.0)] == [False, True]
    config.checkpoint.every_minutes = 2.0
    loop = train.make_loop_schedule(config, num_train_steps=11, steps_per_epoch=1.6)
    assert [loop.should_save(4, seconds) for seconds in (0.0, 119.0, 120.0)] == [False, False, True]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, None, 1), (4, None, 2), (0, None, 0), (1, 0, 0), (1, 7, 7)],
)
def test_short_training_has_at_least_one_step(epochs, steps, expected):
    """Check the number of steps; 0 epochs or steps stay 0."""
    config = schema.get_config()
    config.num_epochs, config.num_train_steps = epochs, steps
    assert count_train_steps(config, steps_per_epoch=0.47) == expected

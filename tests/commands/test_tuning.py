"""Checks which learning rates `dualpath finetune --tune` tries, and what it keeps of them."""

import json
import pathlib

import pytest

from dualpath_jax.commands import tuning
from dualpath_jax.config import small_sets
from dualpath_jax.models.backbones import vit

DEMO = vit.ViTConfig("custom", 64, 8, 96, 4, 2, 384, 64)
HALF = (  # a try that neither diverged nor has all scores
    '{"tries": [{"learning_rate": 1.0, "steps": 2, "top1": null, "mean_class_accuracy": 0.5, '
    '"num_videos": 3}], "config": {}}'
)
CLIPS = 144  # 16 a step: 9 steps an epoch


def make_try(rate, top1, mean=0.5):
    return tuning.Try(rate, 252, top1, mean, 36)


@pytest.fixture
def config():
    return small_sets.make_config(CLIPS, DEMO, "st_adapter")  # rate 1e-2, 140 epochs


@pytest.fixture
def trainings(monkeypatch):
    """Replace the trainings: return the configurations of those that began, and their scores."""
    begun, scores = [], {0.00333: 0.5, 0.01: 0.6, 0.03: 0.7, 0.09: 0.65}

    def train(config, workdir, training):
        assert training
        begun.append((config, workdir))
        if scores[config.optimizer.learning_rate] is None:
            raise KeyboardInterrupt
        if scores[config.optimizer.learning_rate] == "diverges":
            raise FloatingPointError("loss is nan, gradient norm nan at step 5")
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True)
        top1 = scores[config.optimizer.learning_rate]
        results = {"top1": top1, "mean_class_accuracy": 1 - top1, "num_videos": 36}
        (folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(tuning.launch, "train_and_evaluate", train)
    return begun, scores


@pytest.fixture(autouse=True)
def digests(monkeypatch):
    """Replace the digests of backbone and data, and return them."""
    found = {"the backbone": "b", "the frames of train videos": ""}
    monkeypatch.setattr(tuning, "input_digests", lambda config, splits: dict(found))
    return found


@pytest.mark.parametrize(
    ("scores", "tried", "best"),
    [
        ({1: 0.2, 3: 0.4, 9: 0.3}, [1, 3, 9], 3),
        ({1: 0.2, 3: 0.4, 9: 0.5, 27: 0.4}, [1, 3, 9, 27], 9),
        ({1: 0.6, 3: 0.4, 9: 0.5, 0.333: 0.7}, [0.333, 1, 3, 9], 0.333),
        ({1: 0.4, 3: 0.4, 9: 0.4}, [1, 3, 9], 3),  # equal: the table's rate
        ({1: 0.4, 3: 0.2, 9: 0.4, 0.333: 0.4}, [0.333, 1, 3, 9], 1),
    ],
)
def test_search(scores, tried, best):
    results = tuning.search(lambda rate: make_try(rate, scores[rate]), (1, 3, 9), "top1")
    assert [result.learning_rate for result in results] == tried
    assert tuning.choose(results, 3, "top1").learning_rate == best


def test_the_criterion_decides():
    results = [make_try(1, 0.9, 0.2), make_try(3, 0.1, 0.8)]
    assert tuning.choose(results, 1, "top1").learning_rate == 1
    assert tuning.choose(results, 1, "mean_class_accuracy").learning_rate == 3


def test_length_of_a_try(config):
    """Check a fifth of 1,260 steps, with as large a share of warm-up as the training has."""
    tried = tuning.make_try_config(config, 0.03, CLIPS)
    assert (tried.num_train_steps, tried.optimizer.learning_rate) == (252, 0.03)
    assert tried.optimizer.warmup_epochs / config.optimizer.warmup_epochs == pytest.approx(0.2)
    assert (tried.eval.split, tried.eval.checkpoint) == ("validation", "latest")
    assert (tried.eval.every_epochs, tried.early_stopping_evaluations) == (0, 0)
    config.num_epochs = 20
    assert tuning.count_try_steps(config, CLIPS) == 100  # at least
    config.num_epochs = 2
    assert tuning.count_try_steps(config, CLIPS) == 18  # not more than the training


def test_tries_are_recorded_and_continued(config, trainings, tmp_path, capsys):
    begun, scores = trainings
    scores[0.03] = None  # interrupted
    with pytest.raises(KeyboardInterrupt):
        tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
    scores[0.03] = 0.7
    tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
    rates = [tried.optimizer.learning_rate for tried, _ in begun]
    assert rates == [0.00333, 0.01, 0.03, 0.03, 0.09]  # finished tries are not repeated
    assert {tried.eval.split for tried, _ in begun} == {"validation"}
    assert begun[-1][1] == f"{tmp_path}/tune/lr0.09"
    assert config.optimizer.learning_rate == 0.03
    content = json.loads((tmp_path / "tune.json").read_text())
    assert content["tries"][2] == {
        "learning_rate": 0.03,
        "steps": 252,
        "top1": 0.7,
        "mean_class_accuracy": pytest.approx(0.3),
        "num_videos": 36,
    }
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert " ".join(lines[0].split()) == "learning rate steps validation top-1 mean class accuracy"
    assert lines[3] == ("  0.03           252     0.7000 (95%: 0.531 to 0.820)     0.3000  chosen")
    assert lines[5] == "  learning rate 0.03 has the best top1; the training uses it"
    # Once more: nothing is trained. Twin: with other settings the tries do not count.
    config.optimizer.learning_rate = 0.01
    tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
    assert (len(begun), config.optimizer.learning_rate) == (5, 0.03)
    config.optimizer.learning_rate = 0.01
    config.data.num_frames = 4
    message = r"had other settings: data.num_frames was 8, is 4, views was 8x1x1, is 4x1x1\. Choose"
    with pytest.raises(ValueError, match=message):
        tuning.choose_learning_rate(config, str(tmp_path), CLIPS)


def test_a_try_that_diverges_is_not_chosen(config, trainings, tmp_path, capsys):
    begun, scores = trainings
    scores |= {0.03: "diverges"}
    for _ in range(2):  # the second time, nothing is trained
        config.optimizer.learning_rate = 0.01
        tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
        assert (len(begun), config.optimizer.learning_rate) == (3, 0.01)
    printed = capsys.readouterr().out.splitlines()
    assert "tuning: learning rate 0.03 diverged" in printed
    assert printed[-2] == "  0.03           252     diverged"
    recorded = json.loads((tmp_path / "tune.json").read_text())["tries"][2]
    assert (recorded["learning_rate"], recorded["top1"]) == (0.03, None)


def test_all_tries_diverge(config, trainings, tmp_path):
    begun, scores = trainings
    scores |= dict.fromkeys(scores, "diverges") | {0.001: 0.3, 0.000333: 0.2}
    message = "rates 0.00333, 0.01, 0.03 all diverged: set a lower --config.optimizer.learning_rate"
    with pytest.raises(ValueError, match=message):
        tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
    config.optimizer.learning_rate = 0.001  # the remedy works
    scores[0.003] = "diverges"
    tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
    assert config.optimizer.learning_rate == 0.001
    # Twin: another middle rate where a rate was chosen.
    config.optimizer.learning_rate = 0.01
    with pytest.raises(ValueError, match="other settings: optimizer.learning_rate was 0.001, is"):
        tuning.choose_learning_rate(config, str(tmp_path), CLIPS)


@pytest.mark.parametrize("what", ["backbone", "views", "data", "criterion", "unknown"])
def test_tries_of_other_inputs(what, config, trainings, digests, tmp_path):
    """Check that finished tries do not count for another backbone, other views or other videos."""
    begun, _ = trainings
    tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
    config.optimizer.learning_rate = 0.01
    message = None
    if what == "backbone":
        digests["the backbone"] = "c"
        message = "other settings: changed: the backbone. Choose another --out"
    elif what == "data":
        content = json.loads((tmp_path / "tune.json").read_text())
        content["inputs"]["the frames of train videos"] = "x"
        (tmp_path / "tune.json").write_text(json.dumps(content))
        digests["the frames of train videos"] = "y"
        message = "other settings: changed: the frames of train videos. Choose"
    elif what == "views":
        config.eval.temporal_views = 3
        message = "other settings: views was 8x1x1, is 8x3x1"
    elif what == "criterion":  # twin: both scores are recorded
        config.eval.criterion = "mean_class_accuracy"
    else:  # twin: data that were prepared by an old version
        digests["the frames of train videos"] = "y"
    if message:
        with pytest.raises(ValueError, match=message):
            tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
        return
    trainings[1][0.00111] = 0.9
    tuning.choose_learning_rate(config, str(tmp_path), CLIPS)
    # By mean class accuracy, the lowest of the first three rates is the best: one more.
    assert len(begun) == 4 + (what == "criterion")


@pytest.mark.parametrize(
    "text", ['{"tries": [{}]}', '{"tries": 3}', "[]", '{"tries": [], "c": 1}', HALF]
)
def test_a_damaged_record(config, text, tmp_path):
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(ValueError, match="damaged|instead of"):
        tuning.choose_learning_rate(config, str(tmp_path), CLIPS)

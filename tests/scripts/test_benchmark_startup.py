"""Tests the benchmark of starts: stages do not overlap, tables have medians and ratios."""

import types

import pytest

from dualpath_jax.models.backbones import registry
from dualpath_jax.runtime import environment
from dualpath_jax.weights import convert
from scripts import benchmark_startup
from scripts.benchmarks import startup


@pytest.fixture
def clock(monkeypatch):
    """Return a clock of CPU time that only `clock.now` advances."""
    fake = types.SimpleNamespace(now=1.0)
    monkeypatch.setattr(startup.time, "process_time", lambda: fake.now)
    fake.stages = startup._StageClock()
    return fake


def test_nested_stages_do_not_count_twice(clock, monkeypatch):
    def load():
        clock.now += 4

    def build():
        clock.now += 2
        module.load()
        clock.now += 1

    module = types.ModuleType("measured")
    module.load, module.build = load, build
    monkeypatch.setitem(startup.sys.modules, "measured", module)
    clock.stages.wrap("weights", "measured", "load")
    clock.stages.wrap("init", "measured", "build")
    module.build()
    clock.now += 5
    clock.stages._advance()
    expected = {"imports": 1 + 5, "init": 2 + 1, "weights": 4}
    assert clock.stages.seconds == dict.fromkeys(startup.STAGES, 0.0) | expected


def test_command_that_fails(tmp_path):
    arguments = ["--workdir=nowhere", "clip.mp4"]
    with pytest.raises(
        RuntimeError, match="(?s)startup.py unknown --workdir=nowhere clip.mp4.*KeyErr"
    ):
        startup.measure_start("unknown", arguments, tmp_path, str(benchmark_startup.ROOT))


@pytest.mark.slow
def test_prediction_that_ends_with_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="error: there is no video or folder 'clip.mp4'"):
        startup.measure_start(
            "predict", ["--workdir=nowhere", "clip.mp4"], tmp_path, str(benchmark_startup.ROOT)
        )


@pytest.mark.parametrize("kind", ["train", "predict"])
@pytest.mark.parametrize("status", [None, 0, 2])
def test_end_of_the_command(kind, status, monkeypatch):
    """Check that only a prediction with status 0 counts; a training ends in its first step."""
    ends = []

    def command():
        if status is not None:
            raise SystemExit(status)

    clock = types.SimpleNamespace(finish=lambda: ends.append("finished"))
    monkeypatch.setattr(startup, "_StageClock", lambda: clock)
    monkeypatch.setattr(startup, "_time_training", lambda clock: command)
    monkeypatch.setattr(startup, "_time_prediction", lambda clock: command)
    monkeypatch.setattr(environment, "configure_environment", lambda: None)
    monkeypatch.setattr(startup.sys, "argv", ["startup.py", kind])
    if status == 2:
        with pytest.raises(SystemExit):
            startup.main()
    elif kind == "train":
        with pytest.raises(RuntimeError, match="has ended before its first step"):
            startup.main()
    else:
        startup.main()
    assert ends == (["finished"] if kind == "predict" and status != 2 else [])


def test_random_backbone_can_be_loaded(tmp_path, monkeypatch):
    tiny = registry.MODELS["ViT-B/32"]
    tiny = tiny.__class__(**(vars(tiny) | {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 32}))
    monkeypatch.setitem(registry.MODELS, "tiny", tiny)
    path = tmp_path / "weights.safetensors"
    startup.write_random_backbone(path, "tiny")
    params, _, info = convert.load_backbone(path, tiny)
    assert info.source == "random"
    assert params["class_embedding"].std() == pytest.approx(0.02, rel=0.5)


def test_table():
    def result(seconds):
        return dict.fromkeys(startup.STAGES, 0.5) | {"total": seconds, "wall": seconds}

    results = {
        ("train", "cold", "this"): [result(10.0), result(12.0), result(99.0)],
        ("train", "cold", "other"): [result(16.0), result(24.0), result(100.0)],
    }
    lines = benchmark_startup.format_tables("demo", results, ["this", "other"])
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2].startswith("| train | cold | this | 0.50 | ")
    assert lines[2].endswith(" | 0.50 | 12.00 |")
    assert lines[3].endswith(" | 0.50 | 24.00 |")
    assert lines[4:] == ["demo train cold: this / other: 0.62"]

"""Tests the benchmark of the training step: PyTorch's model is the same; timing and counts."""

import importlib

import jax
import numpy as np
import pytest

from tests.helpers.processes import make_xla_flags
from tests.helpers.small_config import TINY_VIT

torch = pytest.importorskip("torch")

from configs import ssv2_vitb  # noqa: E402
from dualpath_jax.training import sharding  # noqa: E402
from scripts.benchmarks import interleave, train_step  # noqa: E402
from scripts.benchmarks.train_step import Setting  # noqa: E402


@pytest.fixture
def config():
    """Return SSv2's recipe, with its adapter before attention, on a tiny backbone."""
    config = ssv2_vitb.get_config()
    config.backbone.name = "custom"
    config.backbone.update(TINY_VIT)
    config.data.image_size = 64
    config.model.scan_blocks = False
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Use one device instead of the tests' eight, because the benchmark's batches are small."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda fsdp: one)


def test_pytorch_is_the_same_model(config):
    experiment, state, batch = train_step.build_random_experiment(Setting(config, "float32", 2))
    make_runners = (train_step.RUNNERS[name] for name in train_step.DEFAULT_RUNNERS)
    ours, theirs = (make(experiment, state, batch) for make in make_runners)
    assert ours.forward().shape == (2, 174)
    assert np.abs(ours.forward() - theirs.forward()).max() <= train_step.TOLERANCE
    assert abs(ours.train_step() - theirs.train_step()) <= 1e-4
    assert np.std(ours.forward()) > 0.05  # no comparison of zeros


def test_another_model_is_noticed(config, monkeypatch):
    """Check as a twin that a model without the adapter before attention is rejected."""
    make_torch_model = train_step.make_torch_model

    def make_incomplete_model(experiment, state):
        model = make_torch_model(experiment, state)
        for adapters in model.adapters["temporal"]:
            del adapters["before"]
        return model

    experiment, state, batch = train_step.build_random_experiment(Setting(config, "float32", 2))
    ours = train_step.make_jax_runner(experiment, state, batch).forward()
    right = train_step.make_torch_runner(experiment, state, batch).forward()
    assert 0 < train_step.check_logits_agree("float32", ours, right) < train_step.TOLERANCE
    monkeypatch.setattr(train_step, "make_torch_model", make_incomplete_model)
    wrong = train_step.make_torch_runner(experiment, state, batch).forward()
    with pytest.raises(RuntimeError, match="PyTorch's logits differ by"):
        train_step.check_logits_agree("float32", ours, wrong)


def test_compiled_pytorch_is_measured_too(config, monkeypatch):
    """Check that both models are compiled, also the trained one, and have rows in the tables."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    experiment, state, batch = train_step.build_random_experiment(Setting(config, "float32", 2))
    train_step.RUNNERS["torch"](experiment, state, batch)
    assert not compiled  # twin
    runner = train_step.RUNNERS["torch_compiled"](experiment, state, batch)
    assert [type(model).__name__ for model in compiled] == ["TorchDualPath"] * 2
    assert np.isfinite(runner.train_step())
    row = {"jax": 1.0, "torch": 2.0, "ratio_vs_torch": 2.0}
    row |= {"torch_compiled": 1.5, "ratio_vs_torch_compiled": 1.5}
    compared = {"forward": row, "train_step": row, "compile_seconds": 3.0}
    compared["step_mib"] = {"jax": 1.0, "torch": 2.0, "torch_compiled": 3.0}
    fraction = {"fraction_of_matmul_limit": {"float32": 0.5}}
    result = {"forward": fraction, "train_step": fraction, "dtypes": {"float32": compared}}
    script = importlib.import_module("scripts.benchmark_step")
    table = script.format_markdown({**result, "matmul_limit_gflops": {"float32": 100.0}})
    assert "| training step, float32 | 1.00 | 2.00 | 2.00 | 0.50 |" in table
    assert "| training step, float32, torch.compile | 1.00 | 1.50 | 1.50 | 0.50 |" in table
    assert "| float32, torch.compile | 1 | 3 |" in table


def test_several_calls_give_the_last_result(config):
    experiment, state, batch = train_step.build_random_experiment(Setting(config, "float32", 2))
    ours, again = (train_step.make_jax_runner(experiment, state, batch) for _ in range(2))
    losses = [ours.train_step() for _ in range(3)]
    assert again.train_step(3) == losses[2] != losses[0]


def test_turns_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleave.time_interleaved(calls, 3)
    assert order == ["a", "b", *"abbaab"]  # the first of each is not counted
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_operations_are_those_of_the_plain_model(config):
    """Check that operations grow with the batch and that the backward pass doubles them."""
    forward, both = train_step._count_operations(Setting(config, "float32", 1))
    assert train_step._count_operations(Setting(config, "float32", 3)) == (3 * forward, 3 * both)
    assert 1.9 < both / forward < 2.4
    config.model.remat = "full"
    assert train_step._count_operations(Setting(config, "float32", 1)) == (forward, both)


def test_limit_is_measured():
    assert train_step.measure_matmul_gflops("float32", size=64, rounds=1) > 0


def test_script(config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", make_xla_flags())  # for the timed processes
    script = importlib.import_module("scripts.benchmark_step")
    monkeypatch.setattr(train_step, "measure_peak_memory", lambda setting, framework: 12.4)
    monkeypatch.setattr(train_step, "measure_matmul_gflops", lambda dtype: 100.0)
    settings = [Setting(config, "float32", 1)]
    result = script.measure_settings(settings, 1, list(train_step.DEFAULT_RUNNERS))
    assert list(result["forward"]) == ["ratio_vs_torch_float32", "fraction_of_matmul_limit"]
    assert list(result["train_step"]) == list(result["forward"])
    assert result["matmul_limit_gflops"] == {"float32": 100.0}
    table = script.format_markdown(result)
    assert "| forward, float32 | " in table
    assert "| training step, float32 | " in table
    assert "| float32 | 12 | 12 |" in table
    assert "Our training step is compiled in: float32 " in table


def test_compiling_leaves_the_cache_in_use(config):
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = [getattr(jax.config, name) for name in names]
    assert train_step.measure_compile_seconds(Setting(config, "float32", 1)) > 0
    assert [getattr(jax.config, name) for name in names] == before
    assert before[1]

"""Tests the benchmark of the training step: PyTorch's model is the same; timing and counts."""

import concurrent.futures
import functools
import importlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers.processes import ROOT, make_environment, make_xla_flags
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


def test_both_models_are_compiled(config, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    experiment, state, batch = train_step.build_random_experiment(Setting(config, "float32", 2))
    train_step.RUNNERS["torch"](experiment, state, batch)
    assert not compiled  # twin
    runner = train_step.RUNNERS["torch_compiled"](experiment, state, batch)
    assert [type(model).__name__ for model in compiled] == ["TorchDualPath"] * 2
    assert np.isfinite(runner.train_step())


def test_table_of_torch_compile():
    row = {"jax": 1.0, "torch_compiled": 1.5, "ratio_vs_torch_compiled": 1.5}
    first = {"jax": 9.0, "torch_compiled": 20.0}
    compared = {"forward": row, "train_step": row, "too_slow": []}
    compared["first_call"] = {"forward": first, "train_step": first}
    compared["step_mib"] = {"jax": 1.0, "torch_compiled": 3.0}
    fraction = {"fraction_of_matmul_limit": {"float32": 0.5}}
    result = {"forward": fraction, "train_step": fraction, "dtypes": {"float32": compared}}
    result["matmul_limit_gflops"] = {"float32": 100.0}
    script = importlib.import_module("scripts.benchmark_step")
    table = script.format_markdown(result)
    assert (
        "| training step, float32, torch.compile | 1.00 | 1.50 | 1.50 | 0.50 | 9.0 | 20.0 |"
        in table
    )
    assert "| float32, torch.compile | 1 | 3 |" in table
    # A framework that is left out has no figures, and without memory there is no such table.
    compared |= {"forward": {"jax": 1.0}, "train_step": {"jax": 1.0}, "step_mib": {}}
    compared |= {"too_slow": ["torch_compiled"]}
    table = script.format_markdown(result)
    assert (
        "| forward, float32, torch.compile | 1.00 | too slow to compile | | 0.50 | 9.0 | |" in table
    )
    assert "memory" not in table


def test_half_precision_uses_flash_attention(config, monkeypatch):
    """Check that flash attention is the only kernel allowed, and only in half precision."""
    chosen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(*arguments):
        backends = torch.backends.cuda  # the switches that `sdpa_kernel` sets for every device
        chosen.append((backends.flash_sdp_enabled(), backends.math_sdp_enabled()))
        return original(*arguments)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    for dtype, expected in (("bfloat16", (True, False)), ("float32", (True, True))):
        chosen.clear()
        runner = train_step.make_torch_runner(
            *train_step.build_random_experiment(Setting(config, dtype, 1))
        )
        assert np.isfinite(runner.forward()).all()
        assert set(chosen) == {expected}


def test_a_framework_that_compiles_too_long_is_left_out(config, monkeypatch):
    def start(process, setting, name, limit):
        if name in slow:
            raise TimeoutError
        return original(process, setting, name, None)

    def in_this_process():
        return concurrent.futures.ThreadPoolExecutor(1)

    def make_runner():
        return train_step.Runner(lambda calls=1: np.zeros((1, 2)), lambda calls=1: 1.0)

    slow, original = ["torch_compiled"], train_step._start_runner
    monkeypatch.setattr(train_step, "build_random_experiment", lambda setting: ())
    monkeypatch.setattr(train_step, "RUNNERS", {"jax": make_runner})
    monkeypatch.setattr(train_step, "_start_runner", start)
    monkeypatch.setattr(train_step, "_spawn_process", in_this_process)
    monkeypatch.setattr(train_step.environment, "keep_freed_memory", lambda: None)
    compare = functools.partial(
        train_step.compare_frameworks,
        Setting(config, "float32", 1),
        1,
        ["jax", "torch_compiled"],
        start_limit=170.0,
    )
    result = compare()
    assert result["too_slow"] == ["torch_compiled"]
    assert result["train_step"].keys() == {"jax", "gflops"}
    assert all(result["first_call"][part].keys() == {"jax"} for part in train_step.PARTS)
    slow.append("jax")
    with pytest.raises(RuntimeError, match="did not start and compile within 170 s"):
        compare()


def test_the_limit_ends_the_process():
    with train_step._spawn_process() as process:
        pid = process.submit(os.getpid).result()
        os.kill(pid, 0)  # it runs
        with pytest.raises(TimeoutError):
            train_step._start_runner(process, None, "torch", 0.0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_tensorflow_and_pyav_are_not_needed(tmp_path):
    """Check in a process that lacks them; as a twin, the pipeline needs them."""
    for name in ("tensorflow", "tensorflow_datasets", "array_record", "av"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('blocked')")
    code = f"""
from configs import ssv2_vitb
from scripts.benchmarks import train_step
config = ssv2_vitb.get_config()
config.backbone.name = "custom"
config.backbone.update({TINY_VIT})
config.data.image_size = 64
_, _, batch = train_step.build_random_experiment(train_step.Setting(config, "bfloat16", 1))
print(batch["spatial"].shape)
import dualpath_jax.data.pipeline
"""
    environment = make_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.stdout.strip() == "(1, 8, 64, 64, 3)", result.stderr
    assert result.stderr.endswith("ImportError: blocked\n")


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
    counts = train_step._count_operations(Setting(config, "float32", 1))
    tripled = {part: 3 * count for part, count in counts.items()}
    assert train_step._count_operations(Setting(config, "float32", 3)) == tripled
    assert 1.9 < counts["train_step"] / counts["forward"] < 2.4
    config.model.remat = "full"
    assert train_step._count_operations(Setting(config, "float32", 1)) == counts


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


def test_caches_are_empty(monkeypatch, tmp_path):
    script = importlib.import_module("scripts.benchmark_step")
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "/of/the/user"})
    script.use_empty_caches(str(tmp_path))
    assert len(os.environ) == 3
    assert all(folder.startswith(str(tmp_path)) for folder in os.environ.values())
    assert not any(tmp_path.iterdir())

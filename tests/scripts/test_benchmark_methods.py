"""Tests the benchmark of the methods: its measurements and the search for the largest batch."""

import jax
import pytest

from configs import ssv2_vitb, ssv2_vitb_full
from scripts import benchmark_methods
from scripts.benchmarks import methods
from tests.helpers.small_config import TINY_VIT


def tiny_config(method):
    """Return the benchmark's configuration of a method on a tiny backbone."""
    config = methods.method_config(ssv2_vitb.get_config(), ssv2_vitb_full.get_config(), method)
    config.backbone.name = "custom"
    config.backbone.update(TINY_VIT)
    config.data.image_size = 64
    config.model.dtype = "float32"
    return config


def test_speeds_and_table():
    messages = []
    configs = {method: tiny_config(method) for method in ("dualpath", "linear")}
    speeds = methods.measure_methods(configs, 2, messages.append)
    assert list(speeds) == ["dualpath", "linear"]
    assert [speed.num_frames for speed in speeds.values()] == [16, 8]
    assert speeds["dualpath"].relative == 1.0
    assert speeds["dualpath"].gmacs > speeds["linear"].gmacs > 0
    assert speeds["linear"].trainable_params == 48 * 174 + 174
    assert messages[-3] == "round 2 of 2"
    assert messages[-1] == f"linear: {1000 * speeds['linear'].latency:.2f} ms for one view"
    table = benchmark_methods.format_markdown(speeds)
    assert "| `linear` | 8 | 8,526 |" in table
    assert "not measured" in table


class FakeForwardPass:
    """Imitates `ForwardPass` with 1000 bytes of memory: 100 for a view and 50 for the weights.

    Args:
      reported: bytes for a view that the compiler reports.
      error: message of the error when the memory does not suffice.
    """

    def __init__(self, reported=100, error="RESOURCE_EXHAUSTED: out of memory"):
        self.reported, self.error, self.tried = reported, error, []

    def required_bytes(self, size):
        return 50 + self.reported * size

    def make_call(self, size):
        self.tried.append(size)
        if 50 + 100 * size > 1000:
            raise jax.errors.JaxRuntimeError(self.error)
        return lambda: None


def test_largest_batch():
    forward = FakeForwardPass()
    size, throughput = methods.find_largest_batch(forward, 1000)
    assert (size, forward.tried) == (8, [8])
    assert throughput > 0
    underestimated = FakeForwardPass(reported=20)  # the program needs more than reported
    assert methods.find_largest_batch(underestimated, 1000)[0] == 8
    assert underestimated.tried == [32, 16, 8]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        methods.find_largest_batch(FakeForwardPass(20, "INTERNAL: no"), 1000)


def test_memory_of_a_batch():
    """Check that the memory grows linearly with the number of views."""
    forward = methods.ForwardPass(tiny_config("linear"))
    one, two, three = (forward.required_bytes(size) for size in (8, 16, 24))
    assert three - two == pytest.approx(two - one, rel=0.1)
    assert two - one > 8 * 8 * 64 * 64 * 3  # at least the views themselves

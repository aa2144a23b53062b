"""Speed of the methods: what is measured, and the search for the largest batch."""

import jax
import pytest

from configs import ssv2_vitb, ssv2_vitb_full
from scripts import benchmark_methods
from scripts.benchmarks import methods
from tests.helpers.small_config import TINY_VIT


def tiny(method):
    config = methods.method_config(ssv2_vitb.get_config(), ssv2_vitb_full.get_config(), method)
    config.backbone.name = "custom"
    config.backbone.update(TINY_VIT)
    config.data.image_size = 64
    config.model.dtype = "float32"
    return config


def test_rows():
    told = []
    configs = {method: tiny(method) for method in ("dualpath", "linear")}
    speeds = methods.measure_methods(configs, 2, told.append)
    assert list(speeds) == ["dualpath", "linear"]
    assert [one.num_frames for one in speeds.values()] == [16, 8]
    assert speeds["dualpath"].relative == 1.0
    assert speeds["dualpath"].gmacs > speeds["linear"].gmacs > 0
    assert speeds["linear"].trainable_params == 48 * 174 + 174
    assert told[-3] == "round 2 of 2"
    assert told[-1] == f"linear: {1000 * speeds['linear'].latency:.2f} ms for one view"
    table = benchmark_methods.format_markdown(speeds)
    assert "| `linear` | 8 | 8,526 |" in table
    assert "not measured" in table


class Fake:
    """100 bytes for a view and 50 for the weights; more than 1000 are not there."""

    def __init__(self, asked=100, error="RESOURCE_EXHAUSTED: out of memory"):
        self.asked, self.error, self.tried = asked, error, []

    def required_bytes(self, size):
        return 50 + self.asked * size

    def make_call(self, size):
        self.tried.append(size)
        if 50 + 100 * size > 1000:
            raise jax.errors.JaxRuntimeError(self.error)
        return lambda: None


def test_largest_batch():
    forward = Fake()
    size, throughput = methods.find_largest_batch(forward, 1000)
    assert (size, forward.tried) == (8, [8])
    assert throughput > 0
    optimist = Fake(asked=20)  # the program needs more than its compiler says
    assert methods.find_largest_batch(optimist, 1000)[0] == 8
    assert optimist.tried == [32, 16, 8]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        methods.find_largest_batch(Fake(20, "INTERNAL: no"), 1000)


def test_memory_of_a_batch():
    """Twice the views, twice what is not weights."""
    forward = methods.ForwardPass(tiny("linear"))
    one, two, three = (forward.required_bytes(size) for size in (8, 16, 24))
    assert three - two == pytest.approx(two - one, rel=0.1)
    assert two - one > 8 * 8 * 64 * 64 * 3  # at least the views themselves

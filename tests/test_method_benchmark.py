"""Speed of the methods: what is measured, and the search for the largest batch."""

import jax
import pytest
from small_config import TINY_VIT

from configs import ssv2_vitb, ssv2_vitb_full
from dualpath_jax import method_benchmark
from scripts import benchmark_methods


def tiny(method):
    config = method_benchmark.method_config(
        ssv2_vitb.get_config(), ssv2_vitb_full.get_config(), method
    )
    config.backbone.name = "custom"
    config.backbone.update(TINY_VIT)
    config.data.image_size = 64
    config.model.dtype = "float32"
    return config


def test_rows():
    told = []
    configs = {method: tiny(method) for method in ("dualpath", "linear")}
    speeds = method_benchmark.measure(configs, 2, told.append)
    assert list(speeds) == ["dualpath", "linear"]
    assert [one.num_frames for one in speeds.values()] == [16, 8]
    assert speeds["dualpath"].relative == 1.0
    assert speeds["dualpath"].gmacs > speeds["linear"].gmacs > 0
    assert speeds["linear"].trainable_params == 48 * 174 + 174
    assert told[-1] == "round 2 of 2"
    table = benchmark_methods.markdown(speeds)
    assert "| `linear` | 8 | 8,526 |" in table
    assert "not measured" in table


def test_largest_batch():
    made = []

    def make(size):
        made.append(size)
        if size > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return lambda: None

    size, throughput = method_benchmark.largest_batch(make)
    assert (size, made) == (4, [1, 2, 4, 8])
    assert throughput > 0

    def broken(size):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        method_benchmark.largest_batch(broken)

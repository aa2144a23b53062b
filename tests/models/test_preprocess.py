"""Tests the preprocessing on the device: equal on any number of devices, no unneeded work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dualpath_jax.data.randaugment_ops import OPS
from dualpath_jax.models import preprocess
from dualpath_jax.training import sharding

DATA = ConfigDict(
    {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "frameset_input": "rgb", "grid": (2, 2)}
)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "spatial": rng.integers(0, 256, (8, 2, 6, 6, 3), np.uint8),
        "temporal": rng.integers(0, 256, (8, 1, 12, 12, 3), np.uint8),
    }


def with_ops(batch, *names, value=1.63):
    """Add the named operations to all clips but the first."""
    ops = np.tile(np.array([OPS.index(name) for name in names], np.int32), (8, 1))
    ops[0] = 0
    tables = np.tile(np.arange(256, dtype=np.uint8), (8, 3, 1))
    return (
        batch
        | {"ops": ops, "op_values": np.full(ops.shape, value, np.float32)}
        | {"tables": tables}
    )


@jax.jit
def model_inputs(batch):
    return preprocess.model_inputs(batch, DATA, jnp.float32)


def test_normalization(batch):
    spatial, temporal = model_inputs(batch)
    expected = (batch["spatial"] / 255 - np.array(DATA.mean)) / np.array(DATA.std)
    assert np.abs(spatial - expected).max() < 1e-5
    assert temporal.shape == (8, 1, 12, 12, 3)
    del batch["temporal"]
    assert preprocess.model_inputs(batch, DATA, jnp.bfloat16)[1] is None


def test_operations_of_each_clip(batch):
    plain = model_inputs(batch)
    names = ("color", "contrast", "rotate")  # the pipeline applies the geometric operations
    changed = model_inputs(with_ops(batch, *names))
    for a, b in zip(plain, changed, strict=True):
        assert np.abs(a[0] - b[0]).max() < 1e-5
        assert all(np.abs(x - y).max() > 0.1 for x, y in zip(a[1:], b[1:], strict=True))
    geometry = model_inputs(with_ops(batch, *["rotate"] * 3))
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(plain, geometry, strict=True))


def test_the_same_on_all_devices(batch):
    batch = with_ops(batch, "contrast", "color", "brightness")
    assert jax.device_count() == 8
    sharded = model_inputs(sharding.shard_batch(batch, sharding.make_mesh()))
    assert len(sharded[0].sharding.device_set) == 8
    for a, b in zip(model_inputs(batch), sharded, strict=True):
        assert np.abs(a - np.asarray(b)).max() < 1e-5


def test_no_work_without_randaugment(batch):
    def operations(batch):
        return model_inputs.lower(batch).as_text()

    assert "select" not in operations(batch)
    assert "gather" not in operations(batch)
    assert "gather" in operations(with_ops(batch, "color"))


def test_tables_by_gather_and_by_select_are_equal():
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, (3, 256), dtype=np.uint8)
    images = np.concatenate([np.arange(256), rng.integers(0, 256, 512)]).astype(np.uint8)
    images = images.reshape(2, 16, 8, 3)
    want = np.stack([table[c][images[..., c]] for c in range(3)], axis=-1)
    for look_up in (
        preprocess._apply_tables_by_gather,
        preprocess._apply_tables_by_select,
        preprocess._apply_tables,
    ):
        assert np.array_equal(jax.jit(look_up)(table, images), want)
    assert not np.array_equal(preprocess._apply_tables_by_select(table[::-1], images), want)

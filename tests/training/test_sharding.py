"""Checks the step on several meshes, the sharded arrays, and the traffic between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpath_jax.config import schema
from dualpath_jax.config.schema import check_values
from dualpath_jax.data import pipeline
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import param_tree
from dualpath_jax.training import sharding
from dualpath_jax.training.state import state_shardings
from dualpath_jax.training.step import make_train_step
from scripts.benchmarks import hlo_cost
from tests.helpers.runs import build_run
from tests.helpers.small_config import small_config


def run_step(config, dataset, devices):
    """Run one step on `devices` devices.

    Returns:
      (new trainable parameters by path, metrics, compiled step, run).
    """
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh(config.mesh.fsdp, jax.devices()[:devices])
        patch.setattr(sharding, "make_mesh", lambda fsdp: mesh)
        run = build_run(config, "", dataset)
    batch = next(pipeline.train_batches(dataset, config.data, 0, 0, 1))
    step = jax.jit(
        make_train_step(run.model, config, run.optimizer, mesh),
        out_shardings=(
            state_shardings(run.state, mesh),
            sharding.replicated_sharding(mesh),
        ),
    )
    arguments = (run.state, run.frozen, sharding.shard_batch(batch, mesh))
    compiled = step.lower(*arguments).compile()
    state, metrics = compiled(*arguments)
    return param_tree.flatten(state.trainable), jax.device_get(metrics), compiled, run


@pytest.fixture
def config(demo_data, demo_backbone):
    config = small_config(demo_data, demo_backbone)
    config.data.batch_size = 8
    config.num_train_steps = 10
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.clip_norm = None
    config.model.temporal_path = False  # compiles sooner
    return config


@pytest.fixture
def dataset(config):
    return VideoDataset(config.data.dir, "train")


def find_collectives(compiled):
    """Return the collective operations of a program by (kind, dtype)."""
    return {(c.kind, c.dtype): c for c in hlo_cost.HloProgram(compiled.as_text()).collectives()}


@pytest.mark.slow
def test_a_step_is_the_same_on_any_mesh(config, dataset):
    expected, metrics, compiled, _ = run_step(config, dataset, 1)
    assert not find_collectives(compiled)
    for devices, fsdp, parts in ((4, 2, 1), (2, 2, 1), (2, 1, 2)):
        config.mesh.fsdp, config.optimizer.accumulation_steps = fsdp, parts
        trainable, other_metrics, compiled, run = run_step(config, dataset, devices)
        for name, leaf in expected.items():
            # AdamW's first step is about the sign of the gradient, hence the absolute tolerance.
            np.testing.assert_allclose(trainable[name], leaf, rtol=0, atol=2e-3, err_msg=name)
        for name in ("loss", "gradient_norm"):
            assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-4), (
                devices,
                fsdp,
                name,
            )
        if fsdp == 1:  # all gradients and metrics at once, in float32
            collectives = find_collectives(compiled)
            assert set(collectives) == {("all-reduce", "f32")}
            size = 4 * run.trainable_params
            assert size <= collectives["all-reduce", "f32"].bytes <= size + 100


@pytest.mark.parametrize(("platform", "axes"), [("cpu", ("data",)), ("gpu", sharding.AXES)])
def test_gradients_in_bfloat16(platform, axes, config, monkeypatch):
    """Check the mean over two devices, and that gradients are rounded to `reduce_dtype`."""
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(sharding, "_platform", lambda mesh: platform)

    def compute(trainable, frozen, batch, rng):
        # XLA partitions along `fsdp` only; on a GPU it partitions nothing.
        assert jax.sharding.get_abstract_mesh().manual_axes == axes
        return {"loss": batch.mean()}, {"w": trainable["w"] * (batch * frozen).mean()}

    def mean(dtype):
        averaged = jax.jit(sharding.data_parallel_mean(compute, mesh, dtype))
        arguments = {"w": jnp.float32(1)}, jnp.float32(1 / 3), jnp.arange(4.0), jax.random.key(0)
        metrics, gradients = averaged(*arguments)
        assert metrics["loss"] == 1.5
        assert gradients["w"].dtype == jnp.float32
        return float(gradients["w"])

    assert mean("float32") == pytest.approx(0.5, rel=1e-6)
    halves = [float(jnp.bfloat16(x)) for x in (0.5 / 3, 2.5 / 3)]
    if platform == "cpu":  # XLA's CPU compiler sums no bfloat16
        assert mean("bfloat16") == sum(halves) / 2 != mean("float32")
    config.optimizer.reduce_dtype = "float16"
    with pytest.raises(ValueError, match="reduce_dtype='float16': known are float32, bfloat16"):
        check_values(config)


@pytest.mark.parametrize(("fsdp", "sums"), [(1, True), (2, False)])
def test_no_sum_where_one_device_has_all_rows(fsdp, sums):
    """Check `mesh.fsdp` of all devices: GPU compilers refuse a sum over one device."""
    mesh = sharding.make_mesh(fsdp, jax.devices()[:2])
    averaged = sharding.data_parallel_mean(lambda w, *_: ({"loss": w}, {"w": w}), mesh, "float32")
    with sharding.with_mesh(mesh):
        program = jax.make_jaxpr(averaged)(1.0, 1.0, jnp.arange(4.0), jax.random.key(0))
    assert ("psum" in str(program)) == sums


def test_only_large_leaves_of_blocks_are_sharded():
    mesh = sharding.make_mesh(4)
    assert mesh.shape == {"data": 2, "fsdp": 4}
    tree = {
        "blocks": np.zeros((12, 768, 3072)),
        "bias": np.zeros((12, 768)),
        "odd": np.zeros((3, 333, 333)),
        "classifier": np.zeros((1024, 512)),
        "step": np.zeros(()),
    }
    specs = {name: tuple(s.spec) for name, s in sharding.fsdp_sharding(tree, mesh).items()}
    assert specs == {
        "blocks": (None, None, "fsdp"),
        "bias": (),
        "odd": (),
        "classifier": (),
        "step": (),
    }
    config = schema.get_config()
    config.mesh.fsdp, config.model.scan_blocks = 4, False
    with pytest.raises(ValueError, match="mesh.fsdp=4 divides the weights of scanned blocks"):
        sharding.check_batch_sizes(config, 8)
    with pytest.raises(ValueError, match=r"mesh.fsdp=3 must divide .* 8: use one of \[1, 2, 4, 8]"):
        sharding.make_mesh(3)

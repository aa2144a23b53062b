"""How arrays lie on the devices of a run.

Public: `make_mesh`, `check_batch_sizes`, `replicated_sharding`, `batch_sharding`, `shard_batch`, `fsdp_sharding`,
`with_mesh`, `replicate`, `data_parallel_mean`, `AXES`.

The mesh has two axes. Each device computes its own rows of the batch, along both axes together.
Along `fsdp` (fully sharded data parallel), frozen weights and the optimizer's state are divided as
well: a block's weights are gathered when it is computed. What trains is whole on each device.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
REDUCE_DTYPES = ("float32", "bfloat16")
_SMALL = 2**16  # elements: a leaf below that is not worth dividing


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """All devices, [n / fsdp, fsdp]; those of a process stand together, as its rows do.

    Raises:
      ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"mesh.fsdp={fsdp} must divide the number of devices, {len(devices)}: use one of "
            f"{[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}"
        )
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices).reshape(-1, fsdp), AXES)


def check_batch_sizes(config: Any, num_devices: int) -> None:
    """ValueError unless batches divide over the devices and the accumulation steps."""
    dtype = config.optimizer.reduce_dtype
    if dtype not in REDUCE_DTYPES:
        raise ValueError(
            f"unknown optimizer.reduce_dtype={dtype!r}: known are {', '.join(REDUCE_DTYPES)}"
        )
    if config.mesh.fsdp > 1 and config.model.scan_blocks is False:
        raise ValueError(
            f"mesh.fsdp={config.mesh.fsdp} divides the weights that a loop goes over, and nothing "
            "with model.scan_blocks=False: leave that out"
        )
    accumulation_steps = config.optimizer.accumulation_steps
    for key, size, parts in (
        ("data.batch_size", config.data.batch_size, accumulation_steps),
        ("eval.batch_size", config.eval.batch_size, 1),
    ):
        if size % (num_devices * parts):
            raise ValueError(
                f"{key}={size} must be a multiple of {num_devices} devices x "
                f"{parts} accumulation steps = {num_devices * parts}"
            )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of what each device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shard_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, onto its devices."""
    return {
        key: jax.make_array_from_process_local_data(batch_sharding(mesh), value)
        for key, value in batch.items()
        if key != "example_id"
    }


def fsdp_sharding(tree: Any, mesh: Mesh) -> Any:
    """Tree of shardings for frozen weights or the optimizer's state: large leaves over `fsdp`.

    Those of blocks, which a loop gathers one after the other: [L, ..., ...], divided along the
    longest axis that can be, but the first.
    """

    def sharding(leaf: Any) -> NamedSharding:
        fsdp, shape = mesh.shape["fsdp"], leaf.shape
        axes = [i for i in range(1, len(shape)) if shape[i] % fsdp == 0]
        if fsdp == 1 or len(shape) != 3 or math.prod(shape) < _SMALL or not axes:
            return replicated_sharding(mesh)
        longest = max(axes, key=lambda i: shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, tree)


def with_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """In it, what is compiled gathers the weights that `fsdp` divides, see `block_loop.gather_fsdp`."""
    return contextlib.nullcontext() if mesh.shape["fsdp"] == 1 else jax.set_mesh(mesh)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """`tree` with each leaf whole on each device, as it is saved; to be called by all processes."""
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.jit(lambda x: x, out_shardings=replicated_sharding(mesh))(tree)


def _platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def data_parallel_mean(compute: Callable, mesh: Mesh, dtype: str) -> Callable:
    """`compute`, each device on its own rows, and the mean of the results over devices.

    What comes out is reduced once, after all of it is computed: XLA alone would do it leaf by leaf
    inside the loop over blocks, once for each accumulation step, and in the dtype of the model.
    (Along `fsdp` XLA does.)

    Args:
      compute: (trainable, frozen, batch, rng) -> (metrics, gradients), means over the batch.
      mesh: of the run.
      dtype: of the gradients on their way between devices; they are float32 before and after. On
        CPUs they are rounded to it, and travel in float32.
    """

    # XLA's CPU compiler aborts on a sum of bfloat16 between devices (jax 0.10.2).
    on_the_way = jnp.float32 if _platform(mesh) == "cpu" else dtype
    # Where `fsdp` divides nothing, GPUs take it as well: no operation is left to be divided by XLA,
    # as JAX's for cuDNN would have to be. A TPU's step has 7% more cycles so (v5e).
    axes = set(AXES) if _platform(mesh) == "gpu" and mesh.shape["fsdp"] == 1 else {"data"}

    def local(trainable, frozen, batch, rng):
        rng = jax.random.fold_in(rng, jax.lax.axis_index("data"))  # other rows, other dropout
        metrics, gradients = compute(trainable, frozen, batch, rng)
        gradients = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(on_the_way), gradients)
        if mesh.shape["data"] > 1:  # a GPU's compiler refuses a sum of one (jax 0.10.2)
            metrics, gradients = jax.lax.pmean((metrics, gradients), "data")
        return metrics, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)

    everywhere = PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(everywhere, everywhere, PartitionSpec("data"), everywhere),
        out_specs=everywhere,
        axis_names=axes,
        check_vma=False,  # else each gradient is summed where it arises
    )

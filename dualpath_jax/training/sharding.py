"""Distributes the arrays of a run over its devices.

The mesh has two axes. The rows of a batch are divided over both axes together. Along `fsdp` (fully
sharded data parallel), frozen weights and the optimizer's state are divided too: a block's weights
are gathered when it is computed. Trainable parameters are replicated on each device.
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
_MIN_SHARDED_SIZE = 2**16  # elements; dividing smaller leaves saves too little memory


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """Return the mesh [n / fsdp, fsdp] of n devices, in which those of a process are neighbors.

    Args:
      fsdp: size of the axis that divides frozen weights.
      devices: the devices of the mesh; None: all devices of the run.

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


def round_up(number: int, devices: int) -> int:
    """Return `number`, or the next larger one that can be shared among the devices."""
    return -(-number // devices) * devices


def check_batch_sizes(config: Any, num_devices: int) -> None:
    """Check that batches can be divided over the devices and the accumulation steps.

    Raises:
      ValueError: they cannot, or `mesh.fsdp` is used with unrolled blocks.
    """
    if config.mesh.fsdp > 1 and config.model.scan_blocks is False:
        raise ValueError(
            f"mesh.fsdp={config.mesh.fsdp} divides the weights of scanned blocks, and with "
            "model.scan_blocks=False no block is scanned: leave out model.scan_blocks=False"
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
    """Return the sharding of arrays that each device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis is divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shard_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this host's rows of a batch on its devices; "example_id" is left out."""
    return {
        key: jax.make_array_from_process_local_data(batch_sharding(mesh), value)
        for key, value in batch.items()
        if key != "example_id"
    }


def fsdp_sharding(tree: Any, mesh: Mesh) -> Any:
    """Return the shardings of frozen weights or the optimizer's state: large leaves over `fsdp`.

    Only the leaves of stacked blocks [L, ..., ...] are divided, along the longest axis that `fsdp`
    divides, except the first one: a scan gathers the blocks one after the other.
    """

    def sharding(leaf: Any) -> NamedSharding:
        fsdp, shape = mesh.shape["fsdp"], leaf.shape
        axes = [i for i in range(1, len(shape)) if shape[i] % fsdp == 0]
        if fsdp == 1 or len(shape) != 3 or math.prod(shape) < _MIN_SHARDED_SIZE or not axes:
            return replicated_sharding(mesh)
        longest = max(axes, key=lambda i: shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, tree)


def with_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Return a context for compilation in which `block_loop.gather_fsdp` gathers weights."""
    return contextlib.nullcontext() if mesh.shape["fsdp"] == 1 else jax.set_mesh(mesh)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Return `tree` with each leaf in full on each device, for saving.

    All processes must call it.
    """
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.jit(lambda x: x, out_shardings=replicated_sharding(mesh))(tree)


def _platform(mesh: Mesh) -> str:
    """Return the kind of the devices: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def data_parallel_mean(compute: Callable, mesh: Mesh, dtype: str) -> Callable:
    """Return a function that runs `compute` on each device's rows and averages the results.

    All results are reduced at once at the end. XLA's own partitioning would reduce leaf by leaf
    inside the loop over blocks, once for each accumulation step, and in the dtype of the model. (It
    does so along `fsdp`.)

    Args:
      compute: (trainable, frozen, batch, rng) -> (metrics, gradients), means over the batch.
      mesh: of the run.
      dtype: of the gradients while they are reduced; they are float32 before and after. On CPUs
        they are rounded to it and reduced in float32.

    Returns:
      A function with the arguments of `compute`, for the batch of all devices.
    """
    # XLA's CPU compiler aborts on a sum of bfloat16 between devices (jax 0.10.2).
    transfer_dtype = jnp.float32 if _platform(mesh) == "cpu" else dtype
    # On GPUs the axis `fsdp` is mapped too if its size is 1. XLA then has no operation left to
    # partition, such as JAX's cuDNN attention. On TPUs this makes steps slower.
    axes = set(AXES) if _platform(mesh) == "gpu" and mesh.shape["fsdp"] == 1 else {"data"}

    def compute_local_rows(trainable, frozen, batch, rng):
        # Devices that hold other rows draw other dropout.
        rng = jax.random.fold_in(rng, jax.lax.axis_index("data"))
        metrics, gradients = compute(trainable, frozen, batch, rng)
        gradients = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(transfer_dtype), gradients)
        if mesh.shape["data"] > 1:  # a GPU's compiler refuses a sum of one (jax 0.10.2)
            metrics, gradients = jax.lax.pmean((metrics, gradients), "data")
        return metrics, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)

    replicated = PartitionSpec()
    return jax.shard_map(
        compute_local_rows,
        mesh=mesh,
        in_specs=(replicated, replicated, PartitionSpec("data"), replicated),
        out_specs=replicated,
        axis_names=axes,
        check_vma=False,  # otherwise each gradient is summed where it arises
    )

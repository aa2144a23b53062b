"""Several processes that do one run together, one on each host: how they start and end.

Public: `initialize`, `end_together`, `is_peer_failure`, `is_main_process`, `process_label`, `check_same_on_all_hosts`,
`check_shared_workdir`, `share_compiled_programs`.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpath_jax.runtime import environment
from dualpath_jax.runtime.preemption import EXIT_CODE

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is dead
GRACE_SECONDS = 3  # in which the others may print an error of their own before process 0 leaves
# What JAX, Gloo and NCCL say when the other end of a connection is gone.
GONE = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|coordination service", re.IGNORECASE)


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of the run, if there are any. Before JAX touches a device.

    What is not given, JAX's own detection finds out (Cloud TPU pods, Slurm, Open MPI, Kubernetes).
    Where that finds nothing and nothing is given, or `num_processes` is 1, this process is alone.
    All but process 0 print nothing to standard output from here on.

    Args:
      coordinator_address: host:port, where process 0 listens.
      num_processes: of the run.
      process_id: this one's number, from 0.

    Raises:
      ValueError: what is given is not enough or not possible.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if num_processes == 1:
        return
    if coordinator_address and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"--coordinator_address={coordinator_address} must be HOST:PORT")
    try:
        jax.distributed.initialize(*given.values(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if len(missing) == len(given):  # no cluster that JAX knows of
            return
        remedy = f"; pass {', '.join(missing)} as well" if missing else ""
        raise ValueError(
            f"cannot start several processes: {str(error).rstrip('.')}{remedy}"
        ) from None
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ and _alone_on_host():
        # Under Slurm and Open MPI JAX shows each process one GPU, that of its number on the host.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    if jax.process_count() > 1:
        _meet()


def _alone_on_host() -> bool:
    """Is this the only process on its host, by what Open MPI or Slurm say? False without them."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    tasks, nodes = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    return tasks is not None and tasks == nodes


def _meet() -> None:
    """Connect processes and devices, and tell which process is where."""
    # Now, while all are here: Gloo waits 30 s for the others when it connects, later for ever.
    name = socket.gethostname().encode()[:64].ljust(64)
    names = multihost_utils.process_allgather(np.frombuffer(name, np.uint8))
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
    ones = np.ones(jax.local_device_count(), np.int32)
    jax.jit(jnp.sum)(jax.make_array_from_process_local_data(sharding, ones)).block_until_ready()
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    hosts = [bytes(row).decode().strip() for row in names.reshape(-1, 64)]
    where = ", ".join(f"{i} on {host}" for i, host in enumerate(hosts))
    print(f"{len(hosts)} processes, {jax.device_count()} devices: {where}", flush=True)


def check_same_on_all_hosts(facts: dict[str, Any], remedy: str) -> None:
    """OSError with the remedy where not all processes have the same facts, JSON by their names.

    Each would go its own way with them, and all would wait for each other.
    """
    if jax.process_count() == 1:
        return
    # Their names first: rows of different lengths cannot be gathered.
    for some in ({"what is compared": sorted(facts)}, facts):
        texts = (json.dumps(some[name], sort_keys=True) for name in sorted(some))
        own = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
        rows = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
        rows = rows.reshape(jax.process_count(), len(some), -1)
        for name, column in zip(sorted(some), rows.swapaxes(0, 1), strict=True):
            others = [str(i) for i, digest in enumerate(column) if np.any(digest != column[0])]
            if others:
                other = ", ".join(others)
                raise OSError(f"{name}: process {other} differs from process 0; {remedy}")


def is_main_process() -> bool:
    """Is this the process that prints and writes for all?"""
    return jax.process_index() == 0


def process_label() -> str:
    """What stands before this process's errors: nothing where it is alone."""
    if not jax.distributed.is_initialized():  # asked before process_count(), which starts devices
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}: "


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Around the whole program: no process stays when another one fails.

    Left by an error, a process ends at once, without JAX's barrier at exit: there it would seem
    alive to the others, which wait for it. JAX's coordination service notices, names it to the
    others, and ends them (SIGABRT).
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_CODE):
            raise  # all of them do so
        if is_peer_failure(error):
            _wait_for_the_end(error)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        _leave(error.code if isinstance(error, SystemExit) else 1)


def is_peer_failure(error: BaseException) -> bool:
    """Does `error` only say that another process is gone?"""
    # Cloud Storage is "unavailable" as well, by an OSError.
    if not jax.distributed.is_initialized() or isinstance(error, SystemExit | OSError):
        return False
    return bool(GONE.search(str(error)))


def _wait_for_the_end(error: BaseException) -> NoReturn:
    """The coordination service knows which process is gone, says so and ends this one."""
    faulthandler.disable()  # its stack traces would bury the number
    line = " ".join(str(error).split())
    print(
        f"{process_label()}another process is gone ({line}). Its number follows within "
        f'{HEARTBEAT_SECONDS} s; "the leader" is process 0',
        file=sys.stderr,
        flush=True,
    )
    time.sleep(HEARTBEAT_SECONDS + 10)
    os._exit(1)


def _leave(status: int) -> NoReturn:
    if is_main_process():  # it holds the coordination service: the others end with it
        time.sleep(GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def share_compiled_programs(workdir: str) -> None:
    """Keep several processes' compiled programs in the workdir, unless the user chose a folder.

    Process 0 alone writes them, so that the others would find none on hosts of their own and
    compile at every start. On GPUs they would also wait for process 0, which finds its own: JAX
    has them share out the tuning of products.
    """
    usual = environment.cache_folder()  # its name tells the kind of processor
    if jax.process_count() > 1 and jax.config.jax_compilation_cache_dir == str(usual):
        compilation_cache.reset_cache()
        folder = f"{workdir}/compiled_programs/{usual.name}"
        jax.config.update("jax_compilation_cache_dir", folder)


def check_shared_workdir(workdir: str) -> None:
    """OSError unless all processes see the folder that process 0 sees; waits for all of them."""
    if jax.process_count() == 1:
        return
    path = epath.Path(workdir) / ".shared"
    token = multihost_utils.broadcast_one_to_all(np.int32(random.getrandbits(31)))
    if is_main_process():
        path.write_text(str(token))
    multihost_utils.sync_global_devices("workdir written")
    sees = path.exists() and path.read_text() == str(token)
    seen = multihost_utils.process_allgather(np.asarray(sees)).reshape(-1)
    if is_main_process():
        path.unlink()
    if not seen.all():
        raise OSError(
            f"--workdir={workdir} is another folder for process {int(np.argmin(seen))} than for "
            "process 0: choose one that all hosts share, or gs://..."
        )

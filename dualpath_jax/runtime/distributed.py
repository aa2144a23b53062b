"""Starts and ends the processes of one run, usually one per host, and checks what they share."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
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

from dualpath_jax.runtime import environment, files
from dualpath_jax.runtime.preemption import EXIT_CODE

HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this long counts as dead
_GRACE_SECONDS = 3  # time for the others to print their own errors before process 0 exits
# Parts of the messages of JAX, Gloo and NCCL when the other end of a connection is gone.
_LOST_CONNECTION = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|coordination service", re.IGNORECASE
)


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of the run, if there are any; call it before JAX uses a device.

    JAX detects the arguments that are missing (Cloud TPU pods, Slurm, Open MPI, Kubernetes). If all
    are missing and it detects no cluster, or if `num_processes` is 1, this is the only process.
    Otherwise, all processes but process 0 print nothing to standard output from now on.

    Args:
      coordinator_address: host:port on which process 0 listens.
      num_processes: number of processes in the run.
      process_id: index of this process, from 0.

    Raises:
      ValueError: the arguments are incomplete or impossible.
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
        if len(missing) == len(given):  # JAX has detected no cluster
            return
        remedy = f"; also pass {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"cannot start several processes: {str(error).rstrip('.')}{remedy}"
        ) from None
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ and _is_only_process_on_host():
        # Under Slurm and Open MPI, JAX shows each process only the GPU of its index on the host.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    if jax.process_count() > 1:
        # JAX ends this process by SIGABRT if another one dies. The stack traces that faulthandler
        # then prints would bury JAX's message, which names the dead process.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        _connect_processes()


def _is_only_process_on_host() -> bool:
    """Return whether Open MPI or Slurm started only this process here; False without them."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    tasks, nodes = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    return tasks is not None and tasks == nodes


def _connect_processes() -> None:
    """Connect processes and devices, and print the host of each process."""
    # Connect now, while all processes are running: Gloo waits 30 s for the others when it
    # connects, and forever later.
    name = socket.gethostname().encode()[:64].ljust(64)
    names = multihost_utils.process_allgather(np.frombuffer(name, np.uint8))
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
    ones = np.ones(jax.local_device_count(), np.int32)
    jax.jit(jnp.sum)(jax.make_array_from_process_local_data(sharding, ones)).block_until_ready()
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    hosts = [bytes(row).decode().strip() for row in names.reshape(-1, 64)]
    where = ", ".join(f"{i} on {host}" for i, host in enumerate(hosts))
    print(f"{len(hosts)} processes, {jax.device_count()} devices: {where}", flush=True)


def check_same_on_all_hosts(values: dict[str, Any], remedy: str) -> None:
    """Check that all processes have the same values; otherwise they would wait for each other.

    Args:
      values: JSON values by name.
      remedy: the end of the error message.

    Raises:
      OSError: a value differs between processes; the message names it and the processes.
    """
    if jax.process_count() == 1:
        return
    # Compare the names first: rows of different lengths cannot be gathered.
    for group in ({"the compared values": sorted(values)}, values):
        texts = (json.dumps(group[name], sort_keys=True) for name in sorted(group))
        own = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
        rows = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
        rows = rows.reshape(jax.process_count(), len(group), -1)
        for name, column in zip(sorted(group), rows.swapaxes(0, 1), strict=True):
            differing = [str(i) for i, digest in enumerate(column) if np.any(digest != column[0])]
            if differing:
                processes = ", ".join(differing)
                raise OSError(f"{name}: process {processes} differs from process 0; {remedy}")


def is_main_process() -> bool:
    """Return whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def process_label() -> str:
    """Return the prefix of this process's errors, empty if it is the only process."""
    if not jax.distributed.is_initialized():  # checked first: process_count() starts devices
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}: "


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """End all processes of the run when one of them fails; wraps the whole program.

    A process that fails exits at once, without JAX's barrier at exit: in that barrier it would seem
    alive to the others, which would wait for it. JAX's coordination service notices the exit, names
    the process to the others, and ends them (SIGABRT).
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_CODE):
            raise  # all processes exit this way
        if is_peer_failure(error):
            _wait_for_termination(error)
        if isinstance(error, KeyboardInterrupt):
            print(f"{process_label()}interrupted by Ctrl-C", file=sys.stderr)
            _exit_process(128 + signal.SIGINT)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        _exit_process(error.code if isinstance(error, SystemExit) else 1)


def is_peer_failure(error: BaseException) -> bool:
    """Return whether `error` only reports that another process is gone."""
    # An OSError is not a peer failure: Cloud Storage can be "unavailable" too.
    if not jax.distributed.is_initialized() or isinstance(error, SystemExit | OSError):
        return False
    return bool(_LOST_CONNECTION.search(str(error)))


def _wait_for_termination(error: BaseException) -> NoReturn:
    """Wait until the coordination service names the lost process and end this one."""
    line = " ".join(str(error).split())
    print(
        f"{process_label()}another process is gone ({line}). Its index follows within "
        f'{HEARTBEAT_SECONDS} s; "the leader" is process 0',
        file=sys.stderr,
        flush=True,
    )
    time.sleep(HEARTBEAT_SECONDS + 10)
    os._exit(1)


def _exit_process(status: int) -> NoReturn:
    """Exit without JAX's barrier."""
    if is_main_process():  # it runs the coordination service: the others end with it
        time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def share_compiled_programs(workdir: str) -> None:
    """Keep compiled programs in the workdir if there are several processes.

    Only process 0 writes compiled programs. In folders local to their hosts the other processes
    would find none, and compile at every start. On GPUs they would also wait for process 0, which
    finds its own: JAX distributes the autotuning of matrix products among the processes.

    A folder that the user has chosen stays.
    """
    usual = environment.cache_folder()  # its name identifies the kind of CPU
    if jax.process_count() > 1 and jax.config.jax_compilation_cache_dir == str(usual):
        compilation_cache.reset_cache()
        folder = f"{workdir}/compiled_programs/{usual.name}"
        jax.config.update("jax_compilation_cache_dir", folder)


def check_shared_workdir(workdir: str) -> None:
    """Check that all processes see the workdir of process 0; wait for all of them.

    Raises:
      OSError: a process sees another folder.
    """
    if jax.process_count() == 1:
        return
    path = epath.Path(workdir) / ".shared"
    token = multihost_utils.broadcast_one_to_all(np.int32(random.getrandbits(31)))
    if is_main_process():
        files.write_text(path, str(token))
    multihost_utils.sync_global_devices("workdir written")
    is_visible = path.exists() and path.read_text() == str(token)
    visible = multihost_utils.process_allgather(np.asarray(is_visible)).reshape(-1)
    if is_main_process():
        path.unlink()
    if not visible.all():
        raise OSError(
            f"--workdir={workdir} is another folder for process {int(np.argmin(visible))} than for "
            "process 0; choose one that all hosts share, or gs://..."
        )

"""Sets what JAX, TensorFlow and glibc read at start, and describes the environment of a run.

Settings of the user are kept. Order of the calls: `configure_environment` before JAX and
TensorFlow are imported, `disable_async_dispatch` before JAX makes its first array, and
`keep_freed_memory` after the first step.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import resource
import shlex
import sys
import threading
import time
from typing import Any, NoReturn

from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.version import __version__

# Packages that decide what a training computes, and how fast.
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow"),
    *("tensorflow-cpu", "array_record", "ml_collections"),
)

_XLA_FLAGS = (
    # On CPUs, XLA's YNNPACK fusions make the demo's training step slower (jax 0.10.2).
    "--xla_cpu_experimental_ynn_fusion_type=",
    # On GPUs, cuBLAS is as fast, adds biases itself, and programs compile sooner.
    "--xla_gpu_enable_triton_gemm=false",
    # On GPUs, merging the products of both paths, which share weights, copies all their outputs.
    "--xla_gpu_dot_merger_threshold_mb=0",
)

# TensorFlow only reads and decodes videos here. Without oneDNN, which no operation of the pipeline
# uses, it prints nothing at start. Its own pool of memory reuses what clips free; from glibc, every
# clip would wait for new pages (docs/notes/measurements.md). Batches are the same.
_TENSORFLOW_VARIABLES = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_CPU_ALLOCATOR_USE_BFC": "true",
    # TensorFlow then imports neither Keras 3, which nothing here uses, nor matplotlib's pyplot.
    "TF_USE_LEGACY_KERAS": "1",
}

_MIN_ADDRESS_SPACE = 4 * 2**30  # bytes; the demo's training reserves 2.5 GB
_THREAD_SECONDS = 10.0  # in which threads end by themselves when the program is done
_a_thread_may_hang = threading.Event()

# Parameters of `mallopt`, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def quiet_tensorflow() -> None:
    """Quiet TensorFlow and make it reuse memory; call it before TensorFlow is imported."""
    for name, value in _TENSORFLOW_VARIABLES.items():
        os.environ.setdefault(name, value)


def configure_environment() -> None:
    """Quiet TensorFlow, set XLA flags, and make JAX keep compiled programs for later starts."""
    quiet_tensorflow()
    os.environ.setdefault("XLA_FLAGS", " ".join(_XLA_FLAGS))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def disable_async_dispatch() -> None:
    """Make steps on a CPU run in the calling thread, as `keep_freed_memory` requires.

    Call it before JAX makes its first array. It changes nothing on other devices.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a step on a CPU frees, so that the next step reuses it.

    Otherwise glibc returns blocks as large as a step's to the system at once, and the next step
    waits for new pages (docs/notes/measurements.md).

    Call it after the first step: it first returns the memory that compilation used. It affects only
    blocks of the calling thread, see `disable_async_dispatch`. It does nothing on other devices and
    with other C libraries, or if the user has set GLIBC_TUNABLES or glibc's MALLOC_ variables.
    """
    import jax

    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc" or chosen:
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_M_MMAP_MAX, 0)
    glibc.mallopt(_M_TRIM_THRESHOLD, -1)  # as an unsigned number: never
    glibc.malloc_trim(0)


def find_memory_problem() -> str | None:
    """Return why this process may use too little memory for JAX and TensorFlow, which then abort.

    Returns:
      A message with the remedy; None without such a limit (`ulimit -v`).
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or limit >= _MIN_ADDRESS_SPACE:
        return None
    return (
        f"this process is limited to {limit / 2**30:.1f} GB of address space (ulimit -v), and JAX "
        f"and TensorFlow need {_MIN_ADDRESS_SPACE / 2**30:.0f} GB: raise or remove the limit "
        "(ulimit -v unlimited, or the scheduler's option for virtual memory)"
    )


def note_that_a_thread_may_hang() -> None:
    """Make `exit_process` wait for threads for a limited time only."""
    _a_thread_may_hang.set()


def exit_process(status: Any) -> NoReturn:
    """Exit with `status`; wait at most 10 s for threads if one may hang.

    After a save that was given up, orbax's threads wait for each other: for minutes if the disk had
    no inode left, and by the wall clock, which may be set back.
    """
    if not _a_thread_may_hang.is_set():
        sys.exit(status)
    others = [t for t in threading.enumerate() if t is not threading.current_thread()]
    deadline = time.monotonic() + _THREAD_SECONDS
    while any(thread.is_alive() and not thread.daemon for thread in others):
        if time.monotonic() >= deadline and isinstance(status, int | None):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
        time.sleep(0.05)  # orbax's `join` has no limit
    sys.exit(status)


def cache_folder() -> pathlib.Path:
    """Return the folder for compiled programs: one for each kind of CPU, as homes are shared.

    The folder is in $XDG_CACHE_HOME or ~/.cache. JAX_COMPILATION_CACHE_DIR chooses another one, and
    JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    cpu_kind = platform.machine() + platform.processor()
    info = pathlib.Path("/proc/cpuinfo")  # Linux
    if info.exists():
        lines = info.read_text().splitlines()
        cpu_kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(cpu_kind.encode()).hexdigest()[:12]
    return pathlib.Path(cache) / "dualpath_jax" / f"compiled-{digest}"


def describe_machine() -> dict[str, Any]:
    """Return what decides how sums are rounded, for JSON: devices, processes and cores.

    Returns:
      A dictionary with the keys devices (their number by kind), processes and cpu_cores; the last
      is 0 where no device is a CPU.
    """
    import jax

    kinds = collections.Counter(device.device_kind for device in jax.devices())
    on_cpu = any(device.platform == "cpu" for device in jax.devices())
    return {
        "devices": dict(kinds),
        "processes": jax.process_count(),
        "cpu_cores": num_cores() if on_cpu else 0,
    }


def describe_environment() -> dict[str, Any]:
    """Return what this process runs on, for JSON.

    Returns:
      A dictionary with the keys command, versions (by package), devices (their number by kind),
      processes, cpu_cores, platform and xla_flags.
    """
    versions = {"dualpath_jax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": versions,
        **describe_machine(),
        "cpu_cores": num_cores(),
        "platform": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }

"""What JAX, TensorFlow and glibc are told, and what a run had. What the user has set stays.

Public: `configure_environment`, before JAX and TensorFlow are imported; `disable_async_dispatch`, before JAX makes
its first array, and `keep_freed_memory`, after the first step; `cache_folder`; `describe_environment`.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys
from typing import Any

from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.version import __version__

# Packages that decide what a training computes, and how fast.
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow"),
    *("tensorflow-cpu", "array_record", "ml_collections"),
)

_XLA_FLAGS = (
    # On CPU, XLA's YNNPACK fusions make the demo's training step 1.2 times slower (jax 0.10.2).
    "--xla_cpu_experimental_ynn_fusion_type=",
    # On GPU, cuBLAS adds biases itself, and programs compile in 0.7 of the time; equally fast.
    "--xla_gpu_enable_triton_gemm=false",
    # On GPU, products of both paths with the same weights, joined, cost copies of all they return.
    "--xla_gpu_dot_merger_threshold_mb=0",
)

# Of glibc's malloc.h, for mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def configure_environment() -> None:
    """Quiet TensorFlow, measured XLA flags, and compiled programs kept for the next start."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("XLA_FLAGS", " ".join(_XLA_FLAGS))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def disable_async_dispatch() -> None:
    """Steps on a CPU run in the thread that calls them, as `keep_freed_memory` needs it.

    To be called before JAX makes its first array. On other devices it changes nothing.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Where JAX computes on a CPU: what a step frees stays with the process for the next one.

    To be called when the first step is done: what compiling it took is given back. glibc gives
    blocks as large as a step's back to the system at once, and the next step waits for as many new
    pages: 300,000 with ViT-B/16. Of other threads' blocks it keeps none, see
    `disable_async_dispatch`. Other C libraries stay as they are, and processes whose user has set
    GLIBC_TUNABLES or glibc's MALLOC_ variables.
    """
    import jax

    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc" or chosen:
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_M_MMAP_MAX, 0)
    glibc.mallopt(_M_TRIM_THRESHOLD, -1)  # as an unsigned number: never
    glibc.malloc_trim(0)


def cache_folder() -> pathlib.Path:
    """Where compiled programs are kept: apart for each kind of processor, as homes are shared.

    In $XDG_CACHE_HOME or ~/.cache. JAX_COMPILATION_CACHE_DIR chooses another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false none.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    kind = platform.machine() + platform.processor()
    info = pathlib.Path("/proc/cpuinfo")  # Linux
    if info.exists():
        lines = info.read_text().splitlines()
        kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(kind.encode()).hexdigest()[:12]
    return pathlib.Path(cache) / "dualpath_jax" / f"compiled-{digest}"


def describe_environment() -> dict[str, Any]:
    """What this process runs on, for JSON: `command`, `versions`, `devices` by kind, and so on."""
    import jax

    versions = {"dualpath_jax": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": versions,
        "devices": dict(collections.Counter(device.device_kind for device in jax.devices())),
        "processes": jax.process_count(),
        "cpu_cores": num_cores(),
        "platform": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }

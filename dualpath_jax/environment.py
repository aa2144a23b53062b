"""Environment variables that JAX and TensorFlow read when they are imported: `prepare` sets them.

Public: `prepare`, `cache_folder`; `describe`, what a run had: command, versions, devices. What the
user has set stays.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys
from typing import Any

from dualpath_jax.cores import num_cores

# Packages that decide what a training computes, and how fast.
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow"),
    *("tensorflow-cpu", "array_record", "ml_collections"),
)


def prepare() -> None:
    """Quiet TensorFlow, measured XLA flags, and compiled programs kept for the next start."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # On CPU, XLA's YNNPACK fusions make the demo's training step 1.2 times slower (jax 0.10.2).
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


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


def describe() -> dict[str, Any]:
    """What this process runs on, for JSON: `command`, `versions`, `devices` by kind, and so on."""
    import jax

    import dualpath_jax

    versions = {"dualpath_jax": dualpath_jax.__version__, "python": platform.python_version()}
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

"""Tests the settings made before JAX is imported, and that the user's own settings stay."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

import dualpath_jax
from dualpath_jax.runtime import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")


def test_the_users_settings_stay(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    environment.configure_environment()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
    folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert folder.parent == tmp_path / "dualpath_jax"
    assert folder == environment.cache_folder()


def test_a_second_start_compiles_nothing(tmp_path):
    """Check that a second process finds the programs that the first one has compiled."""
    program = (
        "from dualpath_jax.runtime import environment; environment.configure_environment(); "
        "import jax; "
        "from jax import monitoring; hits = []; "
        "monitoring.register_event_listener(lambda name, **_: hits.append(name)); "
        "jax.jit(lambda x: sum((x @ x + i).sum() for i in range(40)))(jax.numpy.ones((64, 64)));"
        "print(hits.count('/jax/compilation_cache/cache_hits'),"
        " hits.count('/jax/compilation_cache/cache_misses'))"
    )
    inherited = {key: value for key, value in os.environ.items() if key not in NAMES}
    variables = {**inherited, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def counts():
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
        hits, misses = done.stdout.split()
        return int(hits), int(misses)

    assert counts()[0] == 0
    hits, _ = counts()
    assert hits >= 1


FAULTS = """
import os, resource, sys
from dualpath_jax.runtime import environment
environment.disable_async_dispatch()
import jax
step = jax.jit(lambda x: (x @ x.T).sum())  # needs 64 MiB
x = jax.numpy.ones((4096, 16))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    float(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(5)])
environment.keep_freed_memory()
print([faults() for _ in range(20)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12), reason="its threads have memory pools (arenas) of their own"
)
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_CHECK_": "0"}])
def test_memory_of_a_step_is_reused(chosen):
    """Check that a step reuses memory of the step before, unless the user has own settings."""
    names = ("MALLOC_", "GLIBC_TUNABLES")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    variables = {**inherited, **chosen, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FAULTS]
    num_huge = 32  # page faults, if the system uses huge pages of 2 MiB by itself
    for _ in range(3):  # a system that is short of memory takes pages back between steps
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
        before, after = map(json.loads, done.stdout.splitlines())
        reused = [np.median(faults) < num_huge for faults in (before, after)]
        if reused == [False, not chosen]:
            return
    pytest.fail(f"page faults of each step before {before} and after {after}")


BATCHES = """
import resource
from dualpath_jax.runtime import environment
environment.configure_environment()
import tensorflow as tf
batches = tf.data.Dataset.range(20).map(lambda i: tf.fill([64, 2**20], tf.cast(i, tf.uint8)))
batches, faults = iter(batches), []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    next(batches)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-10:])
"""


@pytest.mark.parametrize("chosen", [{}, {"TF_CPU_ALLOCATOR_USE_BFC": "false"}])
def test_memory_of_a_batch_is_reused(chosen):
    """Check that batches of 64 MiB need no new pages; the twin is the user's own setting."""
    name = "TF_CPU_ALLOCATOR_USE_BFC"
    inherited = {key: value for key, value in os.environ.items() if key != name}
    command = [sys.executable, "-c", BATCHES]
    variables = {**inherited, **chosen, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    faults = np.median(json.loads(done.stdout))
    assert (faults > 16) == bool(chosen), done.stdout  # huge pages have 2 MiB


def test_description_of_the_environment(monkeypatch):
    command = ["/usr/bin/python3", "-m", "dualpath_jax.main", "--workdir=a b"]
    monkeypatch.setattr(sys, "orig_argv", command)
    description = json.loads(json.dumps(environment.describe_environment()))
    assert description["command"] == "python -m dualpath_jax.main '--workdir=a b'"
    assert description["versions"]["jax"] == jax.__version__
    assert description["versions"]["dualpath_jax"] == dualpath_jax.__version__
    assert description["devices"] == {"cpu": len(jax.devices())}
    assert (description["processes"], description["xla_flags"]) == (1, os.environ["XLA_FLAGS"])


EXITING = """
import sys, threading
from dualpath_jax.runtime import environment
environment._THREAD_SECONDS = 0.1
class Thread(threading.Thread):
    def join(self, timeout=None):  # as orbax's
        raise TimeoutError("did not complete")
kind = Thread if sys.argv[1] == "raising" else threading.Thread
kind(target=threading.Event().wait, daemon=sys.argv[1] == "daemon").start()
print("done")
environment.note_that_a_thread_may_hang()
environment.exit_process(7)
"""


@pytest.mark.parametrize("kind", ["stuck", "raising", "daemon"])
def test_a_stuck_thread_does_not_keep_the_process(kind):
    command = [sys.executable, "-c", EXITING, kind]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout) == (7, "done\n")


def test_tensorflow_comes_without_keras():
    program = (
        "import sys; from dualpath_jax.runtime import environment; "
        "environment.quiet_tensorflow(); import tensorflow; from tensorflow import summary; "
        "print('keras' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    inherited = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    variables = {**inherited, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    assert done.stdout.split() == ["False", "False"]

"""Sets up eight CPU devices, so that every test of a step also tests sharding.

XLA optimizes little here, so that programs compile sooner. CI also runs commands of the README,
which use the flags that users have.
"""

import contextlib
import gc
import importlib.metadata
import os

with contextlib.suppress(ImportError):  # before TensorFlow, see scripts/benchmarks/train_step.py
    import triton  # noqa: F401

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
if importlib.metadata.version("jax").startswith("0.10."):  # later ones abort on this flag
    # Both flags together make programs compile several times sooner.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")

# Tracing makes many small objects, so frequent garbage collection takes noticeable time.
gc.set_threshold(20_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402


def pytest_collection_modifyitems(items):
    """Run files with long tests first, so that no worker starts one of them at the end."""
    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Cache compiled programs on disk, because many tests compile the same steps."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder shared by all workers
    folder = str(base / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for processes started by tests


@pytest.fixture(autouse=True)
def verbosity():
    """Restore absl's verbosity, which scripts run by a test in this process change."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """Render and prepare a small demo set: 40 training, 8 validation and 21 test videos."""
    from dualpath_jax.data.datasets import registry as dataset_registry
    from dualpath_jax.data.preparation import prepare
    from dualpath_jax.demo import render

    folder = tmp_path_factory.mktemp("demo")
    sizes = {"train": 40, "validation": 8, "test": 21}
    render.render_demo(folder / "raw", sizes, progress=False)
    videos, labels = str(folder / "raw" / "videos"), str(folder / "raw" / "labels")
    listing = dataset_registry.list_videos("ssv2", videos, labels)
    options = prepare.PrepareOptions(progress=False)
    prepare.prepare_dataset(listing, videos, str(folder / "prepared"), options)
    return folder / "prepared"


@pytest.fixture(scope="session")
def demo_backbone(tmp_path_factory):
    """Convert the packaged backbone; return its path."""
    from dualpath_jax.demo import setup
    from dualpath_jax.weights import convert

    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    convert.convert_checkpoint(setup.BACKBONE, path)
    return path


@pytest.fixture
def config(demo_data, demo_backbone):
    """Return the config of `small_config` on the fixtures' data and backbone."""
    from tests.helpers.small_config import small_config

    return small_config(demo_data, demo_backbone)

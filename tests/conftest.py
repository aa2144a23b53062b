"""Eight devices on the CPU, so that every test of a step is a test of sharding too.

XLA optimises little, so that programs compile sooner: the README's other commands run what users
run.
"""

import contextlib
import gc
import os

with contextlib.suppress(ImportError):  # before TensorFlow, see scripts/benchmarks/train_step.py
    import triton  # noqa: F401

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # A training step of test_methods.py compiles in 3 s of CPU time by both; by the level
        # alone in 8, by neither in 19.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# What is traced is so many small objects that looking for garbage takes 6% of test_methods.py.
gc.set_threshold(20_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402


def pytest_collection_modifyitems(items):
    """Files with long tests come first, so that no worker has one of them left at the end."""
    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Tests compile the same steps again and again: once is enough."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    folder = str(base / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # of processes started by tests


@pytest.fixture(autouse=True)
def verbosity():
    """Scripts that a test runs in this process make absl quieter: not for other tests."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A small demo set, rendered and prepared: 40 training, 8 validation and 21 test videos."""
    from dualpath_jax.data.datasets import registry as dataset_registry
    from dualpath_jax.data.preparation import prepare
    from dualpath_jax.demo import render

    folder = tmp_path_factory.mktemp("demo")
    sizes = {"train": 40, "validation": 8, "test": 21}
    render.render_demo(folder / "raw", sizes, progress=False)
    videos, labels = str(folder / "raw" / "videos"), str(folder / "raw" / "labels")
    listing = dataset_registry.list_videos("ssv2", videos, labels)
    prepare.prepare_dataset(listing, videos, str(folder / "prepared"), progress=False)
    return folder / "prepared"


@pytest.fixture(scope="session")
def demo_backbone(tmp_path_factory):
    """The packaged backbone, converted."""
    from dualpath_jax.demo import setup
    from dualpath_jax.weights import convert

    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    convert.convert_checkpoint(setup.BACKBONE, path)
    return path


@pytest.fixture
def config(demo_data, demo_backbone):
    from tests.helpers.small_config import small_config

    return small_config(demo_data, demo_backbone)

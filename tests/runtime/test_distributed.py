"""Tests the parts of `distributed` that need no second process; see test_multiprocess.py."""

import jax
import numpy as np
import pytest
from jax._src import xla_bridge

from dualpath_jax import launch
from dualpath_jax.config import schema
from dualpath_jax.runtime import distributed, environment


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, "all"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "4"}, "0"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
        (
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"},
            "0",
        ),
        ({}, "0"),
        (
            {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1", "JAX_LOCAL_DEVICE_IDS": "0"},
            "0",  # the user has chosen
        ),
    ],
)
def test_one_process_on_a_host_has_all_its_gpus(variables, devices, monkeypatch):
    """Check that the only process on a host gets all its GPUs, not only one."""
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def initialize(*_, **__):
        jax.config.update("jax_cuda_visible_devices", "0")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = xla_bridge.CUDA_VISIBLE_DEVICES.value
    try:
        distributed.initialize()
        assert xla_bridge.CUDA_VISIBLE_DEVICES.value == devices
    finally:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, before)


def test_values_must_be_the_same_on_all_hosts(monkeypatch):
    values = {"videos": ["a", "b"], "classes": ["x"]}
    distributed.check_same_on_all_hosts(values, "the way")  # a single process
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    rows = []

    def gather(row):
        rows.append(row)
        return np.stack([row] * 3)

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    distributed.check_same_on_all_hosts(values, "the way")
    distributed.check_same_on_all_hosts(values | {"classes": ["y"]}, "the way")
    names, videos_and_classes, _, others = rows
    gathered = {names.size: [names] * 3, others.size: [videos_and_classes] * 2 + [others]}
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda row: np.stack(gathered[row.size])
    )
    with pytest.raises(OSError, match=r"classes: process 2 differs from process 0; the way"):
        distributed.check_same_on_all_hosts(values, "the way")
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda row: np.stack([row, row, row + 1])
    )
    with pytest.raises(OSError, match="the compared values: process 2 differs from process 0"):
        distributed.check_same_on_all_hosts(values, "the way")


def test_unavailable_cloud_storage_is_not_a_peer_failure(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    message = "UNAVAILABLE: connection closed by peer"
    assert distributed.is_peer_failure(jax.errors.JaxRuntimeError(message))
    assert not distributed.is_peer_failure(OSError("HTTP response code 503: Service Unavailable"))
    assert not distributed.is_peer_failure(ValueError("no videos"))


@pytest.mark.parametrize(
    ("processes", "chosen", "folder"),
    [(2, None, "runs/x/compiled_programs/{}"), (1, None, None), (2, "elsewhere", "elsewhere")],
)
def test_folder_of_compiled_programs(processes, chosen, folder, monkeypatch):
    """Check that several processes keep compiled programs in a folder that all of them share."""
    usual = str(environment.cache_folder())
    folder = folder and folder.format(environment.cache_folder().name)
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    try:
        jax.config.update("jax_compilation_cache_dir", chosen or usual)
        distributed.share_compiled_programs("runs/x")
        assert jax.config.jax_compilation_cache_dir == (folder or usual)
    finally:
        distributed.compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", before)


def test_hosts_may_differ_only_in_the_paths_of_files():
    config = schema.get_config()
    before = launch.shared_settings(config)
    for name in ("data.dir", "backbone.checkpoint", "init_from"):
        config.update_from_flattened_dict({name: "/elsewhere"})
    assert launch.shared_settings(config) == before
    config.optimizer.learning_rate *= 2
    assert launch.shared_settings(config) != before

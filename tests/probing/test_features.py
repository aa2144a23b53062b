"""Tests the features on disk: files, identities, interruptions, damage."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dualpath_jax.probing import features
from dualpath_jax.probing.features import FeatureCache, FeatureSpec, ProgressOfSplits

SPEC = FeatureSpec("train", 7, (1, 2, 3, 4), {"backbone": "abc", "data.num_frames": 2}, 2)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Make shards of two batches: rows 0 to 3, and 4 to 6."""
    monkeypatch.setattr(features, "_SHARD_BYTES", 4 * SPEC.row_bytes)


def rows():
    """Return tokens and labels of 8 rows, one more than `SPEC` has."""
    values = np.random.default_rng(0).normal(size=(8, *SPEC.shape)).astype(jnp.bfloat16)
    return values, np.arange(8, dtype=np.int32)


def batches(start=0, fail_at=None):
    """Yield the rows from `start` on, two at a time; raise before row `fail_at`."""
    tokens, labels = rows()
    for i in range(start, 8, 2):
        if i == fail_at:
            raise KeyboardInterrupt
        yield tokens[i : i + 2], labels[i : i + 2]


def write(folder, spec=SPEC, first=0, **options):
    """Write features from shard `first` on; return the cache and the rows that were counted."""
    cache, counts = FeatureCache(folder), []
    cache.write(spec, first, batches(4 * first, **options), counts.append)
    return cache, counts


def test_rows_come_back(tmp_path):
    cache, counts = write(tmp_path / "features")
    assert counts == [2, 2, 2, 1]
    stored = cache.open(SPEC)
    tokens, labels = rows()
    assert len(stored) == 7
    assert [len(shard) for shard in stored.shards] == [4, 3]
    assert np.array_equal(stored.labels, labels[:7])
    assert np.array_equal(stored.read([6, 0, 4]), tokens[[6, 0, 4]])
    files = sorted((tmp_path / "features").iterdir())
    assert [file.name for file in files] == ["train-00000.safetensors", "train-00001.safetensors"]
    assert sum(file.stat().st_size for file in files) - SPEC.num_bytes < 1000
    as_safetensors = load_file(files[1])  # the library reads them
    assert np.array_equal(as_safetensors["tokens"], tokens[4:7])
    assert np.array_equal(as_safetensors["labels"], [4, 5, 6])


def test_an_interrupted_computation_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, fail_at=6)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.safetensors"]
    cache = FeatureCache(tmp_path)
    assert cache.remove_others(SPEC) == ""
    assert cache.num_complete(SPEC) == 1
    assert write(tmp_path, first=1)[1] == [2, 1]
    assert np.array_equal(cache.open(SPEC).read(range(7)), rows()[0][:7])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"identity": SPEC.identity | {"backbone": "def"}}, "made with backbone='abc', now 'def'"),
        (
            {"identity": SPEC.identity | {"data.num_frames": 4}},
            "made with data.num_frames=2, now 4",
        ),
        ({"identity": SPEC.identity | {"seed": 0}}, "made with seed=None, now 0"),
        ({"num_clips": 6}, "has other rows"),
        ({}, ""),  # twin: the same features are used
    ],
)
def test_features_of_other_settings_are_not_used(tmp_path, change, reason):
    cache, _ = write(tmp_path)
    other = dataclasses.replace(SPEC, **change)
    (tmp_path / "train1-00000.safetensors").write_bytes(b"of another split")
    assert reason in cache.remove_others(other)
    assert cache.num_complete(other) == (0 if "identity" in change else 1 if change else 2)
    assert (tmp_path / "train1-00000.safetensors").exists()
    if change:
        assert not (tmp_path / "train-00001.safetensors").exists()
        with pytest.raises((OSError, ValueError)):
            cache.open(other)


@pytest.mark.parametrize("damage", ["cut off", "longer", "empty", "header", "huge header"])
def test_damaged_features_are_not_used(tmp_path, damage):
    cache, _ = write(tmp_path)
    path = tmp_path / "train-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut off": content[:-1],
            "longer": content + b"x",
            "empty": b"",
            "header": content[:8] + b"[" + content[9:],
            "huge header": b"\xff" * 8 + content[8:],
        }[damage]
    )
    assert cache.num_complete(SPEC) == 1
    assert "train-00001.safetensors is damaged" in cache.remove_others(SPEC)
    assert not path.exists()
    write(tmp_path, first=1)
    assert path.read_bytes() == content


def test_the_duration_is_printed_after_the_first_batches(capsys):
    times = iter([10.0, 16.0])
    with ProgressOfSplits(20, clock=lambda: next(times)).shown() as progress:
        for _ in range(5):
            progress.on_batch(4)
    assert capsys.readouterr().out == "features: 1.5 s a clip, about 0:00:18 for the others\n"

"""Checks saved configurations as config files."""

import json
import pathlib

import pytest

from dualpath_jax.config import loading, saved_config
from dualpath_jax.config.values import flatten_config


@pytest.mark.parametrize("name", ["finetune:demo", "ssv2_swinb_st_adapter", "k400_vitl_evl"])
def test_a_saved_configuration_is_the_same(name, tmp_path):
    """Check every value and its type; overrides work as on a config file."""
    config = loading.load_config(name)
    path = tmp_path / "config.json"
    path.write_text(config.to_json_best_effort())
    loaded = loading.load_config(str(path))
    values, expected = flatten_config(loaded), flatten_config(config)
    assert values == expected
    assert {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in expected.items()}
    changed = loading.load_config(
        str(path), ["--config.data.batch_size=2", "--config.init_from=a.safetensors"]
    )
    differing = {k: v for k, v in flatten_config(changed).items() if v != expected[k]}
    assert differing == {"data.batch_size": 2, "init_from": "a.safetensors"}


def test_keys_of_other_versions(tmp_path):
    """Check that keys added since have their defaults, and that others are refused."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"seed": 7, "model": {"class_only": False}}))
    config = saved_config.get_config(str(path))
    assert (config.seed, config.model.cls_token_only, config.num_epochs) == (7, False, 30)
    for text, message in (
        ('{"sede": 7}', "json is not a configuration .* no key 'sede': did you mean seed?"),
        ('{"model": 3}', "is not a configuration of this package"),
        ('{"data": {"grid": "ab"}}', "is not a configuration of this package"),
        ('{"data": {"batch_size": 0}}', "data.batch_size=0 must be 1 or more"),
        ("[1]", "config.json"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            saved_config.get_config(str(path))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("configs/ssv2_vitb.py:32", "runs/ssv2_vitb"),
        ("runs/mine/config.json", "runs/mine"),
        ("settings/lr3.json", "runs/lr3"),
    ],
)
def test_default_workdir(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path(name)
    if path.suffix == ".json":
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    assert loading.default_workdir(loading.find_config_file(name)) == folder

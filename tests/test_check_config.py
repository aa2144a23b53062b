"""Checks `--mode=check` on the config files, on wrong values and on keys without effect."""

import importlib
import pathlib
import re

import pytest

from dualpath_jax import check_config
from dualpath_jax.config import schema
from dualpath_jax.config.loading import load_config
from dualpath_jax.config.unread_keys import (
    RecordedReads,
    check_unread_keys,
    describe_unread_model_keys,
)
from dualpath_jax.config.values import flatten_config
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import abstract_model
from dualpath_jax.models.registry import METHODS
from dualpath_jax.training.experiment import build_abstract
from tests.helpers.runs import build_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base", "recipes")
)


def load(name):
    """Return the configuration of a file in configs/, "NAME" or "NAME:VARIANT"."""
    file, _, argument = name.partition(":")
    get_config = importlib.import_module(f"configs.{file}").get_config
    return get_config(argument) if argument else get_config()


# Some files, with every kind of backbone and data set.
CHECKED = [
    "demo",
    "diving48_vitb",
    "finetune",
    "hmdb51_vitb_linear",
    "hmdb51_vitb_vpt",
    "k400_vitl_evl",
    "ssv2_swinb_st_adapter",
    "ssv2_vitb:48",
    "ssv2_vitb_aim",
    "ssv2_vitb_in21k",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_configs_are_consistent(name, capsys):
    check_config.check_config(load(name))
    out = capsys.readouterr().out
    assert "the configuration is consistent" in out
    assert "training batch of two clips: spatial uint8" in out


@pytest.mark.parametrize("name", CONFIGS)
def test_header_has_the_numbers_of_parameters(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m dualpath_jax.main --config=configs/{name}.py" in text
    config = load(name)
    classes = dataset_registry.NUM_CLASSES.get(
        config.data.source, dataset_registry.PLACEHOLDER_NUM_CLASSES
    )
    model = abstract_model(config, classes)
    trainable = param_tree.count_params(param_tree.split(model.params, model.mask)[0])
    total = param_tree.count_params(model.params)
    if name == "finetune":
        assert "Trainable" not in text  # depends on the reader's classes
    else:
        found = re.search(r"Trainable parameters:\s+([\d,]+) of\s+([\d,]+)", text)
        assert found.groups() == (f"{trainable:,}", f"{total:,}")


def get_ablations():
    """Return the overrides of each ablation of the paper."""
    from configs import ssv2_vitb

    return ssv2_vitb.ABLATIONS


@pytest.mark.parametrize("name", sorted(get_ablations()))
def test_ablations_build(name):
    config = load(f"ssv2_vitb:{name}")
    for key, value in get_ablations()[name].items():
        section, key = key.split(".")
        assert config[section][key] == value
    abstract_model(config, 174)


def test_unknown_variant():
    with pytest.raises(ValueError, match="unknown argument 'sixteen'.*48, without_ta"):
        load("ssv2_vitb:sixteen")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("hmdb51_vitb_vpt", "model.temporal_path", False),
        ("demo", "model.vpt.num_prompts", 5),
    ],
)
def test_key_without_effect(name, key, value):
    config = load(name)
    config.update_from_flattened_dict({key: value})
    message = f"without effect for model.method='{config.model.method}'.*: {key}={value}$"
    with pytest.raises(ValueError, match=message):
        check_config.check_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_the_config_of_dualpath(method, capsys):
    """Check --config=ssv2_vitb --config.model.method=NAME: keys of DualPath are a warning."""
    config = load_config("ssv2_vitb", [f"--config.model.method={method}"])
    check_config.check_config(config, ["model.method"])
    out = capsys.readouterr().out
    assert "the configuration is consistent" in out
    warning = f"keys without effect for model.method='{method}' and the rest of this configuration"
    assert (
        f"warning: the config file sets {warning}: model.pre_attention_adapter=True" in out
    ) == (method != "dualpath")


def test_overridden_key_without_effect():
    """Check that a key of the command line without effect is an error also with another method."""
    overrides = {"model.method": "linear", "model.adapter_bottleneck": 32}
    config = load_config("ssv2_vitb", [f"--config.{key}={v}" for key, v in overrides.items()])
    seen = {key for key in flatten_config(config) if not key.startswith("model.adapter")}
    with pytest.raises(
        ValueError, match="^set, but without effect .*: model.adapter_bottleneck=32$"
    ):
        check_unread_keys(config, seen, overrides)
    check_unread_keys(config, seen | {"model.adapter_bottleneck"}, overrides)


OFF = {
    "temporal_path": {
        "data.grid": (2, 4),
        "data.frame_scale": 3,
        "data.frameset_input": "abs_minus_mean",
        "model.serial_skip": True,
        "model.temporal_position": "clip",
        "model.readout_width": 8,
    },
    "spatial_path": {"data.num_spatial_frames": 99, "model.spatial_dropout": 0.5},
}


def path_off(path):
    """Return the demo's configuration with a path off, and keys set that only this path reads."""
    config = load("demo")
    config.update_from_flattened_dict(OFF[path] | {f"model.{path}": False})
    if path == "temporal_path":
        config.model.pre_attention_adapter = False
        config.model.time_kernel_size = 0
        config.model.pre_attention_residual = schema.get_config().model.pre_attention_residual
    return config


@pytest.mark.parametrize("path", OFF)
def test_keys_of_a_path_that_is_off(path, capsys):
    """Check that they are named, in the check and in training, and nothing else of the path is.

    Values that do not fit together are no error of their own.
    """
    config = path_off(path)
    names = [f"{key}={value}" for key, value in OFF[path].items()]
    with pytest.raises(ValueError, match="^set, but without effect") as error:
        check_config.check_config(config)
    where, settings = str(error.value).rsplit(": ", 1)
    assert f"for model.method='dualpath', model.{path}=False and the rest" in where
    assert sorted(re.split(r", (?=data|model)", settings)) == sorted(names)
    # The command line switches the path off: the keys of the file are a warning.
    check_config.check_config(config, [f"model.{path}"])
    assert f"warning: the config file sets keys without effect {where[24:]}" in (
        capsys.readouterr().out
    )
    # Training builds the model in the same way.
    log = RecordedReads(config)
    build_abstract(log, 8, 10.0)
    warning = describe_unread_model_keys(config, log.seen)
    assert warning == f"warning: {where}: {settings}"


@pytest.mark.parametrize("name", ["demo", "ssv2_vitb:without_ta", "ssv2_vitb:without_sa"])
def test_training_has_no_warning(name):
    config = load(name)
    log = RecordedReads(config)
    build_abstract(log, 8, 10.0)
    assert describe_unread_model_keys(config, log.seen) == ""


def test_training_prints_the_warning(config, tmp_path, capsys):
    config.model.temporal_path, config.data.frame_scale = False, 3
    build_run(config, str(tmp_path), VideoDataset(config.data.dir, "train"))
    assert (
        "without effect for model.method='dualpath', model.temporal_path=False and the rest of"
        in (capsys.readouterr().out)
    )


def test_both_paths_off():
    config = load("demo")
    config.model.spatial_path = config.model.temporal_path = False
    with pytest.raises(ValueError, match="spatial_path and model.temporal_path are both False"):
        check_config.check_config(config)


def test_keys_that_only_matter_with_other_values():
    config = load("demo")
    changes = {
        "data.sampling_interval": 4,  # only matters for dense sampling
        "model.adapt_shifted_windows": True,  # only matters for Swin
        "profile.first_step": 3,  # only matters if steps are profiled
    }
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=", ".join(f"{k}={v}" for k, v in changes.items()) + "$"):
        check_config.check_config(config)


def test_keys_that_only_a_run_reads(capsys):
    """Check that they count as read; `num_epochs` is set by the recipe."""
    config = load("hmdb51_vitb_linear")
    config.num_train_steps, config.init_from = 1000, "a.safetensors"
    config.eval.checkpoint, config.resume_changed = "best", True
    check_config.check_config(config)
    assert "the configuration is consistent" in capsys.readouterr().out


def test_value_out_of_range():
    config = load("demo")
    config.log_every_steps = 0
    with pytest.raises(ValueError, match="log_every_steps=0 must be 1 or more"):
        check_config.check_config(config)


def test_recorded_reads():
    log = RecordedReads(schema.get_config())
    assert log.data.num_frames == 32
    assert log.seen == {"data.num_frames"}
    assert log.model.vpt["num_prompts"] == 10
    assert log.seen == {"data.num_frames", "model.vpt.num_prompts"}
    assert "patch_size" in list(log.backbone)

"""`--mode=check`: every configuration holds together; what does not, or has no effect, is named."""

import importlib
import pathlib
import re

import pytest

from dualpath_jax import check_config
from dualpath_jax.config import schema
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import abstract_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base", "recipes")
)


def load(name):
    file, _, argument = name.partition(":")
    get_config = importlib.import_module(f"configs.{file}").get_config
    return get_config(argument) if argument else get_config()


# One for each method, backbone and data set; the command line takes all of them.
CHECKED = [
    "demo",
    "diving48_vitb",
    "folder_vitb",
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
def test_configs_hold_together(name, capsys):
    check_config.check_config(load(name))
    out = capsys.readouterr().out
    assert "configuration holds together" in out
    assert "training batch of two clips: spatial uint8" in out


@pytest.mark.parametrize("name", CONFIGS)
def test_header_gives_the_parameters(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m dualpath_jax.main --config=configs/{name}.py" in text
    config = load(name)
    classes = dataset_registry.NUM_CLASSES.get(
        config.data.source, dataset_registry.PLACEHOLDER_NUM_CLASSES
    )
    model = abstract_model(config, classes)
    trainable = param_tree.count_params(param_tree.split(model.params, model.mask)[0])
    total = param_tree.count_params(model.params)
    if name == "folder_vitb":
        assert "Trainable" not in text  # depends on the reader's classes
    else:
        found = re.search(r"Trainable parameters:\s+([\d,]+) of\s+([\d,]+)", text)
        assert found.groups() == (f"{trainable:,}", f"{total:,}")


def ablations():
    from configs import ssv2_vitb

    return ssv2_vitb.ABLATIONS


@pytest.mark.parametrize("name", sorted(ablations()))
def test_ablations_build(name):
    config = load(f"ssv2_vitb:{name}")
    for key, value in ablations()[name].items():
        section, key = key.split(".")
        assert config[section][key] == value
    abstract_model(config, 174)


def test_unknown_argument():
    with pytest.raises(ValueError, match="unknown argument 'sixteen'.*48, without_ta"):
        load("ssv2_vitb:sixteen")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("hmdb51_vitb_vpt", "model.temporal_path", False),
        ("demo", "model.vpt.num_prompts", 5),
    ],
)
def test_a_key_without_effect(name, key, value):
    config = load(name)
    config.update_from_flattened_dict({key: value})
    message = f"without effect for model.method='{config.model.method}'.*: {key}={value}$"
    with pytest.raises(ValueError, match=message):
        check_config.check_config(config)


def test_keys_that_have_an_effect_beside_others():
    config = load("demo")
    changes = {
        "data.sampling_interval": 4,  # without dense sampling
        "model.adapt_shifted_windows": True,  # of a ViT
        "profile.first_step": 3,  # of no steps
    }
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=", ".join(f"{k}={v}" for k, v in changes.items()) + "$"):
        check_config.check_config(config)


def test_keys_of_a_run_have_an_effect(capsys):
    """Though nothing reads them here; `num_epochs` is the recipe's."""
    config = load("hmdb51_vitb_linear")
    config.num_train_steps, config.init_from = 1000, "a.safetensors"
    config.eval.checkpoint, config.resume_changed = "best", True
    check_config.check_config(config)
    assert "configuration holds together" in capsys.readouterr().out


def test_a_wrong_value():
    config = load("demo")
    config.log_every_steps = 0
    with pytest.raises(ValueError, match="log_every_steps=0 must be 1 or more"):
        check_config.check_config(config)


def test_read_log():
    log = check_config.RecordedReads(schema.get_config())
    assert log.data.num_frames == 32
    assert log.seen == {"data.num_frames"}
    assert log.model.vpt["num_prompts"] == 10
    assert log.seen == {"data.num_frames", "model.vpt.num_prompts"}
    assert "patch_size" in list(log.backbone)

"""Checks how config files are found and loaded, and which key a wrong override is answered with."""

import pytest

from dualpath_jax.config import loading, schema

USER_CONFIG = """
from dualpath_jax.config import schema


def get_config(variant: str = "1"):
    config = schema.get_config()
    config.seed = int(variant)
    return config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(path, text=USER_CONFIG):
    """Write a config file of the user's and make its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("variant", ["", ":7"])
@pytest.mark.parametrize("name", ["configs/mine.py", "mine", "mine.py", "other/mine.py"])
def test_file_of_the_user(name, variant, folder, capsys):
    """Check a path, and a bare name, which is looked for in ./configs."""
    for path in ("configs/mine.py", "other/mine.py"):
        write_config(folder / path)
    path = name if "/" in name else "configs/mine.py"
    assert loading.find_config_file(name + variant) == path + variant
    assert loading.load_config(name + variant).seed == int(variant[1:] or 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variant", ["", ":48"])
@pytest.mark.parametrize("name", ["ssv2_vitb", "ssv2_vitb.py", "configs/ssv2_vitb.py"])
def test_packaged_file(name, variant, folder, capsys):
    """Check that packaged files are found anywhere, with a line where a path is not there."""
    packaged = str(loading.packaged_configs() / "ssv2_vitb.py")
    assert loading.find_config_file(name + variant) == packaged + variant
    line = f"{name} is not in this folder: using the packaged file\n" if "/" in name else ""
    assert capsys.readouterr().err == line
    assert loading.load_config(name + variant).data.num_frames == int(variant[1:] or 16)


def test_file_of_the_user_comes_before_the_packaged_one(folder):
    write_config(folder / "configs" / "demo.py")
    assert loading.find_config_file("demo") == "configs/demo.py"


@pytest.mark.parametrize("name", ["folder_vitb", "configs/folder_vitb.py"])
def test_old_name_of_a_file_works_and_says_the_new_one(name, folder, capsys):
    write_config(folder / "configs" / "finetune.py")
    assert loading.find_config_file(name) == "configs/finetune.py"
    line = f"{name} was replaced by finetune.py, which is another recipe\n"
    assert capsys.readouterr().err == line
    write_config(folder / "configs" / "folder_vitb.py")  # the user's own
    assert loading.find_config_file(name) == "configs/folder_vitb.py"
    with pytest.raises(FileNotFoundError, match="there is no config file 'other/folder_vitb.py'"):
        loading.find_config_file("other/folder_vitb.py")


@pytest.mark.parametrize("name", ["nothing", "configs/nothing.py:16", "other/demo.py", "base.txt"])
def test_missing_file(name, folder):
    path = name.partition(":")[0]
    with pytest.raises(FileNotFoundError, match=f"there is no config file '{path}'") as caught:
        loading.find_config_file(name)
    known = str(caught.value).partition("packaged are ")[2].split(", ")
    assert {"demo", "finetune", "ssv2_vitb"} <= set(known)
    assert not {"base", "__init__"} & set(known)


@pytest.mark.parametrize(
    ("overrides", "steps", "printed"),
    [
        (["--config.num_epochs=2"], None, "num_epochs=2 replaces num_train_steps=1000\n"),
        (["--config.num_epochs=2", "--config.num_train_steps=9"], 9, ""),
        ([], 1000, ""),
    ],
)
def test_num_epochs_of_the_command_line_wins(overrides, steps, printed, capsys):
    config = loading.load_config("demo", overrides)
    assert config.num_train_steps == steps
    assert capsys.readouterr().err == printed


def test_load_config_with_overrides(capsys):
    overrides = [
        "--config.data.batch_size=8",
        "--config.model.class_only=False",
        "--config.model.remat=cheap",
    ]
    config = loading.load_config("demo", overrides)
    assert config.data.batch_size == 8
    assert config.model.cls_token_only is False
    assert config.model.remat == "save_matmuls"
    assert capsys.readouterr().err.splitlines() == [
        f"{overrides[1]} is now called --config.model.cls_token_only=False",
        f"{overrides[2]} is now called --config.model.remat=save_matmuls",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.data.batch_sise=8", "no key 'data.batch_sise': did you mean data.batch_size?"),
        ("--config.data.batch_size=many", "flag --config.data.batch_size=many: invalid literal"),
        ("batch_size=8", "unexpected arguments: batch_size=8"),
    ],
)
def test_wrong_override(override, message):
    with pytest.raises(ValueError, match=message):
        loading.load_config("demo", [override])


def test_old_names_of_other_arguments_stay():
    arguments = ["--model.remat=cheap", "--config", "demo", "model.class_only", "--config.seed=1"]
    assert loading.rename_overrides(arguments) == arguments
    renamed = loading.rename_overrides(["-config.model.class_only", "False"])
    assert renamed == ["--config.model.cls_token_only", "False"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        # Names of other projects.
        ("lr", "optimizer.learning_rate"),
        ("wd", "optimizer.weight_decay"),
        ("epochs", "num_epochs"),
        ("bs", "data.batch_size"),
        ("frames", "data.num_frames"),
        ("optimizer.lr", "optimizer.learning_rate"),
        # A component is misspelled, or the group is missing or another one.
        ("optimizer.learning_rte", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.learning_rte", "optimizer.learning_rate"),
        ("model.num_frame", "data.num_frames"),
        ("seeed", "seed"),
        ("data.batchsize", "data.batch_size or eval.batch_size"),
    ],
)
def test_hint_for_an_unknown_key(key, meant):
    message = loading.find_unknown_override(["--quiet", f"--config.{key}=1"])
    assert message.startswith(f"the configuration has no key {key!r}: did you mean {meant}")
    assert message.endswith("? (--help_config lists all keys)")


def test_every_alias_is_a_key():
    names = {key.name for key in schema.KEYS}
    assert set(loading._ALIASES.values()) <= names
    assert set(schema.RENAMED_KEYS.values()) <= names
    assert not names & {*loading._ALIASES, *schema.RENAMED_KEYS}
    for (key, old), new in schema.RENAMED_VALUES.items():
        assert new in schema.choices(key)
        assert old not in schema.choices(key)


def test_unknown_key_without_a_hint():
    message = "the configuration has no key 'xyz' (--help_config lists all keys)"
    assert loading.describe_unknown_key("xyz") == message


def test_group_is_not_a_key():
    message = loading.describe_unknown_key("model.vpt")
    assert message.startswith("config.model.vpt is a group of keys: name one of them")


def test_known_keys_have_no_message():
    names = [key.name for key in schema.KEYS]
    assert [name for name in names if loading.describe_unknown_key(name)] == []
    arguments = ["--config=demo", "--config.seed=1", "--config.model.class_only=True", "--mode=x"]
    assert loading.find_unknown_override(arguments) is None


def test_unknown_key_of_a_config_file():
    config = schema.get_config()
    loading.check_known_keys(config)
    config.optimizer.learning_rte = 0.1
    with pytest.raises(ValueError, match="no key 'optimizer.learning_rte': did you mean optimizer"):
        loading.check_known_keys(config)


def test_old_names_in_a_config_file(folder, capsys):
    """Check that a user's file of version 0.1.0 loads, and that a misspelled key is an error."""
    old = "    config.model.class_only = False\n    config.model.remat = 'cheap'\n"
    write_config(folder / "mine.py", USER_CONFIG.replace("    return", f"{old}    return"))
    config = loading.load_config("./mine.py")
    assert config.model.cls_token_only is False
    assert config.model.remat == "save_matmuls"
    assert "class_only" not in config.model
    assert capsys.readouterr().err.count(" is now called config.model.") == 2
    write_config(folder / "mine.py", USER_CONFIG.replace("config.seed", "config.sed"))
    with pytest.raises(ValueError, match="no key 'sed': did you mean seed"):
        loading.load_config("./mine.py")

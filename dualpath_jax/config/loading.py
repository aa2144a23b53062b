"""Finds config files and loads them, with overrides as on the command line.

`--config` means the same everywhere: the path of a file, or the name of one ("ssv2_vitb"), with
":VARIANT" after either. A name is looked for in ./configs and then among the files of this package.
"""

import difflib
import os
import pathlib
import sys
from collections.abc import Collection, Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from dualpath_jax.config import schema
from dualpath_jax.config.values import apply_renames, flatten_config

_PACKAGE = pathlib.Path(__file__).parents[1]
# Short names that users of other projects try first.
_ALIASES = {
    "batch": "data.batch_size",
    "bs": "data.batch_size",
    "epochs": "num_epochs",
    "frames": "data.num_frames",
    "lr": "optimizer.learning_rate",
    "steps": "num_train_steps",
    "warmup": "optimizer.warmup_epochs",
    "wd": "optimizer.weight_decay",
}


_PATHS = ("data.dir", "data.label_swap", "backbone.checkpoint", "init_from")
# Config files of older versions -> the files that replace them.
_REPLACED_FILES = {"folder_vitb": "finetune"}


def packaged_configs() -> pathlib.Path:
    """Return the folder of this package's config files, in a wheel or in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find_config_file(name: str) -> str:
    """Return the path of a config file, with the variant that `name` has after a colon.

    Args:
      name: "configs/demo.py", "demo", "configs/ssv2_vitb.py:32" or "ssv2_vitb:32". A file of
        ./configs that is not there is taken from the package, with a line on standard error.
        "runs/demo/config.json", or another saved configuration, becomes the argument of
        `saved_config`.

    Raises:
      FileNotFoundError: there is no such file; the message lists the packaged ones.
    """
    if name.endswith(".json"):
        if not epath.Path(name).exists():
            raise FileNotFoundError(f"there is no saved configuration {name!r}")
        return f"{_PACKAGE / 'config' / 'saved_config.py'}:{name}"
    path, colon, variant = name.partition(":")
    if os.path.isfile(path):
        return name
    if not os.path.dirname(path):
        stem = path.removesuffix(".py")
        for folder in (pathlib.Path("configs"), packaged_configs()):
            if (folder / f"{stem}.py").is_file():
                return f"{folder / stem}.py{colon}{variant}"
    elif os.path.dirname(path) == "configs":
        packaged = packaged_configs() / os.path.basename(path)
        if packaged.is_file():
            print(f"{path} is not in this folder: using the packaged file", file=sys.stderr)
            return f"{packaged}{colon}{variant}"
    folder, stem = os.path.split(path.removesuffix(".py"))
    if stem in _REPLACED_FILES and folder in ("", "configs"):
        new = _REPLACED_FILES[stem]
        print(f"{path} was replaced by {new}.py, which is another recipe", file=sys.stderr)
        return find_config_file(f"{new}{colon}{variant}")
    known = sorted(file.stem for file in packaged_configs().glob("[!_]*.py"))
    known = ", ".join(known_name for known_name in known if known_name != "base")
    raise FileNotFoundError(f"there is no config file {path!r}; packaged are {known}")


def default_workdir(config_file: str) -> str:
    """Return the workdir of a run whose command line names none.

    Args:
      config_file: a path of `find_config_file`.

    Returns:
      runs/NAME, the name of the config file. The config.json of a run belongs to its own folder.
    """
    path, _, argument = config_file.partition(":")
    if not argument.endswith(".json"):
        return f"runs/{pathlib.Path(path).stem}"
    folder, name = os.path.split(argument)
    return folder or "." if name == "config.json" else f"runs/{name.removesuffix('.json')}"


def load_config(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load a config file as `--config` of the command line does.

    Args:
      name: see `find_config_file`.
      overrides: arguments such as "--config.data.batch_size=8".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an override or the file names an unknown key, or a value is not of its key's type.
    """
    values = flags.FlagValues()
    arguments = ["", f"--config={find_config_file(name)}", *rename_overrides(overrides)]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        left = values(arguments)
    except (AttributeError, KeyError):
        if unknown := find_unknown_override(overrides):
            raise ValueError(unknown) from None
        raise
    except flags.Error as error:
        raise ValueError(find_unknown_override(overrides) or str(error)) from None
    if len(left) > 1:
        raise ValueError(f"unexpected arguments: {' '.join(left[1:])}")
    config = values["config"].value
    prefer_num_epochs(config, config_flags.get_override_values(values["config"]))
    upgrade_config(config)
    return config


def prefer_num_epochs(config: ConfigDict, overridden: Collection[str]) -> None:
    """Unset a config file's `num_train_steps` where the command line sets only `num_epochs`.

    Args:
      config: changed in place, with a line on standard error.
      overridden: keys that the command line sets.
    """
    steps = config.num_train_steps
    if steps is None or "num_epochs" not in overridden or "num_train_steps" in overridden:
        return
    config.num_train_steps = None
    print(f"num_epochs={config.num_epochs} replaces num_train_steps={steps}", file=sys.stderr)


def upgrade_config(config: ConfigDict) -> None:
    """Rename keys and values of older versions in place, with a line on standard error for each.

    "~" at the beginning of a path is replaced by the home folder.

    Raises:
      ValueError: the config file sets a key that does not exist.
    """
    with config.unlocked():
        for line in apply_renames(config):
            print(line, file=sys.stderr)
    check_known_keys(config)
    values = flatten_config(config)
    config.update_from_flattened_dict(
        {name: os.path.expanduser(values[name]) for name in _PATHS if values[name]}
    )


def rename_overrides(arguments: Sequence[str]) -> list[str]:
    """Replace keys and values of older versions in `arguments`, with a line on standard error."""
    renamed = []
    for argument in arguments:
        key, equals, value = _split_override(argument)
        if key in schema.RENAMED_KEYS:
            new = f"--config.{schema.RENAMED_KEYS[key]}{equals}{value}"
        elif (key, value) in schema.RENAMED_VALUES:
            new = f"--config.{key}={schema.RENAMED_VALUES[key, value]}"
        else:
            new = argument
        if new != argument:
            print(f"{argument} is now called {new}", file=sys.stderr)
        renamed.append(new)
    return renamed


def _split_override(argument: str) -> tuple[str | None, str, str]:
    """Split "--config.KEY=VALUE" into (KEY, "=", VALUE); KEY is None for other arguments."""
    name, equals, value = argument.partition("=")
    stripped = name.lstrip("-")
    if name == stripped or not stripped.startswith("config."):
        return None, equals, value
    return stripped.removeprefix("config."), equals, value


def find_overridden_keys(arguments: Sequence[str]) -> list[str]:
    """Return the dotted keys, by their present names, that arguments "--config.KEY=VALUE" set."""
    keys = [key for key, _, _ in map(_split_override, arguments) if key is not None]
    return [schema.RENAMED_KEYS.get(key, key) for key in keys]


def find_unknown_override(arguments: Sequence[str]) -> str | None:
    """Return an error message for the first override of a key that does not exist, or None."""
    for argument in arguments:
        key, _, _ = _split_override(argument)
        if key is not None and (message := describe_unknown_key(key)):
            return message
    return None


def describe_unknown_key(key: str) -> str | None:
    """Return an error message with the key that was probably meant; None for a known key."""
    names = [known.name for known in schema.KEYS]
    if key in names or key in schema.RENAMED_KEYS:
        return None
    if any(name.startswith(f"{key}.") for name in names):
        return f"config.{key} is a group of keys: name one of them, --help_config lists all"
    # By the last component: users forget the group more often than they misspell a name.
    last = key.split(".")[-1]
    by_last: dict[str, list[str]] = {}
    for name in names:
        by_last.setdefault(name.split(".")[-1], []).append(name)
    close = [_ALIASES[last]] if last in _ALIASES else []
    for match in difflib.get_close_matches(last, by_last, n=2, cutoff=0.7):
        close += [name for name in by_last[match] if name not in close]
    hint = f": did you mean {' or '.join(close[:3])}?" if close else ""
    return f"the configuration has no key {key!r}{hint} (--help_config lists all keys)"


def check_known_keys(config: ConfigDict) -> None:
    """Raise ValueError for a key that a config file sets and that does not exist."""
    for key in flatten_config(config):
        if message := describe_unknown_key(key):
            raise ValueError(message)

"""Checks how command lines are parsed and how errors are reported, without running commands."""

import argparse
import subprocess
import sys

import pytest
from absl import flags, logging

from dualpath_jax import cli, main
from dualpath_jax.config import loading, schema
from dualpath_jax.runtime.preemption import Interrupted, Preempted
from tests.helpers.processes import ROOT, make_environment


def exit_code(function, *args):
    """Return the status with which a call ends the process."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    return end.value.code


def test_help_config_prints_every_key(monkeypatch, capsys):
    """Check that it needs no config file, and ignores other arguments."""
    monkeypatch.setattr(sys, "argv", ["main", "--mode=nonsense", "--help_config"])
    assert exit_code(cli.run_app, main.run, main.__doc__) == 0
    assert capsys.readouterr().out == schema.format_keys() + "\n"


def test_config_flag_takes_a_path_or_a_name(monkeypatch):
    """Check `--config=NAME`, and `--config NAME`, whose value is the next argument."""
    monkeypatch.chdir(loading.packaged_configs().parent)
    arguments = ["--mode=check", "--config", "ssv2_vitb:32", "-config=demo", "--config.seed=1"]
    assert cli._find_config_files(arguments) == [
        *("--mode=check", "--config", "configs/ssv2_vitb.py:32"),
        *("-config=configs/demo.py", "--config.seed=1"),
    ]
    with pytest.raises(FileNotFoundError, match="there is no config file 'nothing'"):
        cli._find_config_files(["--config=nothing"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config=nothing", "there is no config file 'nothing'; packaged are "),
        (
            "--config.lr=1",
            "the configuration has no key 'lr': did you mean optimizer.learning_rate",
        ),
        ("--config.data=1", "config.data is a group of keys: name one of them"),
        ("--config.seed=x", "flag --config.seed=x: invalid literal"),
        ("--mode=trian", "flag --mode=trian: value should be one of <train|eval|check>"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    ],
)
def test_wrong_flag_is_one_line(argument, message, monkeypatch, capsys):
    arguments = ["main", "--config=demo", argument]
    monkeypatch.setattr(sys, "argv", arguments)
    saved = flags.FLAGS.flag_values_dict().keys()
    try:
        assert exit_code(cli._parse_flags, list(arguments)) == 2
    finally:
        for name in [name for name in flags.FLAGS if name not in saved]:
            delattr(flags.FLAGS, name)  # flags of the overrides
        flags.FLAGS.unparse_flags()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_parse_with_overrides(capsys):
    parser = cli.build_parser("Does nothing.\n\n    an example")
    parser.add_argument("--out")
    arguments = ["--out=x", "--config.seed=1", "--config.data.batch_size=2"]
    options, overrides = cli.parse_with_overrides(parser, arguments)
    assert options.out == "x"
    assert overrides == arguments[1:]
    for wrong in ("--config.seed", "--other=1", "word"):
        assert exit_code(cli.parse_with_overrides, parser, [wrong]) == 2
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
    assert "    an example" in parser.format_help()


def test_positive_numbers():
    number, count = cli.positive(float), cli.positive(int)
    assert (number("0.5"), count("3")) == (0.5, 3)
    for kind, text in ((number, "0"), (number, "nan"), (count, "-1")):
        with pytest.raises(argparse.ArgumentTypeError, match="is not positive"):
            kind(text)
    with pytest.raises(ValueError, match="invalid literal"):
        count("0.5")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("wrong"), 2, "error: wrong"),
        (OSError("gone"), 2, "error: gone"),
        (FloatingPointError("nan"), 2, "error: nan"),
        (Preempted("stopped"), 75, "stopped; the same command resumes there"),
        (Interrupted("stopped"), 130, "stopped; the same command resumes there"),
    ],
)
def test_errors_of_the_user_are_one_line(error, status, text, capsys):
    def fail():
        with cli.user_errors():
            raise error

    assert exit_code(fail) == status
    assert capsys.readouterr().err == f"{text}\n"
    logging.set_verbosity(logging.DEBUG)
    assert exit_code(fail) == status
    has_traceback = "Traceback" in capsys.readouterr().err
    assert has_traceback == (status == 2)


def test_other_errors_are_raised():
    with pytest.raises(KeyError), cli.user_errors():
        raise KeyError("a mistake of this package")


def test_home_is_expanded(monkeypatch, tmp_path):
    """Check options, positional arguments and the keys of a config; other texts stay."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = cli.build_parser("doc")
    parser.add_argument("--out")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args(["--out=~/a=b", "~/c.mp4", "d~e.mp4"])
    assert (options.out, options.files) == (f"{tmp_path}/a=b", [f"{tmp_path}/c.mp4", "d~e.mp4"])
    assert parser.parse_args(["--out", "~/a"]).out == f"{tmp_path}/a"
    config = loading.load_config("demo", ["--config.init_from=~/a.safetensors"])
    assert config.init_from == f"{tmp_path}/a.safetensors"
    assert config.data.dir == "data/demo"
    assert cli.expand_home(["--workdir=~/runs", "--config=demo"]) == [
        f"--workdir={tmp_path}/runs",
        "--config=demo",
    ]


@pytest.mark.parametrize("command", ["train", "predict", "convert", "prepare"])
def test_too_little_memory_is_one_line(command, tmp_path):
    """Check a limit on the address space, in which JAX and TensorFlow would abort."""
    options = {
        "train": ["--config=configs/demo.py", f"--workdir={tmp_path}"],
        "predict": ["--workdir=runs/x", "x.mp4"],
        "convert": ["--checkpoint=x", "--out=y"],
        "prepare": ["--dataset=folder", "--videos=x", "--out=y"],
    }
    limited = ["bash", "-c", 'ulimit -v 3145728; exec "$0" "$@"']
    result = subprocess.run(
        [*limited, sys.executable, "-m", "dualpath_jax", command, *options[command]],
        env=make_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    expected = "error: this process is limited to 3.0 GB of address space (ulimit -v), and JAX and"
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1

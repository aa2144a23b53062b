"""Checks --help of every command: a description, an example, every option with its default."""

import argparse
import importlib
import subprocess
import sys

import pytest

from dualpath_jax import __main__ as dualpath
from dualpath_jax.runtime import command_line
from tests.helpers.documents import ROOT
from tests.test_docs import script

ABSL = {
    "scripts/compile_tpu.py": ["scripts/compile_tpu.py"],
    "main": ["-m", "dualpath_jax.main"],
}
SCRIPTS = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "scripts").glob("*.py") if p.name != "__init__.py"
)
# Scripts that run a subcommand of `dualpath`, and its name.
SUBCOMMANDS = {f"scripts/{script}.py": name for name, script in command_line.SCRIPTS.items()}


def format_default(default):
    """Return the ways in which the help may state a default, {""} if it need not."""
    if default in (None, False, argparse.SUPPRESS):
        return {""}
    if isinstance(default, (list, tuple)):
        return {" ".join(map(str, default)), "all"}
    if isinstance(default, str):
        return {default}
    return {str(default), f"{default:,}", f"{default:g}"}


def find_help_faults(parser):
    """Return what the help of a parser lacks, as a list of messages."""
    faults = []
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else action.dest
        if not action.help:
            faults.append(f"{name} has no help")
        elif not any(
            (text and f"({text})") in action.help for text in format_default(action.default)
        ):
            faults.append(f"{name} does not state its default, {action.default}")
    return faults


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ABSL])
def test_help_of_scripts(name, capsys):
    parser = script(name).parser()
    assert find_help_faults(parser) == []
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    if name in SUBCOMMANDS:
        assert f"    dualpath {SUBCOMMANDS[name]} " in text  # an example
        assert f"In a checkout, python {name} is the same command." in text
    else:
        assert f"    python {name}" in text
    assert all(option in text for action in parser._actions for option in action.option_strings)


def test_faults_of_help_are_found():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=5, help="in pixels (6)")
    parser.add_argument("--out", help="a file")
    assert find_help_faults(parser) == [
        "--steps has no help",
        "--size does not state its default, 5",
    ]


@pytest.mark.parametrize("arguments", ABSL.values(), ids=ABSL)
def test_help_of_absl(arguments):
    result = subprocess.run(
        [sys.executable, *arguments, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "    python " in result.stdout
    assert "--config: " in result.stdout
    assert "configs/" in result.stdout
    assert "--verbosity" not in result.stdout  # a flag of absl
    if "-m" in arguments:
        assert "--config.KEY=VALUE" in result.stdout
        assert "--help_config" in result.stdout
        for option in ("workdir", "mode", "[no]quiet", "coordinator_address", "process_id"):
            assert f"--{option}: " in result.stdout


@pytest.mark.parametrize("name", ["scripts/rerun.sh", "scripts/tpu_pod.sh"])
def test_help_of_shell_scripts(name):
    result = subprocess.run(["bash", name, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert f"{name} " in result.stdout


def run_dualpath(capsys, *arguments):
    """Run `dualpath` in this process; return (exit status, output, errors)."""
    with pytest.raises(SystemExit) as end:
        dualpath.main(arguments)
    return end.value.code, *capsys.readouterr()


def test_help_of_dualpath(capsys):
    for arguments, status in (((), 2), (("--help",), 0), (("help",), 0)):
        code, output, _ = run_dualpath(capsys, *arguments)
        assert code == status
        assert all(f"\n  {name} " in output for name in dualpath.COMMANDS)
    assert run_dualpath(capsys, "nothing")[::2] == (
        2,
        f"error: unknown command 'nothing': known are {', '.join(dualpath.COMMANDS)}\n",
    )


def test_subcommands_are_the_scripts(monkeypatch):
    """Check that each subcommand has its script, and that both run the same function."""
    commands = {name: module for name, (module, *_) in dualpath.COMMANDS.items()}
    assert command_line.SCRIPTS.keys() == {n for n, m in commands.items() if ".commands." in m}
    for name, script_name in command_line.SCRIPTS.items():
        module = importlib.import_module(commands[name])
        wrapper = importlib.import_module(f"scripts.{script_name}")
        assert (wrapper.main, wrapper.parser) == (module.main, module.parser)
        assert command_line.command_line(name) == f"python scripts/{script_name}.py"
    monkeypatch.setattr(command_line, "_ROOT", ROOT / "nowhere")  # an installation has no scripts
    assert command_line.command_line("prepare") == "dualpath prepare"


def test_subcommand_runs_with_its_arguments(monkeypatch, capsys):
    """Check the arguments that `main` of a subcommand gets, and the exit status."""
    seen = []
    monkeypatch.setattr("dualpath_jax.main.main", lambda: seen.append(sys.argv))
    monkeypatch.setattr("dualpath_jax.commands.report.main", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert run_dualpath(capsys, "check", "--config=demo")[0] is None
    assert run_dualpath(capsys, "demo")[0] is None
    assert seen == [
        ["dualpath check", "--mode=check", "--config=demo"],
        ["dualpath demo", "--config=demo"],
    ]
    assert run_dualpath(capsys, "report", "--workdir=x")[0] == 3

"""--help of every command line: description, an example, every option with its default."""

import argparse
import subprocess
import sys

import pytest

from tests.helpers.documents import ROOT
from tests.test_docs import script

ABSL = {
    "scripts/compile_tpu.py": ["scripts/compile_tpu.py"],
    "main": ["-m", "dualpath_jax.main"],
}
SCRIPTS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "scripts").glob("*.py"))


def shown(default):
    """The ways in which a default may be written; none at all where there is none to tell."""
    if default in (None, False, argparse.SUPPRESS):
        return {""}
    if isinstance(default, (list, tuple)):
        return {" ".join(map(str, default)), "all"}
    if isinstance(default, str):
        return {default}
    return {str(default), f"{default:,}", f"{default:g}"}


def faults(parser):
    """What is missing in the help of a parser."""
    found = []
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else action.dest
        if not action.help:
            found.append(f"{name} has no help")
        elif not any((text and f"({text})") in action.help for text in shown(action.default)):
            found.append(f"{name} does not tell its default, {action.default}")
    return found


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ABSL])
def test_help_of_scripts(name, capsys):
    parser = script(name).parser()
    assert faults(parser) == []
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"    python {name}" in text  # an example
    assert all(option in text for action in parser._actions for option in action.option_strings)


def test_faults_are_found():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=5, help="in pixels (6)")
    parser.add_argument("--out", help="a file")
    assert faults(parser) == ["--steps has no help", "--size does not tell its default, 5"]


@pytest.mark.parametrize("arguments", ABSL.values(), ids=ABSL)
def test_help_of_absl(arguments):
    done = subprocess.run(
        [sys.executable, *arguments, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "    python " in done.stdout
    assert "--config: " in done.stdout
    assert "configs/" in done.stdout
    assert "--verbosity" not in done.stdout  # absl's own
    if "-m" in arguments:
        assert "--config.KEY=VALUE" in done.stdout
        assert "dualpath_jax/config/schema.py" in done.stdout
        for option in ("workdir", "mode", "[no]quiet", "coordinator_address", "process_id"):
            assert f"--{option}: " in done.stdout


@pytest.mark.parametrize("name", ["scripts/rerun.sh", "scripts/tpu_pod.sh"])
def test_help_of_shell_scripts(name):
    done = subprocess.run(["bash", name, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert f"{name} " in done.stdout

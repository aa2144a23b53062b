"""Tests scripts/tpu_pod.sh (printed commands, arguments of gcloud) and scripts/rerun.sh."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLACE = ["--name=my-pod", "--zone=us-west4-a"]
SSH = "gcloud compute tpus tpu-vm ssh my-pod --zone=us-west4-a --worker=all"
APT = "sudo apt-get -o DPkg::Lock::Timeout=600"
ARGUMENTS = ["--config=configs/ssv2_vitb.py", "--workdir=gs://b/my run", "--config.x=it's $HOME"]
HOST_COMMAND = (
    "cd dualpath_jax || exit; if ! flock -n run.lock true; then "
    'echo "a run is going on on $(hostname): stop it first" >&2; exit 1; fi; '
    "nohup setsid flock run.lock scripts/rerun.sh .venv/bin/python -m dualpath_jax.main "
    "--config=configs/ssv2_vitb.py '--workdir=gs://b/my run' '--config.x=it'\\''s $HOME' "
    ">> run.log 2>&1 < /dev/null & echo $! > run.pid"
)

# A fake gcloud, which notes its arguments; for ssh it runs the command in $POD_HOME like a host.
GCLOUD = f"""#!{sys.executable}
import json, os, subprocess, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
status = int(os.environ.get("STATUS", 0))
command = [a.removeprefix("--command=") for a in sys.argv if a.startswith("--command=")]
if command and "POD_HOME" in os.environ:
    home = os.environ["POD_HOME"]
    status = subprocess.run(["bash", "-c", command[0]], cwd=home).returncode
sys.exit(status)
"""


@pytest.fixture
def pod(tmp_path):
    """Return a function that calls the script with a fake gcloud, which notes its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    gcloud = folder / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()

    def call(*arguments, **environment):
        inherited = {k: value for k, value in os.environ.items() if not k.startswith("POD_")}
        path = f"{folder}:{os.environ['PATH']}"
        return subprocess.run(
            [ROOT / "scripts" / "tpu_pod.sh", *arguments],
            env=inherited | {"PATH": path, "CALLS": str(calls)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    call.calls = lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    return call


def printed(pod, *arguments, **environment):
    """Return the lines that --dry_run prints, and check that it does not call gcloud."""
    result = pod(*arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert pod.calls() == []
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--accelerator=v5litepod-16"],
            "tpu-vm create my-pod --zone=us-west4-a --accelerator-type=v5litepod-16 "
            "--version=v2-alpha-tpuv5-lite",
        ),
        (
            ["--accelerator=v4-32", "--spot", "--project=mine"],
            "tpu-vm create my-pod --zone=us-west4-a --project=mine --accelerator-type=v4-32 --spot "
            "--version=tpu-ubuntu2204-base",
        ),
        (
            ["--accelerator=v6e-16", "--spot", "--queued"],
            "queued-resources create my-pod --node-id=my-pod --zone=us-west4-a "
            "--accelerator-type=v6e-16 --spot --runtime-version=v2-alpha-tpuv6e",
        ),
        (
            ["--accelerator=v5p-16", "--version=a b"],
            "tpu-vm create my-pod --zone=us-west4-a --accelerator-type=v5p-16 '--version=a b'",
        ),
    ],
)
def test_create(pod, options, line):
    assert printed(pod, "create", *PLACE, *options, "--dry_run") == [f"gcloud compute tpus {line}"]


def test_setup_copies_this_folder(pod):
    archive = f"{ROOT}/runs/my-pod.tar.gz"
    options = ["--data=gs://b/k400", "--data_to=my data", "--dry_run"]
    assert printed(pod, "setup", *PLACE, *options) == [
        f"mkdir -p {ROOT}/runs",
        f"bash -o pipefail -c 'git -C {ROOT} ls-files -z --cached --others --exclude-standard | "
        f"tar -C {ROOT} --null -T - -czf {archive}'",
        f"gcloud compute tpus tpu-vm scp {archive} my-pod:dualpath_jax.tar.gz --zone=us-west4-a "
        "--worker=all",
        f"{SSH} '--command=mkdir -p dualpath_jax && tar -C dualpath_jax -xzf dualpath_jax.tar.gz'",
        f"{SSH} '--command=python3.11 -m ensurepip --version || {{ {APT} update && {APT} install "
        "-y python3.11 python3.11-venv; }'",
        f"{SSH} '--command=cd dualpath_jax && python3.11 -m venv .venv && .venv/bin/pip install -r "
        "requirements.txt '\\''jax[tpu]'\\'' '\\''array_record>=0.8.6'\\'' "
        "'\\''google-cloud-storage>=3.0'\\'''",
        f"{SSH} '--command=cd dualpath_jax && mkdir -p '\\''my data'\\'' && gcloud storage rsync "
        "--recursive gs://b/k400 '\\''my data'\\'''",
    ]


def test_setup_installs_the_extras(pod):
    """Check that a host gets the packages of the extras `tpu` and `gcs` of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    line = printed(pod, "setup", *PLACE, "--dry_run")[-1]
    installed = shlex.split(shlex.split(line)[-1].partition("pip install ")[2])
    assert installed == ["-r", "requirements.txt", "jax[tpu]", *extras["gcs"]]
    assert {requirement.partition(">")[0] for requirement in extras["tpu"]} == {"jax[tpu]"}


def test_setup_clones_a_repository(pod):
    lines = printed(pod, "setup", *PLACE, "--repository=https://h/a.git", "--dry_run")
    assert lines[0] == (
        f"{SSH} '--command=if [ -d dualpath_jax/.git ]; then git -C dualpath_jax pull --ff-only; "
        "else git clone https://h/a.git dualpath_jax; fi'"
    )
    assert len(lines) == 3  # then Python and the packages


def test_the_other_verbs(pod):
    place = "my-pod --zone=us-west4-a"
    (line,) = printed(pod, "delete", *PLACE, "--dry_run")
    assert line == f"gcloud compute tpus tpu-vm delete {place}"
    (line,) = printed(pod, "delete", *PLACE, "--queued", "--dry_run")
    assert line == f"gcloud compute tpus queued-resources delete {place} --force"
    (line,) = printed(pod, "stop", *PLACE, "--dry_run")
    assert line == f"{SSH} '--command=cd dualpath_jax && kill -TERM -- \"-$(cat run.pid)\"'"
    state, hosts = printed(pod, "status", *PLACE, "--dry_run")
    assert state == f"gcloud compute tpus tpu-vm describe {place} '--format=value(state)'"
    assert hosts.startswith(
        f"{SSH} '--command=cd dualpath_jax || exit; if flock -n run.lock true; then"
    )
    assert hosts.endswith("; tail -n 3 run.log'")


def test_printed_command_equals_gclouds_arguments(pod):
    (line,) = printed(pod, "run", *PLACE, "--dry_run", "--", *ARGUMENTS)
    *words, command = shlex.split(line)
    assert words == shlex.split(SSH)
    assert command == f"--command={HOST_COMMAND}"
    assert pod("run", *PLACE, "--", *ARGUMENTS).returncode == 0
    assert pod.calls() == [shlex.split(line)[1:]]


def test_environment_variables_replace_options(pod):
    environment = {"POD_NAME": "my-pod", "POD_ZONE": "us-west4-a", "POD_QUEUED": "1"}
    expected = printed(pod, "delete", *PLACE, "--queued", "--dry_run")
    assert printed(pod, "delete", "--dry_run", **environment) == expected


def test_a_failing_gcloud_ends_setup_with_its_status(pod):
    result = pod("setup", *PLACE, "--repository=https://h/a.git", STATUS="7")
    assert result.returncode == 7
    assert len(pod.calls()) == 1  # no call after the failed one
    assert pod("delete", *PLACE, STATUS="3").returncode == 3
    assert pod("delete", *PLACE, STATUS="0").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start"], "unknown verb 'start': it is one of create, setup, run, status, stop, delete"),
        ([], "unknown verb ''"),
        (["create", "--zone=us-west4-a"], "--name= must be the slice's name: small letters"),
        (["create", "--name=My_Pod", "--zone=us-west4-a"], "--name=My_Pod must be"),
        (["create", "--name=a"], "--zone= must be a zone such as us-west4-a"),
        (
            ["create", *PLACE],
            "--accelerator= must be a type and a number, such as v4-16",
        ),
        (
            ["create", *PLACE, "--accelerator=h100"],
            "--accelerator=h100 must be a type and a number",
        ),
        (["create", *PLACE, "--accelerator=v5litepod"], "v5litepod-16, v5p-16 or v6e-16"),
        (["create", *PLACE, "--cheap"], "unknown option '--cheap' of create"),
        (["stop", *PLACE, "--", "--config=a"], "only run takes arguments behind --, stop got"),
        (["setup", *PLACE, "--data=/d", "--data_to=d"], "--data=/d must be a folder in Cloud"),
        (["setup", *PLACE, "--data=gs://b/d"], "--data=gs://b/d needs --data_to=FOLDER"),
        (["setup", *PLACE, "--data_to=d"], "--data_to=d needs --data=gs://BUCKET/FOLDER"),
        (["run", *PLACE], "run needs the arguments of dualpath_jax.main: -- --config="),
        (["run", *PLACE, "--config=a"], "unknown option '--config=a' of run"),
    ],
)
def test_bad_input_is_named_before_anything_runs(pod, arguments, message):
    result = pod(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert pod.calls() == []


def test_without_gcloud(tmp_path):
    for tool in ("bash", "env", "dirname", "sed"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    result = subprocess.run(
        [ROOT / "scripts" / "tpu_pod.sh", "delete", *PLACE],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "there is no gcloud: install the Google Cloud CLI" in result.stderr


@pytest.fixture
def host(tmp_path):
    """Make the home of a host after setup; a script that saves at SIGTERM replaces Python."""
    repository = tmp_path / "home" / "dualpath_jax"
    (repository / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "rerun.sh", repository / "scripts")
    python = repository / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\ntrap "echo saved; exit 75" TERM\nprintf "[%s]" "$@"; echo\n'
        "echo $$ > pid; mv pid started\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    return repository


def wait_for(condition):
    """Wait until condition() is true; fails after 30 s."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition did not become true within 30 s")


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock, as on Linux")
def test_run_status_and_stop_on_a_host(pod, host):
    environment = {"POD_HOME": str(host.parent), "HOME": "/nowhere", "RERUN_SECONDS": "0"}
    log = host / "run.log"
    assert pod("run", *PLACE, "--", *ARGUMENTS, **environment).returncode == 0  # returns at once
    wait_for((host / "started").exists)
    assert log.read_text().startswith(
        "[-m][dualpath_jax.main][--config=configs/ssv2_vitb.py][--workdir=gs://b/my run]"
        "[--config.x=it's $HOME]\n"
    )
    second = pod("run", *PLACE, "--", *ARGUMENTS, **environment)
    assert second.returncode == 1
    assert "stop it first" in second.stderr
    assert "a run is going on\n" in pod("status", *PLACE, **environment).stdout

    program = int((host / "started").read_text())
    (host / "started").unlink()
    os.kill(program, signal.SIGTERM)  # only the program, as when its host is taken away
    wait_for((host / "started").exists)  # it starts again
    assert "saved\nended with status 75; again in 0 s\n" in log.read_text()

    assert pod("stop", *PLACE, **environment).returncode == 0
    wait_for(lambda: "no run\n" in pod("status", *PLACE, **environment).stdout)
    assert log.read_text().endswith("saved\nended with status 75\n")


def test_run_on_a_host_without_setup(pod, tmp_path):
    home = tmp_path / "empty"
    home.mkdir()
    result = pod("run", *PLACE, "--", *ARGUMENTS, POD_HOME=str(home))
    assert result.returncode == 1
    assert "dualpath_jax: No such file" in result.stderr
    assert not list(home.iterdir())


@pytest.mark.parametrize(("statuses", "count"), [("75 75 0", 3), ("75 2", 2), ("1", 1), ("0", 1)])
def test_rerun_only_after_75(tmp_path, statuses, count):
    (tmp_path / "left").write_text(statuses)
    script = tmp_path / "script"
    script.write_text("read -r first rest < left; echo $rest > left; echo run; exit $first")
    result = subprocess.run(
        [ROOT / "scripts" / "rerun.sh", "bash", "script"],
        cwd=tmp_path,
        env=os.environ | {"RERUN_SECONDS": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.splitlines().count("run") == count
    assert result.returncode == int(statuses.split()[-1])

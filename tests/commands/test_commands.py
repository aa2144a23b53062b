"""Runs every command of README.md and docs on small data, except where `NOT_RUN` has a reason.

A command runs as it is documented, with the changes of its row in `RUN`: placeholders (VIDEOS) are
replaced, and options that make it small are appended. Scripts run in this process, as `python
SCRIPT` runs them, so that JAX and TensorFlow are imported once.
"""

import contextlib
import dataclasses
import fnmatch
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent import futures

import pytest

from tests.helpers.documents import PAGES, ROOT, find_commands
from tests.helpers.processes import make_xla_flags

DOCUMENTED = list(dict.fromkeys(command for page in PAGES for command in find_commands(page)))
_DEMO = "python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo"
_PREPARE = "python scripts/prepare_dataset.py --dataset=folder --videos=VIDEOS --out=data/mine"
_MINE = "python -m dualpath_jax.main --config=configs/finetune.py --config.data.dir=data/mine"
_MINE_ST_ADAPTER = (
    f"{_MINE} --config.model.method=st_adapter --config.data.num_frames=8 --workdir=runs/st_adapter"
)
_PRETRAIN = (
    "python scripts/pretrain_demo_backbone.py --out=weights/vit12_openai.safetensors "
    "--image_size=84 --patch_size=14 --width=384 --depth=12 --heads=6 --batch_size=16 --steps=1000 "
    "--learning_rate=1e-3"
)
_LABELS = "--annotations=data/demo/raw/labels"
_LISTS = {"VIDEOS": "data/demo/raw/videos", "--annotations=ANNOTATIONS": _LABELS}
_SMALL = (
    "--config.num_train_steps=2 --config.data.batch_size=8 --config.eval.batch_size=8 "
    "--config.data.image_size=32 --config.model.scan_blocks=True"
)
_DEMO_BACKBONE = (
    "--config.backbone.checkpoint=data/demo/backbone.safetensors --config.backbone.name=custom "
    "--config.backbone.patch_size=8 --config.backbone.width=96 --config.backbone.depth=4 "
    "--config.backbone.heads=2 --config.backbone.mlp_dim=384 --config.backbone.projection_dim=64"
)


@dataclasses.dataclass(frozen=True)
class CommandRun:
    """Describes how a command is run, and what it must print and write.

    Attributes:
      output: a regular expression that its output contains.
      file: a file that exists afterwards.
      replaced: texts of the command, and their replacements.
      options: options to append.
      after: a command that must run before.
    """

    output: str = ""
    file: str = ""
    replaced: dict[str, str] = dataclasses.field(default_factory=dict)
    options: str = ""
    after: str = ""


_MERGE = "python scripts/merge.py runs/lora --out=merged.safetensors"
_SSV2 = "python scripts/prepare_dataset.py --dataset=ssv2 --videos=VIDEOS"
_STORED = "total: listed 69, found 69, stored 69, bad 0"
RUN = {
    _PREPARE: CommandRun("total: listed 12, found 12, stored 12", "data/mine/dataset_info.json"),
    f"{_PREPARE} --group_by='name:(.+)_'": CommandRun(
        r"\^\[0-9\] makes . groups of 12 videos(.|\n)*total: listed 12, found 12, stored 12",
        replaced={"data/mine": "data/grouped", "name:(.+)_": "name:^[0-9]"},
    ),
    "python scripts/prepare_dataset.py --dataset=folder --videos=VIDEOS --check": CommandRun(
        "the frames would take about"
    ),
    f"{_SSV2} --annotations=FOLDER --out=data/ssv2": CommandRun(
        *(_STORED, "data/ssv2/dataset_info.json"),
        replaced={"VIDEOS": "data/demo/raw/videos", "--annotations=FOLDER": _LABELS},
    ),
    f"{_SSV2} --annotations=ANNOTATIONS --out=data/ssv2": CommandRun(
        _STORED, replaced=_LISTS | {"data/ssv2": "data/ssv2_again"}
    ),
    f"{_SSV2} --annotations=ANNOTATIONS --check --bad_videos=bad.jsonl": CommandRun(
        file="bad.jsonl", replaced=_LISTS
    ),
    "python scripts/convert_clip.py --checkpoint=ViT-B-16.pt "
    "--out=weights/clip_vit_b16.safetensors": CommandRun(
        file="weights/clip_vit_b16.safetensors",
        replaced={"ViT-B-16.pt": "dualpath_jax/demo/demo_backbone.safetensors"},
    ),
    _PRETRAIN: CommandRun(
        "wrote weights/vit12_openai.safetensors",
        options="--steps=1 --batch_size=2 --depth=1 --width=24 --heads=2 --image_size=28",
    ),
    "python scripts/convert_clip.py --checkpoint=weights/vit12_openai.safetensors "
    "--out=weights/vit12.safetensors --normalization=clip": CommandRun(
        r"written +weights/vit12\.safetensors", after=_PRETRAIN
    ),
    "python scripts/show_batch.py --config=configs/demo.py --step=3 --clips=2 --zoom=3 "
    "--out=batch.png": CommandRun(file="batch.png"),
    "python scripts/benchmark_seek.py --prepared=data/demo --batch_size=4 --rounds=15": CommandRun(
        "first batch at step 0", options="--rounds=1"
    ),
    "python scripts/efficiency.py": CommandRun("12,617,134", options="--config ssv2_vitb"),
    "python scripts/efficiency.py --figure=figure1.png": CommandRun(
        file="figure1.png", options="--config ssv2_vitb"
    ),
    "scripts/tpu_pod.sh create --spot --dry_run --name=dualpath --zone=us-west4-a "
    "--project=PROJECT --accelerator=v5litepod-16": CommandRun("gcloud .* create dualpath"),
    _DEMO: CommandRun(r"step 2/2 (.|\n)*\ntest  top-1 ", "runs/demo/results.json", options=_SMALL),
    "python scripts/export_adapter.py --workdir=runs/demo --out=demo.safetensors": CommandRun(
        file="demo.safetensors", after=_DEMO
    ),
    "python scripts/predict.py --workdir=runs/demo data/demo/raw/videos": CommandRun(
        r"videos/0\.mp4  0\.\d+ \w+ something", after=_DEMO
    ),
    "python scripts/export_model.py --workdir=runs/demo --out=exported": CommandRun(
        file="exported/model.stablehlo", after=_DEMO
    ),
    "python scripts/visualize_attention.py --workdir=runs/demo --out=attention "
    "data/demo/raw/videos/8161.mp4": CommandRun(
        file="attention/48.gif", replaced={"8161": "48"}, after=_DEMO
    ),
    "python scripts/attention_share.py --workdirs runs/demo runs/demo1 runs/demo2": CommandRun(
        r"\| temporal \| seed 0 \|", replaced={" runs/demo1 runs/demo2": ""}, after=_DEMO
    ),
    "python scripts/report.py --workdir runs/demo runs/demo1 --out=runs/compared.html": CommandRun(
        file="runs/compared.html", replaced={"runs/demo1": "runs/finetune"}, after=_MINE
    ),
    "python -m dualpath_jax.main --config=configs/ssv2_vitb.py --mode=check": CommandRun(
        "12,617,134"
    ),
    "python -m dualpath_jax.main --help_config": CommandRun("--config.data.batch_size=64"),
    "python -m dualpath_jax.config.schema": CommandRun(r"\| `data.batch_size` \| `64` \|"),
    _MINE: CommandRun(
        "step 2/2 .*\nvalidation  top-1 ",
        options=f"{_SMALL} {_DEMO_BACKBONE} --config.model.method=lora",
        after=_PREPARE,
    ),
    _MINE_ST_ADAPTER: CommandRun(
        "step 2/2 .*\nvalidation  top-1 ",
        options=f"{_SMALL} {_DEMO_BACKBONE} --config.model.st_adapter.width=8",
        after=_PREPARE,
    ),
    "python scripts/probe.py --config=configs/finetune.py --config.data.dir=data/mine "
    "--workdir=runs/finetune": CommandRun(
        r"ordered .*\nwrote runs/finetune/probe.json",
        options=f"--steps=2 --config.data.image_size=32 {_DEMO_BACKBONE}",
        after=_MINE,
    ),
    "python scripts/report.py --workdir=runs/finetune --out=report.html": CommandRun(
        file="report.html", after=_MINE
    ),
    _MERGE: CommandRun(
        *("with lora of step 2 merged", "merged.adapter.safetensors"),
        replaced={"runs/lora": "runs/finetune"},
        after=_MINE,
    ),
    "python scripts/predict.py --adapter=merged.adapter.safetensors VIDEOS": CommandRun(
        r"\.mp4  0\.\d+ (walks|runs)", after=_MERGE
    ),
    "python scripts/predict.py --workdir=runs/finetune VIDEOS": CommandRun(
        r"\.mp4  0\.\d+ (walks|runs)", after=_MINE
    ),
}

# Reasons not to run a command, and the commands of each (patterns of `fnmatch`).
CI = "CI runs it exactly as documented"
CLOUD = "needs a cloud; test_docs.py runs it with --dry_run"
FOREIGN = "needs data or weights that others publish"
PACKAGES = "needs packages that CI does not install"
SLOW = "takes 45 s at its smallest; test_methods.py trains every method"
INSTALLATION = "needs an installation; test_docs.py parses it, and scripts are the same commands"
SAME = "another documented command, which is run, does the same with another configuration"
NOT_RUN = {
    CI: [
        *("pip install -r requirements.txt", "pip install -r requirements-test.txt"),
        *("python -m pytest", "python -m pytest tests/*", "python -m pytest -n0 tests/*"),
        "python scripts/chaos.py --minutes=2.5",
        "python -m tests.chaos.exit_loop --runs=50",
        "python scripts/report.py --workdir=runs/demo --out=runs/demo/report.html",
        *('pip install ".[[]docs]"', "python -m pdoc *"),
    ],
    CLOUD: [
        *(f"scripts/tpu_pod.sh {verb}" for verb in ("create --spot", "status", "stop", "delete")),
        *("scripts/tpu_pod.sh setup *", "scripts/tpu_pod.sh run *"),
    ],
    FOREIGN: [
        *(
            f"python scripts/prepare_dataset.py --dataset={n} *"
            for n in ("k400", "hmdb51", "ucf101")
        ),
        "python scripts/prepare_dataset.py --dataset=diving48 *",
        *(f"python -m dualpath_jax.main --config=configs/{n}_vitb.py" for n in ("k400", "ssv2")),
        "python -m dualpath_jax.main --config=configs/ssv2_vitb.py --config.data.source=folder *",
        "python -m dualpath_jax.main --config=configs/diving48_vitb.py",
        "python -m dualpath_jax.main --config=configs/hmdb51_vitb.py --config.data.split=all",
        "python -m dualpath_jax.main --config=configs/finetune.py *dinov2_s14.safetensors",
        "python scripts/convert_clip.py --method=*",
        "python -m dualpath_jax.main --config=configs/k400_vitb_aim.py:32 *",
        "python -m dualpath_jax.main --config=configs/k400_vitb_st_adapter.py:released *",
    ],
    PACKAGES: [
        *(f'pip install ".[[]{extra}]"' for extra in ("beam", "bench", "gpu", "tpu")),
        'pip install ".[[]bench]" decord2 torchcodec',
        "python scripts/benchmark_memory.py *",
        "python scripts/compile_tpu.py *",
    ],
    INSTALLATION: ["pip install .", "dualpath *"],
    SLOW: ["python scripts/compare_methods.py --out=runs/compare"],
    SAME: [
        "python -m dualpath_jax.main --config=configs/diving48_vitb.py --mode=check",
        "python -m dualpath_jax.main --config=configs/finetune.py *method=probe *",
        "python scripts/pretrain_demo_backbone.py *depth=12 --steps=1500",
        "python scripts/convert_clip.py *vit12_small.safetensors *",
    ],
}
# Slow commands by pattern: the test that runs the program on less data, and a text of that test.
SLOW_COMMANDS = {
    "python scripts/show_batch.py --config=configs/finetune.py *": (
        "commands/test_show_batch",
        "show_batch",
    ),
    "python scripts/benchmark_pipeline.py *": (
        "scripts/test_benchmark_pipeline",
        "benchmark_pipeline",
    ),
    "python scripts/benchmark_step.py*": ("scripts/test_benchmark_step", "benchmark_step"),
    "python scripts/benchmark_methods.py": ("scripts/test_benchmark_methods", "benchmark_methods"),
    "python scripts/benchmark_startup.py*": ("scripts/test_benchmark_startup", "benchmark_startup"),
    "python scripts/fuzz.py *": ("fuzz/test_fuzz", "scripts/fuzz.py"),
    "python -m dualpath_jax.main *synthetic=True *": (
        "data/test_synthetic",
        "--config.data.synthetic=True",
    ),
    "python -m dualpath_jax.main *coordinator_address=*": (
        "training/test_multiprocess",
        "coordinator_address",
    ),
    "python scripts/probe_pixels.py *": ("demo/test_paths", "probe_pixels"),
    "python scripts/trainability.py *": ("scripts/test_trainability", "trainability.main()"),
    "python -m dualpath_jax.main --config=configs/finetune.py:demo *": (
        "demo/test_paths",
        "setup.ensure_generated",
    ),
    "python scripts/finetune.py *": ("commands/test_finetune", "finetune.main()"),
    "python scripts/show_comparison.py": ("scripts/test_compare_methods", "show_comparison.main"),
    "scripts/rerun.sh *": ("scripts/test_tpu_pod", "rerun.sh"),
}


PATTERNS = [*SLOW_COMMANDS, *(pattern for row in NOT_RUN.values() for pattern in row)]


def find_unclassified(documented):
    """Return the commands that are neither run nor excluded, or both."""
    excluded = {c for c in documented if any(fnmatch.fnmatchcase(c, p) for p in PATTERNS)}
    return {c for c in documented if (c in RUN) == (c in excluded)}


def test_every_command_has_its_row():
    assert find_unclassified(DOCUMENTED) == set()
    assert find_unclassified([*DOCUMENTED, "python scripts/new.py"]) == {"python scripts/new.py"}
    assert set(RUN) <= set(DOCUMENTED)  # every row is documented
    for pattern in PATTERNS:
        assert fnmatch.filter(DOCUMENTED, pattern), pattern


@pytest.mark.parametrize("pattern", SLOW_COMMANDS)
def test_slow_command_has_a_test(pattern):
    test, name = SLOW_COMMANDS[pattern]
    assert name in (ROOT / "tests" / f"{test}.py").read_text()


class CommandFolder:
    """Runs each command once, in a folder with the repository's files and small data."""

    def __init__(self, folder, demo_data):
        self.folder = folder
        self._results: dict[str, futures.Future] = {}
        # Copied here, because pytest changes the environment while a thread reads it.
        self._environment = {**os.environ, "XLA_FLAGS": make_xla_flags()}
        for name in ("configs", "dualpath_jax", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(demo_data, folder / "data" / "demo")
        shutil.copytree(demo_data.parent / "raw", folder / "data" / "demo" / "raw")
        videos = sorted((demo_data.parent / "raw" / "videos").iterdir())
        for number, video in enumerate(videos[:12]):
            target = folder / "VIDEOS" / ("walks", "runs")[number % 2] / video.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(video, target)

    def start(self, executor, command):
        """Start a command in the background."""
        self._results[command] = executor.submit(self._run, command)

    def run(self, command):
        """Return (exit status, output) of a command of `RUN`."""
        if command not in self._results:
            result = self._run(command)
            self._results[command] = futures.Future()
            self._results[command].set_result(result)
        return self._results[command].result()

    def _run(self, command):
        row = RUN[command]
        if row.after:
            assert self.run(row.after)[0] == 0
        for old, new in row.replaced.items():
            assert old in command
            command = command.replace(old, new)
        words = shlex.split(f"{command} {row.options}")
        if words[0] == "python" and words[1].startswith("scripts/"):
            return self._run_script(words[1:])
        words = [sys.executable if word == "python" else word for word in words]
        result = subprocess.run(
            words,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return result.returncode, result.stdout

    def _run_script(self, words):
        """Run a script in this process."""
        output, status = io.TextIOWrapper(io.BytesIO(), write_through=True), 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", words)
            patch.syspath_prepend(str(ROOT / "scripts"))  # where Python looks first
            try:
                runpy.run_path(words[0], run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
        return status, output.buffer.getvalue().decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_data):
    """Return a `CommandFolder` that runs the commands of `main` in the background."""
    command_folder = CommandFolder(tmp_path_factory.mktemp("commands"), demo_data)
    command_folder.run(_PREPARE)
    with futures.ThreadPoolExecutor(1) as executor:  # they run in processes of their own
        for command in RUN:
            if command.startswith("python -m dualpath_jax.main"):
                command_folder.start(executor, command)
        yield command_folder


@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:90])
def test_command(folder, command):
    status, output = folder.run(command)
    assert status == 0, output[-2000:]
    assert re.search(RUN[command].output, output), output[-2000:]
    assert not RUN[command].file or (folder.folder / RUN[command].file).exists()


@pytest.mark.parametrize(
    "command",
    [
        "benchmark_memory --videos=. --batch_size=0",
        "benchmark_methods --rounds=0",
        "benchmark_pipeline --videos=. --frames 16 0",
        "benchmark_seek --prepared=. --rounds=0",
        "benchmark_step --calls=0",
        "compare_methods --seeds=0",
        "export_model --workdir=. --out=. --batch_size=0",
        "fuzz --inputs=0",
    ],
)
def test_zero_is_refused(command, capsys):
    """Check that the parser refuses it; twin: the same command with 1."""
    name, *arguments = command.split()
    parser = importlib.import_module(f"scripts.{name}").parser()
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert ": 0 is not positive" in capsys.readouterr().err
    parser.parse_args([re.sub(r"(^|=)0$", r"\g<1>1", argument) for argument in arguments])


def test_a_failing_command_is_noticed(folder, monkeypatch):
    """Check that `CommandFolder` reports the status of a command with missing videos."""
    wrong = "python scripts/prepare_dataset.py --dataset=folder --videos=NOTHING --out=data/none"
    monkeypatch.setitem(RUN, wrong, CommandRun())
    status, output = folder.run(wrong)
    assert status != 0
    assert "NOTHING" in output

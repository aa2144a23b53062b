"""Defines a small training that runs as a process, for `chaos` to inject faults.

The program is `python -m dualpath_jax.main` on the demo's model at 32 pixels, with all
augmentation, gradient accumulation, evaluation during training, and epochs that end within a batch.
Three of its videos are damaged from the beginning.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.data.preparation import prepare
from dualpath_jax.data.video_dataset import VideoDataset, frame_shard_path
from dualpath_jax.demo import render, setup
from dualpath_jax.weights import convert

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"train": 44, "validation": 8, "test": 16}  # videos; an epoch is 5.5 batches of 8
DAMAGED = (5, 17, 30)  # indices of the training videos that cannot be read
PATIENCE = 300.0  # seconds to wait for an event, after which the program counts as hung
_MIRRORED_CLASSES = [["Moving something to the left", "Moving something to the right"]]
_SETTINGS = {
    "data.source": "ssv2",
    "data.batch_size": 8,
    "data.image_size": 32,
    "data.flip": True,
    "data.randaugment_layers": 2,
    "data.erasing_probability": 0.25,
    "data.max_broken_videos": len(DAMAGED),
    "optimizer.accumulation_steps": 2,
    "model.scan_blocks": True,
    "log_every_steps": 1,
    "checkpoint.every_steps": 5,
    "eval.every_epochs": 10,
    "eval.batch_size": 8,
}
# What runs before the program, in its process, by fault.
_RUN = """
import runpy
runpy.run_module("dualpath_jax.main", run_name="__main__", alter_sys=True)
"""
# The clock jumps by up to ten years, forward or back, every second.
WRONG_CLOCK = """
import random, time
seconds, nanoseconds = time.time, time.time_ns
jump = lambda: random.Random(int(time.monotonic())).uniform(-3e8, 3e8)
time.time = lambda: seconds() + jump()
time.time_ns = lambda: nanoseconds() + int(1e9 * jump())
"""
# Nobody reads what is printed.
CLOSED_PIPES = """
import os
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
os.dup2(writing, 2)
"""
# The disk fails when the arrays of a checkpoint are read.
FAILING_DISK = """
import errno, os
from dualpath_jax.runtime import environment
environment.configure_environment()
import orbax.checkpoint as ocp
def fail(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
ocp.StandardCheckpointHandler.restore = fail
"""
# Permissions of files apply to root too: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE and _READ_SEARCH.
NO_PRIVILEGE = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "dualpath_jax.main", *sys.argv[1:]])
"""


class ChaosError(Exception):
    """Reports that the program did not handle a fault as it must."""


@dataclasses.dataclass(frozen=True)
class TrainingFixture:
    """Makes the inputs of a small training and starts it.

    Attributes:
      folder: folder of the inputs and the logs.
      num_steps: number of training steps.
    """

    folder: pathlib.Path
    num_steps: int

    @property
    def data(self) -> str:
        """Return the folder of the prepared data."""
        return str(self.folder / "data")

    @property
    def shard(self) -> pathlib.Path:
        """Return the file with the frames of the training videos."""
        return pathlib.Path(frame_shard_path(self.data, "train", 0, 1))

    def make_inputs(self) -> None:
        """Render, prepare and damage the videos, and convert the backbone."""
        raw = self.folder / "raw"
        render.render_demo(raw, SIZES, progress=False)
        videos, labels = str(raw / "videos"), str(raw / "labels")
        listing = dataset_registry.list_videos("ssv2", videos, labels)
        options = prepare.PrepareOptions(progress=False)
        prepare.prepare_dataset(listing, videos, self.data, options)
        convert.convert_checkpoint(setup.BACKBONE, self.folder / "backbone.safetensors")
        (self.folder / "mirrored.json").write_text(json.dumps(_MIRRORED_CLASSES))
        (self.folder / "logs").mkdir()
        self.damage_videos(DAMAGED)

    def damage_videos(self, videos: Iterable[int]) -> None:
        """Flip a bit in a stored frame of each video, as a failing disk does."""
        dataset = VideoDataset(self.data, "train")
        content = bytearray(self.shard.read_bytes())
        for video in videos:
            record = dataset.read_frames(video, [0])[0]
            # The file's own headers may be between two parts of a record.
            parts = (record[i : i + 40] for i in range(len(record) // 2, len(record) - 40, 40))
            content[next(p for part in parts if (p := content.find(part)) > 0)] ^= 1
        self.shard.write_bytes(content)

    def start(
        self,
        workdir: pathlib.Path,
        log: str,
        before: str = "",
        settings: dict[str, Any] | None = None,
        cache: pathlib.Path | None = None,
    ) -> "TrainingProcess":
        """Start the program as a user does; its output goes to `logs/<log>`.

        Args:
          workdir: of the run.
          log: name of the log.
          before: a Python program that its process runs first.
          settings: more settings, by key.
          cache: folder of compiled programs; None for one that all starts share.
        """
        options = {
            **_SETTINGS,
            "data.dir": self.data,
            "data.label_swap": self.folder / "mirrored.json",
            "backbone.checkpoint": self.folder / "backbone.safetensors",
            "num_train_steps": self.num_steps,
            **(settings or {}),
        }
        program = ["-c", before + _RUN] if before else ["-m", "dualpath_jax.main"]
        command = [sys.executable, *program, "--config=configs/demo.py", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in options.items()]
        environment = self._environment()
        if cache:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        return TrainingProcess(command, environment, self.folder / "logs" / log)

    def prepare_again(self, log: str) -> "TrainingProcess":
        """Start to prepare the videos in the folder of the data, which lacks a part by now."""
        raw = self.folder / "raw"
        command = [sys.executable, "-m", "dualpath_jax", "prepare", "--dataset=ssv2"]
        command += [f"--videos={raw / 'videos'}", f"--annotations={raw / 'labels'}"]
        command += [f"--out={self.data}"]
        return TrainingProcess(command, self._environment(), self.folder / "logs" / log)

    def _environment(self) -> dict[str, str]:
        """Return the environment of the program; restarts reuse compiled programs."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }


class TrainingProcess:
    """Runs the program once and observes it by its output.

    Attributes:
      process: the running process.

    Args:
      command: the program and its arguments.
      environment: its environment variables.
      log: file for its output.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: pathlib.Path):
        self._log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
            )

    def read_log(self) -> str:
        """Return what the program has printed so far."""
        return self._log.read_text(errors="replace")

    def last_step(self) -> int:
        """Return the last step that the program has printed, or 0."""
        lines = [line for line in self.read_log().splitlines() if line.startswith("step ")]
        return int(lines[-1].split()[1].split("/")[0]) if lines else 0

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.02) -> bool:
        """Wait for `condition`; return False if the program ends before it is true.

        Raises:
          ChaosError: neither has happened, and nothing was printed for `PATIENCE` seconds.
        """
        printed, end = -1, math.inf
        while not condition():
            if self.process.poll() is not None:
                return condition()
            if (size := self._log.stat().st_size) != printed:
                printed, end = size, time.monotonic() + PATIENCE
            if time.monotonic() > end:
                error = self.make_error(f"has been hanging for {PATIENCE:.0f} s")
                self.kill()
                raise error
            time.sleep(pause)
        return True

    def wait_for_first_step(self) -> bool:
        """Wait for the first step; return False if the program ends before it."""
        return self.wait_until(lambda: "first step, compilation included" in self.read_log())

    def wait_for_exit(self) -> int:
        """Wait for the end; return the exit status, or minus the number of the signal."""
        self.wait_until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def kill(self) -> None:
        """Kill the program with SIGKILL (kill -9)."""
        self.process.kill()
        self.process.wait()

    def make_error(self, what: str) -> ChaosError:
        """Return an error for what the program did, with the end of its output."""
        return ChaosError(
            f"the program {what}. The end of its output, from {self._log}:\n"
            f"{self.read_log()[-3000:]}"
        )

"""Maps shards through Apache Beam, on this machine or on a cluster: `map_shards`.

Each shard is stored by a process of its own. It may be killed or crash, which Beam's workers may
not: with --direct_running_mode=multi_processing, Beam 2.77 waits forever for a worker that died.
"""

import contextlib
import errno
import functools
import importlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from dualpath_jax.runtime import files

if TYPE_CHECKING:
    import apache_beam

LOCAL = "local"  # without Beam
# Other runners -> Beam's names.
_BEAM_NAMES = {
    # Beam's DirectRunner takes this one too, but may download another one first.
    "direct": "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
}
RUNNERS = (LOCAL, *_BEAM_NAMES)
_ATTEMPTS = 3  # of a shard whose process is killed
_running: set[subprocess.Popen] = set()
_stopped: set[str] = set()  # `work` of jobs that have ended here, of which nothing starts any more


def new_pipeline(runner: str, beam_options: str, num_workers: int) -> "apache_beam.Pipeline | None":
    """Return an empty pipeline, after all options have been checked; None for "local".

    Args:
      runner: one of `RUNNERS`.
      beam_options: options of Beam and of the runner, as on a command line.
      num_workers: number of shards that "direct" stores at once; other runners have options for it.

    Raises:
      ValueError: Beam or the runner is not installed, or an option is wrong.
    """
    if runner not in RUNNERS:
        raise ValueError(f"runner is {runner!r}; choose one of {', '.join(RUNNERS)}")
    if runner == LOCAL:
        if beam_options:
            raise ValueError(f"--beam_options={beam_options!r} needs a --runner other than local")
        return None
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(
            f'--runner={runner} needs Apache Beam ({error}): pip install ".[beam]"'
        ) from None
    flags = []
    if runner == "direct":
        flags = [f"--direct_num_workers={num_workers}", "--direct_running_mode=multi_threading"]
    printed = io.StringIO()
    try:
        flags += shlex.split(beam_options)  # the last of several values counts
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            options = PipelineOptions(flags)
            known = options.get_all_options()
            unknown = options.get_all_options(retain_unknown_options=True).keys() - known
        if known["runner"]:
            raise ValueError(f"it sets runner={known['runner']}; --runner={runner} has done so")
        if unknown and runner != "flink":  # Flink's job server has options of its own
            raise ValueError(f"Beam has no option {', '.join(sorted(unknown))}")
        return apache_beam.Pipeline(_BEAM_NAMES[runner], options)
    except SystemExit:
        problem = printed.getvalue().strip().rpartition("error: ")[2]
        problem = problem or "it asks for help instead of naming options"
    except Exception as error:  # Beam asks the cloud of Dataflow about some options
        problem = " ".join(str(error).split())
    raise ValueError(f"--runner={runner} --beam_options={beam_options!r}: {problem}") from None


def map_shards(
    pipeline: "apache_beam.Pipeline", function: Callable[[str, int], None], work: str, count: int
) -> None:
    """Call `function(work, number)` for each number below `count`, each in its own process.

    A process that is killed is started again. If the function raises, the runner may call it again,
    perhaps while another call still runs; the function must allow this. Interrupted, it cancels the
    job and ends its processes on this machine.

    Args:
      pipeline: an empty pipeline, from `new_pipeline`.
      function: importable from a module other than the main one, also on the workers.
      work: path of a file that the function reads and all workers see, another one for each job; it
        is deleted at the end.
      count: number of shards.

    Raises:
      OSError: a call failed; the others may have been made. `errno` is set if a disk is full.
    """
    import apache_beam as beam

    call = functools.partial(
        call_in_process, module=function.__module__, name=function.__qualname__, work=work
    )
    shards = pipeline | "list shards" >> beam.Create(list(range(count)), reshuffle=True)
    _ = shards | "store shard" >> beam.Map(call)
    try:
        result = pipeline.run()
        try:
            result.wait_until_finish()
        except BaseException:
            with contextlib.suppress(Exception):  # the job has ended, or cannot be reached
                result.cancel()
            raise
    except Exception as error:  # each runner has its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        message = lines[-1].partition(" [while running")[0].removeprefix("RuntimeError: ")
        is_full = files.is_disk_error(error) and not isinstance(error, OSError)
        raise OSError(errno.ENOSPC if is_full else errno.EIO, message) from None
    finally:
        _stopped.add(work)
        # On another machine, a call that has not begun yet ends at once without its file.
        with contextlib.suppress(FileNotFoundError):
            os.remove(work)
        killed = list(_running)
        for process in killed:
            process.kill()
        for process in killed:
            process.wait()
            _running.discard(process)


def call_in_process(number: int, module: str, name: str, work: str) -> None:
    """Call the function `name` of a module with (work, number) in a new process.

    Raises:
      RuntimeError: the call raised, its process was killed in each of three attempts, or the job
        has been stopped.
    """
    program = "import sys; sys.path[:] = sys.argv[5:]; "
    program += f"from {__name__} import _serve_call; _serve_call(*sys.argv[1:5])"
    arguments = [module, name, work, str(number), *map(os.path.abspath, sys.path)]
    for _ in range(_ATTEMPTS):
        if work in _stopped:
            lines = ["the job was stopped"]
            break
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                stdin=subprocess.PIPE,  # its end tells the process that this one has ended
                stdout=output,
                stderr=output,
            )
            _running.add(process)
            if work in _stopped:  # since the process was started
                process.kill()
            with process:
                code = process.wait()
            _running.discard(process)
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
        if code == 0:
            return
        if code > 0:
            break
        lines = [f"its process was killed every time (signal {-code}), perhaps for lack of memory"]
    raise RuntimeError(f"shard {number}: {lines[-1] if lines else f'exit code {code}'}")


def _serve_call(module: str, name: str, work: str, number: str) -> None:
    """Run in the new process: call the function, and end early if the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    getattr(importlib.import_module(module), name)(work, int(number))

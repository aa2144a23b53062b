"""Worker processes that survive bad files.

Public: `WorkerPool`, `pull_streams`, `Failure`; `START` and `serve` are the processes' beginning.
"""

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import av.logging

from dualpath_jax.data.preparation.video_decoder import DecodeLimits, VideoError, describe_video


@dataclasses.dataclass(frozen=True)
class Failure:
    """What `WorkerPool.map` and `pull_streams` yield in place of a result; `reason` in plain words."""

    reason: str


class WorkerPool:
    """Runs a function in killable worker processes; a bad item costs only itself.

    Each worker has its own pipe, so one that dies at any moment, even while it sends a result,
    cannot garble or block the others. (pebble's workers share one pipe and its lock: when one is
    killed while it sends a large result, as the kernel does for lack of memory, the pool waits for
    ever; measured with 5.2.3.) Workers are programs of their own, not forked: the parent may run
    TensorFlow or JAX threads. Nor does `multiprocessing` start them, which would execute the user's
    main module in each: that needs a guard in it, and a file, which standard input is not.

    The workers end with the `with` block, with the pool, or with the parent.

    Args:
      num_workers: processes at most; they start when there is work for them.
      limits: `seconds` and `memory_mb` per item.
    """

    def __init__(self, num_workers: int, limits: DecodeLimits):
        self._num_workers = num_workers
        self._limits = limits
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        weakref.finalize(self, _stop_all, self._workers)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_) -> None:
        _stop_all(self._workers)

    def map(self, function: Callable, arguments: Iterable[tuple]) -> Iterator[Any]:
        """Yields `function(*args)` for each of `arguments`, in order; a `Failure` where it failed.

        At most 4 x num_workers results wait in memory, fewer where they have more than
        `_WAITING_BYTES` x num_workers: the others wait in their processes. Function, arguments and
        results must be picklable, and the function importable: not of the main module. What a call
        leaves under way, since it was interrupted, ends when the next one begins.

        Raises:
          ChildProcessError: worker processes do not start at all.
        """
        for worker in [w for w in self._workers if w.tasks]:  # its answers are not of this call
            self._workers.remove(worker)
            worker.stop()
        todo = enumerate(arguments)
        waiting = []  # the next task, and tasks taken back from dead workers
        done = {}  # finished ahead of their turn: (result, bytes it took)
        first, end = 0, 0  # tasks [first, end) are under way or in `done`
        while True:
            while first in done:
                yield done.pop(first)[0]
                first += 1
            while True:
                if not waiting and end < first + 4 * self._num_workers:
                    waiting.extend(itertools.islice(todo, 1))
                if not waiting or not (worker := self._free_worker()):
                    break
                task = waiting.pop()
                end = max(end, task[0] + 1)
                if not worker.give(function, *task):
                    waiting.append(task)
                    while worker in self._workers:  # its last answers, then its end
                        self._receive(worker, done, waiting)
            if first == end:
                return
            busy = {w.connection: w for w in self._workers if w.tasks}
            if sum(size for _, size in done.values()) > _WAITING_BYTES * self._num_workers:
                # Only from the worker whose answer the others wait for; it may have died, though.
                needed = {c: w for c, w in busy.items() if any(i == first for i, _ in w.tasks)}
                busy = needed or busy
            for connection in multiprocessing.connection.wait(list(busy)):
                self._receive(busy[connection], done, waiting)

    def _free_worker(self) -> "_Worker | None":
        """A worker that can take a task. Each holds two, so that it never waits for the parent."""
        worker = min(self._workers, key=lambda w: len(w.tasks), default=None)
        if (worker is None or worker.tasks) and len(self._workers) < self._num_workers:
            worker = _Worker(self._limits)
            self._workers.append(worker)
        return worker if len(worker.tasks) < 2 else None

    def _receive(self, worker: "_Worker", done: dict, waiting: list) -> None:
        """Takes one message of a worker, or its death."""
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._bury(worker, done, waiting)
            return
        result = pickle.loads(message)
        if result is _READY:
            worker.ready = True
            self._failed_starts = 0
        else:
            done[worker.tasks.popleft()[0]] = result, len(message)

    def _bury(self, worker: "_Worker", done: dict, waiting: list) -> None:
        """Drops a dead worker: the task it was at has failed, the one after it goes to another."""
        self._workers.remove(worker)
        code = worker.stop(grace=5.0)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == 3:
                raise ChildProcessError(
                    f"worker processes do not start ({_death(code, self._limits)})"
                )
        elif worker.tasks:
            done[worker.tasks.popleft()[0]] = Failure(_death(code, self._limits)), 0
        waiting.extend(reversed(worker.tasks))


# The frames of ten ordinary seconds have 6 MB; a file made for it has hundreds.
_WAITING_BYTES = 64 * 2**20
_READY = ...  # first message of a worker; Ellipsis stays itself when pickled


def pull_streams(
    function: Callable, arguments: Sequence[tuple], limits: DecodeLimits
) -> Iterator[tuple[int, Any]]:
    """Runs a generator function in a killable process, for each of `arguments` in order.

    One process does them all, at most four items ahead of what is taken here; `limits.seconds` are
    for each item. A new one takes the place of one that dies.

    Yields:
      (place in `arguments`, item); where the generator fails, its good items and then a `Failure`.

    Raises:
      ChildProcessError: worker processes do not start at all.
    """
    place = 0  # whose items are taken
    asked = collections.deque()  # the places of the pulls under way

    def pulls() -> Iterator[tuple]:
        for of in range(len(arguments)):
            begin = True
            while place == of:
                asked.append(of)
                yield function, arguments[of], begin
                begin = False

    with WorkerPool(1, limits) as pool:
        for item in pool.map(_pull, pulls()):
            if asked.popleft() != place:
                continue  # asked for before the end was known
            if item is not _End:
                yield place, item
            if item is _End or isinstance(item, Failure):
                place += 1


class _End:
    """Stands for the end of a generator; a class stays itself when pickled."""


_stream: Iterator[Any] = iter(())  # in a worker: the generator that it is at


def _pull(function: Callable, arguments: tuple, begin: bool) -> Any:
    """Runs in a worker: the next item of the generator, `_End` when there is none.

    A worker that did not begin it, since the one that did has died, has none.
    """
    global _stream
    if begin:
        _stream = function(*arguments)
    return next(_stream, _End)


# What a worker executes; its arguments are the number of its pipe and the parent's `sys.path`.
START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from dualpath_jax.data.preparation import worker_pool; worker_pool.serve(int(sys.argv[1]))"
)


class _Worker:
    """One process, our end of its pipe, and the `tasks` it has not answered yet, in order."""

    def __init__(self, limits: DecodeLimits):
        self.connection, theirs = multiprocessing.Pipe()
        paths = [os.path.abspath(path) for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs.fileno()), *paths],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()  # so that the worker's death is an end of file here
        with contextlib.suppress(OSError):  # it has died, as will be seen
            self.connection.send(limits)
        self.tasks = collections.deque()
        self.ready = False

    def give(self, function: Callable, index: int, arguments: tuple) -> bool:
        """Sends a task; False if the worker has died."""
        self.tasks.append((index, arguments))  # first: an interrupted call leaves its traces
        try:
            self.connection.send((function, arguments))
        except OSError:
            self.tasks.pop()
            return False
        return True

    def stop(self, grace: float = 0.0) -> int:
        """Ends the process (by force after `grace` seconds); returns its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        self._process.kill()
        self.connection.close()
        return self._process.wait()


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
    workers.clear()


def serve(pipe: int) -> None:
    """What a worker does, until its parent closes the other end of `pipe`, a file descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # The kernel's alarm keeps the time: it ends the process wherever it hangs, parent or none.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    av.logging.set_level(av.logging.PANIC)
    connection = multiprocessing.connection.Connection(pipe)
    with contextlib.suppress(EOFError, OSError):  # the parent has gone or is done
        limits = connection.recv()
        _limit_memory(limits.memory_mb)
        connection.send(_READY)
        while True:
            function, arguments = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, limits.seconds)
            answer = _answer(function, arguments, limits)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(answer)


def _answer(function: Callable, arguments: tuple, limits: DecodeLimits) -> bytes:
    """The pickled result or Failure."""
    try:
        return pickle.dumps(function(*arguments), pickle.HIGHEST_PROTOCOL)
    except VideoError as problem:
        failure = Failure(str(problem))
    except MemoryError:
        failure = Failure(f"needs more than {limits.memory_mb} MB of memory")
    except Exception as problem:  # whatever a broken file makes a library raise
        failure = Failure(describe_video(problem))
    return pickle.dumps(failure)


def _limit_memory(memory_mb: int) -> None:
    """Limits the address space to what is mapped now and `memory_mb` MiB more (Linux only)."""
    if not os.path.exists("/proc/self/statm"):
        return
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limit = mapped + memory_mb * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _death(code: int | None, limits: DecodeLimits) -> str:
    if code == -signal.SIGALRM:
        return f"took longer than {limits.seconds:g} s"
    if code == -signal.SIGKILL:
        return "the decoding process was killed (signal 9), perhaps for lack of memory"
    if code is not None and code < 0:
        return f"the decoding process crashed (signal {-code})"
    return f"the decoding process ended with exit code {code}"

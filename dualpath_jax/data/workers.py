"""Worker processes that survive bad files: `WorkerPool`, `Failure`."""

import collections
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import av.logging

from dualpath_jax.data.decode import DecodeLimits, VideoError, describe


@dataclasses.dataclass(frozen=True)
class Failure:
    """What `WorkerPool.map` yields in place of a result; `reason` in plain words."""

    reason: str


class WorkerPool:
    """Runs a function in killable worker processes; a bad item costs only itself.

    Each worker has its own pipe, so one that dies at any moment, even while it sends a result,
    cannot garble or block the others. (pebble's workers share one pipe and its lock: when one is
    killed while it sends a large result, as the kernel does for lack of memory, the pool waits for
    ever; measured with 5.2.3.) Workers are spawned, never forked: the parent may run TensorFlow or
    JAX threads. Use as a context manager, in a program whose main module is guarded.

    Args:
      num_workers: processes at most; they start when there is work for them.
      limits: `seconds` and `memory_mb` per item.
    """

    def __init__(self, num_workers: int, limits: DecodeLimits):
        self._num_workers = num_workers
        self._limits = limits
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def map(self, function: Callable, arguments: Iterable[tuple]) -> Iterator[Any]:
        """Yields `function(*args)` for each of `arguments`, in order; a `Failure` where it failed.

        At most 4 x num_workers results wait in memory, fewer where they have more than
        `_WAITING_BYTES` x num_workers: the others wait in their processes. Function, arguments and
        results must be picklable.

        Raises:
          ChildProcessError: worker processes do not start at all.
        """
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


class _Worker:
    """One process, our end of its pipe, and the `tasks` it has not answered yet, in order."""

    def __init__(self, limits: DecodeLimits):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_worker_main, args=(theirs, limits), daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's death is an end of file here
        self.tasks = collections.deque()
        self.ready = False

    def give(self, function: Callable, index: int, arguments: tuple) -> bool:
        """Sends a task; False if the worker has died."""
        try:
            self.connection.send((function, arguments))
        except OSError:
            return False
        self.tasks.append((index, arguments))
        return True

    def stop(self, grace: float = 0.0) -> int:
        """Ends the process (by force after `grace` seconds); returns its exit code."""
        self.process.join(grace)
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def _worker_main(connection, limits: DecodeLimits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # The kernel's alarm keeps the time: it ends the process wherever it hangs, parent or none.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    av.logging.set_level(av.logging.PANIC)
    _limit_memory(limits.memory_mb)
    connection.send(_READY)
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, OSError):
            return  # the parent has gone or is done
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
        failure = Failure(describe(problem))
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

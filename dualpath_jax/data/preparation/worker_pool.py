"""Runs functions on untrusted files in worker processes that may be killed or crash."""

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

from dualpath_jax.data.preparation.video_decoder import DecodeLimits, VideoError, describe_error


@dataclasses.dataclass(frozen=True)
class Failure:
    """Replaces the result of an item that failed.

    Attributes:
      reason: why it failed, in plain words.
    """

    reason: str


class WorkerPool:
    """Runs a function in killable worker processes; a bad item costs only itself.

    Each worker has its own pipe. A worker that dies at any moment, even while it sends a result,
    therefore cannot garble or block the others. (pebble 5.2.3 waits forever in that case: its
    workers share one pipe and its lock.) Workers are new programs and not forks, because the parent
    may run threads of TensorFlow or JAX. `multiprocessing` does not start them, because it would
    execute the user's main module in each worker: that module would need a guard, and a file,
    which standard input is not.

    The workers end with the `with` block, with the pool, or with the parent.

    Args:
      num_workers: maximum number of processes, at least 1; they start when there is work.
      limits: `seconds` and `memory_mb` apply to each item.
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
        """Yield `function(*args)` for each of `arguments`, in order, or a `Failure`.

        At most 4 x num_workers results wait in memory, and fewer if they take more than
        `_MAX_WAITING_BYTES` x num_workers; the others wait in the worker processes. Function,
        arguments and results must be picklable, and the function must be importable from a module
        other than the main one. Tasks of an interrupted call end when the next call begins.

        Raises:
          ChildProcessError: worker processes do not start at all.
        """
        # Stop workers that are still busy with an interrupted call.
        for worker in [w for w in self._workers if w.tasks]:
            self._workers.remove(worker)
            worker.stop()
        todo = enumerate(arguments)
        waiting = []  # the next task, and tasks taken back from dead workers
        done = {}  # results that came before their turn: task number -> (result, bytes)
        first, end = 0, 0  # tasks [first, end) are with workers or in `done`
        while True:
            # Yield the results whose turn it is.
            while first in done:
                yield done.pop(first)[0]
                first += 1
            # Give tasks to workers that are free.
            while True:
                if not waiting and end < first + 4 * self._num_workers:
                    waiting.extend(itertools.islice(todo, 1))
                if not waiting or not (worker := self._free_worker()):
                    break
                task = waiting.pop()
                end = max(end, task[0] + 1)
                if not worker.send_task(function, *task):
                    waiting.append(task)
                    while worker in self._workers:  # takes its last results, then its end
                        self._receive(worker, done, waiting)
            if first == end:
                return
            # Wait for results.
            busy = {w.connection: w for w in self._workers if w.tasks}
            if sum(size for _, size in done.values()) > _MAX_WAITING_BYTES * self._num_workers:
                # Take only the result that is next in order. Its worker may have died, though.
                needed = {c: w for c, w in busy.items() if any(i == first for i, _ in w.tasks)}
                busy = needed or busy
            for connection in multiprocessing.connection.wait(list(busy)):
                self._receive(busy[connection], done, waiting)

    def _free_worker(self) -> "_Worker | None":
        """Return a worker that can take a task, or None.

        Each worker holds up to two tasks, so that it does not have to wait for the parent.
        """
        worker = min(self._workers, key=lambda w: len(w.tasks), default=None)
        if (worker is None or worker.tasks) and len(self._workers) < self._num_workers:
            worker = _Worker(self._limits)
            self._workers.append(worker)
        return worker if len(worker.tasks) < 2 else None

    def _receive(self, worker: "_Worker", done: dict, waiting: list) -> None:
        """Handle one message of a worker, or its death."""
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._remove_dead(worker, done, waiting)
            return
        result = pickle.loads(message)
        if result is _READY:
            worker.ready = True
            self._failed_starts = 0
        else:
            done[worker.tasks.popleft()[0]] = result, len(message)

    def _remove_dead(self, worker: "_Worker", done: dict, waiting: list) -> None:
        """Remove a dead worker: its current task has failed, its next one goes to another."""
        self._workers.remove(worker)
        code = worker.stop(grace=5.0)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == 3:
                raise ChildProcessError(
                    f"worker processes do not start ({_describe_exit(code, self._limits)})"
                )
        elif worker.tasks:
            done[worker.tasks.popleft()[0]] = Failure(_describe_exit(code, self._limits)), 0
        waiting.extend(reversed(worker.tasks))


# Far more than the frames of an ordinary clip take, see docs/notes/measurements.md.
_MAX_WAITING_BYTES = 64 * 2**20
_READY = ...  # the first message of a worker; Ellipsis is the same object after unpickling


def pull_streams(
    function: Callable, arguments: Sequence[tuple], limits: DecodeLimits
) -> Iterator[tuple[int, Any]]:
    """Run a generator function in a killable process, for each of `arguments` in order.

    One process runs all generators, at most four items ahead of the caller. A process that dies is
    replaced by a new one.

    Args:
      function: a generator function, picklable and importable as for `WorkerPool.map`.
      arguments: the arguments of each call.
      limits: `seconds` and `memory_mb` apply to each item.

    Yields:
      (position in `arguments`, item). A generator that fails yields its good items and then a
      `Failure`.

    Raises:
      ChildProcessError: worker processes do not start at all.
    """
    position = 0  # the generator whose items are yielded now
    requested = collections.deque()  # the positions of the requests under way

    def make_requests() -> Iterator[tuple]:
        for i in range(len(arguments)):
            begin = True
            while position == i:
                requested.append(i)
                yield function, arguments[i], begin
                begin = False

    with WorkerPool(1, limits) as pool:
        for item in pool.map(_next_item, make_requests()):
            if requested.popleft() != position:
                continue  # requested before the end of its generator was known
            if item is not _End:
                yield position, item
            if item is _End or isinstance(item, Failure):
                position += 1


class _End:
    """Marks the end of a generator; a class is the same object after unpickling."""


_generator: Iterator[Any] = iter(())  # in a worker: its current generator


def _next_item(function: Callable, arguments: tuple, begin: bool) -> Any:
    """Run in a worker; return the next item of the generator, or `_End`.

    If the worker that began the generator has died, the next worker returns `_End`.
    """
    global _generator
    if begin:
        _generator = function(*arguments)
    return next(_generator, _End)


# The program of a worker; its arguments are the file descriptor of its pipe and the parent's
# `sys.path`.
WORKER_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from dualpath_jax.data.preparation import worker_pool; "
    "worker_pool.serve_tasks(int(sys.argv[1]))"
)


class _Worker:
    """Holds a process, the parent's end of its pipe, and its unanswered tasks.

    Attributes:
      connection: the parent's end of the pipe.
      tasks: deque of (number, arguments) of the tasks sent and not answered, in order.
      ready: True after the process has reported that it has started.
    """

    def __init__(self, limits: DecodeLimits):
        self.connection, worker_end = multiprocessing.Pipe()
        paths = [os.path.abspath(path) for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER_PROGRAM, str(worker_end.fileno()), *paths],
            stdin=subprocess.DEVNULL,
            pass_fds=[worker_end.fileno()],
        )
        worker_end.close()  # so that the parent reads an end of file when the worker dies
        with contextlib.suppress(OSError):  # the worker has died, which `_receive` will notice
            self.connection.send(limits)
        self.tasks = collections.deque()
        self.ready = False

    def send_task(self, function: Callable, index: int, arguments: tuple) -> bool:
        """Send a task; return False if the worker has died."""
        # The entry comes first: if the call is interrupted, the worker counts as busy.
        self.tasks.append((index, arguments))
        try:
            self.connection.send((function, arguments))
        except OSError:
            self.tasks.pop()
            return False
        return True

    def stop(self, grace: float = 0.0) -> int:
        """Wait `grace` seconds for the process to end, then kill it; return its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        self._process.kill()
        self.connection.close()
        return self._process.wait()


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
    workers.clear()


def serve_tasks(pipe: int) -> None:
    """Run in a worker; answer tasks until the parent closes its end of the pipe.

    Args:
      pipe: file descriptor of the worker's end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # The kernel's alarm limits the time: it ends the process wherever it hangs, even without a
    # parent.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    av.logging.set_level(av.logging.PANIC)
    connection = multiprocessing.connection.Connection(pipe)
    with contextlib.suppress(EOFError, OSError):  # the parent has finished or died
        limits = connection.recv()
        _limit_memory(limits.memory_mb)
        connection.send(_READY)
        while True:
            function, arguments = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, limits.seconds)
            result = _run_task(function, arguments, limits)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(result)


def _run_task(function: Callable, arguments: tuple, limits: DecodeLimits) -> bytes:
    """Call the function; return its pickled result, or a pickled `Failure` if it raises."""
    try:
        return pickle.dumps(function(*arguments), pickle.HIGHEST_PROTOCOL)
    except VideoError as problem:
        failure = Failure(str(problem))
    except MemoryError:
        failure = Failure(f"needs more than {limits.memory_mb} MB of memory")
    except Exception as problem:  # a broken file may make a library raise anything
        failure = Failure(describe_error(problem))
    return pickle.dumps(failure)


def _limit_memory(memory_mb: int) -> None:
    """Limit the address space to the present size and `memory_mb` MiB more (Linux only)."""
    if not os.path.exists("/proc/self/statm"):
        return
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limit = mapped + memory_mb * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _describe_exit(code: int | None, limits: DecodeLimits) -> str:
    """Describe why a worker process ended, from its exit code."""
    if code == -signal.SIGALRM:
        return f"took longer than {limits.seconds:g} s"
    if code == -signal.SIGKILL:
        return "the decoding process was killed (signal 9), perhaps for lack of memory"
    if code is not None and code < 0:
        return f"the decoding process crashed (signal {-code})"
    return f"the decoding process ended with exit code {code}"

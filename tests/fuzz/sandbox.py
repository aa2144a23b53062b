"""Reads untrusted files and watches what the readers do.

`serve` runs in a separate process, which may crash, hang or be killed; `harness` starts it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import sys
import traceback
from collections.abc import Callable, Iterator

from dualpath_jax.data.preparation import worker_pool
from tests.fuzz.mutate import mutate_bytes

ACCEPTED, REFUSED, FINDING = "accepted", "refused", "finding"
NAMED_ERRORS = (ValueError, OSError)  # `cli.user_errors` and the scripts report these in one line
_BARE_ERRORS = (UnicodeError, json.JSONDecodeError)  # ValueErrors that name no file
# Audit events of Python, see sys.addaudithook.
_CODE_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_CHANGE_EVENTS = (
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
)


# Damages of a format raise these for a file that no longer has this format.
_MUTATION_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    struct.error,
)
# Contents of `Case.files`, and where the links lead, that stand for something that is not a file.
FIFO, LINK_TO_FILE, LINK_TO_FOLDER = b"\0fifo", b"\0link to a file", b"\0link to a folder"
_OUTSIDE = {
    LINK_TO_FILE: "precious/file",
    LINK_TO_FOLDER: "precious",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds the files of one input.

    Attributes:
      kind: selects the reader of the target.
      files: content by path, relative to the folder of the case. `FIFO` makes a pipe, and
        `LINK_TO_FILE` or `LINK_TO_FOLDER` a link out of the folder.
    """

    kind: str
    files: dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Describes how reading a case ended.

    Attributes:
      kind: ACCEPTED, REFUSED or FINDING.
      text: the reason.
    """

    kind: str
    text: str = ""


class Target:
    """Defines readers to test, and makes valid and damaged files for them.

    Attributes:
      batch: number of cases that are read together.
      seconds: time limit for one batch; a longer one counts as a hang.
      changes_files: True if readers may change the files of a case, but nothing outside of them.
      memory_mb: MiB of address space that reading may add to what is mapped before.

    Args:
      folder: an empty folder for files needed to make the seeds.
    """

    batch = 1
    seconds = 60.0
    memory_mb = 2048
    changes_files = False

    def __init__(self, folder: pathlib.Path):
        raise NotImplementedError

    def seeds(self) -> list[Case]:
        """Return valid cases."""
        raise NotImplementedError

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        """Return a damaged copy of a seed, which depends only on the seed and `rng`."""
        raise NotImplementedError

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        """Read the files in `folder` as a user of the package does; may write into `out`."""
        raise NotImplementedError

    def read_all(
        self, cases: list[Case], folders: list[pathlib.Path], out: pathlib.Path
    ) -> list[Outcome]:
        """Read a batch of cases and return the outcome of each."""
        return [
            run_reader(lambda case=case, folder=folder: self.read(case.kind, folder, out))
            for case, folder in zip(cases, folders, strict=True)
        ]


def run_reader(read: Callable[[], None]) -> Outcome:
    """Call `read`; return ACCEPTED, REFUSED for `NAMED_ERRORS`, or FINDING for other errors."""
    try:
        read()
    except (
        BaseException
    ) as error:  # including MemoryError and SystemExit, which no reader may raise
        if isinstance(error, NAMED_ERRORS) and not isinstance(error, _BARE_ERRORS):
            return Outcome(REFUSED, f"{type(error).__name__}: {error}"[:500])
        return Outcome(FINDING, traceback.format_exc()[-4000:])
    return Outcome(ACCEPTED)


class SideEffectMonitor:
    """Records changes outside the output folder, started programs, and network connections.

    Python's audit events report everything that Python code does, anywhere. Writes by native
    libraries are found by comparing the files in `watched_dir` before and after.

    Args:
      watched_dir: the folder that contains all files of the test.
      out: the output folder, in which changes are allowed.
    """

    def __init__(self, watched_dir: pathlib.Path, out: pathlib.Path):
        self._watched_dir, self._out = watched_dir, out
        self._is_active = False
        self._events: list[str] = []
        sys.addaudithook(self._handle_audit_event)

    @contextlib.contextmanager
    def changes(self) -> Iterator[list[str]]:
        """Yield a list that gets, at the end of the block, a line for each forbidden action."""
        changes: list[str] = []
        before = self._list_files()
        self._events, self._is_active = [], True
        try:
            yield changes
        finally:
            self._is_active = False
            changes += self._events
            after = self._list_files()
            differing = sorted(k for k in before | after if before.get(k) != after.get(k))
            changes += [f"changed outside the output folder: {path}" for path in differing]

    def _handle_audit_event(self, event: str, arguments: tuple) -> None:
        """Record the event if it is forbidden."""
        if not self._is_active:
            return
        if event == "subprocess.Popen" and arguments[1][1:3] == ["-c", worker_pool.WORKER_PROGRAM]:
            return  # a video decoding process, which is meant to read the file
        if event in _CODE_EVENTS:
            self._events.append(f"{event} {arguments!r}"[:500])
        elif event == "open" and isinstance(arguments[0], str | bytes):
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            if arguments[2] & writes and not self._is_allowed(arguments[0]):
                self._events.append(f"opened for writing: {arguments[0]!r}")
        elif event in _CHANGE_EVENTS:
            paths = [a for a in arguments if isinstance(a, str | bytes)]
            self._events += [f"{event} {path!r}" for path in paths if not self._is_allowed(path)]

    def _is_allowed(self, path: str | bytes) -> bool:
        """Return whether `path` may be written."""
        path = os.path.realpath(os.fsdecode(path))
        return path == os.devnull or pathlib.Path(path).is_relative_to(self._out)

    def _list_files(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time of each watched file outside the output folder."""
        files = {}
        folders = [str(self._watched_dir)]
        while folders:
            for entry in os.scandir(folders.pop()):
                if entry.is_dir(follow_symlinks=False):
                    if entry.path != str(self._out):
                        folders.append(entry.path)
                        files[entry.path] = (0, 0)
                else:
                    stat = entry.stat(follow_symlinks=False)
                    files[entry.path] = (stat.st_size, stat.st_mtime_ns)
        return files


def make_case(target: Target, seed: int, index: int) -> Case:
    """Return case `index` of a target; equal seeds give equal cases."""
    rng = random.Random(f"{type(target).__name__}/{seed}/{index}")
    seeds = target.seeds()
    return target.mutate(rng, seeds[rng.randrange(len(seeds))])


def make_case_of_genome(target: Target, genome: bytes) -> Case:
    """Return a seed with several damages, one after the other.

    Args:
      target: makes the seed and the damages.
      genome: numbers of two bytes; the first selects the seed, each other one a damage.
    """
    numbers = [int.from_bytes(genome[i : i + 2], "little") for i in range(0, len(genome), 2)]
    seeds = target.seeds()
    case = seeds[(numbers or [0])[0] % len(seeds)]
    for number in numbers[1:]:
        rng = random.Random(number)
        try:
            case = target.mutate(rng, case)
        except _MUTATION_ERRORS:
            name = rng.choice(sorted(case.files))
            case = Case(case.kind, case.files | {name: mutate_bytes(rng, case.files[name])})
    return case


def write_case(case: Case, folder: pathlib.Path) -> None:
    """Write the files of a case into a folder."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == FIFO:
            os.mkfifo(path)
        elif content in _OUTSIDE:
            path.symlink_to("../" * (name.count("/") + 2) + _OUTSIDE[content])
        else:
            path.write_bytes(content)


class CaseReader:
    """Writes cases into a watched folder and reads them with a target.

    The process that makes one can do nothing else: its output goes to the file "log" in `work`.

    Args:
      target_type: the target that reads the files.
      work: an empty folder for all files.
    """

    def __init__(self, target_type: type[Target], work: str):
        sys.dont_write_bytecode = True  # bytecode of late imports would look like a forbidden write
        root = pathlib.Path(work).resolve()
        log = (root / "log").open("w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        (root / "seeds").mkdir()
        self.target = target_type(root / "seeds")
        watched_dir = root / "watched"
        deep = watched_dir / "a/b/c/d"  # deep, so that a few "../" stay in the watched folder
        self._cases_dir, self._out = deep / "cases", deep / "out"
        self._cases_dir.mkdir(parents=True)
        self._out.mkdir()
        write_case(Case("precious", {"file": b"{}"}), deep / "precious")
        self._monitor = SideEffectMonitor(watched_dir, self._out)

    def read(self, cases: list[Case]) -> list[Outcome]:
        """Read a batch; every case of it is a finding if one has a side effect."""
        parent = self._out if self.target.changes_files else self._cases_dir
        folders = [parent / str(i) for i in range(len(cases))]
        for case, folder in zip(cases, folders, strict=True):
            folder.mkdir()
            write_case(case, folder)
        with self._monitor.changes() as changes:
            outcomes = self.target.read_all(cases, folders, self._out)
        for folder in (*folders, self._out):
            shutil.rmtree(folder)
        self._out.mkdir()
        return [Outcome(FINDING, "\n".join(changes))] * len(cases) if changes else outcomes

    def read_seeds(self) -> str:
        """Read the seeds, which also imports what is imported late, and limit the memory.

        Returns:
          "ready", or the text of their errors.
        """
        outcomes = self.read(self.target.seeds())
        errors = [o.text or o.kind for o in outcomes if o.kind != ACCEPTED]
        _limit_memory(self.target.memory_mb)
        return "\n".join(errors) or "ready"


def serve(connection, target_type: type[Target], work: str, seed: int) -> None:
    """Run the reading process: receive cases, read them, and send the outcomes.

    First it reads the seeds, and sends "ready" or the text of their errors. Then it receives ranges
    of cases (first, end) and sends a list of `Outcome` for each batch in them, or it receives the
    genome of one case, see `make_case_of_genome`.

    Args:
      connection: one end of a pipe.
      target_type: the target that reads the files.
      work: an empty folder for all files.
      seed: random seed of the damages.
    """
    reader = CaseReader(target_type, work)
    target = reader.target
    connection.send(reader.read_seeds())
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if isinstance(message, bytes):
            connection.send(reader.read([make_case_of_genome(target, message)]))
            continue
        first, end = message
        for start in range(first, end, target.batch):
            indices = range(start, min(start + target.batch, end))
            connection.send(reader.read([make_case(target, seed, i) for i in indices]))


def _limit_memory(memory_mb: int) -> None:
    """Limit the address space to what is mapped now and `memory_mb` MiB more."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_mb * 2**20, resource.RLIM_INFINITY))

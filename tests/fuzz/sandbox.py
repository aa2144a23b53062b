"""Watches a process that reads strangers' files: `Case`, `Outcome`, `Target`, `SideEffectMonitor`, `serve`.

Runs in a process of its own, which may crash, hang or be killed; `harness` starts it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator

from dualpath_jax.data.preparation import worker_pool

ACCEPTED, REFUSED, FINDING = "accepted", "refused", "finding"
NAMED_ERRORS = (ValueError, OSError)  # what command.user_errors and the scripts show in one line
_BARE_ERRORS = (UnicodeError, json.JSONDecodeError)  # ValueErrors that name no file
_CODE_RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_CHANGES = (
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Files as a stranger sends them.

    Attributes:
      kind: which reader of the target they are for.
      files: content by path, relative to the folder of the case.
    """

    kind: str
    files: dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case: ACCEPTED, REFUSED or FINDING, and in words why."""

    kind: str
    text: str = ""


class Target:
    """Readers to try, and valid files for them.

    Attributes:
      batch: cases that are read together.
      seconds: time for one batch, a hang beyond.
      memory_mb: MiB of address space that reading may take on top of what is there before.

    Args:
      folder: an empty one, for files needed to make the seeds.
    """

    batch = 1
    seconds = 60.0
    memory_mb = 2048

    def __init__(self, folder: pathlib.Path):
        raise NotImplementedError

    def seeds(self) -> list[Case]:
        """Valid cases."""
        raise NotImplementedError

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        """A damaged copy of a seed, a function of `rng` alone."""
        raise NotImplementedError

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        """Reads the files in `folder` as a user of the package does; may write into `out`."""
        raise NotImplementedError

    def read_all(
        self, cases: list[Case], folders: list[pathlib.Path], out: pathlib.Path
    ) -> list[Outcome]:
        """The outcome of each case of a batch."""
        return [
            run_reader(lambda case=case, folder=folder: self.read(case.kind, folder, out))
            for case, folder in zip(cases, folders, strict=True)
        ]


def run_reader(read: Callable[[], None]) -> Outcome:
    """Accepted, refused with one of `NAMED_ERRORS`, or what else was raised."""
    try:
        read()
    except BaseException as error:  # also MemoryError and SystemExit: no reader may raise them
        if isinstance(error, NAMED_ERRORS) and not isinstance(error, _BARE_ERRORS):
            return Outcome(REFUSED, f"{type(error).__name__}: {error}"[:500])
        return Outcome(FINDING, traceback.format_exc()[-4000:])
    return Outcome(ACCEPTED)


class SideEffectMonitor:
    """Notes what a process changes outside one folder, and programs and connections it starts.

    Python's audit events tell of everything done by Python, anywhere. What libraries write
    natively is found by looking at `around`, the folder in which all of the test lies.
    """

    def __init__(self, around: pathlib.Path, out: pathlib.Path):
        self._around, self._out = around, out
        self._on = False
        self._seen: list[str] = []
        sys.addaudithook(self._note)

    @contextlib.contextmanager
    def changes(self) -> Iterator[list[str]]:
        """Gets, at the end of the block, a line for each thing done in it that it must not do."""
        found: list[str] = []
        before = self._files()
        self._seen, self._on = [], True
        try:
            yield found
        finally:
            self._on = False
            found += self._seen
            after = self._files()
            differing = sorted(k for k in before | after if before.get(k) != after.get(k))
            found += [f"changed outside the output folder: {path}" for path in differing]

    def _note(self, event: str, arguments: tuple) -> None:
        if not self._on:
            return
        if event == "subprocess.Popen" and arguments[1][1:3] == ["-c", worker_pool.START]:
            return  # a decoding process, which is what shall meet the file
        if event in _CODE_RUNS:
            self._seen.append(f"{event} {arguments!r}"[:500])
        elif event == "open" and isinstance(arguments[0], str | bytes):
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            if arguments[2] & writes and not self._allowed(arguments[0]):
                self._seen.append(f"opened for writing: {arguments[0]!r}")
        elif event in _CHANGES:
            paths = [a for a in arguments if isinstance(a, str | bytes)]
            self._seen += [f"{event} {path!r}" for path in paths if not self._allowed(path)]

    def _allowed(self, path: str | bytes) -> bool:
        path = os.path.realpath(os.fsdecode(path))
        return path == os.devnull or pathlib.Path(path).is_relative_to(self._out)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every file around, but for those in the output folder."""
        found = {}
        folders = [str(self._around)]
        while folders:
            for entry in os.scandir(folders.pop()):
                if entry.is_dir(follow_symlinks=False):
                    if entry.path != str(self._out):
                        folders.append(entry.path)
                        found[entry.path] = (0, 0)
                else:
                    stat = entry.stat(follow_symlinks=False)
                    found[entry.path] = (stat.st_size, stat.st_mtime_ns)
        return found


def make_case(target: Target, seed: int, index: int) -> Case:
    """Case `index` of a target, the same for the same `seed`."""
    rng = random.Random(f"{type(target).__name__}/{seed}/{index}")
    seeds = target.seeds()
    return target.mutate(rng, seeds[rng.randrange(len(seeds))])


def write_case(case: Case, folder: pathlib.Path) -> None:
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def serve(connection, target_type: type[Target], work: str, seed: int) -> None:
    """Main function of the reading process.

    Sends "ready", or the text of what is wrong with the seeds; then gets ranges of cases (first,
    end) and for each batch in them sends a list of `Outcome`.

    Args:
      connection: one end of a pipe.
      target_type: what reads.
      work: an empty folder for all of it.
      seed: of the damages.
    """
    sys.dont_write_bytecode = True  # what is imported late would look like a file written
    root = pathlib.Path(work).resolve()
    log = (root / "log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    (root / "seeds").mkdir()
    target = target_type(root / "seeds")
    around = root / "around"  # deep, so that a few "../" stay within
    cases_dir, out = around / "a/b/c/d/cases", around / "a/b/c/d/out"
    cases_dir.mkdir(parents=True)
    out.mkdir()
    watch = SideEffectMonitor(around, out)

    def read(cases: list[Case]) -> list[Outcome]:
        folders = [cases_dir / str(i) for i in range(len(cases))]
        for case, folder in zip(cases, folders, strict=True):
            folder.mkdir()
            write_case(case, folder)
        with watch.changes() as changes:
            outcomes = target.read_all(cases, folders, out)
        for folder in (*folders, out):
            shutil.rmtree(folder)
        out.mkdir()
        return [Outcome(FINDING, "\n".join(changes))] * len(cases) if changes else outcomes

    outcomes = read(target.seeds())  # also loads what is loaded late
    wrong = [o.text or o.kind for o in outcomes if o.kind != ACCEPTED]
    connection.send("\n".join(wrong) or "ready")
    _limit_memory(target.memory_mb)
    while True:
        try:
            first, end = connection.recv()
        except EOFError:
            return
        for start in range(first, end, target.batch):
            indices = range(start, min(start + target.batch, end))
            connection.send(read([make_case(target, seed, i) for i in indices]))


def _limit_memory(memory_mb: int) -> None:
    """Address space: what is mapped now and `memory_mb` MiB more."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_mb * 2**20, resource.RLIM_INFINITY))

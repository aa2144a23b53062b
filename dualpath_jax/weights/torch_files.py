"""Reads the tensors of torch's files without torch, and without executing anything in them.

Three formats hold a pickle that refers to raw storages: the zip archives of `torch.save`,
TorchScript archives, and the files of `torch.save` before torch 1.6. The pickle is interpreted
here. It can only build containers, numbers, strings and tensors: a callable is never looked up, its
name is compared with `_BUILDERS` and `_INERT`.
"""

import dataclasses
import functools
import io
import math
import mmap
import os
import pathlib
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

_MAX_EXPANSION = 2  # ratio of bytes in memory to bytes on disk: tied weights are stored once
_MAX_PICKLE_BYTES = 64 * 2**20  # a state dict of 10,000 tensors has 1 MB
_MAX_NODES = 1_000_000  # containers and attributes of an archive
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Objects that training checkpoints hold next to the weights. Their content is not needed.
_INERT = {
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.device",
    "torch.Size",
    "builtins.set",
    "__builtin__.set",
}
_DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
_LISTS = {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}


class RefusedPickleError(ValueError):
    """A pickle that needs more than tensors and plain values."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """Stands for a class or function that a pickle names."""

    name: str


@dataclasses.dataclass
class _Object:
    """Stands for an object of a known class, with the state that the pickle gives it."""

    name: str
    state: Any = None


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Describes the raw numbers that tensors share: `read` returns them."""

    dtype: np.dtype
    size: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Describes a tensor, whose numbers are read when they are needed."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor in memory."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Read the tensor."""
        flat = np.frombuffer(self.storage.read(), self.storage.dtype)
        if len(flat) < self.storage.size:
            raise ValueError("its storage is truncated")
        view = np.lib.stride_tricks.as_strided(
            flat[self.offset :],
            self.shape,
            [stride * flat.itemsize for stride in self.strides],
            writeable=False,
        )
        return np.ascontiguousarray(view)


# ---------------------------------------------------------------- the pickle


def _build_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Build a tensor as torch._utils._rebuild_tensor_v2 does, after checking its bounds."""
    numbers = (offset, *shape, *strides)
    valid = isinstance(storage, _Storage) and len(shape) == len(strides) <= 8
    if not (valid and all(type(n) is int and n >= 0 for n in numbers)):
        raise ValueError("a tensor is described wrongly")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_: Any) -> Any:
    return value


_BUILDERS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _build_tensor,
    "torch._utils._rebuild_tensor_v2": _build_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    **dict.fromkeys(_DICTS, lambda *_: {}),
    **dict.fromkeys(_LISTS, _first),
}


class _Interpreter:
    """Interprets the opcodes of one pickle.

    Attributes:
      open_storage: returns the `_Storage` of a persistent id.
    """

    def __init__(self, open_storage: Callable[[Any], _Storage]):
        self.open_storage = open_storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: Any) -> Any:
        """Return the object of the pickle that begins at the file's position."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(_VALUES[name](argument))
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Global(f"{module}.{attribute}"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name == "TUPLE":
            stack.append(tuple(self._pop_mark()))
        elif name == "BINPERSID":
            stack.append(self.open_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_construct(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Object):
                stack[-1].state = state
        else:
            self._fill(name)

    def _fill(self, name: str) -> None:
        """Interpret the opcodes that fill containers."""
        stack = self._stack
        if name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items = stack[-count:]
            del stack[-count:]
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            items = self._pop_mark()
        else:
            raise RefusedPickleError(f"the opcode {name}")
        container = stack[-1]
        if name.startswith("APPEND") and isinstance(container, list):
            container += items
        elif name.startswith("SETITEM") and isinstance(container, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            # Keys of other types (tuples) could be nested deeper than hashing can go.
            container.update((k, v) for k, v in pairs if isinstance(k, str | int | float))
        elif not isinstance(container, _Object):
            raise ValueError("the pickle fills what is not a container")

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items


_VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        (
            *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
            *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        ),
        _first,
    ),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_SET": lambda _: _Object("set"),
    "GLOBAL": lambda argument: _Global(argument.replace(" ", ".")),
}


def _construct(target: Any, arguments: Any) -> Any:
    """Return what calling `target`, of a pickle, gives; raise RefusedPickleError if unknown."""
    name = target.name if isinstance(target, _Global) else repr(type(target).__name__)
    if name in _INERT or name.startswith("__torch__."):  # a module of a TorchScript archive
        return _Object(name)
    if "_rebuild_qtensor" in name:
        raise RefusedPickleError("quantized tensors")
    if name not in _BUILDERS:
        raise RefusedPickleError(name[:100])
    return _BUILDERS[name](*arguments)


def _interpret(file: Any, open_storage: Callable[[Any], _Storage]) -> Any:
    """Interpret a pickle; raises ValueError for a damaged one."""
    try:
        return _Interpreter(open_storage).load(file)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from None


# ---------------------------------------------------------------- the three formats


def _parse_storage_id(value: Any) -> tuple[np.dtype, str, int]:
    """Return dtype, key and number of elements of ("storage", type, key, device, number, ...)."""
    kind, storage_type, key, _, size = value[:5]
    name = storage_type.name.rpartition(".")[2]
    if kind != "storage" or type(size) is not int or size < 0:
        raise ValueError("a storage is described wrongly")
    if name not in _STORAGE_DTYPES:
        raise RefusedPickleError(f"the storage type {name[:50]}")
    return _STORAGE_DTYPES[name], str(key), size


def read_zip(path: pathlib.Path) -> Any:
    """Return the content of an archive of `torch.save` or TorchScript, with `Tensor` leaves.

    Raises:
      RefusedPickleError: the pickle holds more than tensors and plain values.
      ValueError: the archive is damaged.
    """
    try:
        archive = zipfile.ZipFile(path)
        members = {member.filename: member for member in archive.infolist()}
        pickles = [n for n in members if n.endswith("data.pkl") and n.count("/") <= 1]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl: it is a zip archive of another kind")
        prefix = pickles[0].removesuffix("data.pkl")
        if members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("its pickle is too large")
        byteorder = members.get(f"{prefix}byteorder")
        read = functools.lru_cache(maxsize=1)(archive.read)  # tensors may share a storage
        big = byteorder is not None and archive.read(byteorder) == b"big"

        def open_storage(value: Any) -> _Storage:
            dtype, key, size = _parse_storage_id(value)
            name = f"{prefix}data/{key}"
            if name not in members or members[name].file_size < size * dtype.itemsize:
                raise ValueError(f"the storage {key[:50]} is missing or truncated")
            if big and dtype.itemsize > 1:
                raise ValueError("its numbers are big-endian: save it again on another machine")
            return _Storage(dtype, size, lambda: read(name))

        return _interpret(io.BytesIO(archive.read(pickles[0])), open_storage)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(str(error)) from None


def read_legacy(path: pathlib.Path) -> Any:
    """Return the content of a file of `torch.save` before torch 1.6, with `Tensor` leaves.

    It has a magic number, version, machine, the object and the storages' keys, each as a pickle.
    Then each storage follows: its number of elements as int64, and the elements.

    Raises:
      RefusedPickleError: the pickle holds more than tensors and plain values.
      ValueError: the file is damaged.
    """
    storages: dict[str, _Storage] = {}
    positions: dict[str, int] = {}

    def open_storage(value: Any) -> _Storage:
        dtype, key, size = _parse_storage_id(value)
        if len(value) > 5 and value[5] is not None:
            raise RefusedPickleError("views of storages: save the file again with a newer torch")

        @functools.cache
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(positions[key])
                return file.read(size * dtype.itemsize)

        return storages.setdefault(key, _Storage(dtype, size, read))

    # The file is mapped because a damaged pickle requests as many bytes as it claims to have.
    with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if _interpret(file, open_storage) != _LEGACY_MAGIC:
            raise RefusedPickleError("a plain pickle, which torch did not write")
        _interpret(file, open_storage)
        _interpret(file, open_storage)
        content = _interpret(file, open_storage)
        keys = _interpret(file, open_storage)
        file_size = len(file)
        for key in keys if isinstance(keys, list) else ():
            if key not in storages:
                raise ValueError("a storage is not used")
            size = int.from_bytes(file.read(8), "little")
            num_bytes = storages[key].size * storages[key].dtype.itemsize
            positions[key] = file.tell()
            if size != storages[key].size or positions[key] + num_bytes > file_size:
                raise ValueError(f"the storage {key} is truncated")
            file.seek(num_bytes, os.SEEK_CUR)
    if missing := storages.keys() - positions.keys():
        raise ValueError(f"{len(missing)} storages are missing")
    return content


def module_tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by their dotted attribute names."""
    tensors, nodes = {}, [("", content)]
    for count, (name, node) in enumerate(nodes):  # grows while it runs
        if count > _MAX_NODES or name.count(".") > 50:
            raise ValueError("its modules are nested too deep")
        if isinstance(node, Tensor):
            tensors[name] = node
        state = node.state if isinstance(node, _Object) else None
        if isinstance(state, dict):
            prefix = f"{name}." if name else ""
            nodes += [(f"{prefix}{key}", value) for key, value in state.items()]
    return tensors


def check_expansion(path: pathlib.Path, num_bytes: int) -> None:
    """Raise ValueError if a file claims to hold far more bytes than it has."""
    size = path.stat().st_size
    if num_bytes > _MAX_EXPANSION * size:
        raise ValueError(
            f"{path} has {size:,} bytes but claims to hold {num_bytes:,}: it is damaged, or was "
            "made to exhaust the memory"
        )

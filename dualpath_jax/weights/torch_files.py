"""Reads the tensors of torch's files without torch, and without executing anything in them.

Three formats hold a pickle that refers to raw storages: the zip archives of `torch.save`,
TorchScript archives, and the files of `torch.save` before torch 1.6. The pickle is interpreted
here. It can only build containers, numbers, strings and tensors. A class or function is never
looked up: its name is compared with `_BUILDERS`, and the object of any other name becomes a
placeholder, `Opaque`.
"""

import dataclasses
import functools
import io
import itertools
import math
import os
import pathlib
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

_MAX_EXPANSION = 2  # ratio of bytes in memory to bytes on disk: tied weights are stored once
_MAX_PICKLE_BYTES = 64 * 2**20  # a state dict of 10,000 tensors has 1 MB
_MAX_OPCODES = 5_000_000
_MAX_INTEGER_BITS = 128
_MAX_NAME_CHARS = 1_000  # of classes, storages, and the attributes of an archive
_MAX_DIMENSIONS = 8
_MAX_NODES = 100_000  # modules and tensors of an archive
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
_DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
_LISTS = {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}


class RefusedPickleError(ValueError):
    """Reports a pickle that torch did not write, or that needs what is not supported."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """Stands for a class or function that a pickle names."""

    name: str


@dataclasses.dataclass
class Opaque:
    """Stands for an object that is not needed, with the state that the pickle gives it.

    Training checkpoints hold many next to the weights: options, paths, dates, random states.
    """

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
        return np.asarray(view, order="C")  # np.ascontiguousarray adds an axis to a number


# ---------------------------------------------------------------- the pickle


def _build_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
    """Build a tensor as torch._utils._rebuild_tensor does, after checking its bounds."""
    if isinstance(storage, Opaque):
        return storage
    valid = isinstance(storage, _Storage) and type(shape) is type(strides) is tuple
    if not (valid and len(shape) == len(strides) <= _MAX_DIMENSIONS):
        raise ValueError("a tensor is described wrongly")
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor is described wrongly")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    return Tensor(storage, offset, shape, strides)


def _build_tensor_v2(*arguments: Any) -> Any:
    """Build a tensor; metadata, the seventh argument, changes what its numbers mean."""
    if len(arguments) > 6 and arguments[6]:
        return Opaque("a tensor with metadata, such as the negative bit")
    return _build_tensor(*arguments)


def _build_typed(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """Build a tensor with attributes; those of other classes may mean something else."""
    name = kind.name if isinstance(kind, _Global) else "a tensor of an unknown class"
    return _construct(function, arguments) if name in _TENSOR_CLASSES else Opaque(name)


def _first(value: Any, *_: Any) -> Any:
    return value


_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"}
_BUILDERS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _build_tensor,
    "torch._utils._rebuild_tensor_v2": _build_tensor_v2,
    "torch._tensor._rebuild_from_type_v2": _build_typed,
    "torch._utils._rebuild_qtensor": lambda *_: Opaque("a quantized tensor"),
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

    def load(self, file: BinaryIO) -> Any:
        """Return the object of the pickle that begins at the file's position."""
        opcodes = pickletools.genops(_BoundedReader(file))
        for opcode, argument, _ in itertools.islice(opcodes, _MAX_OPCODES):
            if opcode.name == "STOP":
                return self._stack.pop()
            if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
                raise ValueError("the pickle holds an integer that is too large")
            self._step(opcode.name, argument)
        raise ValueError("the pickle has no end, or too many parts")

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
            stack.append(_Global(f"{_check_name(module)}.{_check_name(attribute)}"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name == "TUPLE":
            stack.append(tuple(self._pop_mark()))
        elif name == "BINPERSID":
            stack.append(self.open_storage(stack.pop()))
        elif name == "FROZENSET":
            self._pop_mark()
            stack.append(Opaque("frozenset"))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()  # keyword arguments, which no builder has
            arguments = stack.pop()
            stack.append(_construct(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Opaque):
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
            container.update((key, value) for key, value in pairs if _is_key(key))
        elif not isinstance(container, Opaque):
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
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        ),
        _first,
    ),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_SET": lambda _: Opaque("set"),
    "GLOBAL": lambda argument: _Global(_check_name(argument).replace(" ", ".")),
}


class _BoundedReader:
    """Reads a pickle, but no more bytes than the pickle of a checkpoint may have.

    A damaged pickle requests as many bytes as it claims to have.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = _MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        """Read `size` bytes."""
        self._left -= size
        if self._left < 0:
            raise ValueError("its pickle is too large")
        return self._file.read(size)

    def readline(self) -> bytes:
        """Read a line, which holds the name of a class."""
        line = self._file.readline(2 * _MAX_NAME_CHARS)
        self._left -= len(line)
        return line


def _check_name(value: Any) -> str:
    """Return the name of a class or a storage; raise ValueError if it is not one."""
    if type(value) is not str or len(value) > _MAX_NAME_CHARS:
        raise ValueError("a name is not text, or too long")
    return value


def _is_key(value: Any) -> bool:
    """Return whether a dict may have this key.

    Tuples may be nested deeper than hashing can go. Large integers may share one hash, so that a
    dict of them takes the square of the time.
    """
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**60)


def _construct(target: Any, arguments: Any) -> Any:
    """Return the result of a call of `target` in a pickle; only our builders are really called."""
    if isinstance(target, Opaque):  # what getattr, partial or a factory would give
        return Opaque(target.name)
    if not isinstance(target, _Global) or type(arguments) is not tuple:
        raise ValueError("the pickle calls what is not a class")
    builder = _BUILDERS.get(target.name)
    return builder(*arguments) if builder else Opaque(target.name)


# What a damaged pickle makes the interpreter raise.
_DAMAGES = (
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


def _interpret(file: BinaryIO, open_storage: Callable[[Any], Any]) -> Any:
    """Interpret a pickle; raise ValueError for a damaged one."""
    try:
        return _Interpreter(open_storage).load(file)
    except _DAMAGES as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from None


# ---------------------------------------------------------------- the three formats


def _parse_storage_id(value: Any) -> tuple[str, str, int]:
    """Return type, key and number of elements of ("storage", type, key, device, number, ...)."""
    if type(value) is not tuple or len(value) < 5 or type(value[0]) is not str:
        raise ValueError("a storage is described wrongly")
    kind, storage_type, key, _, size = value[:5]
    valid = kind == "storage" and isinstance(storage_type, _Global)
    if not (valid and type(size) is int and 0 <= size < 2**60):
        raise ValueError("a storage is described wrongly")
    return storage_type.name.rpartition(".")[2], _check_name(key), size


def read_zip(path: pathlib.Path) -> Any:
    """Return the content of an archive of `torch.save` or TorchScript.

    Its tensors are `Tensor`; other objects than containers, numbers and strings are `Opaque`.

    Raises:
      RefusedPickleError: the pickle needs what is not supported.
      ValueError: the archive is damaged.
    """
    try:
        archive = zipfile.ZipFile(path)
        read = functools.lru_cache(maxsize=1)(  # tensors may share a storage
            functools.partial(_read_member, archive)
        )
        members = {member.filename: member for member in archive.infolist()}
        pickles = [n for n in members if n.endswith("data.pkl") and n.count("/") <= 1]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl: it is a zip archive of another kind")
        prefix = pickles[0].removesuffix("data.pkl")
        if members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("its pickle is too large")
        byteorder = members.get(f"{prefix}byteorder")
        big = byteorder is not None and read(byteorder.filename) == b"big"

        def open_storage(value: Any) -> _Storage | Opaque:
            storage_type, key, size = _parse_storage_id(value)
            if storage_type not in _STORAGE_DTYPES:
                return Opaque(f"torch.{storage_type}")
            dtype, name = _STORAGE_DTYPES[storage_type], f"{prefix}data/{key}"
            if name not in members or members[name].file_size < size * dtype.itemsize:
                raise ValueError(f"the storage {key[:50]} is missing or truncated")
            if big and dtype.itemsize > 1:
                raise ValueError("its numbers are big-endian: save it again on another machine")
            return _Storage(dtype, size, lambda: read(name))

        return _interpret(io.BytesIO(read(pickles[0])), open_storage)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(str(error)) from None


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except Exception as error:  # each kind of compression raises its own types
        raise ValueError(f"{name[:50]} cannot be read: {error}") from None


def read_legacy(path: pathlib.Path) -> Any:
    """Return the content of a file of `torch.save` before torch 1.6, as `read_zip` does.

    It has a magic number, version, machine, the object and the storages' keys, each as a pickle.
    Then each storage follows: its number of elements as int64, and the elements.

    Raises:
      RefusedPickleError: the pickle needs what is not supported.
      ValueError: the file is damaged.
    """
    storages: dict[str, _Storage] = {}
    positions: dict[str, int] = {}

    def open_storage(value: Any) -> _Storage:
        storage_type, key, size = _parse_storage_id(value)
        if storage_type not in _STORAGE_DTYPES:
            raise RefusedPickleError(f"the storage type {storage_type[:50]}")
        dtype = _STORAGE_DTYPES[storage_type]
        if len(value) > 5 and value[5] is not None:
            raise RefusedPickleError("views of storages: save the file again with a newer torch")

        @functools.cache
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(positions[key])
                return file.read(size * dtype.itemsize)

        storage = storages.setdefault(key, _Storage(dtype, size, read))
        if (storage.dtype, storage.size) != (dtype, size):
            raise ValueError(f"the storage {key[:50]} is described twice")
        return storage

    with path.open("rb") as file:
        if _interpret(file, open_storage) != _LEGACY_MAGIC:
            raise RefusedPickleError("a plain pickle, which torch did not write")
        _interpret(file, open_storage)
        _interpret(file, open_storage)
        content = _interpret(file, open_storage)
        keys = _interpret(file, open_storage)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its list of storages is not one of names")
        file_size = os.fstat(file.fileno()).st_size
        for key in keys:
            if key not in storages:
                raise ValueError("a storage is not used")
            size = int.from_bytes(file.read(8), "little")
            num_bytes = storages[key].size * storages[key].dtype.itemsize
            positions[key] = file.tell()
            if size != storages[key].size or positions[key] + num_bytes > file_size:
                raise ValueError(f"the storage {key[:50]} is truncated")
            file.seek(num_bytes, os.SEEK_CUR)
    if missing := storages.keys() - positions.keys():
        raise ValueError(f"{len(missing)} storages are missing")
    return content


def module_tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by their dotted attribute names."""
    tensors, nodes = {}, [("", content)]
    for name, node in nodes:  # grows while it runs
        if isinstance(node, Tensor):
            tensors[name] = node
        elif isinstance(node, Opaque) and isinstance(node.state, dict):
            prefix = f"{name}." if name else ""
            for key, value in node.state.items():
                if isinstance(value, Tensor | Opaque):
                    nodes.append((_check_name(f"{prefix}{key}"), value))
                if len(nodes) > _MAX_NODES:
                    raise ValueError("it has too many modules")
    return tensors


def check_expansion(path: pathlib.Path, num_bytes: int) -> None:
    """Raise ValueError if a file claims to hold far more bytes than it has."""
    size = path.stat().st_size
    if num_bytes > _MAX_EXPANSION * size:
        raise ValueError(
            f"{path} has {size:,} bytes but claims to hold {num_bytes:,}: it is damaged, or was "
            "made to exhaust the memory"
        )

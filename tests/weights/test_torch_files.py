"""Tests of reading torch's files: what is read, what is skipped, and what is refused."""

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dualpath_jax.weights import source_files, torch_files

torch = pytest.importorskip("torch")

BOTH_FORMATS = pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])


def _save(content, path, new_format=True):
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    return path


def _read(path):
    """Return the arrays of a torch file's state dict."""
    _, readers, _ = source_files.open_tensors(source_files.find_source(path))
    return {name: read() for name, read in readers.items()}


def _write_zip(path, data_pickle, **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pickle)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def _write_legacy(path, content, keys, rest=b""):
    """Write a file of the old format: magic, version, machine, content and keys as pickles."""
    head = [torch_files._LEGACY_MAGIC, 1001, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in head) + content + keys + rest)
    return path


# ---------------------------------------------------------------- what is read


@BOTH_FORMATS
def test_views_and_dtypes(new_format, tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "transposed": base.T,
        "offset": base[1:3, 2:5],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "shared": base,
        "bfloat16": base.to(torch.bfloat16),
        "parameter": torch.nn.Parameter(base + 1),
        "number": torch.tensor(7),
    }
    arrays = _read(_save(state, tmp_path / "a.pt", new_format))
    assert arrays.keys() == state.keys()
    for name, tensor in state.items():
        array = arrays[name]
        assert array.shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy())
    assert arrays["bfloat16"].dtype == ml_dtypes.bfloat16
    assert arrays["number"].dtype == np.int64


class _Color(enum.Enum):
    RED = 1


class _Options(dict):
    """Stands for yacs' CfgNode and other dicts with attributes."""


def _objects_of_training():
    options = _Options(lr=0.1)
    options.frozen = True
    return {
        "args": argparse.Namespace(out=pathlib.Path("a"), lr=np.float64(0.1), seen={1, 2}),
        "arrays": [np.arange(3), np.random.RandomState(0).get_state()],
        "containers": (frozenset({1}), collections.deque([1], 5), range(3), slice(1)),
        "bytes": [b"a", bytearray(b"a")],
        "options": options,
        "time": [datetime.datetime(2024, 1, 1), datetime.timedelta(1), datetime.date(2024, 1, 1)],
        "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), 1j, 2**100],
        "enum": {_Color.RED: _Color.RED, (1, 2): 3},
        "functions": [functools.partial(max, 1), max, _Color],
        "sparse": torch.eye(2).to_sparse(),
        "device": [torch.device("cpu"), torch.Size([1]), torch.float16],
    }


@BOTH_FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_next_to_the_weights_are_skipped(protocol, new_format, tmp_path):
    content = {"model": {"a": torch.ones(2)}, **_objects_of_training()}
    torch.save(
        content,
        tmp_path / "a.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=new_format,
    )
    np.testing.assert_array_equal(_read(tmp_path / "a.pt")["a"], [1, 1])


@pytest.mark.parametrize(
    ("content", "logged"),
    [
        ({"state_dict": {"a": 1}, "state_dict_ema": {"a": 2}}, "state_dict are read, not those"),
        ({"state_dict_ema": {"a": 2}, "model": {"a": 1}}, "in model are read, not those in state"),
        ({"model": {}, "state_dict_ema": {"a": 1}}, None),
        ({"state_dict": {"epoch": "x"}, "model": {"a": 1}}, None),
        ({"model": {}, "ema": {"module": {"a": 1}}}, None),
        ({"state_dict": {"model": {"a": 1}}, "epoch": "x"}, None),
    ],
)
def test_first_wrapper_with_tensors_is_read(content, logged, tmp_path, caplog):
    def to_tensors(value):
        if isinstance(value, dict):
            return {key: to_tensors(item) for key, item in value.items()}
        return torch.tensor(value) if isinstance(value, int) else value

    assert _read(_save(to_tensors(content), tmp_path / "a.pt"))["a"] == 1
    assert logged in caplog.text if logged else not caplog.text


@pytest.mark.parametrize("name", ["last.ckpt", "checkpoint.pth.tar"])
def test_weights_of_a_folder(name, tmp_path):
    (tmp_path / "log.txt").write_text("")
    path = _save({"a": torch.ones(1)}, tmp_path / name)
    assert source_files.find_source(tmp_path).files == (path,)


def test_tensor_with_attributes_is_read(tmp_path):
    tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.zeros(3))
    tensor.note = parameter.note = "kept by torch"
    arrays = _read(_save({"a": tensor, "b": parameter}, tmp_path / "a.pt"))
    np.testing.assert_array_equal(arrays["a"], [1, 1])
    np.testing.assert_array_equal(arrays["b"], [0, 0, 0])


# ---------------------------------------------------------------- what is refused


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda a: a.numpy(), r"b: numpy\._?core\.multiarray\._reconstruct"),
        (lambda a: a.to_sparse(), r"b: torch\._utils\._rebuild_sparse_tensor"),
        (lambda a: a.to(torch.complex64), r"b: torch\.ComplexFloatStorage"),
        (lambda a: torch.quantize_per_tensor(a, 0.1, 0, torch.qint8), "b: a quantized tensor"),
        (lambda a: a.to(torch.complex64).conj().imag, "b: a tensor with metadata"),
        (lambda a: _Options(c=a), r"b: tests\.weights\.test_torch_files\._Options"),
    ],
    ids=["numpy", "sparse", "complex", "quantized", "negative", "dict"],
)
def test_other_values_of_the_state_dict_are_refused_by_name(build, message, tmp_path):
    weight = torch.ones(2)
    _save({"state_dict": {"a": weight, "b": build(weight)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"holds more than tensors \({message}.*is refused"):
        _read(tmp_path / "a.pt")


def test_pickled_model_is_refused_by_name(tmp_path):
    for content in (torch.nn.Linear(1, 1), {"model": torch.nn.Linear(1, 1), "epoch": 1}):
        with pytest.raises(ValueError, match=r"\((model: )?torch\.nn\.modules\.linear\.Linear"):
            _read(_save(content, tmp_path / "a.pt"))


_GLOBAL_STORAGE = b"ctorch\nFloatStorage\n"


def _storage_id(key):
    """Return the opcodes of a persistent id whose key is built by the opcodes `key`."""
    return b"(X\x07\0\0\0storage" + _GLOBAL_STORAGE + key + b"X\x03\0\0\0cpuK\x01tQ"


def _self_referring(depth):
    """Return opcodes of a tuple that holds another one twice, which does too, and so on."""
    level = b"q\x00h\x00\x86"  # BINPUT 0, BINGET 0, TUPLE2: (x, x)
    return b")" + level * depth


def _long(size):
    return b"\x8b" + struct.pack("<i", size) + b"\x7f" * size


_LONG_TEXT = b"X" + struct.pack("<I", 2000) + b"x" * 2000
DAMAGED_PICKLES = {
    "deep storage key": b"\x80\x02" + _storage_id(b")" + b"\x85" * 200_000) + b".",
    "self-referring storage key": b"\x80\x02" + _storage_id(_self_referring(60)) + b".",
    "long storage key": b"\x80\x02" + _storage_id(_LONG_TEXT) + b".",
    "self-referring module": b"\x80\x02" + _self_referring(60) + b"X\x01\0\0\0a\x93.",
    "long module": b"\x80\x02" + _LONG_TEXT + b"X\x01\0\0\0a\x93.",
    "number as a module": b"\x80\x02K\x01K\x01\x93.",
    "long class name": b"\x80\x02c" + b"x" * 1500 + b"\na\n.",
    "large integer": b"\x80\x02" + _long(17) + b".",
    "deep rebuilding": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\0ctorch\nTensor\nq\x01)"
    + (b"q\x02h\0h\x01h\x02\x87" * 50_000)
    + b"q\x03h\0h\x03R.",
    "claimed bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "called text": b"\x80\x02X\x01\0\0\0a)R.",
    "arguments that are a dict": b"\x80\x02ctorch\nTensor\n}R.",
    "no end": b"\x80\x02)",
    "shape of many sizes": b"\x80\x02ctorch._utils\n_rebuild_tensor\n("
    + _storage_id(b"X\x01\0\0\x000")
    + b"K\0("
    + b"K\x01" * 9
    + b"tq\0h\0tR.",
    "shape that is a number": b"\x80\x02ctorch._utils\n_rebuild_tensor\n("
    + _storage_id(b"X\x01\0\0\x000")
    + b"K\0K\x01K\x01tR.",
}


@pytest.mark.parametrize("name", DAMAGED_PICKLES)
def test_damaged_pickles(name, tmp_path):
    data = DAMAGED_PICKLES[name]
    _write_zip(tmp_path / "a.pt", data, **{"0": bytes(4)})
    _write_legacy(tmp_path / "b.pt", data, pickle.dumps(["0"], 2))
    for file in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="is truncated or damaged"):
            _read(tmp_path / file)


def test_storage_of_two_types_is_damage(tmp_path):
    key = b"X\x01\0\0\x000"
    other = _storage_id(key).replace(b"FloatStorage", b"IntStorage")
    content = b"\x80\x02" + _storage_id(key) + other + b"\x86."
    _write_legacy(tmp_path / "a.pt", content, pickle.dumps(["0"], 2))
    with pytest.raises(ValueError, match="the storage 0 is described twice"):
        _read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "keys",
    [
        pickle.dumps([["0"]], 2),
        pickle.dumps("0", 2),
        b"\x80\x02])" + b"\x85" * 200_000 + b"a.",
    ],
    ids=["list", "text", "deep tuple"],
)
def test_keys_of_legacy_storages_are_names(keys, tmp_path):
    """Check keys that cannot be hashed, one of them nested deeper than hashing can go."""
    _write_legacy(tmp_path / "a.pt", b"\x80\x02" + _storage_id(b"X\x01\0\0\x000") + b".", keys)
    with pytest.raises(ValueError, match="its list of storages is not one of names"):
        _read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("limit", "message"), [("_MAX_OPCODES", "too many parts"), ("_MAX_PICKLE_BYTES", "too large")]
)
def test_limits_of_a_pickle(limit, message, monkeypatch):
    data = b"\x80\x02" + b")" * 1000 + b"."
    assert torch_files._interpret(io.BytesIO(data), None) == ()
    monkeypatch.setattr(torch_files, limit, 500)
    with pytest.raises(ValueError, match=message):
        torch_files._interpret(io.BytesIO(data), None)


def test_keys_with_one_hash_are_left_out():
    keys = [1, "a", *(n * (2**61 - 1) for n in range(1, 100))]
    data = io.BytesIO(pickle.dumps(dict.fromkeys(keys), 2))
    assert torch_files._interpret(data, None).keys() == {1, "a"}


def test_modules_that_refer_to_each_other():
    content = torch_files.Opaque("a")
    for _ in range(60):  # 2^60 paths
        content = torch_files.Opaque("a", {"b": content, "c": content})
    with pytest.raises(ValueError, match="too many modules"):
        torch_files.module_tensors(content)
    content = torch_files.Opaque("a", dict.fromkeys(map(str, range(200_000)), content))
    with pytest.raises(ValueError, match="too many modules"):
        torch_files.module_tensors(content)
    assert torch_files.module_tensors([1]) == {}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_compression(method, tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", np.random.default_rng(0).bytes(2000))
    data = bytearray(path.read_bytes())
    start = data.index(b"data.pkl") + len("data.pkl")
    data[start + 9 : start + 60] = b"\xff" * 51
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        _read(path)

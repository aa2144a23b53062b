"""Makes damaged copies of valid files; equal random numbers give equal damages."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Bytes with a meaning in one of the formats.
_TOKENS = (
    b"../../../fuzz_outside",
    b"/fuzz_outside",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b",",
    b";",
    b"\n",
    b"\r",
    b"{}",
    b"[]",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"99999999999999999999",
    b"9" * 5000,
    b"\\ud800",
    b"\xd9\xa3",  # an Arabic three: a digit to Python
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b"x" * 200_000,
)
_INTEGERS = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -1)
# Replacements for a value of a JSON file; a str that begins with _RAW is inserted unquoted.
_RAW = "\x00raw:"
_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    0.5,
    2**31,
    2**63,
    2**64 - 1,
    10**30,
    "",
    "0",
    "-1",
    "gelu",
    "../../../fuzz_outside",
    "/fuzz_outside",
    "\ud800",
    "\0",
    "F64",
    "x" * 5000,
    [],
    {},
    [[]],
    [0, 2**62],
    [2**64],
    [2**33, 2**33],
    {"name": "train"},
    _RAW + "1e999",
    _RAW + "-Infinity",
    _RAW + "NaN",
    _RAW + "9" * 5000,
    _RAW + "[" * 20_000 + "]" * 20_000,
    _RAW + '{"a":' * 20_000 + "1" + "}" * 20_000,
)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return the data with one to four small damages, usually one."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_DAMAGES)(rng, data)
    return data


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Return a text with damaged bytes, or with a line dropped, doubled or exchanged."""
    if rng.random() < 0.6:
        return mutate_bytes(rng, data)
    lines = data.splitlines(keepends=True) or [b""]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.insert(j, lines[i])
    elif kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        lines[i] = mutate_bytes(rng, lines[i])
    else:
        del lines[0]
    return b"".join(lines)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Return a JSON text with one to three values or names replaced, added or removed."""
    content = [json.loads(data)]  # in a list, so that the top level is a value like others
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_value(rng, content)
    text = json.dumps(content[0])
    while (start := text.find('"\\u0000raw:')) >= 0:
        end = start + 1
        while text[end] != '"':
            end += 2 if text[end] == "\\" else 1
        raw = json.loads(text[start : end + 1]).removeprefix(_RAW)
        text = text[:start] + raw + text[end + 1 :]
    return text.encode()


def _change_value(rng: random.Random, content: list) -> None:
    """Replace, remove, copy or add one value in place."""
    places = list(_places(content))
    container, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 5 or container is content:
        container[key] = copy.deepcopy(rng.choice(_VALUES))  # it may be changed next
    elif kind == 5:
        del container[key]
    elif kind == 6:
        other, other_key = rng.choice(places)
        container[key] = copy.deepcopy(other[other_key])  # no cycles
    elif isinstance(container, dict):
        container[rng.choice(("", "__metadata__", "../../../fuzz_outside", "x" * 999))] = (
            copy.deepcopy(container[key])
        )
    else:
        container.insert(key, copy.deepcopy(container[key]))


def _places(container: Any):
    """Yield (container, key) for every value below `container`."""
    keys = container.keys() if isinstance(container, dict) else range(len(container))
    for key in list(keys):
        yield container, key
        if isinstance(container[key], dict | list):
            yield from _places(container[key])


# ---------------------------------------------------------------- damages


def _draw_range(rng: random.Random, data: bytes) -> tuple[int, int]:
    """Draw start and end of a part of the data, usually a short one."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 1024, len(data))))


def _flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_bytes(rng: random.Random, data: bytes) -> bytes:
    start, end = _draw_range(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def _set_integer(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    order = rng.choice(("little", "big"))
    value = rng.choice(_INTEGERS) % 256**size
    start = rng.randrange(len(data) + 1)
    return data[:start] + value.to_bytes(size, order) + data[start + size :]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _delete(rng: random.Random, data: bytes) -> bytes:
    start, end = _draw_range(rng, data)
    return data[:start] + data[end:]


def _double(rng: random.Random, data: bytes) -> bytes:
    start, end = _draw_range(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 3)) + data[end:]


def _insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice((rng.choice(_TOKENS), rng.randbytes(8))) + data[start:]


def _splice(rng: random.Random, data: bytes) -> bytes:
    """Write one part of the data over another."""
    start, end = _draw_range(rng, data)
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[start:end] + data[place + end - start :]


def _fill(rng: random.Random, data: bytes) -> bytes:
    start, end = _draw_range(rng, data)
    return data[:start] + rng.choice((b"\0", b"\xff")) * (end - start) + data[end:]


_DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip_bits,
    _flip_bits,
    _set_bytes,
    _set_integer,
    _set_integer,
    _truncate,
    _delete,
    _double,
    _insert,
    _splice,
    _fill,
)

"""What a compiled program moves: read from its text, each loop counted as often as it runs.

Public: `HloProgram`, `Collective`. XLA's own cost analysis counts the body of a loop once.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%([^ ]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([^ ]+) = (.*?[}\])]) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_FREE = {  # they move nothing themselves
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "iota", "partition-id", "replica-id", "opt-barrier"),
}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE_CALL = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of traffic between chips.

    Attributes:
      kind: as "all-reduce".
      dtype: of what travels, as "f32".
      times: how often it happens in a run of the program.
      bytes: of all its results, per chip.
    """

    kind: str
    dtype: str
    times: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str  # operands, and what stands behind them

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([^ ,()]+)", self.rest.split(")", 1)[0])

    def called(self, key: str) -> str | None:
        match = re.search(rf"\b{key}=%([^ ,()]+)", self.rest)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """An instruction that reads a fusion's parameter: as which operand, bytes of its result."""

    op: str
    operand: int
    result: int
    updated: int  # bytes that a dynamic-update-slice writes


class HloProgram:
    """A compiled program, of `compiled.as_text()`."""

    def __init__(self, text: str):
        self._computations: dict[str, list[_Instruction]] = {}
        current, entry = None, None
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self._computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.append(_Instruction(*match.groups()))
        if entry is None:
            raise ValueError("the text of the program has no ENTRY computation")
        self._times: collections.Counter[str] = collections.Counter()
        self._fused: collections.Counter[str] = collections.Counter()
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        """Note how often each computation runs; those inside a fusion are part of it, and apart."""
        self._times[name] += times
        for instruction in self._computations.get(name, ()):
            if instruction.op == "while":
                trips = self._trips(instruction)
                self._count(instruction.called("body"), times * trips)
            elif instruction.op == "fusion":
                self._fused[instruction.called("calls")] += times
            elif instruction.op in ("call", "async-start"):
                if called := instruction.called("to_apply") or instruction.called("calls"):
                    self._count(called, times)
            elif instruction.op == "conditional":  # the dearest branch is not known: each counts
                for branch in re.findall(r"%([^ ,(){}]+)", instruction.rest.split("), ", 1)[-1]):
                    if branch in self._computations:
                        self._count(branch, times)

    def _trips(self, loop: _Instruction) -> int:
        """How often a loop runs: the bound that its condition compares with."""
        if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(match[1])
        names, bounds = [loop.called("condition")], []
        for name in names:
            for instruction in self._computations[name]:
                if instruction.op == "constant" and re.match(r"[su]32\[\]", instruction.shape):
                    bounds.append(int(re.match(r"-?\d+", instruction.rest)[0]))
                elif called := instruction.called("calls"):
                    names.append(called)
        return max(bounds, default=1)

    def bytes_accessed(self) -> int:
        """Bytes read from and written to the device's memory; on a TPU what is in VMEM is not.

        Each instruction reads its operands once and writes its result once; of what a fusion or a
        slice takes only a part of, the part.
        """
        total = 0
        for name, times in self._times.items():
            instructions = self._computations.get(name, ())
            shapes = {instruction.name: instruction.shape for instruction in instructions}
            total += times * sum(self._bytes(one, shapes) for one in instructions)
        return total

    def cycles(self) -> int:
        """Of a TPU's chip, as its compiler expects of each instruction; 0: it does not say."""
        total = 0
        for name, times in self._times.items():
            for one in self._computations.get(name, ()):
                if match := _CYCLES.search(one.rest):
                    total += times * int(match[1])
        return total

    def _bytes(self, one: _Instruction, shapes: dict[str, str]) -> int:
        if one.op in _FREE or one.op.endswith("-done") or _FREE_CALL.search(one.rest):
            return 0
        operands = [shapes.get(name, "") for name in one.operands]
        if one.op in ("dynamic-slice", "slice", "gather"):
            return 2 * size(one.shape)
        if one.op in ("dynamic-update-slice", "scatter"):
            return 2 * size(operands[-1 if one.op == "scatter" else 1])
        if one.op in ("copy-start", "slice-start"):  # (to, from, ...) and ((from), to, ...)
            arrays = _ARRAY.findall(one.shape)
            to, source = arrays[:2] if one.op == "copy-start" else arrays[1::-1]
            part = _array_bytes(*to)
            return sum(part for array in (to, source) if "S(" not in array[2])
        if one.op == "fusion":
            return self._fusion_bytes(one, operands)
        return size(one.shape) + sum(map(size, operands))

    def _fusion_bytes(self, fusion: _Instruction, operands: list[str]) -> int:
        total, written = 0, size(fusion.shape)
        for index, outer in enumerate(operands):
            readers = list(self._readers(fusion.called("calls"), index))
            updates = [r for r in readers if r.op == "dynamic-update-slice" and r.operand == 0]
            if updates and len(updates) == len(readers):
                part = sum(r.updated for r in updates)
                written -= max(0, size(outer) - part)  # in place
            elif readers and all(r.op in ("dynamic-slice", "slice") for r in readers):
                total += min(size(outer), sum(r.result for r in readers))
            else:
                total += size(outer)
        return total + max(0, written)

    def _readers(self, computation: str, index: int) -> Iterator["_Reader"]:
        """Who reads a fusion's parameter, also in the fusions inside it."""
        inside = self._computations[computation]
        shapes = {one.name: one.shape for one in inside}
        names = {
            one.name
            for one in inside
            if one.op == "parameter" and int(re.match(r"\d+", one.rest)[0]) == index
        }
        for one in inside:
            for operand in (i for i, name in enumerate(one.operands) if name in names):
                if one.op == "bitcast":  # the same bytes by another name; stands before its readers
                    names.add(one.name)
                elif one.op == "fusion":
                    yield from self._readers(one.called("calls"), operand)
                else:
                    update = shapes[one.operands[1]] if one.op == "dynamic-update-slice" else ""
                    yield _Reader(one.op, operand, size(one.shape, anywhere=True), size(update))

    def collectives(self) -> list[Collective]:
        """Traffic between chips, by kind and dtype; a TPU has some of it inside fusions."""
        found: dict[tuple[str, str], list[int]] = {}
        for name, times in (self._times + self._fused).items():
            for one in self._computations.get(name, ()):
                kind = one.op.removesuffix("-start")
                if kind not in _COLLECTIVES or not times:
                    continue
                arrays = _ARRAY.findall(one.shape)
                if one.op != kind and kind != "all-reduce":  # (operands, results, ...)
                    arrays = arrays[len(one.operands) : 2 * len(one.operands)]
                for dtype in {array[0] for array in arrays}:
                    entry = found.setdefault((kind, dtype), [0, 0])
                    entry[0] += times
                    entry[1] += times * sum(
                        _elements(a[1]) * _bits(dtype) // 8 for a in arrays if a[0] == dtype
                    )
        return [Collective(*key, *values) for key, values in sorted(found.items())]


def size(shape: str, anywhere: bool = False) -> int:
    """Bytes of a shape's text, a tuple's together; not of arrays in VMEM unless `anywhere`."""
    return sum(
        _array_bytes(*array) for array in _ARRAY.findall(shape) if anywhere or "S(" not in array[2]
    )


def _array_bytes(dtype: str, sizes: str, layout: str) -> int:
    """In memory: in a TPU's the innermost axes fill whole tiles, as of {1,0:T(8,128)}."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([0-9,]+)\)", rest)
    if not tile or not sizes:
        return _elements(sizes) * _bits(dtype) // 8
    sides = sizes.split(",")
    sides = [int(sides[int(axis)]) for axis in reversed(order.split(","))]  # outermost first
    tile = [*[1] * len(sides), *map(int, tile[1].split(","))][-len(sides) :]
    elements = math.prod(-(-n // side) * side for n, side in zip(sides, tile, strict=True))
    return elements * _bits(dtype) // 8


def _elements(sizes: str) -> int:
    return math.prod(int(n) for n in sizes.split(",") if n)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.search(r"\d+", dtype)  # as in f32, s8, f8e4m3fn
    return int(match[0]) if match else 0  # a token

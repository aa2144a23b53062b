"""Reads memory traffic and collectives of a compiled program from its HLO text.

The body of a loop counts as often as it runs; XLA's own cost analysis counts it once.
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
_FREE = {  # operations that access no memory themselves
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "iota", "partition-id", "replica-id", "opt-barrier"),
}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE_CALL = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describes the traffic between chips of one kind and dtype.

    Attributes:
      kind: the operation, such as "all-reduce".
      dtype: of the data, such as "f32".
      times: number of executions in a run of the program.
      bytes: size of all results together, per chip.
    """

    kind: str
    dtype: str
    times: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """Holds one line of HLO text, `%name = shape op(rest`."""

    name: str
    shape: str
    op: str
    rest: str  # operands, then attributes

    @functools.cached_property
    def operands(self) -> list[str]:
        """Return the names of the operands."""
        return re.findall(r"%([^ ,()]+)", self.rest.split(")", 1)[0])

    def called_computation(self, key: str) -> str | None:
        """Return the computation that the attribute `key` names, such as "body", or None."""
        match = re.search(rf"\b{key}=%([^ ,()]+)", self.rest)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class _ParameterUse:
    """Describes an instruction that reads a fusion's parameter.

    Attributes:
      op: the instruction's operation.
      operand: index of the operand that is the parameter.
      result_bytes: size of the instruction's result.
      updated_bytes: bytes that a dynamic-update-slice writes, else 0.
    """

    op: str
    operand: int
    result_bytes: int
    updated_bytes: int


class HloProgram:
    """Parses a compiled program, the text of `compiled.as_text()`.

    Raises:
      ValueError: the text has no ENTRY computation.
    """

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
        self._run_counts: collections.Counter[str] = collections.Counter()
        self._fused_run_counts: collections.Counter[str] = collections.Counter()
        self._count_runs(entry, 1)

    def _count_runs(self, name: str, times: int) -> None:
        """Add `times` runs of a computation and of the computations that it calls.

        Computations inside fusions are counted separately, because the fusion accounts for them.
        """
        self._run_counts[name] += times
        for instruction in self._computations.get(name, ()):
            if instruction.op == "while":
                trip_count = self._trip_count(instruction)
                self._count_runs(instruction.called_computation("body"), times * trip_count)
            elif instruction.op == "fusion":
                self._fused_run_counts[instruction.called_computation("calls")] += times
            elif instruction.op in ("call", "async-start"):
                called = instruction.called_computation("to_apply")
                if called := called or instruction.called_computation("calls"):
                    self._count_runs(called, times)
            elif instruction.op == "conditional":  # the branch is unknown: each of them counts
                for branch in re.findall(r"%([^ ,(){}]+)", instruction.rest.split("), ", 1)[-1]):
                    if branch in self._computations:
                        self._count_runs(branch, times)

    def _trip_count(self, loop: _Instruction) -> int:
        """Return how often a loop runs: the bound that its condition compares with."""
        if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(match[1])
        names, bounds = [loop.called_computation("condition")], []
        for name in names:
            for instruction in self._computations[name]:
                if instruction.op == "constant" and re.match(r"[su]32\[\]", instruction.shape):
                    bounds.append(int(re.match(r"-?\d+", instruction.rest)[0]))
                elif called := instruction.called_computation("calls"):
                    names.append(called)
        return max(bounds, default=1)

    def bytes_accessed(self) -> int:
        """Return the bytes read from and written to the device's memory, without a TPU's VMEM.

        Each instruction reads its operands once and writes its result once. If a fusion or a slice
        uses only a part of an operand, only that part counts.
        """
        total = 0
        for name, times in self._run_counts.items():
            instructions = self._computations.get(name, ())
            shapes = {instruction.name: instruction.shape for instruction in instructions}
            total += times * sum(self._instruction_bytes(i, shapes) for i in instructions)
        return total

    def cycles(self) -> int:
        """Return the TPU compiler's estimate of cycles, summed over instructions; 0 if absent."""
        total = 0
        for name, times in self._run_counts.items():
            for instruction in self._computations.get(name, ()):
                if match := _CYCLES.search(instruction.rest):
                    total += times * int(match[1])
        return total

    def _instruction_bytes(self, instruction: _Instruction, shapes: dict[str, str]) -> int:
        """Return the bytes that an instruction accesses; `shapes` has the operands' shapes."""
        op, shape = instruction.op, instruction.shape
        if op in _FREE or op.endswith("-done") or _FREE_CALL.search(instruction.rest):
            return 0
        operands = [shapes.get(name, "") for name in instruction.operands]
        if op in ("dynamic-slice", "slice", "gather"):
            return 2 * shape_bytes(shape)
        if op in ("dynamic-update-slice", "scatter"):
            return 2 * shape_bytes(operands[-1 if op == "scatter" else 1])
        if op in ("copy-start", "slice-start"):  # (to, from, ...) and ((from), to, ...)
            arrays = _ARRAY.findall(shape)
            to, source = arrays[:2] if op == "copy-start" else arrays[1::-1]
            copied = _array_bytes(*to)
            return sum(copied for array in (to, source) if "S(" not in array[2])
        if op == "fusion":
            return self._fusion_bytes(instruction, operands)
        return shape_bytes(shape) + sum(map(shape_bytes, operands))

    def _fusion_bytes(self, fusion: _Instruction, operands: list[str]) -> int:
        """Return the bytes that a fusion reads from its operands and writes to its result."""
        total, written = 0, shape_bytes(fusion.shape)
        for index, operand in enumerate(operands):
            uses = list(self._parameter_uses(fusion.called_computation("calls"), index))
            updates = [use for use in uses if use.op == "dynamic-update-slice" and use.operand == 0]
            if updates and len(updates) == len(uses):
                updated = sum(use.updated_bytes for use in updates)
                written -= max(0, shape_bytes(operand) - updated)  # in place
            elif uses and all(use.op in ("dynamic-slice", "slice") for use in uses):
                total += min(shape_bytes(operand), sum(use.result_bytes for use in uses))
            else:
                total += shape_bytes(operand)
        return total + max(0, written)

    def _parameter_uses(self, computation: str, index: int) -> Iterator[_ParameterUse]:
        """Yield the uses of a fusion's parameter `index`, also those in fusions inside it."""
        instructions = self._computations[computation]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        names = {
            instruction.name
            for instruction in instructions
            if instruction.op == "parameter" and int(re.match(r"\d+", instruction.rest)[0]) == index
        }
        for instruction in instructions:
            op, inputs = instruction.op, instruction.operands
            for operand in (i for i, name in enumerate(inputs) if name in names):
                if op == "bitcast":  # another name of the same bytes; it precedes its uses
                    names.add(instruction.name)
                elif op == "fusion":
                    called = instruction.called_computation("calls")
                    yield from self._parameter_uses(called, operand)
                else:
                    result = shape_bytes(instruction.shape, include_vmem=True)
                    update = shapes[inputs[1]] if op == "dynamic-update-slice" else ""
                    yield _ParameterUse(op, operand, result, shape_bytes(update))

    def collectives(self) -> list[Collective]:
        """Return the traffic between chips by kind and dtype, also that inside fusions."""
        totals: dict[tuple[str, str], list[int]] = {}
        for name, times in (self._run_counts + self._fused_run_counts).items():
            for instruction in self._computations.get(name, ()):
                kind = instruction.op.removesuffix("-start")
                if kind not in _COLLECTIVES or not times:
                    continue
                arrays = _ARRAY.findall(instruction.shape)
                if instruction.op != kind and kind != "all-reduce":  # (operands, results, ...)
                    num_operands = len(instruction.operands)
                    arrays = arrays[num_operands : 2 * num_operands]
                for dtype in {array[0] for array in arrays}:
                    entry = totals.setdefault((kind, dtype), [0, 0])
                    entry[0] += times
                    entry[1] += times * sum(
                        _num_elements(sizes) * _dtype_bits(dtype) // 8
                        for array_dtype, sizes, _ in arrays
                        if array_dtype == dtype
                    )
        return [Collective(*key, *values) for key, values in sorted(totals.items())]


def shape_bytes(shape: str, include_vmem: bool = False) -> int:
    """Return the bytes of a shape in HLO text; a tuple's elements are added.

    Args:
      shape: such as "f32[64,197]{1,0:T(8,128)}".
      include_vmem: count arrays in a TPU's VMEM too, whose layout contains "S(1)".
    """
    return sum(
        _array_bytes(*array)
        for array in _ARRAY.findall(shape)
        if include_vmem or "S(" not in array[2]
    )


def _array_bytes(dtype: str, sizes: str, layout: str) -> int:
    """Return the bytes of an array in memory.

    In a TPU's memory the innermost axes fill whole tiles, such as those of {1,0:T(8,128)}.
    """
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([0-9,]+)\)", rest)
    if not tile or not sizes:
        return _num_elements(sizes) * _dtype_bits(dtype) // 8
    sides = sizes.split(",")
    sides = [int(sides[int(axis)]) for axis in reversed(order.split(","))]  # outermost first
    tile = [*[1] * len(sides), *map(int, tile[1].split(","))][-len(sides) :]
    elements = math.prod(-(-n // side) * side for n, side in zip(sides, tile, strict=True))
    return elements * _dtype_bits(dtype) // 8


def _num_elements(sizes: str) -> int:
    """Return the number of elements of an array with `sizes`, such as "64,197"."""
    return math.prod(int(n) for n in sizes.split(",") if n)


def _dtype_bits(dtype: str) -> int:
    """Return the bits of an element, 0 for a token."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.search(r"\d+", dtype)  # as in f32, s8, f8e4m3fn
    return int(match[0]) if match else 0

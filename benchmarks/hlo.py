"""What a compiled program does, counted from its text (`jax.stages.Compiled.as_text()`).

An operation at the top level, or in the body of a loop, is a kernel: it reads its operands from the
device's main memory and writes its result there. What happens inside a fusion stays on the chip.

* Arrays are counted with the padding of their layout's tiles: `bf16[8,25]{1,0:T(8,128)(2,1)}` is
  8 x 128 elements.
* Arrays in another memory space, such as a TPU's VMEM (`S(1)` in the layout), are not main memory.
* A loop counts as many times as it turns; of a conditional, the branch that moves most.
* Of an operand that a fusion only slices, the slices are read; a `dynamic-update-slice` writes its
  update into the array where it is.
"""

import collections
import dataclasses
import math
import re

# Names, constants and other views of what is there already.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency"}
_SLICES = {"slice", "dynamic-slice", "gather"}

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type operation(operands), attributes`."""

    type: str
    operation: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> tuple[str, ...]:
        """The computations that an attribute names."""
        found = re.search(attribute + r"=(?:\{([^}]*)\}|%?([\w.\-]+))", self.attributes)
        if not found:
            return ()
        return tuple(n.strip().lstrip("%") for n in (found[1] or found[2]).split(","))


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program, or a part of it, does.

    Attributes:
      bytes: read from and written to main memory.
      cycles: the TPU compiler's estimate, where it gives one (for kernels in Pallas it does not).
      kernels: operations by kind, each once, however often its loop turns.
      loops: turns of each loop; 1 where the program does not tell.
    """

    bytes: int = 0
    cycles: int = 0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    loops: tuple[int, ...] = ()

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.bytes + other.bytes,
            self.cycles + other.cycles,
            self.kernels + other.kernels,
            self.loops + other.loops,
        )

    def repeated(self, turns: int) -> "Counts":
        """As the body of a loop."""
        loops = (turns, *self.loops)
        return Counts(turns * self.bytes, turns * self.cycles, self.kernels, loops)


def count(text: str) -> Counts:
    """Counts what a compiled program does."""
    computations, entry = parse(text)
    return _Program(computations).count(entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The program's computations by name, and the name of the one that runs."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            if current is not None:
                current[found["name"]] = _instruction(found["rest"])
        elif found := _COMPUTATION.match(line):
            current = computations[found["name"]] = {}
            entry = found["name"] if found["entry"] else entry
    if not entry:
        raise ValueError("expected the text of a compiled program, found no ENTRY computation")
    return computations, entry


def _instruction(text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")  # a tuple's type has spaces
    type_, text = text[:end], text[end:].lstrip()
    operation, _, _ = text.partition("(")
    start = len(operation)
    end = start + _closing(text[start:])
    inside = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", text[start + 1 : end - 1])  # layouts have commas
    inside = re.sub(r"\[[\d,]*\]", "", inside)
    operands = tuple(part.split()[-1].lstrip("%") for part in inside.split(",") if part.strip())
    return Instruction(type_, operation, operands, text[end:])


def _closing(text: str) -> int:
    """Where the bracket that `text` starts with has been closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"a bracket is not closed: {text[:80]}")


def array_bytes(type_: str, *, anywhere: bool = False) -> int:
    """Bytes that a type's arrays take of main memory, with tiles' padding.

    Args:
      type_: of an array or a tuple, such as `(f32[8,3]{1,0:T(8,128)}, s32[])`.
      anywhere: whichever memory space they are in.
    """
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(type_):
        if "S(" in layout and not anywhere:
            continue
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 8 if dtype == "pred" else 0  # 0: tokens
        total += math.prod(_padded(sizes, layout)) * bits // 8
    return total


def _padded(sizes: str, layout: str) -> list[int]:
    dims = [int(n) for n in sizes.split(",") if n]
    order, _, tiling = layout.partition(":")
    minor_first = [int(n) for n in order.split(",") if n]
    if tile := re.match(r"T\(([\d,]+)\)", tiling):
        # Further tiles, as in T(8,128)(2,1), order the elements within the first.
        for axis, n in zip(minor_first, reversed(tile[1].split(",")), strict=False):
            dims[axis] = -(-dims[axis] // int(n)) * int(n)
    return dims


class _Program:
    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations

    def count(self, name: str) -> Counts:
        inside = self.computations[name]
        return sum((self._instruction(i, inside) for i in inside.values()), Counts())

    def _instruction(self, i: Instruction, inside: Computation) -> Counts:
        if i.operation in _FREE or i.operation.endswith(("-done", "-update")):
            return Counts()
        if i.operation == "while":
            (body,) = i.called("body")
            return self.count(body).repeated(self._turns(i))
        if i.operation == "conditional":
            names = i.called("branch_computations")
            names = names or i.called("true_computation") + i.called("false_computation")
            return max((self.count(name) for name in names), key=lambda counts: counts.bytes)
        if i.operation in ("call", "async-start"):
            if names := i.called("to_apply") or i.called("calls"):
                return self.count(names[0])
        kind = i.operation
        if target := re.search(r'custom_call_target="([^"]*)"', i.attributes):
            kind = target[1]
        cycles = re.search(r'estimated_cycles":"(\d+)"', i.attributes)
        return Counts(
            self._traffic(i, inside), int(cycles[1]) if cycles else 0, collections.Counter([kind])
        )

    def _turns(self, loop: Instruction) -> int:
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        # Else the constant that the counter is compared with.
        (name,) = loop.called("condition")
        constants = [
            int(i.operands[0])
            for i in self.computations[name].values()
            if i.operation == "constant" and i.type.startswith("s32[]")
        ]
        return max([1, *constants])

    def _traffic(self, i: Instruction, inside: Computation) -> int:
        """Bytes of main memory that one operation reads and writes."""
        operands = [array_bytes(inside[o].type) if o in inside else 0 for o in i.operands]
        if i.operation in _SLICES:
            return 2 * array_bytes(i.type)
        if i.operation == "dynamic-update-slice":
            return 2 * operands[1]
        if i.operation.endswith("-start"):  # the type names operands, results and a flag
            return operands[0] + array_bytes(_results_of_start(i.type))
        if i.operation == "fusion":
            (body,) = i.called("calls")
            reads = (min(n, self._read(body, k)) if n else 0 for k, n in enumerate(operands))
            return sum(reads) + max(0, array_bytes(i.type) - self._left_in_place(body))
        return sum(operands) + array_bytes(i.type)

    def _read(self, name: str, index: int) -> float:
        """Bytes that a fusion reads of its operand `index`; infinite: all of it."""
        views, total, used = set(), 0.0, False
        for key, i in self.computations[name].items():
            if i.operation == "parameter":
                if i.operands == (str(index),):
                    views.add(key)
                continue
            for position, operand in enumerate(i.operands):
                if operand not in views:
                    continue
                if i.operation == "bitcast":
                    views.add(key)
                    continue
                used = True
                if i.operation in _SLICES and position == 0:
                    total += array_bytes(i.type, anywhere=True)
                elif i.operation == "fusion":
                    total += self._read(i.called("calls")[0], position)
                elif i.operation == "dynamic-update-slice" and position == 0:
                    total += 0
                else:
                    return math.inf
        return total if used else math.inf  # not used: the result is the operand

    def _left_in_place(self, name: str) -> int:
        """Bytes of a fusion's result that it does not write: those around an update."""
        inside, left = self.computations[name], 0
        for i in inside.values():
            if i.operation == "dynamic-update-slice":
                left += array_bytes(i.type, anywhere=True)
                left -= array_bytes(inside[i.operands[1]].type, anywhere=True)
        return left


def _results_of_start(type_: str) -> str:
    arrays = [found[0] for found in re.finditer(_ARRAY, type_)]
    return arrays[1] if len(arrays) > 1 else type_

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

# Names, constants and other views of what is there already; the last two are custom calls.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency"}
_FREE |= {"AllocateBuffer", "ConcatBitcast"}
_SLICES = {"slice", "dynamic-slice", "gather"}

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")


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
    text = _COMMENT.sub("", text)
    end = _closing(text) if text.startswith("(") else text.index(" ")  # a tuple's type has spaces
    type_, text = text[:end], text[end:].lstrip()
    operation = text.partition("(")[0]
    end = len(operation) + _closing(text[len(operation) :])
    operands = (part.split()[-1].lstrip("%") for part in _parts(text[len(operation) : end]))
    return Instruction(type_, operation, tuple(operands), text[end:])


def _parts(text: str) -> list[str]:
    """What stands between the outermost commas of a bracketed list: `(a, (b, c))` has two parts."""
    parts, depth = [""], 0
    for character in text[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


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
        if i.operation.endswith("-start"):  # counted where it starts
            i = _synchronous(i)
        kind = i.operation
        if target := re.search(r'custom_call_target="([^"]*)"', i.attributes):
            kind = target[1]
        if kind in _FREE or kind.endswith(("-done", "-update")):
            return Counts()
        if kind == "while":
            (body,) = i.called("body")
            return self.count(body).repeated(self._turns(i))
        if kind == "conditional":
            names = i.called("branch_computations")
            names = names or i.called("true_computation") + i.called("false_computation")
            return max((self.count(name) for name in names), key=lambda counts: counts.bytes)
        if kind in ("call", "async"):
            (name,) = i.called("to_apply") or i.called("calls")
            return self.count(name)
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
        types = [inside[o].type if o in inside else "" for o in i.operands]
        read, written = [array_bytes(t) for t in types], array_bytes(i.type)
        if i.operation in _SLICES:
            read[0] = min(read[0], array_bytes(i.type, anywhere=True))
        elif i.operation == "dynamic-update-slice":
            read[0], written = 0, min(written, array_bytes(types[1], anywhere=True))
        elif i.operation == "fusion":
            (body,) = i.called("calls")
            read = [min(n, self._read(body, k)) if n else 0 for k, n in enumerate(read)]
            written -= self._left_in_place(body)
        return sum(read) + max(0, written)

    def _read(self, name: str, index: int) -> float:
        """Bytes that a fusion reads of its operand `index`; infinite: all of it."""
        views, total, used = set(), 0, False
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
                elif i.operation != "dynamic-update-slice" or position:
                    return math.inf
        return total if used else math.inf  # not used: the result is the operand

    def _left_in_place(self, name: str) -> int:
        """Bytes of a fusion's result that it does not write: those around an update."""
        inside, left = self.computations[name], 0
        for i in inside.values():
            if i.operation == "dynamic-update-slice" and (whole := array_bytes(i.type)):
                update = inside[i.operands[1]].type
                left += max(0, whole - array_bytes(update, anywhere=True))
        return left


def _synchronous(i: Instruction) -> Instruction:
    """The operation that a `-start` starts: its type names operands, results and a flag."""
    parts = _parts(i.type)
    result = parts[0] if i.operation == "copy-start" else parts[1]
    return dataclasses.replace(i, type=result, operation=i.operation.removesuffix("-start"))

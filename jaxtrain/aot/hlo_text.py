"""A compiled program's text: its computations, their instructions, shapes in bytes."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)\]}])([a-z][a-z0-9\-]*)\((.*)$")
# Of a conditional the first branch: that of `lax.cond` where its predicate is false.
_CALLED = re.compile(
    r"\b(?:to_apply|calls|body|branch_computations|false_computation)=\{?([^,}\s]+)"
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Instruction:
    """One line of a computation, its `scope`. `shape` and `rest` are text."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool
    scope: "Computation"
    program: "Mapping[str, Computation]"

    @property
    def kind(self) -> str:
        """The opcode; of an asynchronous one that of what it starts."""
        return self.opcode.removesuffix("-start")

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def operand_shapes(self) -> list[str]:
        """As text, which is empty for what is not of this computation."""
        known = self.scope
        return [known[name].shape if name in known else "" for name in self.operands]

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        names = (name.lstrip("%") for name in _CALLED.findall(self.rest))
        return [name for name in names if name in self.program]

    @property
    def body(self) -> "Computation":
        """The computation of a fusion; empty for anything else."""
        is_fusion = self.kind == "fusion" and self.called
        return self.program[self.called[0]] if is_fusion else {}

    @property
    def results(self) -> list[str]:
        """Shapes of what it gives: that of an asynchronous one names more than that."""
        kind, shape = self.opcode, self.shape.strip()
        parts = split_tuple(shape)
        if kind == "send":
            return []
        # An all-reduce names its results alone; for GPUs of jax 0.12 its operands too,
        # which are then a tuple of their own.
        alone = kind == "all-reduce-start" and not parts[0].startswith("(")
        if kind == "recv" or (kind.endswith("-start") and not alone):
            # (result, operand, ...) of a copy and of a receipt, else (operand, result).
            place = 0 if kind in ("copy-start", "recv") else 1
            shape = parts[min(place, len(parts) - 1)]
        return split_tuple(shape) if shape.startswith("(") else [shape]


# Instructions by name, in order.
Computation = Mapping[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of `compiled.as_text()` by name, and the name of the first."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, definition = match.groups()
            if operation := _OPCODE.search(definition):
                shape, (opcode, rest) = (
                    definition[: operation.start(1)],
                    operation.groups(),
                )
                current[name] = Instruction(
                    name, shape, opcode, rest, bool(root), current, computations
                )
    return computations, entry


def shape_bytes(text: str, *, device_memory_only: bool = False) -> float:
    """Bytes of a shape, or of all shapes of a tuple, as HLO writes them."""
    total = 0.0
    for dtype, sizes, layout in _SHAPE.findall(text):
        if device_memory_only and re.search(r"S\([1-9]\)", layout):
            continue
        bits = re.search(r"\d+", dtype)
        width = _WIDTHS.get(dtype, int(bits.group()) / 8 if bits else 0)
        total += width * _count(sizes)
    return total


def count_elements(text: str) -> int:
    """Elements of a shape, or of all shapes of a tuple."""
    return sum(_count(sizes) for _, sizes, _ in _SHAPE.findall(text))


def _count(sizes: str) -> int:
    return math.prod(int(n) for n in sizes.split(",") if n)


def split_tuple(shape: str) -> list[str]:
    """The shapes of a tuple's elements, which may be tuples; one that is none alone."""
    parts, depth = [""], 0
    inner = shape.strip()
    if inner.startswith("("):
        inner = inner[1:-1]
    for letter in inner:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]

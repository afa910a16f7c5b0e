"""Memory traffic and collectives of a compiled program, loops counted in full.

XLA's own `cost_analysis` counts the body of a loop once; our layers are one loop. So
this reads the program's text: each computation's instructions, times the iterations
of the loops around it. A fused instruction costs what it reads and writes in device
memory; what lies in on-chip memory (a layout with S(1)) costs nothing.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

_WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)\]}])([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|branch_computations)=\{?([^,}\s]+)")
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# They move nothing, or only name what is moved elsewhere.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "domain",
    "opt-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shape` and `rest` are text."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Of one device and one run of the program.

    `bytes_accessed`: read from and written to device memory. `collectives`: by kind,
    (times it runs, bytes of its results). `between_slices`: the same of what comes
    over the network from other slices. `kernels`: calls of our own in the program.
    """

    bytes_accessed: float
    collectives: Mapping[str, tuple[float, float]]
    between_slices: Mapping[str, tuple[float, float]]
    kernels: int


def shape_bytes(text: str, *, device_memory_only: bool = False) -> float:
    """Bytes of a shape, or of all shapes of a tuple, as HLO writes them."""
    total = 0.0
    for dtype, sizes, layout in _SHAPE.findall(text):
        if device_memory_only and re.search(r"S\([1-9]\)", layout):
            continue
        bits = re.search(r"\d+", dtype)
        width = _WIDTHS.get(dtype, int(bits.group()) / 8 if bits else 0)
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def analyze(text: str) -> ProgramCost:
    """The cost of a program, from `compiled.as_text()`."""
    computations, entry = _parse(text)
    counts = _execution_counts(computations, entry)
    traffic = 0.0
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    network: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    # The compiler may spread one collective over the fusions it overlaps with.
    seen: set[tuple[str, str]] = set()
    for name, count in counts.items():
        is_fused = count < 0
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = (kind, channel.group(1) if channel else instruction.name)
                if key not in seen:
                    seen.add(key)
                    found[kind][0] += abs(count)
                    found[kind][1] += abs(count) * _received_bytes(instruction)
            between = re.search(r'_megascale_transfer_type="(\w+)"', instruction.rest)
            if between and instruction.opcode == "recv":
                kind = between.group(1).lower().replace("_", "-")
                network[kind][0] += abs(count)
                network[kind][1] += abs(count) * _received_bytes(instruction)
            if not is_fused:
                traffic += count * _traffic(instruction, name, computations)
    return ProgramCost(
        traffic,
        {kind: (n, b) for kind, (n, b) in found.items()},
        {kind: (n, b) for kind, (n, b) in network.items()},
        kernels=text.count('custom_call_target="tpu_custom_call"'),
    )


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, definition = match.groups()
            if operation := _OPCODE.search(definition):
                shape = definition[: operation.start(1)]
                current.append(
                    Instruction(
                        name, shape, operation.group(1), operation.group(2), bool(root)
                    )
                )
    return computations, entry


def _execution_counts(
    computations: Mapping[str, Sequence[Instruction]], entry: str
) -> dict[str, float]:
    """How often each computation runs; negative for one inside a fused instruction."""
    counts: dict[str, float] = {}

    def visit(name: str, count: float, *, fused: bool) -> None:
        counts[name] = counts.get(name, 0.0) + (-count if fused else count)
        for instruction in computations[name]:
            inside = fused or instruction.opcode not in ("while", "call", "conditional")
            times = count
            if instruction.opcode == "while":
                times *= _trip_count(instruction, computations)
            for called in _CALLED.findall(instruction.rest):
                if (called := called.lstrip("%")) in computations:
                    visit(called, times, fused=inside)

    visit(entry, 1.0, fused=False)
    return counts


def _trip_count(
    loop: Instruction, computations: Mapping[str, Sequence[Instruction]]
) -> int:
    """Iterations of a counting loop; 1 where the text does not tell."""
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    constants = [
        int(match.group(1))
        for instruction in computations.get(condition.group(1) if condition else "", [])
        if instruction.opcode == "constant"
        and (match := re.match(r"(\d+)\)", instruction.rest))
    ]
    return max(constants, default=1)


def _received_bytes(collective: Instruction) -> float:
    """Bytes of the result: the second part of an asynchronous one's shape."""
    if collective.opcode == "recv":
        return shape_bytes(collective.shape.split(", u32[]")[0])
    if not collective.opcode.endswith("-start"):
        return shape_bytes(collective.shape)
    sizes = [shape_bytes(m.group()) for m in _SHAPE.finditer(collective.shape)]
    big = [size for size in sizes if size > 4] or [0.0]
    return sum(big[len(big) // 2 :])


def _traffic(
    instruction: Instruction,
    name: str,
    computations: Mapping[str, Sequence[Instruction]],
) -> float:
    """Device memory that one instruction reads and writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    shapes = {other.name: other.shape for other in computations[name]}
    operands = [shapes.get(operand, "") for operand in instruction.operands]
    if instruction.opcode == "dynamic-slice":
        return 2 * shape_bytes(instruction.shape, device_memory_only=True)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * shape_bytes(operands[1], device_memory_only=True)
    called = _CALLED.search(instruction.rest)
    body = computations.get(called.group(1).lstrip("%"), []) if called else []
    if instruction.opcode != "fusion" or not body:
        written = shape_bytes(instruction.shape, device_memory_only=True)
        return written + sum(shape_bytes(s, device_memory_only=True) for s in operands)
    inner = {other.name: other for other in body}
    by_index = {
        int(other.rest.split(")")[0]): other
        for other in body
        if other.opcode == "parameter"
    }
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for other in body:
        for operand in other.operands:
            users[operand].append(other)
    total = 0.0
    for index, shape in enumerate(operands):
        whole = shape_bytes(shape, device_memory_only=True)
        uses = users[by_index[index].name] if index in by_index else []
        if whole and uses and all(use.opcode == "dynamic-slice" for use in uses):
            whole = min(whole, sum(shape_bytes(use.shape) for use in uses))
        elif whole and any(
            use.opcode == "dynamic-update-slice"
            and use.operands[0] == by_index[index].name
            for use in uses
        ):
            whole = 0.0  # updated in place
        total += whole
    root = next((other for other in body if other.is_root), body[-1])
    while root.opcode in ("bitcast", "copy") and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and root.operands[1] in inner:
        return total + shape_bytes(inner[root.operands[1]].shape)
    return total + shape_bytes(instruction.shape, device_memory_only=True)

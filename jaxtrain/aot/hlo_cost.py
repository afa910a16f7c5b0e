"""Memory traffic and collectives of a compiled program, loops counted in full.

XLA's own `cost_analysis` counts the body of a loop once; our layers are one loop. So
this reads the program's text: each computation's instructions, times the iterations
of the loops around it. An instruction, fused or not, costs what it reads and writes in
device memory: of an operand that it only takes a slice or rows of, these; of a result
that it updates in place, the update. What lies in on-chip memory (a layout with S(1))
costs nothing. Of a conditional that branch counts which runs where its predicate is
false: so of tokens that travel, the rare layer that gathers weights instead does not.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from jaxtrain.aot.hlo_groups import device_groups, network_share
from jaxtrain.aot.hlo_text import Instruction, count_elements, parse, shape_bytes

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
# They show the same elements in another order: what is read is what is read of these.
_VIEWS = {"bitcast", "copy", "reshape", "transpose"}

_KERNEL = re.compile(
    r'custom_call_target="(?:tpu_custom_call|mosaic_gpu|__gpu\$xla\.gpu\.triton)'
)
_COLLECTIVE_BEGINS = 'custom_call_target="AsyncCollectiveStart"'
_COLLECTIVE_ENDS = 'custom_call_target="AsyncCollectiveDone"'


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Of one device and one run of the program.

    `bytes_accessed`: read from and written to device memory. `collectives`: by kind,
    (times it runs, bytes that arrive). `between_slices`: the same of what comes over
    the network from other slices or hosts. `kernels`: calls of our own in the program.
    """

    bytes_accessed: float
    collectives: Mapping[str, tuple[float, float]]
    between_slices: Mapping[str, tuple[float, float]]
    kernels: int


def analyze(
    text: str, *, device_count: int = 1, per_host: int | None = None
) -> ProgramCost:
    """The cost of a program, from `compiled.as_text()`.

    `per_host`: devices that fast links join, where a network joins the rest of the
    `device_count` (GPUs; a program for several slices of TPUs tells by itself).
    """
    traffic = 0.0
    # By kind: (times it runs, bytes that arrive).
    found: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    network: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for instruction, count, is_fused in _executions(text):
        kind = instruction.kind
        if kind in _COLLECTIVES and not (is_fused and _is_under_way(instruction)):
            arrived = np.array([1.0, _received_bytes(instruction)]) * count
            found[kind] += arrived
            if per_host is not None and device_count > per_host:
                groups = device_groups(instruction.rest, device_count)
                share = network_share(kind, groups, per_host)
                network[kind] += arrived * [share > 0, share]
        between = re.search(r'_megascale_transfer_type="(\w+)"', instruction.rest)
        if between and instruction.opcode == "recv":
            kind = between.group(1).lower().replace("_", "-")
            network[kind] += np.array([1.0, _received_bytes(instruction)]) * count
        if not is_fused:  # else the instruction that it is part of counts
            traffic += count * _traffic(instruction)
    return ProgramCost(
        traffic,
        {kind: (n, b) for kind, (n, b) in found.items()},
        {kind: (n, b) for kind, (n, b) in network.items() if n},
        kernels=len(_KERNEL.findall(text)),
    )


def _executions(text: str) -> Iterator[tuple[Instruction, float, bool]]:
    """Each instruction, how often it runs, and whether it is part of a fused one."""
    program, entry = parse(text)

    def visit(
        name: str, count: float, fused: bool
    ) -> Iterator[tuple[Instruction, float, bool]]:
        for instruction in program[name].values():
            yield instruction, count, fused
            inside = fused or instruction.opcode not in ("while", "call", "conditional")
            is_loop = instruction.opcode == "while"
            times = count * (_trip_count(instruction) if is_loop else 1)
            for called in instruction.called:
                yield from visit(called, times, inside)

    return visit(entry, 1.0, False)


def _trip_count(loop: Instruction) -> int:
    """Iterations of a counting loop; 1 where the text does not tell."""
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    inside = loop.program.get(condition.group(1), {}) if condition else {}
    constants = [
        int(match.group(1))
        for instruction in inside.values()
        if instruction.opcode == "constant"
        and (match := re.match(r"(\d+)\)", instruction.rest))
    ]
    return max(constants, default=1)


def _received_bytes(collective: Instruction) -> float:
    """Bytes that arrive at least: the result, or all parts that a sum is made of."""
    is_sum = collective.kind == "reduce-scatter"
    shapes = collective.operand_shapes if is_sum else collective.results
    return sum(map(shape_bytes, shapes))


def _traffic(instruction: Instruction) -> float:
    """Device memory that one instruction reads and writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    total = 0.0
    for index, shape in enumerate(instruction.operand_shapes):
        if whole := shape_bytes(shape, device_memory_only=True):
            read = _elements_read(instruction, index)
            total += whole * min(1.0, read / count_elements(shape))
    shares = _shares_written(instruction)
    for shape, share in zip(instruction.results, shares, strict=True):
        total += share * shape_bytes(shape, device_memory_only=True)
    return total


def _elements_read(use: Instruction, index: int) -> float:
    """Of its operand `index`; infinity for all."""
    kind = use.kind
    if index == 0 and kind in ("slice", "dynamic-slice", "gather"):
        return sum(map(count_elements, use.results))
    if index == 0 and kind == "dynamic-update-slice":
        return 0.0  # updated in place
    if index == 0 and kind == "scatter":  # the rows that it adds to
        return count_elements(use.operand_shapes[-1])
    for parameter in use.body.values():
        if parameter.opcode == "parameter" and parameter.rest.startswith(f"{index})"):
            return _elements_used(parameter)
    # Where a slice begins is told by scalars.
    told = kind.startswith("dynamic-") and index >= 1 + (kind != "dynamic-slice")
    return 0.0 if told else math.inf


def _elements_used(value: Instruction) -> float:
    """Of a value in a fused computation: what the others there read of it."""
    total = math.inf if value.is_root else 0.0
    for use in value.scope.values():
        if (use.is_root and use.opcode == "tuple") or _is_under_way(use):
            continue  # handed on
        for index, name in enumerate(use.operands):
            if name == value.name:
                is_view = use.opcode in _VIEWS
                total += _elements_used(use) if is_view else _elements_read(use, index)
    return total


def _shares_written(instruction: Instruction) -> list[float]:
    """Of each of its results, what share is written: all, but for updates in place."""
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = 1 if instruction.opcode == "dynamic-update-slice" else -1
        elements = count_elements(instruction.operand_shapes[update])
        share = elements / max(1, count_elements(instruction.shape))
        return [min(1.0, share)] * len(instruction.results)
    shares = [1.0] * len(instruction.results)
    if not (body := instruction.body):
        return shares
    root = next(inner for inner in body.values() if inner.is_root)
    roots = [root]
    if root.opcode == "tuple":
        roots = [body[name] for name in root.operands]
    if len(roots) != len(shares):
        if _COLLECTIVE_BEGINS in root.rest:
            shares[0] = 0.0  # the operand, handed on
        return shares
    for place, inner in enumerate(roots):
        if inner.opcode == "parameter" or _is_under_way(inner):
            shares[place] = 0.0
            continue
        while inner.opcode in _VIEWS and inner.operands[0] in body:
            inner = body[inner.operands[0]]
        if inner.opcode in ("dynamic-update-slice", "scatter", "fusion"):
            shares[place] = _shares_written(inner)[0]
    return shares


def _is_under_way(instruction: Instruction) -> bool:
    """Whether a fused computation only carries a collective on, or ends it.

    One that overlaps with others stands in each fusion on its way, as if it ran there:
    its operands and result are handed on. The fusion that begins it is what counts.
    """
    if instruction.opcode == "custom-call":
        return _COLLECTIVE_ENDS in instruction.rest
    if instruction.opcode not in _COLLECTIVES:
        return False
    others = instruction.scope.values()
    uses = [other for other in others if instruction.name in other.operands]
    tuples = (use for use in uses if use.is_root and use.opcode == "tuple")
    handed_on = {name for use in tuples for name in use.operands}
    ends = all(_COLLECTIVE_ENDS in use.rest for use in uses)
    return bool(uses) and (ends or set(instruction.operands) <= handed_on)

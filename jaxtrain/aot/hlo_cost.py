"""Memory traffic and collectives of a compiled program, loops counted in full.

XLA's own `cost_analysis` counts the body of a loop once; our layers are one loop. So
this reads the program's text: each computation's instructions, times the iterations
of the loops around it. An instruction, fused or not, costs what it reads and writes in
device memory: of an operand that it only takes a slice or rows of, these; of a result
that it updates in place, the update. What lies in on-chip memory (a layout with S(1))
costs nothing.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

from jaxtrain.aot.hlo_groups import device_groups, network_share
from jaxtrain.aot.hlo_text import (
    Computation,
    Instruction,
    count_elements,
    parse,
    shape_bytes,
)

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

_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu)')
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
    computations, entry = parse(text)
    counts = _execution_counts(computations, entry)
    traffic = 0.0
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    network: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, count in counts.items():
        scope = computations[name]
        for instruction in scope.values():
            kind = instruction.opcode.removesuffix("-start")
            is_fused = count < 0
            if kind in _COLLECTIVES and not (
                is_fused and _is_under_way(instruction, scope)
            ):
                received = abs(count) * _received_bytes(instruction, scope)
                found[kind][0] += abs(count)
                found[kind][1] += received
                if per_host is not None and device_count > per_host:
                    groups = device_groups(instruction.rest, device_count)
                    share = network_share(kind, groups, per_host)
                    network[kind][0] += abs(count) * (share > 0)
                    network[kind][1] += received * share
            between = re.search(r'_megascale_transfer_type="(\w+)"', instruction.rest)
            if between and instruction.opcode == "recv":
                kind = between.group(1).lower().replace("_", "-")
                network[kind][0] += abs(count)
                network[kind][1] += abs(count) * _received_bytes(instruction, scope)
            if not is_fused:  # else the instruction that it is part of counts
                traffic += count * _traffic(instruction, scope, computations)
    return ProgramCost(
        traffic,
        {kind: (n, b) for kind, (n, b) in found.items()},
        {kind: (n, b) for kind, (n, b) in network.items() if n},
        kernels=len(_KERNEL.findall(text)),
    )


def _execution_counts(
    computations: Mapping[str, Computation], entry: str
) -> dict[str, float]:
    """How often each computation runs; negative for one inside a fused instruction."""
    counts: dict[str, float] = {}

    def visit(name: str, count: float, *, fused: bool) -> None:
        counts[name] = counts.get(name, 0.0) + (-count if fused else count)
        for instruction in computations[name].values():
            inside = fused or instruction.opcode not in ("while", "call", "conditional")
            times = count
            if instruction.opcode == "while":
                times *= _trip_count(instruction, computations)
            for called in instruction.called:
                if called in computations:
                    visit(called, times, fused=inside)

    visit(entry, 1.0, fused=False)
    return counts


def _trip_count(loop: Instruction, computations: Mapping[str, Computation]) -> int:
    """Iterations of a counting loop; 1 where the text does not tell."""
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    constants = [
        int(match.group(1))
        for instruction in computations.get(
            condition.group(1) if condition else "", {}
        ).values()
        if instruction.opcode == "constant"
        and (match := re.match(r"(\d+)\)", instruction.rest))
    ]
    return max(constants, default=1)


def _received_bytes(collective: Instruction, scope: Computation) -> float:
    """Bytes that arrive at least: the result, or all parts that a sum is made of."""
    if collective.opcode.startswith("reduce-scatter"):
        shapes = [_shape_of(name, scope) for name in collective.operands]
    else:
        shapes = collective.results
    return sum(map(shape_bytes, shapes))


def _traffic(
    instruction: Instruction,
    scope: Computation,
    computations: Mapping[str, Computation],
) -> float:
    """Device memory that one instruction of `scope` reads and writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    total = 0.0
    for index, name in enumerate(instruction.operands):
        shape = _shape_of(name, scope)
        if whole := shape_bytes(shape, device_memory_only=True):
            read = _elements_read(instruction, index, scope, computations)
            total += whole * min(1.0, read / count_elements(shape))
    shares = _shares_written(instruction, scope, computations)
    for shape, share in zip(instruction.results, shares, strict=True):
        total += share * shape_bytes(shape, device_memory_only=True)
    return total


def _elements_read(
    use: Instruction,
    index: int,
    scope: Computation,
    computations: Mapping[str, Computation],
) -> float:
    """Of its operand `index`; infinity for all."""
    kind = use.opcode.removesuffix("-start")
    if index == 0 and kind in ("slice", "dynamic-slice", "gather"):
        return sum(map(count_elements, use.results))
    if index == 0 and kind == "dynamic-update-slice":
        return 0.0  # updated in place
    if index == 0 and kind == "scatter":  # the rows that it adds to
        return count_elements(_shape_of(use.operands[-1], scope))
    inside = _body(use, computations)
    for parameter in inside.values():
        if parameter.opcode == "parameter" and parameter.rest.startswith(f"{index})"):
            return _elements_used(parameter, inside, computations)
    # Where a slice begins is told by scalars.
    told = kind.startswith("dynamic-") and index >= 1 + (kind != "dynamic-slice")
    return 0.0 if told else math.inf


def _elements_used(
    value: Instruction, scope: Computation, computations: Mapping[str, Computation]
) -> float:
    """Of a value in a fused computation: what the others there read of it."""
    total = math.inf if value.is_root else 0.0
    for use in scope.values():
        if (use.is_root and use.opcode == "tuple") or _is_under_way(use, scope):
            continue  # handed on
        for index, name in enumerate(use.operands):
            if name != value.name:
                continue
            if use.opcode in _VIEWS:
                total += _elements_used(use, scope, computations)
            else:
                total += _elements_read(use, index, scope, computations)
    return total


def _shares_written(
    instruction: Instruction,
    scope: Computation,
    computations: Mapping[str, Computation],
) -> list[float]:
    """Of each of its results, what share is written: all, but for updates in place."""
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = 1 if instruction.opcode == "dynamic-update-slice" else -1
        elements = count_elements(_shape_of(instruction.operands[update], scope))
        share = elements / max(1, count_elements(instruction.shape))
        return [min(1.0, share)] * len(instruction.results)
    shares = [1.0] * len(instruction.results)
    if not (body := _body(instruction, computations)):
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
        if inner.opcode == "parameter" or _is_under_way(inner, body):
            shares[place] = 0.0
            continue
        while inner.opcode in _VIEWS and inner.operands[0] in body:
            inner = body[inner.operands[0]]
        if inner.opcode in ("dynamic-update-slice", "scatter", "fusion"):
            shares[place] = _shares_written(inner, body, computations)[0]
    return shares


def _is_under_way(instruction: Instruction, scope: Computation) -> bool:
    """Whether a fused computation only carries a collective on, or ends it.

    One that overlaps with others stands in each fusion on its way, as if it ran there:
    its operands and result are handed on. The fusion that begins it is what counts.
    """
    if instruction.opcode == "custom-call":
        return _COLLECTIVE_ENDS in instruction.rest
    if instruction.opcode not in _COLLECTIVES:
        return False
    uses = [other for other in scope.values() if instruction.name in other.operands]
    handed_on = {
        name
        for use in uses
        if use.is_root and use.opcode == "tuple"
        for name in use.operands
    }
    ends = all(_COLLECTIVE_ENDS in use.rest for use in uses)
    return bool(uses) and (ends or set(instruction.operands) <= handed_on)


def _body(
    instruction: Instruction, computations: Mapping[str, Computation]
) -> Computation:
    """The computation of a fusion; empty for anything else."""
    if instruction.opcode.removesuffix("-start") != "fusion":
        return {}
    return computations.get(next(iter(instruction.called), ""), {})


def _shape_of(name: str, scope: Computation) -> str:
    return scope[name].shape if name in scope else ""

"""Search over mesh shapes, rematerialization and batch sizes: what to compile, and when
to stop. It compiles nothing itself (compile.py does).

A compilation takes minutes, so candidates are tried in the order of what they could
reach at best, and left out where that is known: by what state and the layers' inputs
alone take, by a smaller candidate that did not fit, by a result that no bound beats.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxtrain.aot.report import Report
from jaxtrain.config.sections import REMATS

ROWS = (1, 2, 4, 8, 16, 32)
AXES = ("data", "fsdp", "expert", "context", "tensor")
# Fewer tokens of a row than this are not worth splitting it.
_FEWEST_TOKENS = 4096
_MOST_TENSOR = 8


class Candidate(NamedTuple):
    """One setting: mesh sizes by axis, what is recomputed, a device's rows."""

    mesh: tuple[tuple[str, int], ...]
    remat: str
    rows: int


class Bound(NamedTuple):
    """What a candidate takes at least: bytes of a device, seconds for a token."""

    memory_bytes: float
    secs: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A candidate with its compilation, or the reason why there was none."""

    candidate: Candidate
    result: Report | None
    reason: str = ""

    @property
    def tokens_per_sec(self) -> float:
        """At the bound; 0 where it does not fit."""
        if self.result is None or not self.result.fits:
            return 0.0
        return self.result.tokens / self.result.step_secs


def make_candidates(
    device_count: int,
    *,
    heads: int,
    row_tokens: int,
    num_slices: int = 1,
    experts: int = 0,
) -> list[Candidate]:
    """All settings for so many devices and rows of `row_tokens` tokens.

    `tensor` up to 8 and a divisor of the heads; `context` where a device keeps 4096
    tokens of a row; `data` over the slices, and over parts of them. Where a model has
    `experts`, `expert` divides them; `tensor` is then 1, for it would cut experts that
    are narrow already.
    """
    found = set()
    per_slice = device_count // num_slices
    for tensor in _divisors(per_slice, at_most=_MOST_TENSOR):
        for context in _divisors(per_slice // tensor, at_most=32):
            is_short = context > 1 and row_tokens < context * _FEWEST_TOKENS
            if heads % tensor or is_short:
                continue
            left = per_slice // tensor // context
            most = math.gcd(experts, left) if experts and tensor == 1 else 1
            for expert in _divisors(most, at_most=most):
                for data in (1, 2, 4, left // expert):
                    if left // expert % data == 0:
                        fsdp = left // expert // data
                        sizes = (data * num_slices, fsdp, expert, context, tensor)
                        found.add(_as_mesh(sizes))
    return list(
        itertools.starmap(Candidate, itertools.product(sorted(found), REMATS, ROWS))
    )


def _as_mesh(sizes: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """Sizes by axis as `MeshSection.sizes` has them: without an `expert` of 1."""
    named = zip(AXES, sizes, strict=True)
    return tuple((axis, size) for axis, size in named if (axis, size) != ("expert", 1))


def _divisors(number: int, *, at_most: int) -> list[int]:
    """Powers of two that divide it."""
    powers = (1 << exponent for exponent in range(at_most.bit_length()))
    return [power for power in powers if power <= at_most and number % power == 0]


def search(
    candidates: Iterable[Candidate],
    bound: Callable[[Candidate], Bound],
    compile_candidate: Callable[[Candidate], Report],
    *,
    memory_bytes: float,
    max_compiles: int,
) -> list[Outcome]:
    """Compile the most promising candidates, at most `max_compiles` of them.

    `memory_bytes`: of a device. The outcomes of all candidates, in the order tried.
    """
    bounds = {candidate: bound(candidate) for candidate in candidates}
    # Of equal promise the smaller one first: it fits sooner.
    order = sorted(
        bounds, key=lambda c: (float(f"{bounds[c].secs:.3g}"), bounds[c].memory_bytes)
    )
    outcomes: list[Outcome] = []
    too_large: list[Candidate] = []
    fitting: list[Candidate] = []
    best, compiled = 0.0, 0
    for candidate in order:
        least = bounds[candidate]
        result, reason = None, ""
        if least.memory_bytes > memory_bytes:
            reason = "state and layers' inputs alone are too large"
        elif any(_is_no_smaller(candidate, other) for other in too_large):
            reason = "a smaller one does not fit"
        elif any(_keeps_no_more(candidate, other) for other in fitting):
            reason = "one that recomputes less fits"
        elif best * least.secs >= 1:
            reason = "its bound is no better than the best"
        elif compiled >= max_compiles:
            reason = "not tried: --max_compiles is reached"
        else:
            compiled += 1
            result = compile_candidate(candidate)
            (fitting if result.fits else too_large).append(candidate)
        outcomes.append(Outcome(candidate, result, reason))
        best = max(best, outcomes[-1].tokens_per_sec)
    return outcomes


def _is_no_smaller(candidate: Candidate, other: Candidate) -> bool:
    """Whether it needs at least the other's memory: as many rows, as much kept."""
    return (
        candidate.mesh == other.mesh
        and candidate.rows >= other.rows
        and REMATS.index(candidate.remat) <= REMATS.index(other.remat)
    )


def _keeps_no_more(candidate: Candidate, other: Candidate) -> bool:
    """Whether it is the other one, but computes as much again or more."""
    same = (candidate.mesh, candidate.rows) == (other.mesh, other.rows)
    return same and REMATS.index(candidate.remat) >= REMATS.index(other.remat)


def choose_best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The one of the most tokens a second at its bound; None if none fits."""
    best = max(outcomes, key=lambda outcome: outcome.tokens_per_sec, default=None)
    return best if best is not None and best.tokens_per_sec > 0 else None


def as_flags(candidate: Candidate) -> dict[str, Any]:
    """The configuration's keys, with the values that make a run use the candidate."""
    sizes = dict(candidate.mesh)
    remat = candidate.remat
    splits_weights = sizes["fsdp"] > 1 or "expert" in sizes
    return {
        **{f"mesh.{axis}": size for axis, size in sizes.items() if size > 1},
        "training.deepspeed.zero_stage": 3 if splits_weights else 1,
        "training.gradient_checkpointing": remat != "none",
        **({} if remat == "none" else {"training.remat_policy": remat}),
        # Of all layers: by it policies are in the order of the memory that they take.
        **({"training.remat_layers": -1} if remat == "full" else {}),
        "training.per_device_train_batch_size": candidate.rows,
    }


def format_table(outcomes: Sequence[Outcome], memory_bytes: float) -> str:
    """What was compiled, the best first; then why the rest was not, counted."""
    gib = 2.0**30
    lines = [
        f"{'mesh':32s} {'remat':>14s} {'rows':>4s} {'GiB':>7s} {'of HBM':>6s}"
        f" {'step s':>7s} {'tokens/s':>10s} {'MFU':>4s}  fits"
    ]
    compiled = [outcome for outcome in outcomes if outcome.result is not None]
    for outcome in sorted(compiled, key=lambda o: -o.tokens_per_sec):
        (mesh, remat, rows), result = outcome.candidate, outcome.result
        assert result is not None
        shape = " ".join(f"{axis} {size}" for axis, size in mesh if size > 1)
        line = f"{shape or 'one device':32s} {remat:>14s} {rows:4d}"
        if result.refusal is None:
            line += (
                f" {result.device_bytes / gib:7.2f}"
                f" {result.device_bytes / memory_bytes:6.0%} {result.step_secs:7.3f}"
                f" {result.tokens / result.step_secs:10,.0f} {result.mfu:4.0%}"
            )
        else:
            line += " " * 39
        lines.append(f"{line}  {'yes' if result.fits else 'no'}")
    reasons = [outcome.reason for outcome in outcomes if outcome.result is None]
    for reason in dict.fromkeys(reasons):
        lines.append(f"{reasons.count(reason)} more: {reason}")
    return "\n".join(lines)

"""A residual sum with its RMSNorm in one pass each way, in Triton, against XLA.

    PYTHONPATH=. python benchmarks/norm_kernels.py
    PYTHONPATH=. python benchmarks/norm_kernels.py --smoke    # interpreted, tiny

No part of jaxtrain: in whole steps the kernels gained too little (RESULTS.md). 16,384
tokens in bfloat16, microseconds. Forward reads the stream and what is added, and writes
their sum and its norm; backward reads the gradients of both and the sum, and writes one
gradient, and where it is trained that of the scale. Behind each time is the share of
the GPU's bandwidth that four arrays make of it. All is checked against float64.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxtrain.aot.report import CHIPS
from jaxtrain.models.layers import normalize

Call = Callable[..., Any]
EPSILON = 1e-6
SHAPES = [(16384, 896), (16384, 2048)]
# Rows at once, warps, and turns of a program where the scale is trained.
FORWARD = [(1, 4, 1), (1, 2, 1)]
BACKWARD = [(1, 4, 16), (1, 8, 16), (2, 8, 8)]
FROZEN = [(1, 4, 1), (1, 2, 1)]


Ref = Any


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A program takes `rows` at once by so many warps, and that `turns` times.

    Only the backward pass takes turns, and only where the scale is trained: a program
    gives one partial sum of its gradient.
    """

    rows: int = 1
    warps: int = 4
    turns: int = 16
    interpret: bool = False

    @classmethod
    def of_width(cls, width: int) -> "Tiles":
        """Those that are fast for rows of this width."""
        return cls(warps=max(4, pl.next_power_of_2(width) // 512))


def add_and_norm(
    x: Float[Array, "M D"],
    added: Float[Array, "M D"] | None,
    scale: Float[Array, "D"],
    epsilon: float,
    tiles: Tiles,
) -> tuple[Float[Array, "M D"], ...]:
    """x + added in the type of x, and the norm of it; without `added` the norm of x."""
    terms = [x] if added is None else [x, added]
    tile, vector = _specs(x.shape[1], tiles.rows)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    results: tuple[Array, ...] = pl.pallas_call(
        functools.partial(_forward_kernel, x.shape, epsilon, len(terms)),
        grid=(pl.cdiv(len(x), tiles.rows),),
        in_specs=[vector, *[tile] * len(terms)],
        out_specs=(tile,) * len(terms),
        out_shape=(like,) * len(terms),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        cost_estimate=_estimate(x, passes=2 * len(terms)),
        interpret=tiles.interpret,
        name="norm_forward",
    )(scale, *terms)
    return results


def _forward_kernel(
    shape: tuple[int, ...], epsilon: float, terms: int, scale_ref: Ref, *refs: Ref
) -> None:
    x_ref, out_ref = refs[0], refs[-1]
    rows, block = x_ref.shape
    columns = jnp.arange(block) < shape[1]
    real = _real(shape, rows, pl.program_id(0) * rows, columns)
    total = plgpu.load(x_ref, mask=real, other=0.0)
    if terms == 2:
        _, added_ref, total_ref, _ = refs
        total += plgpu.load(added_ref, mask=real, other=0.0)
        plgpu.store(total_ref, total, mask=real)
    scale = plgpu.load(scale_ref, mask=columns, other=0.0)
    total = total.astype(jnp.float32)
    factor = _inverse_rms(total, shape[1], epsilon)
    out = (total * factor * scale[None]).astype(out_ref.dtype)
    plgpu.store(out_ref, out, mask=real)


def gradient(
    total: Float[Array, "M D"],
    scale: Float[Array, "D"],
    of_total: Float[Array, "M D"] | None,
    of_out: Sequence[Float[Array, "M D"]],
    epsilon: float,
    tiles: Tiles,
    *,
    with_scale: bool,
) -> tuple[Float[Array, "M D"], Float[Array, "D"] | None]:
    """The gradient of the sum, which is that of both terms; and of the scale if asked.

    `of_total` is the gradient of the sum, or None for zeros; those in `of_out` together
    are that of its norm.
    """
    gradients = [*of_out] if of_total is None else [*of_out, of_total]
    turns = tiles.turns if with_scale else 1
    (length, width), block = total.shape, tiles.rows * turns
    tile, vector = _specs(width, block)
    programs = pl.cdiv(length, block)
    outputs = [jax.ShapeDtypeStruct(total.shape, total.dtype)]
    out_specs = [tile]
    if with_scale:
        outputs.append(jax.ShapeDtypeStruct((programs, width), jnp.float32))
        part = pl.BlockSpec((None, pl.next_power_of_2(width)), lambda i: (i, 0))
        out_specs.append(part)
    found = pl.pallas_call(
        functools.partial(
            _backward_kernel,
            _Case(total.shape, epsilon, tiles.rows, len(of_out), len(outputs)),
        ),
        grid=(programs,),
        in_specs=[vector, tile, *[tile] * len(gradients)],
        out_specs=out_specs,
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        cost_estimate=_estimate(total, passes=2 + len(gradients)),
        interpret=tiles.interpret,
        name="norm_backward",
    )(scale, total, *gradients)
    return found[0], found[1].sum(axis=0) if with_scale else None


class _Case(NamedTuple):
    """What a backward kernel is told: `norms` and `outputs` count its arrays."""

    shape: tuple[int, ...]
    epsilon: float
    rows: int
    norms: int
    outputs: int


def _backward_kernel(case: _Case, scale_ref: Ref, total_ref: Ref, *refs: Ref) -> None:
    (_, width), rows, (height, block) = case.shape, case.rows, total_ref.shape
    of_out_refs = refs[: case.norms]
    of_total_refs = refs[case.norms : -case.outputs]
    out_ref, *of_scale_ref = refs[-case.outputs :]
    columns = jnp.arange(block) < width
    scale = plgpu.load(scale_ref, mask=columns, other=0.0)[None]
    first = pl.program_id(0) * height

    def turn(index: Any, of_scale: Array) -> Array:
        own = (pl.ds(index * rows, rows), slice(None))
        real = _real(case.shape, rows, first + index * rows, columns)

        def load(ref: Ref) -> Array:
            return plgpu.load(ref.at[*own], mask=real, other=0.0).astype(jnp.float32)

        total, of_out = load(total_ref), sum(map(load, of_out_refs))
        factor = _inverse_rms(total, width, case.epsilon)
        normal, slope = total * factor, of_out * scale
        pull = (normal * slope).sum(axis=1)[:, None] / width
        found = (slope - normal * pull) * factor
        for ref in of_total_refs:
            found += load(ref)
        plgpu.store(out_ref.at[*own], found.astype(out_ref.dtype), mask=real)
        return of_scale + of_out * normal if of_scale_ref else of_scale

    of_scale = jnp.zeros((rows, block), jnp.float32)
    turns = height // rows
    if turns == 1:
        of_scale = turn(0, of_scale)
    else:
        of_scale = jax.lax.fori_loop(0, turns, turn, of_scale)
    for ref in of_scale_ref:
        plgpu.store(ref, of_scale.sum(axis=0), mask=columns)


def _inverse_rms(x: Array, width: int, epsilon: float) -> Array:
    """1 / rms of each row [rows, 1]; columns behind the width are zero."""
    return jax.lax.rsqrt((x * x).sum(axis=1) / width + epsilon)[:, None]


def _specs(width: int, rows: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Blocks of `rows` rows, and of what all rows share."""
    block = pl.next_power_of_2(width)
    return (
        pl.BlockSpec((rows, block), lambda i: (i, 0)),
        pl.BlockSpec((block,), lambda i: (0,)),
    )


def _real(shape: tuple[int, ...], rows: int, first: Any, columns: Array) -> Array:
    """Which places [rows, block] of the rows from `first` on exist."""
    own = first + jnp.arange(rows)
    return columns[None] & (own < shape[0])[:, None]


def _estimate(x: Array, *, passes: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=10 * x.size,
        transcendentals=len(x),
        bytes_accessed=passes * x.size * x.dtype.itemsize,
    )


def by_xla(x: Any, added: Any, scale: Any) -> Any:
    total = x + added
    return total, normalize(total, scale, EPSILON)


def gradient_by_xla(
    total: Any, scale: Any, of_total: Any, of_out: Any, with_scale: bool
) -> Any:
    """As in a step: the sum is kept, and the norm computed again."""
    norm = lambda total, scale: normalize(total, scale, EPSILON)  # noqa: E731
    of_norm, of_scale = jax.vjp(norm, total, scale)[1](of_out)
    return of_total + of_norm, of_scale if with_scale else None


def exact(total: Any, scale: Any, of_total: Any, of_out: Any) -> list[Any]:
    """The norm, the gradient of the sum and that of the scale in float64."""
    t, s, g, d = (
        np.asarray(x.astype(jnp.float32), np.float64)
        for x in (total, scale, of_total, of_out)
    )
    factor = 1 / np.sqrt((t * t).mean(axis=1, keepdims=True) + EPSILON)
    normal, slope = t * factor, d * s
    pull = (normal * slope).mean(axis=1, keepdims=True)
    return [normal * s, g + (slope - normal * pull) * factor, (d * normal).sum(axis=0)]


def time_us(call: Call, given: tuple[Any, ...], interpret: bool) -> float:
    """Of one call, among many in a program, each of which reads what the last wrote."""
    calls = 1 if interpret else 16

    def chain(*given: Any) -> Any:
        # Nothing may be left out, nor computed once for two calls: every call reads
        # new arrays, and all that is written is a result.
        kept = []
        for _ in range(calls):
            found = jax.lax.optimization_barrier(call(*given))
            kept.append(found)
            if len(given) == 3:
                given = (*found, given[2])
            else:
                total, scale, of_total, _ = given
                given = (found[0], scale, total, of_total)
        return kept

    run = jax.jit(chain)
    jax.block_until_ready(run(*given))
    times = []
    for _ in range(1 if interpret else 6):
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append((time.perf_counter() - start) / calls * 1e6)
    return min(times)


def tell(
    name: str,
    call: Call,
    given: tuple[Any, ...],
    expected: list[Any],
    interpret: bool,
) -> None:
    """The time of `call(*given)`, and its errors, as shares of the largest value."""
    start = time.perf_counter()
    results = jax.block_until_ready(jax.jit(call)(*given))
    compile_secs = time.perf_counter() - start
    errors = []
    for found, right in zip(jax.tree.leaves(results), expected, strict=True):
        found = np.asarray(found.astype(jnp.float32))
        errors.append(np.abs(found - right).max() / np.abs(right).max())
    micros = time_us(call, given, interpret)
    chip = CHIPS.get(jax.devices()[0].device_kind)
    share = 4 * given[0].nbytes / chip.memory_rate / micros * 1e6 if chip else 0.0
    worst = " ".join(f"{error:.0e}" for error in errors)
    print(f"{name:19}{micros:7.1f} {share:.2f} {worst} c{compile_secs:.1f}", flush=True)
    assert max(errors) < 2**-7, errors


def compare(shape: tuple[int, int], interpret: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x, added, of_total, of_out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4]
    )
    scale = jax.random.uniform(keys[4], shape[1:], jnp.float32)
    total = x + added
    norm, of_sum, of_scale = exact(total, scale, of_total, of_out)
    right = [np.asarray(total.astype(jnp.float32)), norm]
    print(shape, "forward", flush=True)

    def run(name: str, call: Any, given: Any, expected: Any) -> None:
        tell(name, call, given, expected, interpret)

    run("XLA", by_xla, (x, added, scale), right)
    for own in FORWARD:
        tiles = Tiles(*own, interpret)
        run(
            str(own),
            lambda *a, t=tiles: add_and_norm(*a, EPSILON, t),
            (x, added, scale),
            right,
        )
    given = (total, scale, of_total, of_out)
    for with_scale, variants in ((True, BACKWARD), (False, FROZEN)):
        print("backward", "with scale" if with_scale else "frozen", flush=True)
        right = [of_sum, of_scale] if with_scale else [of_sum]
        run("XLA", lambda *a, w=with_scale: gradient_by_xla(*a, w), given, right)
        for own in variants:
            tiles = Tiles(*own, interpret)
            run(
                str(own),
                lambda *a, t=tiles, w=with_scale: gradient(
                    *a[:3], [a[3]], EPSILON, t, with_scale=w
                ),
                given,
                right,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, interpreted")
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    for shape in [(37, 96)] if options.smoke else SHAPES:
        compare(shape, options.smoke)


if __name__ == "__main__":
    main()

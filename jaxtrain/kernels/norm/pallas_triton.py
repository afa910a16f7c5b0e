"""A residual sum with its RMSNorm in one pass each way, in Triton by Pallas.

A program takes some rows whole, in registers: it reads each number once and writes each
once. Triton knows only powers of two, so the columns behind the width are masked.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

Ref = Any


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How rows are cut: `rows` at once by `warps` warps, `turns` times a program.

    Of the turns the backward pass has as many partial sums fewer of the scale's
    gradient.
    """

    rows: int = 1
    warps: int = 4
    turns: int = 16
    interpret: bool = False


def forward(
    x: Float[Array, "M D"],
    added: Float[Array, "M D"],
    scale: Float[Array, "D"],
    epsilon: float,
    tiles: Tiles,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """x + added in the type of x, and the norm of that sum as it was rounded."""
    tile, vector = _specs(x.shape, tiles.rows)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(_forward_kernel, x.shape, epsilon),
        grid=(pl.cdiv(len(x), tiles.rows),),
        in_specs=[tile, tile, vector],
        out_specs=[tile, tile],
        out_shape=[like, like],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        cost_estimate=_estimate(x, passes=4),
        interpret=tiles.interpret,
        name="norm_forward",
    )(x, added, scale)


def _forward_kernel(
    shape: tuple[int, int],
    epsilon: float,
    x_ref: Ref,
    added_ref: Ref,
    scale_ref: Ref,
    total_ref: Ref,
    out_ref: Ref,
) -> None:
    rows, width = x_ref.shape[0], shape[1]
    columns = jnp.arange(x_ref.shape[1]) < width
    real = _real(shape, rows, pl.program_id(0) * rows, columns)
    total = plgpu.load(x_ref, mask=real, other=0.0)
    total += plgpu.load(added_ref, mask=real, other=0.0)
    plgpu.store(total_ref, total, mask=real)
    scale = plgpu.load(scale_ref, mask=columns, other=0.0)
    total = total.astype(jnp.float32)
    mean_square = (total * total).sum(axis=1) / width
    factor = jax.lax.rsqrt(mean_square + epsilon)[:, None]
    out = (total * factor * scale[None]).astype(out_ref.dtype)
    plgpu.store(out_ref, out, mask=real)


def backward(
    total: Float[Array, "M D"],
    scale: Float[Array, "D"],
    of_total: Float[Array, "M D"],
    of_out: Float[Array, "M D"],
    epsilon: float,
    tiles: Tiles,
    *,
    with_scale: bool,
) -> tuple[Float[Array, "M D"], Float[Array, "D"] | None]:
    """The gradient of the sum, which is that of both terms, and of the scale if asked.

    `of_total` and `of_out` are the gradients of the sum and of its norm.
    """
    turns = tiles.turns if with_scale else 1
    block = tiles.rows * turns
    tile, vector = _specs(total.shape, block)
    programs = pl.cdiv(len(total), block)
    outputs = [jax.ShapeDtypeStruct(total.shape, total.dtype)]
    out_specs = [tile]
    if with_scale:
        part = jax.ShapeDtypeStruct((programs, total.shape[1]), jnp.float32)
        outputs.append(part)
        out_specs.append(pl.BlockSpec((None, *vector.block_shape), lambda i: (i, 0)))
    found = pl.pallas_call(
        functools.partial(_backward_kernel, total.shape, epsilon, tiles.rows, turns),
        grid=(programs,),
        in_specs=[tile, tile, tile, vector],
        out_specs=out_specs,
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        cost_estimate=_estimate(total, passes=4),
        interpret=tiles.interpret,
        name="norm_backward",
    )(total, of_total, of_out, scale)
    return found[0], found[1].sum(axis=0) if with_scale else None


def _backward_kernel(
    shape: tuple[int, int],
    epsilon: float,
    rows: int,
    turns: int,
    total_ref: Ref,
    of_total_ref: Ref,
    of_out_ref: Ref,
    scale_ref: Ref,
    out_ref: Ref,
    *of_scale_ref: Ref,
) -> None:
    width, block = shape[1], total_ref.shape[1]
    columns = jnp.arange(block) < width
    scale = plgpu.load(scale_ref, mask=columns, other=0.0)[None]
    first = pl.program_id(0) * (rows * turns)

    def turn(index: Array, of_scale: Array) -> Array:
        own = (pl.ds(index * rows, rows), slice(None))
        real = _real(shape, rows, first + index * rows, columns)

        def load(ref: Ref) -> Array:
            x = plgpu.load(ref.at[*own], mask=real, other=0.0)
            return x.astype(jnp.float32)

        total, of_out = load(total_ref), load(of_out_ref)
        mean_square = (total * total).sum(axis=1) / width
        factor = jax.lax.rsqrt(mean_square + epsilon)[:, None]
        normal, slope = total * factor, of_out * scale
        pull = (normal * slope).sum(axis=1)[:, None] / width
        of_total = load(of_total_ref) + (slope - normal * pull) * factor
        plgpu.store(out_ref.at[*own], of_total.astype(out_ref.dtype), mask=real)
        return of_scale + of_out * normal if of_scale_ref else of_scale

    of_scale = jnp.zeros((rows, block), jnp.float32)
    if not of_scale_ref:
        turn(jnp.int32(0), of_scale)
        return
    of_scale = jax.lax.fori_loop(0, turns, turn, of_scale)
    plgpu.store(of_scale_ref[0], of_scale.sum(axis=0), mask=columns)


def _specs(shape: tuple[int, ...], rows: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Blocks of `rows` rows, and of what all rows share."""
    block = pl.next_power_of_2(shape[1])
    return (
        pl.BlockSpec((rows, block), lambda i: (i, 0)),
        pl.BlockSpec((block,), lambda i: (0,)),
    )


def _real(shape: tuple[int, int], rows: int, first: Array, columns: Array) -> Array:
    """Which places [rows, block] of the rows from `first` on exist."""
    own = first + jnp.arange(rows)
    return columns[None] & (own < shape[0])[:, None]


def _estimate(x: Array, *, passes: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=10 * x.size,
        transcendentals=len(x),
        bytes_accessed=passes * x.size * x.dtype.itemsize,
    )

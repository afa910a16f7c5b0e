"""Grouped products on Hopper through Pallas Mosaic GPU.

A program stays on its multiprocessor and takes one tile of the result after the other.
One warpgroup copies blocks of both factors into a ring of buffers in shared memory by
TMA; two compute, each 64 rows of the tile, by wgmma in float32. A tile of rows that
several groups share is summed over these groups, the other groups' rows set to zero in
shared memory: so each tile is written once, and rows behind all groups become zeros.

Matrices of one shape that the same rows meet, as gate's and up's, are given together:
their tiles are taken as if they stood side by side, and none is copied for that.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.hopper import FEEDER, GROUPS, ROWS, Ref
from jaxtrain.kernels.grouped_matmul.api import Kernels
from jaxtrain.kernels.grouped_matmul.plan import TILE, Plan

_DEPTH = 64  # of a buffer: what the 128-byte swizzle holds of 16-bit numbers


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Columns of a tile of the result, buffers in the ring, columns that leave at once.

    `programs`: side by side; None: one a multiprocessor.
    """

    columns: int = 256
    stages: int = 4
    leaving: int = 128
    programs: int | None = None
    interpret: bool = False


@functools.cache
def make_kernels(
    forward: Tiles | None = None,
    transposed: Tiles | None = None,
    of_rows: Tiles | None = None,
) -> Kernels:
    """The three products by tiles of these sizes."""
    return Kernels(
        functools.partial(multiply, tiles=forward or Tiles()),
        functools.partial(multiply_transposed, tiles=transposed or Tiles()),
        functools.partial(multiply_rows, tiles=of_rows or Tiles()),
        row_multiple=TILE,
        width_multiple=_DEPTH,
    )


def multiply(
    rows: Float[Array, "M D"],
    weights: Sequence[Float[Array, "E D F"]],
    plan: Plan,
    tiles: Tiles,
) -> tuple[Float[Array, "M F"], ...]:
    """Each row times its group's matrix, of each of the weights.

    Rows behind all groups give zeros, whatever they hold.
    """
    (length, depth), width = rows.shape, weights[0].shape[2]
    tiles = _fit(tiles, width)
    kernel = _call(
        functools.partial(_multiply_kernel, tiles, len(weights), False),
        tiles,
        [jax.ShapeDtypeStruct((length, width), rows.dtype)] * len(weights),
        [(tiles.stages, GROUPS, ROWS, _DEPTH), (tiles.stages, _DEPTH, tiles.columns)],
        ([rows, *weights], length * depth * width * len(weights)),
    )
    return tuple(kernel(rows, *weights, *_places(plan)))


def multiply_transposed(
    d_outs: Sequence[Float[Array, "M F"]],
    weights: Sequence[Float[Array, "E D F"]],
    plan: Plan,
    tiles: Tiles,
) -> Float[Array, "M D"]:
    """The sum over both sequences of each row times its group's transposed matrix."""
    (length, depth), width = d_outs[0].shape, weights[0].shape[1]
    tiles = _fit(tiles, width)
    kernel = _call(
        functools.partial(_multiply_kernel, tiles, len(weights), True),
        tiles,
        [jax.ShapeDtypeStruct((length, width), d_outs[0].dtype)],
        [(tiles.stages, GROUPS, ROWS, _DEPTH), (tiles.stages, tiles.columns, _DEPTH)],
        ([*d_outs, *weights], length * depth * width * len(weights)),
    )
    (d_rows,) = kernel(*d_outs, *weights, *_places(plan))
    return d_rows


def _places(plan: Plan) -> tuple[Array, ...]:
    """What the kernel that multiplies reads of the plan."""
    return plan.bounds, plan.firsts, plan.counts, plan.tiles


def multiply_rows(
    rows: Float[Array, "M D"],
    others: Sequence[Float[Array, "M F"]],
    plan: Plan,
    tiles: Tiles,
) -> tuple[Float[Array, "E D F"], ...]:
    """The sum over each group's rows of row x other row, for each of the others.

    Zeros for an empty group.
    """
    length, depth = rows.shape
    width, groups = others[0].shape[1], len(plan.groups)
    tiles = _fit(tiles, width)
    kernel = _call(
        functools.partial(_rows_kernel, tiles, len(others)),
        tiles,
        [jax.ShapeDtypeStruct((groups, depth, width), rows.dtype)] * len(others),
        [(tiles.stages, GROUPS, _DEPTH, ROWS), (tiles.stages, _DEPTH, tiles.columns)],
        ([rows, *others], length * depth * width * len(others)),
    )
    return tuple(kernel(rows, *others, plan.bounds, plan.groups))


def _fit(tiles: Tiles, width: int) -> Tiles:
    """Tiles no wider than the result."""
    columns = tiles.columns
    while columns > 64 and columns >= 2 * width:
        columns //= 2
    return dataclasses.replace(
        tiles, columns=columns, leaving=min(columns, tiles.leaving)
    )


def _call(
    body: Callable[..., None],
    tiles: Tiles,
    out_types: list[jax.ShapeDtypeStruct],
    memory: list[tuple[int, ...]],
    work: tuple[list[Array], int],
) -> Callable[..., Sequence[Array]]:
    """The compiled kernel; `memory` has the shapes of the two rings.

    `work`: the factors, and how many numbers are multiplied.
    """
    dtype = out_types[0].dtype
    scratch = [
        *(hopper.matrix_memory(shape, dtype) for shape in memory),
        hopper.matrix_memory((GROUPS, ROWS, tiles.leaving), dtype),
        plgpu.Barrier(num_arrivals=GROUPS + 1, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=tiles.stages),
    ]
    extra: dict[str, Any] = {}
    if hopper.TELLS_COST:
        factors, products = work
        numbers = sum(x.size for x in factors)
        numbers += sum(math.prod(x.shape) for x in out_types)
        extra["cost_estimate"] = pl.CostEstimate(
            flops=2 * products,
            bytes_accessed=numbers * dtype.itemsize,
            transcendentals=0,
        )
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch,
        grid=(_count_programs(tiles),),
        grid_names=("programs",),
        num_threads=GROUPS + 1,
        thread_name="group",
        interpret=hopper.make_interpreter(tiles.interpret),
        **extra,
    )


def _count_programs(tiles: Tiles) -> int:
    if tiles.programs is not None:
        return tiles.programs
    return 2 if tiles.interpret else hopper.count_multiprocessors()


@dataclasses.dataclass(frozen=True)
class Ring:
    """The buffers of both factors, filled by one warpgroup and read by the others."""

    left: Ref
    right: Ref
    ready: Ref
    free: Ref

    @property
    def stages(self) -> int:
        return self.left.shape[0]

    def fill(self, turn: Array, left: Callable[[int], Ref], right: Ref) -> None:
        """Copies each group's block of the left factor, and one of the right."""
        self.fill_from(turn, turn, [left], [right])

    def fill_from(
        self,
        turn: Array,
        choice: Array,
        lefts: Sequence[Callable[[int], Ref]],
        rights: Sequence[Ref],
    ) -> None:
        """The same where a factor has several arrays, of which `choice` tells one."""
        slot = hopper.remainder(turn, self.stages)
        hopper.wait_for_slot(self.free, turn, slot, self.stages)
        ready = self.ready.at[slot]

        def copy_left(blocks: Callable[[int], Ref]) -> None:
            for group in range(GROUPS):
                plgpu.copy_gmem_to_smem(blocks(group), self.left.at[slot, group], ready)

        choose(choice, lefts, copy_left)
        choose(
            choice,
            rights,
            lambda block: plgpu.copy_gmem_to_smem(block, self.right.at[slot], ready),
        )

    def release_before(self, turn: Array, first: Array) -> None:
        """Gives the buffers of the turn before back, if it was of the same tile."""
        plgpu.wgmma_wait(1)
        slot = hopper.remainder(turn + self.stages - 1, self.stages)
        pl.when(turn > first)(lambda: plgpu.barrier_arrive(self.free.at[slot]))

    def release_last(self, turns: Array, first: Array) -> None:
        """The same of a tile's last turn, `turns` being how many were taken so far."""
        plgpu.wgmma_wait(0)
        slot = hopper.remainder(turns + self.stages - 1, self.stages)
        pl.when(turns > first)(lambda: plgpu.barrier_arrive(self.free.at[slot]))


def choose(choice: Array, options: Sequence[Any], take: Callable[[Any], None]) -> None:
    """`take` of that of the options; of the only one, whatever the choice."""
    if len(options) == 1:
        take(options[0])
        return
    for number, option in enumerate(options):
        pl.when(choice == number)(functools.partial(take, option))


def over_tiles(count: int, take: Callable[[Array, Array], Array]) -> None:
    """Folds `take(tile, turns so far)` over the tiles of this program.

    Tiles are in the order of their length; rounds of programs take them there and
    back, so that programs end together.
    """
    programs = jax.lax.axis_size("programs")
    rounds, rest = divmod(count, programs)
    program = jax.lax.axis_index("programs")

    def seat(index: Array) -> Array:
        back = hopper.remainder(index, 2) == 1
        return jnp.where(back, programs - 1 - program, program)

    def visit(index: Array, turns: Array) -> Array:
        return take(index * programs + seat(index), turns)

    own = rounds + (seat(jnp.int32(rounds)) < rest).astype(jnp.int32)
    jax.lax.fori_loop(0, own, visit, jnp.int32(0))


def _multiply_kernel(tiles: Tiles, many: int, transposed: bool, *refs: Ref) -> None:
    """`many` matrices give each a result of its own, or where `transposed` a sum."""
    across, along = (1, many) if transposed else (many, 1)
    rows_refs, weights_refs = refs[:along], refs[along : along + many]
    bounds_ref, firsts_ref, counts_ref, order_ref = refs[along + many :][:4]
    out_refs = refs[along + many + 4 :][:across]
    rows_memory, weights_memory, out_memory, ready, free = refs[-5:]
    (length, depth), width = rows_refs[0].shape, out_refs[0].shape[1]
    part = pl.cdiv(width, tiles.columns)
    columns = part * across
    part_steps = depth // _DEPTH
    steps = part_steps * along
    ring = Ring(rows_memory, weights_memory, ready, free)
    group = jax.lax.axis_index("group")

    def over_groups(take: Callable[..., Any], place: Array, turns: Array) -> Array:
        """Folds `take(tile, column, expert, turns)` over what meets a tile."""
        tile = order_ref[hopper.divide(place, columns)]
        column = hopper.remainder(place, columns)
        first = firsts_ref[tile]

        def visit(expert: Array, turns: Array) -> Array:
            is_empty = bounds_ref[expert] == bounds_ref[expert + 1]
            own = jnp.where(is_empty, 0, steps)
            take(tile * TILE, column, expert, turns, own)
            return turns + own

        return jax.lax.fori_loop(first, first + counts_ref[tile], visit, turns)

    @pl.when(group == FEEDER)
    def _feed() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def feed(
            row: Array, column: Array, expert: Array, turns: Array, own: Array
        ) -> None:
            outer = pl.ds(hopper.remainder(column, part) * tiles.columns, tiles.columns)

            def copy(step: Array, _: None) -> None:
                inner = pl.ds(hopper.remainder(step, part_steps) * _DEPTH, _DEPTH)
                block = (outer, inner) if transposed else (inner, outer)

                def of_rows(ref: Ref) -> Callable[[int], Ref]:
                    return lambda i: ref.at[pl.ds(row + i * ROWS, ROWS), inner]

                counted = (step, part_steps) if transposed else (column, part)
                ring.fill_from(
                    turns + step,
                    hopper.divide(*counted),
                    [of_rows(ref) for ref in rows_refs],
                    [ref.at[expert, *block] for ref in weights_refs],
                )

            jax.lax.fori_loop(0, own, copy, None)

        over_tiles(
            pl.cdiv(length, TILE) * columns, functools.partial(over_groups, feed)
        )

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def take(place: Array, first: Array) -> Array:
            def sum_up(total: Ref) -> tuple[Array, Array]:
                def add(
                    row: Array, column: Array, expert: Array, turns: Array, own: Array
                ) -> None:
                    start = bounds_ref[expert] - (row + group * ROWS)
                    end = bounds_ref[expert + 1] - (row + group * ROWS)
                    is_part = (start > 0) | (end < ROWS)

                    def step(index: Array, _: None) -> None:
                        turn = turns + index
                        slot = hopper.remainder(turn, tiles.stages)
                        plgpu.barrier_wait(ready.at[slot])
                        block = rows_memory.at[slot, group]
                        pl.when(is_part)(lambda: _keep(tiles, block, start, end))
                        right = weights_memory.at[slot]
                        if transposed:
                            right = right.transpose((1, 0))
                        plgpu.wgmma(total, block, right)
                        ring.release_before(turn, first)

                    jax.lax.fori_loop(0, own, step, None)

                turns = over_groups(add, place, first)
                ring.release_last(turns, first)
                return total[...], turns

            shape = (ROWS, tiles.columns)
            total, turns = pl.run_scoped(sum_up, plgpu.ACC(shape, jnp.float32))
            tile = order_ref[hopper.divide(place, columns)]
            own = pl.ds(tile * TILE + group * ROWS, ROWS)
            column = hopper.remainder(place, columns)
            targets = [ref.at[own] for ref in out_refs]
            _store(tiles, total, out_memory.at[group], targets, (column, part))
            return turns

        over_tiles(pl.cdiv(length, TILE) * columns, take)
        plgpu.wait_smem_to_gmem(0)


def _rows_kernel(tiles: Tiles, many: int, rows_ref: Ref, *refs: Ref) -> None:
    """`many` arrays of other rows give each a result of its own."""
    others_refs, (bounds_ref, order_ref) = refs[:many], refs[many : many + 2]
    out_refs = refs[many + 2 : many + 2 + many]
    rows_memory, others_memory, out_memory, ready, free = refs[-5:]
    groups, depth, width = out_refs[0].shape
    part, parts = pl.cdiv(width, tiles.columns), pl.cdiv(depth, TILE)
    columns = part * many
    ring = Ring(rows_memory, others_memory, ready, free)
    group = jax.lax.axis_index("group")

    def locate(place: Array) -> tuple[Array, ...]:
        """The expert of a tile, its first row, its column, its blocks of rows."""
        column = hopper.remainder(place, columns)
        place = hopper.divide(place, columns)
        expert = order_ref[hopper.divide(place, parts)]
        start, end = bounds_ref[expert], bounds_ref[expert + 1]
        first = hopper.divide(start, _DEPTH)
        own = jnp.where(start == end, 0, hopper.divide(end - 1, _DEPTH) + 1 - first)
        return expert, hopper.remainder(place, parts) * TILE, column, first, own

    @pl.when(group == FEEDER)
    def _feed() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def feed(place: Array, turns: Array) -> Array:
            _, row, column, first, own = locate(place)
            outer = pl.ds(hopper.remainder(column, part) * tiles.columns, tiles.columns)

            def copy(step: Array, _: None) -> None:
                inner = pl.ds((first + step) * _DEPTH, _DEPTH)
                ring.fill_from(
                    turns + step,
                    hopper.divide(column, part),
                    [lambda i: rows_ref.at[inner, pl.ds(row + i * ROWS, ROWS)]],
                    [ref.at[inner, outer] for ref in others_refs],
                )

            jax.lax.fori_loop(0, own, copy, None)
            return turns + own

        over_tiles(groups * parts * columns, feed)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def take(place: Array, turns: Array) -> Array:
            expert, row, column, first, own = locate(place)

            def sum_up(total: Ref) -> Array:
                def step(index: Array, _: None) -> None:
                    turn = turns + index
                    slot = hopper.remainder(turn, tiles.stages)
                    plgpu.barrier_wait(ready.at[slot])
                    block = rows_memory.at[slot, group]
                    start = bounds_ref[expert] - (first + index) * _DEPTH
                    end = bounds_ref[expert + 1] - (first + index) * _DEPTH
                    is_part = (start > 0) | (end < _DEPTH)
                    pl.when(is_part)(lambda: _keep(tiles, block, start, end))
                    plgpu.wgmma(total, block.transpose((1, 0)), others_memory.at[slot])
                    ring.release_before(turn, turns)

                jax.lax.fori_loop(0, own, step, None)
                ring.release_last(turns + own, turns)
                return total[...]

            shape = (ROWS, tiles.columns)
            total = pl.run_scoped(sum_up, plgpu.ACC(shape, jnp.float32))
            own_rows = pl.ds(row + group * ROWS, ROWS)
            targets = [ref.at[expert, own_rows] for ref in out_refs]
            _store(tiles, total, out_memory.at[group], targets, (column, part))
            return turns + own

        over_tiles(groups * parts * columns, take)
        plgpu.wait_smem_to_gmem(0)


def _keep(tiles: Tiles, block: Ref, start: Array, end: Array) -> None:
    """Sets the rows of a block before `start` and from `end` on to zero."""
    if tiles.interpret:
        row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
    else:
        row = plgpu.broadcasted_iota(jnp.int32, block.shape, 0, layout=hopper.TILE)
    is_own = (row >= start) & (row < end)
    block[...] = jnp.where(is_own, block[...], jnp.zeros((), block.dtype))
    plgpu.commit_smem()


def _store(
    tiles: Tiles,
    total: Array,
    memory: Ref,
    targets: Sequence[Ref],
    place: tuple[Array, int],
) -> None:
    """Sends a tile's sums to a target's columns, in as many parts as it takes.

    `place`: the tile's column, counted over all targets, and tiles of one target.
    """
    column, part = place
    choice, start = hopper.divide(column, part), hopper.remainder(column, part)
    leaving = memory.shape[1]
    for first in range(0, total.shape[1], leaving):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        memory[...] = total[:, first : first + leaving].astype(memory.dtype)
        plgpu.commit_smem()
        columns = pl.ds(start * tiles.columns + first, leaving)

        def send(target: Ref, columns: Any = columns) -> None:
            plgpu.copy_smem_to_gmem(memory, target.at[:, columns])

        choose(choice, targets, send)

"""The loss head's logits on Hopper, used where they are made, by Pallas Mosaic GPU.

A product of hidden states and the table whose tiles of logits never leave registers:
forward they become each row's sums of its tile, backward the slopes that both gradients
are products of; or both at once, the weights of a softmax beside the sums
(one_walk.py). XLA would write all logits in float32 and read them several times.

As in grouped_matmul/hopper.py a program takes one tile of 128 rows after the other, one
warpgroup copies, two compute. Blocks of 64 columns are in the vocabulary or outside.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.blocked import LOG2_E
from jaxtrain.kernels.attention.hopper import BLOCK, FEEDER, GROUPS, ROWS, Ref
from jaxtrain.kernels.grouped_matmul.hopper import Ring, over_tiles
from jaxtrain.kernels.linear_cross_entropy.level import level

DEPTH = 64  # of a buffer: what the 128-byte swizzle holds of 16-bit numbers
PART = 64  # columns that are taken at once from a tile, all real or none
_NEVER = -1e30
# Nats above the base from which on a tile's weights have its highest logit for theirs:
# what 151,936 weights of exp(60) add up to is a float32.
FAR = 60.0
# Tiles of rows that are taken with one tile of the table, so that both are found in
# the L2 cache again.
_TOGETHER = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Columns of a tile of logits, and buffers in the ring.

    `programs`: side by side; None: one a multiprocessor.
    """

    columns: int = 256
    stages: int = 4
    programs: int | None = None
    interpret: bool = False

    def count_programs(self) -> int:
        if self.programs is not None:
            return self.programs
        return 2 if self.interpret else hopper.count_multiprocessors()


class Head(NamedTuple):
    """Hidden states, entries of a table whose axis `vocab_axis` they are, a factor.

    All rows and entries: 128 rows, 64 entries and 64 numbers of width are the least
    common parts.
    """

    hidden: Float[Array, "M D"]
    table: Float[Array, "V D"] | Float[Array, "D V"]
    vocab_axis: int
    scale: float

    @property
    def entries(self) -> int:
        return self.table.shape[self.vocab_axis]


class Sums(NamedTuple):
    """Of each row over all entries, float32.

    `total` is the sum of exp(logit - highest), `weighted` that of the logits times
    these; `target` the target's logit, `is_first` whether it is the first highest one.
    """

    highest: Float[Array, "M"]
    total: Float[Array, "M"]
    weighted: Float[Array, "M"]
    target: Float[Array, "M"]
    is_first: Float[Array, "M"]


def sum_logits(head: Head, targets: Int32[Array, "M"], tiles: Tiles) -> Sums:
    """What a softmax and its statistics need of each row's logits."""
    rows, parts = len(head.hidden), pl.cdiv(head.entries, tiles.columns)
    by_tile = jax.ShapeDtypeStruct((parts, rows), jnp.float32)
    kernel = _call(
        functools.partial(_sums_kernel, tiles, _Grid.of(head, tiles), head.scale),
        head,
        tiles,
        out_type=(by_tile,) * 5,
        scratch=[
            hopper.vector_memory((GROUPS, ROWS), jnp.int32),
            hopper.vector_memory((5, GROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=GROUPS),
        ],
    )
    asked = _ask_for_targets(targets, parts, tiles)
    highest, total, weighted, target, earlier = kernel(
        head.hidden, head.table, targets, asked
    )
    most = highest.max(axis=0)
    fade = jnp.exp(highest - most)
    own_target, is_first = _find_targets(tiles, targets, highest, target, earlier)
    return Sums(
        most,
        (total * fade).sum(axis=0),
        (weighted * fade).sum(axis=0),
        own_target,
        is_first,
    )


def _ask_for_targets(
    targets: Int32[Array, "M"], parts: int, tiles: Tiles
) -> Int32[Array, "P"]:
    """Which 64 rows have a target in a tile: the others skip looking for it."""
    rows = len(targets)
    asked = jnp.zeros((rows // ROWS, parts), jnp.int32)
    groups = jnp.arange(rows) // ROWS
    return asked.at[groups, targets // tiles.columns].set(1).reshape(-1)


def _find_targets(
    tiles: Tiles, targets: Int32[Array, "M"], *by_tile: Float[Array, "P M"]
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """The target's logit, and whether it is the first highest one, of all tiles.

    `by_tile`: the highest logit, the target's where it is in the tile, and whether an
    earlier entry of that tile is as high.
    """
    highest, target, earlier = by_tile
    place = targets // tiles.columns
    own_target, own_earlier = (
        jnp.take_along_axis(each, place[None], axis=0)[0] for each in (target, earlier)
    )
    is_first = (highest.argmax(axis=0) == place) & (own_target == highest.max(axis=0))
    return own_target, (is_first & (own_earlier == 0.0)).astype(jnp.float32)


class Weights(NamedTuple):
    """exp(logit - base) of all entries, in the type of hidden states, and float32 sums.

    `base` is the one that was asked for, or the highest logit where that is more than
    `FAR` above it. `others` adds up all weights but the target's, `weighted` the logits
    times their weights; `target` and `is_first` are as in `Sums`.
    """

    weights: Float[Array, "M V"]
    base: Float[Array, "M"]
    others: Float[Array, "M"]
    weighted: Float[Array, "M"]
    target: Float[Array, "M"]
    is_first: Float[Array, "M"]


def weigh_logits(
    head: Head, targets: Int32[Array, "M"], base: Float[Array, "M"], tiles: Tiles
) -> Weights:
    """The weights of a softmax before they are divided by their sum.

    Each tile of logits chooses its base by itself, so that no logit has to be known
    before. Where tiles of a row differ, which is rare, `level` mends them behind it: a
    program that the host need not wait for, as it would have to for a condition.
    """
    rows, dtype = len(head.hidden), head.hidden.dtype
    parts = pl.cdiv(head.entries, tiles.columns)
    by_tile = jax.ShapeDtypeStruct((parts, rows), jnp.float32)
    kernel = _call(
        functools.partial(_weights_kernel, tiles, _Grid.of(head, tiles), head.scale),
        head,
        tiles,
        out_type=(*(by_tile,) * 6, jax.ShapeDtypeStruct((rows, head.entries), dtype)),
        scratch=[
            hopper.vector_memory((GROUPS, ROWS), jnp.int32),
            hopper.vector_memory((GROUPS, ROWS), jnp.float32),
            hopper.vector_memory((6, GROUPS, ROWS), jnp.float32),
            hopper.matrix_memory((GROUPS, ROWS, PART), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
        ],
    )
    asked = _ask_for_targets(targets, parts, tiles)
    shift = base * LOG2_E
    *by_tile, weights = kernel(head.hidden, head.table, targets, shift, asked)
    highest, others, weighted, target, earlier, shifts = by_tile
    most = shifts.max(axis=0)
    is_far, fade = most > shift, jnp.exp2(shifts - most)
    return Weights(
        level(weights, fade, is_far, tiles.columns, interpret=tiles.interpret),
        jnp.where(is_far, highest.max(axis=0), base),
        (others * fade).sum(axis=0),
        (weighted * fade).sum(axis=0),
        *_find_targets(tiles, targets, highest, target, earlier),
    )


class Slope(NamedTuple):
    """d loss / d logits is `on_target` at the target less `share` times the softmax.

    `targets` count from the first entry of the table that is given, `log_total` is the
    log of the softmax's denominator. Slopes before entry `first` are zero.
    """

    targets: Int32[Array, "M"]
    log_total: Float[Array, "M"]
    on_target: Float[Array, "M"]
    share: Float[Array, "M"]
    first: Int32[Array, ""]


def make_slopes(head: Head, slope: Slope, tiles: Tiles) -> Float[Array, "M V"]:
    """The slopes by the product `hidden @ table`, in the type of `hidden`."""
    rows, dtype = len(head.hidden), head.hidden.dtype
    kernel = _call(
        functools.partial(_slopes_kernel, tiles, _Grid.of(head, tiles), head.scale),
        head,
        tiles,
        out_type=jax.ShapeDtypeStruct((rows, head.entries), dtype),
        scratch=[
            hopper.vector_memory((GROUPS, ROWS), jnp.int32),
            hopper.vector_memory((3, GROUPS, ROWS), jnp.float32),
            hopper.matrix_memory((GROUPS, ROWS, PART), dtype),
            plgpu.Barrier(num_arrivals=4, num_barriers=GROUPS),
        ],
    )
    return kernel(
        head.hidden,
        head.table,
        slope.targets,
        slope.log_total * LOG2_E,
        slope.on_target * head.scale,
        slope.share * head.scale,
        slope.first.reshape(1),
    )


def _call(
    body: Callable[..., None], head: Head, tiles: Tiles, *, out_type: Any, scratch: list
) -> Callable[..., Any]:
    """The compiled kernel; behind its own scratch come the rings and their barriers."""
    dtype, (rows, width) = head.hidden.dtype, head.hidden.shape
    block = (tiles.columns, DEPTH) if head.vocab_axis == 0 else (DEPTH, tiles.columns)
    scratch = [
        *scratch,
        hopper.matrix_memory((tiles.stages, GROUPS, ROWS, DEPTH), dtype),
        hopper.matrix_memory((tiles.stages, *block), dtype),
        plgpu.Barrier(num_arrivals=GROUPS + 1, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=tiles.stages),
    ]
    extra: dict[str, Any] = {}
    if hopper.TELLS_COST:
        outputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(out_type))
        extra["cost_estimate"] = pl.CostEstimate(
            flops=2 * rows * width * head.entries,
            bytes_accessed=(rows + head.entries) * width * dtype.itemsize + outputs,
            transcendentals=rows * head.entries,
        )
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(tiles.count_programs(),),
        grid_names=("programs",),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=hopper.make_interpreter(tiles.interpret),
        **extra,
    )


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The tiles of logits, and how many blocks of the width each sums over."""

    row_tiles: int
    column_tiles: int
    steps: int
    entries: int
    by_entry: bool

    @classmethod
    def of(cls, head: Head, tiles: Tiles) -> "_Grid":
        rows, width = head.hidden.shape
        return cls(
            rows // BLOCK,
            pl.cdiv(head.entries, tiles.columns),
            width // DEPTH,
            head.entries,
            head.vocab_axis == 0,
        )

    @property
    def count(self) -> int:
        return self.row_tiles * self.column_tiles

    def locate(self, place: Array) -> tuple[Array, Array]:
        """The tile of rows and the tile of columns: some rows with each of the columns.

        Programs side by side so share rows and columns.
        """
        together = min(_TOGETHER, self.row_tiles)
        band = hopper.divide(place, together * self.column_tiles)
        first = band * together
        height = jnp.minimum(together, self.row_tiles - first)
        place = place - first * self.column_tiles
        return first + jax.lax.rem(place, height), jax.lax.div(place, height)


def _walk(
    tiles: Tiles,
    grid: _Grid,
    refs: tuple[Ref, ...],
    begin: Callable[[Array], None],
    end: Callable[[Array, Array, Array], None],
) -> None:
    """Every tile of a program: its copies, its product, and what `end` makes of it.

    `begin(row)` asks for what else is read of this group's rows, `end(logits, row,
    column)` has the raw logits [ROWS, columns] of its rows from `row` on, and of
    `column`, the tile's number. `refs`: hidden states, table, rings, their barriers.
    """
    hidden_ref, table_ref, left, right, ready, free = refs
    ring = Ring(left, right, ready, free)
    group = jax.lax.axis_index("group")

    @pl.when(group == FEEDER)
    def _feed() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def feed(place: Array, turns: Array) -> Array:
            row, column = grid.locate(place)

            def copy(step: Array, _: None) -> None:
                inner = pl.ds(step * DEPTH, DEPTH)
                outer = pl.ds(column * tiles.columns, tiles.columns)
                block = (outer, inner) if grid.by_entry else (inner, outer)
                ring.fill(
                    turns + step,
                    lambda i: hidden_ref.at[pl.ds(row * BLOCK + i * ROWS, ROWS), inner],
                    table_ref.at[*block],
                )

            jax.lax.fori_loop(0, grid.steps, copy, None)
            return turns + grid.steps

        over_tiles(grid.count, feed)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def take(place: Array, first: Array) -> Array:
            tile, column = grid.locate(place)
            row = tile * BLOCK + group * ROWS
            begin(row)

            def sum_up(total: Ref) -> Array:
                def step(index: Array, _: None) -> None:
                    turn = first + index
                    slot = hopper.remainder(turn, tiles.stages)
                    plgpu.barrier_wait(ready.at[slot])
                    block = right.at[slot]
                    block = block.transpose((1, 0)) if grid.by_entry else block
                    plgpu.wgmma(total, left.at[slot, group], block)
                    ring.release_before(turn, first)

                jax.lax.fori_loop(0, grid.steps, step, None)
                ring.release_last(first + grid.steps, first)
                return total[...]

            shape = (ROWS, tiles.columns)
            end(pl.run_scoped(sum_up, plgpu.ACC(shape, jnp.float32)), row, column)
            return first + grid.steps

        over_tiles(grid.count, take)
        plgpu.wait_smem_to_gmem(0)


def _sums_kernel(
    tiles: Tiles, grid: _Grid, scale: float, hidden_ref: Ref, table_ref: Ref, *refs: Ref
) -> None:
    targets_ref, asked_ref, *outputs = refs[:7]
    targets_memory, sums_memory, arrived, *buffers = refs[7:]
    group = jax.lax.axis_index("group")
    factor = scale * LOG2_E

    def begin(row: Array) -> None:
        source = targets_ref.at[pl.ds(row, ROWS)]
        plgpu.copy_gmem_to_smem(source, targets_memory.at[group], arrived.at[group])

    def end(logits: Array, row: Array, column: Array) -> None:
        start = column * tiles.columns
        highest = _find_highest(tiles, grid, logits, start)
        total = hopper.constant(tiles, (ROWS,), 0.0, hopper.PER_ROW)
        weighted = hopper.constant(tiles, (ROWS,), 0.0, hopper.PER_ROW)
        for first in range(0, tiles.columns, PART):
            part = logits[:, first : first + PART]
            shift = highest * factor - _outside(grid, start + first)
            weights = jnp.exp2(part * factor - hopper.over_rows(shift, part.shape))
            total += weights.sum(axis=1)
            weighted += (weights * part).sum(axis=1)
        plgpu.barrier_wait(arrived.at[group])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        is_asked = asked_ref[hopper.divide(row, ROWS) * grid.column_tiles + column]

        @pl.when(is_asked == 1)
        def _look_for_targets() -> None:
            place = hopper.place(tiles, targets_memory[group], hopper.PER_ROW) - start
            target, earlier = _look_up(tiles, logits, place, highest)
            sums_memory[3, group] = target * scale
            sums_memory[4, group] = earlier

        sums_memory[0, group] = highest * scale
        sums_memory[1, group] = total
        sums_memory[2, group] = weighted * scale
        _send_sums(sums_memory, outputs, row, column)

    _walk(tiles, grid, (hidden_ref, table_ref, *buffers), begin, end)


def _find_highest(tiles: Tiles, grid: _Grid, logits: Array, start: Array) -> Array:
    """Each row's highest raw logit of a tile whose first column is `start`."""
    highest = hopper.constant(tiles, (ROWS,), _NEVER, hopper.PER_ROW)
    for first in range(0, tiles.columns, PART):
        part = logits[:, first : first + PART].max(axis=1)
        highest = jnp.maximum(highest, part + _outside(grid, start + first))
    return highest


def _look_up(
    tiles: Tiles, logits: Array, place: Array, highest: Array
) -> tuple[Array, Array]:
    """The raw logit at each row's place, and 1 where an earlier one is the highest."""
    target = hopper.constant(tiles, (ROWS,), 0.0, hopper.PER_ROW)
    earlier = hopper.constant(tiles, (ROWS,), 0.0, hopper.PER_ROW)
    for first in range(0, tiles.columns, PART):
        part = logits[:, first : first + PART]
        own = hopper.over_rows(place - first, part.shape)
        entry = hopper.iota(tiles, part.shape, 1)
        target += jnp.where(entry == own, part, 0.0).sum(axis=1)
        is_top = part == hopper.over_rows(highest, part.shape)
        before = jnp.where(is_top & (entry < own), 1.0, 0.0)
        earlier = jnp.maximum(earlier, before.max(axis=1))
    return target, earlier


def _send_sums(memory: Ref, outputs: Sequence[Ref], row: Array, column: Array) -> None:
    """A group's sums of a tile, on their way to where those of all tiles are."""
    group = jax.lax.axis_index("group")
    plgpu.commit_smem()
    for number, output in enumerate(outputs):
        target = output.at[column, pl.ds(row, ROWS)]
        plgpu.copy_smem_to_gmem(memory.at[number, group], target)


def _send_part(
    grid: _Grid, memory: Ref, out_ref: Ref, part: Array, place: tuple[Array, Array]
) -> None:
    """Columns of a group's rows on their way to the result, if they are entries."""
    row, column = place
    group = jax.lax.axis_index("group")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    memory[group] = part.astype(memory.dtype)
    plgpu.commit_smem()
    target = out_ref.at[pl.ds(row, ROWS), pl.ds(column, PART)]
    send = functools.partial(plgpu.copy_smem_to_gmem, memory.at[group], target)
    pl.when(column < grid.entries)(send)


def _weights_kernel(
    tiles: Tiles, grid: _Grid, scale: float, hidden_ref: Ref, table_ref: Ref, *refs: Ref
) -> None:
    targets_ref, base_ref, asked_ref, *outputs, out_ref = refs[:10]
    targets_memory, base_memory, sums_memory, out_memory, arrived, *buffers = refs[10:]
    group = jax.lax.axis_index("group")
    factor = scale * LOG2_E

    def begin(row: Array) -> None:
        own, ready = pl.ds(row, ROWS), arrived.at[group]
        plgpu.copy_gmem_to_smem(targets_ref.at[own], targets_memory.at[group], ready)
        plgpu.copy_gmem_to_smem(base_ref.at[own], base_memory.at[group], ready)

    def weigh(part: Array, base: Array, column: Array) -> Array:
        shift = hopper.over_rows(base - _outside(grid, column), part.shape)
        return jnp.exp2(part * factor - shift)

    def end(logits: Array, row: Array, column: Array) -> None:
        start = column * tiles.columns
        highest = _find_highest(tiles, grid, logits, start)
        plgpu.barrier_wait(arrived.at[group])
        base = hopper.place(tiles, base_memory[group], hopper.PER_ROW)
        is_far = highest * factor > base + FAR * LOG2_E
        base = jnp.where(is_far, highest * factor, base)
        total = hopper.constant(tiles, (ROWS,), 0.0, hopper.PER_ROW)
        weighted = hopper.constant(tiles, (ROWS,), 0.0, hopper.PER_ROW)
        for first in range(0, tiles.columns, PART):
            part = logits[:, first : first + PART]
            weights = weigh(part, base, start + first)
            total += weights.sum(axis=1)
            weighted += (weights * part).sum(axis=1)
            _send_part(grid, out_memory, out_ref, weights, (row, start + first))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sums_memory[1, group] = total
        is_asked = asked_ref[hopper.divide(row, ROWS) * grid.column_tiles + column]

        @pl.when(is_asked == 1)
        def _look_for_targets() -> None:
            place = hopper.place(tiles, targets_memory[group], hopper.PER_ROW) - start
            target, earlier = _look_up(tiles, logits, place, highest)
            sums_memory[3, group] = target * scale
            sums_memory[4, group] = earlier
            # Before the sum over tiles, of which a target's weight can be nearly all.
            others = hopper.constant(tiles, (ROWS,), 0.0, hopper.PER_ROW)
            for first in range(0, tiles.columns, PART):
                part = logits[:, first : first + PART]
                own = hopper.over_rows(place - first, part.shape)
                weights = weigh(part, base, start + first)
                other = hopper.iota(tiles, part.shape, 1) != own
                others += jnp.where(other, weights, 0.0).sum(axis=1)
            sums_memory[1, group] = others

        sums_memory[0, group] = highest * scale
        sums_memory[2, group] = weighted * scale
        sums_memory[5, group] = base
        _send_sums(sums_memory, outputs, row, column)

    _walk(tiles, grid, (hidden_ref, table_ref, *buffers), begin, end)


def _slopes_kernel(
    tiles: Tiles, grid: _Grid, scale: float, hidden_ref: Ref, table_ref: Ref, *refs: Ref
) -> None:
    targets_ref, *vectors, first_ref, out_ref = refs[:6]
    targets_memory, vectors_memory, out_memory, arrived, *buffers = refs[6:]
    group = jax.lax.axis_index("group")

    def begin(row: Array) -> None:
        own, ready = pl.ds(row, ROWS), arrived.at[group]
        plgpu.copy_gmem_to_smem(targets_ref.at[own], targets_memory.at[group], ready)
        for number, vector in enumerate(vectors):
            memory = vectors_memory.at[number, group]
            plgpu.copy_gmem_to_smem(vector.at[own], memory, ready)

    def end(logits: Array, row: Array, column: Array) -> None:
        start = column * tiles.columns
        plgpu.barrier_wait(arrived.at[group])
        place = hopper.place(tiles, targets_memory[group], hopper.PER_ROW) - start
        log_total, on_target, share = (
            hopper.place(tiles, vectors_memory[number, group], hopper.PER_ROW)
            for number in range(3)
        )
        for first in range(0, tiles.columns, PART):
            part = logits[:, first : first + PART]
            # What this slice shares with its neighbour is the neighbour's.
            is_own = jnp.where(start + first >= first_ref[0], 1.0, 0.0)
            shift = hopper.over_rows(log_total, part.shape)
            weights = jnp.exp2(part * (scale * LOG2_E) - shift)
            own = hopper.over_rows(place - first, part.shape)
            at_target = hopper.over_rows(on_target * is_own, part.shape)
            hit = hopper.iota(tiles, part.shape, 1) == own
            slope = jnp.where(hit, at_target, 0.0)
            slope -= weights * hopper.over_rows(share * is_own, part.shape)
            _send_part(grid, out_memory, out_ref, slope, (row, start + first))

    _walk(tiles, grid, (hidden_ref, table_ref, *buffers), begin, end)


def _outside(grid: _Grid, column: Array) -> Array:
    """0 for columns of the vocabulary; behind them what makes a logit vanish."""
    return jnp.where(column < grid.entries, 0.0, _NEVER)

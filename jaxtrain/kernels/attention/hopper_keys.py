"""The walk that the forward and the dq kernel share: tiles of queries, their keys.

A program stays on its multiprocessor and takes one tile of 128 queries of a head after
the other, so that the copies for the next run under the sums of the last. The warpgroup
that feeds copies the tile's rows and the listed key blocks; the others compute.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.blocked import Options
from jaxtrain.kernels.attention.hopper import BLOCK, GROUPS, ROWS, Ref
from jaxtrain.kernels.attention.schedule import Schedule


class Inputs(NamedTuple):
    """In device memory, read by both kernels."""

    k: Ref
    v: Ref
    query_ids: Ref
    prompt_ids: Ref
    key_ids: Ref
    counts: Ref
    wholes: Ref
    blocks: Ref
    order: Ref


class Buffers(NamedTuple):
    """In shared memory: a ring of key blocks, the ids of the tile's rows, barriers."""

    k: Ref
    v: Ref
    key_ids: Ref
    query_ids: Ref
    prompt_ids: Ref
    rows_ready: Ref
    rows_free: Ref
    k_ready: Ref
    v_ready: Ref
    k_free: Ref
    v_free: Ref


class Tile(NamedTuple):
    """One block of queries of one head, and its walk."""

    batch: Array
    head: Array
    first_query: Array
    row: Array  # of the schedule's lists, flat
    turns: Array
    whole_turns: Array
    done: Array  # turns of the tiles before


def lists(schedule: Schedule) -> tuple[Array, ...]:
    """Of the schedule, flat: kernels read single entries from device memory."""
    walk = (schedule.key_counts, schedule.key_wholes, schedule.key_blocks)
    return tuple(x.reshape(-1) for x in (*walk, schedule.query_order))


def buffers(
    widths: tuple[int, int],
    dtype: DTypeLike,
    step: int,
    stages: int,
    *,
    row_copies: int,
) -> list[Any]:
    """Scratch memory for `Buffers`; `row_copies` of each group fill a tile's rows.

    `widths`: of a key and of a value.
    """
    return [
        *(hopper.matrix_memory((stages, step, width), dtype) for width in widths),
        hopper.vector_memory((stages, step), jnp.int32),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        plgpu.Barrier(num_arrivals=row_copies, num_barriers=GROUPS),
        plgpu.Barrier(num_arrivals=1, num_barriers=GROUPS),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ]


def split(
    refs: tuple[Ref, ...], own: int
) -> tuple[Inputs, tuple[Ref, ...], Buffers, tuple[Ref, ...]]:
    """A kernel's references behind q: `own` others and its own scratch between ours."""
    first, last = len(Inputs._fields), len(Inputs._fields) + own
    end = last + len(Buffers._fields)
    return Inputs(*refs[:first]), refs[first:last], Buffers(*refs[last:end]), refs[end:]


@dataclasses.dataclass(frozen=True)
class Walk:
    """One program's, by a kernel whose grid is `programs`.

    `shape`: of q, [B T N H]. `step`, `stages`: keys of a turn, buffers of the ring.
    """

    options: Options
    shape: tuple[int, ...]
    step: int
    stages: int
    programs: int
    inputs: Inputs
    buffers: Buffers

    def over_tiles(self, take: Callable[[Tile], None]) -> None:
        """Calls `take` with each of the program's tiles.

        Tiles lie in the order of their length, longest first; rounds of programs take
        them there and back, so that programs end together.
        """
        tiles = self.shape[0] * self.shape[1] // BLOCK * self.shape[2]
        rounds, rest = divmod(tiles, self.programs)
        program = jax.lax.axis_index("programs")

        def seat(index: Array) -> Array:
            back = hopper.remainder(index, 2) == 1
            return jnp.where(back, self.programs - 1 - program, program)

        def visit(index: Array, done: Array) -> Array:
            tile = self._locate(index * self.programs + seat(index), done)
            take(tile)
            return done + tile.turns

        count = rounds + (seat(jnp.int32(rounds)) < rest).astype(jnp.int32)
        jax.lax.fori_loop(0, count, visit, jnp.int32(0))

    def _locate(self, place: Array, done: Array) -> Tile:
        batches, length, heads, _ = self.shape
        rows = length // BLOCK
        head = hopper.remainder(place, heads)
        place = hopper.divide(place, heads)
        batch = hopper.remainder(place, batches)
        block = self.inputs.order[batch * rows + hopper.divide(place, batches)]
        row = batch * rows + block
        steps = BLOCK // self.step
        turns = self.inputs.counts[row] * steps
        whole_turns = self.inputs.wholes[row] * steps
        return Tile(batch, head, block * BLOCK, row, turns, whole_turns, done)

    def rows(self, tile: Tile, group: int | Array) -> Any:
        """The queries of one computing group."""
        return pl.ds(tile.first_query + group * ROWS, ROWS)

    def feed(self, copy_rows: Callable[[Tile, int], None]) -> None:
        """What the copying warpgroup does.

        `copy_rows(tile, group)` copies what else the kernel reads of the tile's rows,
        on the barrier `rows_ready` of the group.
        """
        plgpu.set_max_registers(40, action="decrease")
        inputs, buffers = self.inputs, self.buffers
        heads_per_kv = self.shape[2] // inputs.k.shape[2]

        def copy_all_rows(tile: Tile) -> None:
            for group in range(GROUPS):
                hopper.wait_for_slot(buffers.rows_free, tile.done, group, 1)
                copy_rows(tile, group)
                ids = (tile.batch, self.rows(tile, group))
                for source, target in (
                    (inputs.query_ids, buffers.query_ids),
                    (inputs.prompt_ids, buffers.prompt_ids),
                ):
                    plgpu.copy_gmem_to_smem(
                        source.at[*ids], target.at[group], buffers.rows_ready.at[group]
                    )

        def copy(tile: Tile, turn: Array, _: None) -> None:
            place = tile.done + turn
            slot = hopper.remainder(place, self.stages)
            ids = (tile.batch, pl.ds(self._first_key(tile, turn), self.step))
            keys = (*ids, hopper.divide(tile.head, heads_per_kv))
            hopper.wait_for_slot(buffers.k_free, place, slot, self.stages)
            barrier = buffers.k_ready.at[slot]
            plgpu.copy_gmem_to_smem(inputs.k.at[*keys], buffers.k.at[slot], barrier)
            plgpu.copy_gmem_to_smem(
                inputs.key_ids.at[*ids], buffers.key_ids.at[slot], barrier
            )
            hopper.wait_for_slot(buffers.v_free, place, slot, self.stages)
            plgpu.copy_gmem_to_smem(
                inputs.v.at[*keys], buffers.v.at[slot], buffers.v_ready.at[slot]
            )
            # After the first keys, which do not wait for the tile before to end. Rows
            # without keys are not read: one group may write those of many tiles while
            # the other waits for its turn in a last visit.
            pl.when(turn == 0)(lambda: copy_all_rows(tile))

        def feed_tile(tile: Tile) -> None:
            jax.lax.fori_loop(0, tile.turns, functools.partial(copy, tile), None)

        self.over_tiles(feed_tile)

    def visit(self, tile: Tile, take: Callable[..., Any], carry: Any) -> Any:
        """Folds `take(masked, turn, slot, carry)` over the turns of a tile.

        `take` calls `release_rows` once it has read the rows' buffers.
        """

        def turn_of(masked: bool, turn: Array, carry: Any) -> Any:
            slot = hopper.remainder(tile.done + turn, self.stages)
            return take(masked, turn, slot, carry)

        ready = self.buffers.rows_ready.at[jax.lax.axis_index("group")]
        pl.when(tile.turns > 0)(lambda: plgpu.barrier_wait(ready))
        whole, masked = (functools.partial(turn_of, x) for x in (False, True))
        carry = jax.lax.fori_loop(0, tile.whole_turns, whole, carry)
        return jax.lax.fori_loop(tile.whole_turns, tile.turns, masked, carry)

    def release_rows(self, tile: Tile, turn: Array) -> None:
        """Gives the buffers of the tile's rows to the next tile, in the last turn."""
        group = jax.lax.axis_index("group")
        pl.when(turn == tile.turns - 1)(
            lambda: plgpu.barrier_arrive(self.buffers.rows_free.at[group])
        )

    def read_allowed(self, tile: Tile, turn: Array, slot: Array) -> Array:
        """Which of the turn's keys each row of the group may read, [ROWS step]."""
        options, buffers = self.options, self.buffers
        group = jax.lax.axis_index("group")
        shape = (ROWS, self.step)
        keys = hopper.place(options, buffers.key_ids[slot], hopper.PER_COLUMN)
        own = hopper.place(options, buffers.query_ids[group], hopper.PER_ROW)
        prompt = hopper.place(options, buffers.prompt_ids[group], hopper.PER_ROW)
        keys = hopper.over_columns(keys, shape)
        allowed = hopper.over_rows(own, shape) == keys
        allowed |= hopper.over_rows(prompt, shape) == keys
        distance = hopper.iota(options, shape, 0) - hopper.iota(options, shape, 1)
        distance += tile.first_query + group * ROWS - self._first_key(tile, turn)
        near = hopper.within_reach(options, distance)
        return allowed if near is None else allowed & near

    def _first_key(self, tile: Tile, turn: Array) -> Array:
        steps = BLOCK // self.step
        columns = self.inputs.k.shape[1] // BLOCK
        slot = tile.row * columns + hopper.divide(turn, steps)
        offset = hopper.remainder(turn, steps) * self.step
        return self.inputs.blocks[slot] * BLOCK + offset


def store_rows(rows: Array, memory: Ref, target: Ref) -> None:
    """Sends a group's rows to `target` through `memory`, in as many parts as it takes.

    Returns while the last part is on its way: `memory` is free after the next wait.
    """
    columns = memory.shape[1]
    for first in range(0, rows.shape[1], columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        part = rows[:, first : first + columns]
        memory[...] = part.astype(memory.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, target.at[:, pl.ds(first, columns)])

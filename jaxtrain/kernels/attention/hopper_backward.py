"""Backward pass of flash attention on Hopper through Pallas Mosaic GPU.

Two walks over the same lists, so that no gradient needs an atomic sum: one kernel
takes a block of queries and visits its keys (dq), the other takes a block of keys and
visits its queries (dk, dv), with its scores transposed. Both recompute the scores
(FlashAttention-2, arXiv 2307.08691).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxtrain.kernels.attention import hopper, hopper_keys
from jaxtrain.kernels.attention.blocked import (
    Ids,
    Options,
    Saved,
    bend_slope,
    id_rows,
    scale_scores,
)
from jaxtrain.kernels.attention.hopper import BLOCK, FEEDER, GROUPS, ROWS, Ref
from jaxtrain.kernels.attention.hopper_keys import Tile, Walk
from jaxtrain.kernels.attention.schedule import Schedule

# Blocks of threads that fill the 132 multiprocessors a few times over.
_ENOUGH_PROGRAMS = 512


def backward(
    options: Options,
    saved: Saved,
    ids: Ids,
    schedule: Schedule,
    tiles: hopper.Tiles | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    hopper.check_schedule(schedule)
    tiles = tiles or hopper.choose_tiles(options, saved.q, saved.v)
    q, k, v, lse, delta, d_out = saved
    inputs = (q, k, v, d_out.astype(q.dtype), lse, delta, *id_rows(ids))
    dq = _query_gradient(options, tiles, inputs, schedule)
    if tiles.joint_dkv:
        dk, dv = _key_gradients(options, tiles, ("k", "v"), inputs, schedule)
    else:
        (dk,) = _key_gradients(options, tiles, ("k",), inputs, schedule)
        (dv,) = _key_gradients(options, tiles, ("v",), inputs, schedule)
    return dq, dk, dv


def _query_gradient(
    options: Options, tiles: hopper.Tiles, inputs: tuple[Array, ...], schedule: Schedule
) -> Array:
    q, k, v, d_out, lse, delta, *ids = inputs
    width, value_width = q.shape[3], v.shape[3]
    programs = hopper.count_programs(options, q, tiles.dq_programs)
    step, stages = tiles.dq_step, tiles.dq_stages
    scratch = [
        *hopper_keys.buffers((width, value_width), q.dtype, step, stages, row_copies=6),
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.matrix_memory((GROUPS, ROWS, value_width), q.dtype),
        hopper.vector_memory((GROUPS, ROWS), jnp.float32),
        hopper.vector_memory((GROUPS, ROWS), jnp.float32),
        hopper.matrix_memory((GROUPS, ROWS, min(width, tiles.dq_columns)), q.dtype),
    ]
    kernel = hopper.call(
        options,
        functools.partial(_query_kernel, options, tiles, programs),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=scratch,
        grid={"programs": programs},
        products=(2, 1),
    )
    return kernel(q, k, v, *ids, *hopper_keys.lists(schedule), d_out, lse, delta)


def _query_kernel(
    options: Options, tiles: hopper.Tiles, programs: int, q_ref: Ref, *refs: Ref
) -> None:
    inputs, own, buffers, scratch = hopper_keys.split(refs, own=4)
    d_out_ref, lse_ref, delta_ref, dq_ref = own
    q_memory, d_out_memory, lse_memory, delta_memory, dq_memory = scratch
    width = q_ref.shape[3]
    step, stages = tiles.dq_step, tiles.dq_stages
    walk = Walk(options, q_ref.shape, step, stages, programs, inputs, buffers)
    group = jax.lax.axis_index("group")

    @pl.when(group == FEEDER)
    def _feed() -> None:
        def copy_rows(tile: Tile, group: int) -> None:
            queries = walk.rows(tile, group)
            by_token = (tile.batch, queries, tile.head)
            by_head = (tile.batch, tile.head, queries)
            for source, target in (
                (q_ref.at[*by_token], q_memory),
                (d_out_ref.at[*by_token], d_out_memory),
                (lse_ref.at[*by_head], lse_memory),
                (delta_ref.at[*by_head], delta_memory),
            ):
                ready = buffers.rows_ready.at[group]
                plgpu.copy_gmem_to_smem(source, target.at[group], ready)

        walk.feed(copy_rows)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        shape = (ROWS, step)

        def per_row(memory: Ref) -> Array:
            numbers = hopper.place(options, memory[group], hopper.PER_ROW)
            return hopper.over_rows(numbers, shape)

        def visit(
            tile: Tile, masked: bool, turn: Array, slot: Array, total: Array
        ) -> Array:
            plgpu.barrier_wait(buffers.k_ready.at[slot])
            raw, _ = hopper.product(
                q_memory.at[group], buffers.k.at[slot].transpose((1, 0)), shape
            )
            logits = scale_scores(options, raw)

            def weigh() -> Array:
                weights = jnp.exp2(logits - per_row(lse_memory))
                if not masked:
                    return weights
                return jnp.where(walk.read_allowed(tile, turn, slot), weights, 0.0)

            # Under the product, but where a mask would take the registers it needs.
            ready = weigh() if masked and step == BLOCK else None
            plgpu.barrier_wait(buffers.v_ready.at[slot])
            d_weights, weights = hopper.product(
                d_out_memory.at[group],
                buffers.v.at[slot].transpose((1, 0)),
                shape,
                weigh if ready is None else lambda: ready,
            )
            plgpu.barrier_arrive(buffers.v_free.at[slot])
            slope = weights * (d_weights - per_row(delta_memory))
            walk.release_rows(tile, turn)
            slope = bend_slope(options, logits, slope)
            total = hopper.add_product(
                options, total, slope.astype(q_ref.dtype), buffers.k.at[slot]
            )
            plgpu.barrier_arrive(buffers.k_free.at[slot])
            return total

        def take(tile: Tile) -> None:
            dq = hopper.constant(options, (ROWS, width), 0.0, hopper.TILE)
            dq = walk.visit(tile, functools.partial(visit, tile), dq)
            target = dq_ref.at[tile.batch, walk.rows(tile, group), tile.head]
            hopper_keys.store_rows(dq * options.scale, dq_memory.at[group], target)

        walk.over_tiles(take)
        plgpu.wait_smem_to_gmem(0)


def _key_gradients(
    options: Options,
    tiles: hopper.Tiles,
    wanted: tuple[str, ...],
    inputs: tuple[Array, ...],
    schedule: Schedule,
) -> list[Array]:
    q, k, v = inputs[:3]
    heads = q.shape[2]
    batch, keys, kv_heads, width = k.shape
    value_width = v.shape[3]
    parts = _split_heads(batch * kv_heads * (keys // BLOCK), heads // kv_heads)
    step, stages = tiles.dkv_step, tiles.dkv_stages
    scratch = [
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.matrix_memory((GROUPS, ROWS, value_width), q.dtype),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        hopper.matrix_memory((stages, step, width), q.dtype),
        hopper.matrix_memory((stages, step, value_width), q.dtype),
        hopper.vector_memory((stages, step), jnp.float32),
        hopper.vector_memory((stages, step), jnp.float32),
        hopper.vector_memory((stages, step), jnp.int32),
        hopper.vector_memory((stages, step), jnp.int32),
        plgpu.Barrier(num_arrivals=3, num_barriers=GROUPS),
        plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ]
    # Parts of a sum stay in float32: rounding each of them would add up.
    dtype = q.dtype if parts == 1 else jnp.float32
    widths = [{"k": width, "v": value_width}[name] for name in wanted]
    rows = (batch, keys, kv_heads * parts)
    kernel = hopper.call(
        options,
        functools.partial(_key_kernel, options, tiles, wanted, parts),
        out_type=tuple(jax.ShapeDtypeStruct((*rows, x), dtype) for x in widths),
        scratch=scratch,
        grid={"heads": kv_heads * parts, "blocks": keys // BLOCK, "batch": batch},
        products=(1 + ("k" in wanted), len(wanted)),
    )
    walk = (schedule.query_counts, schedule.query_wholes, schedule.query_blocks)
    gradients = kernel(*inputs, *(x.reshape(-1) for x in walk))
    if parts == 1:
        return list(gradients)
    apart = (batch, keys, kv_heads, parts, -1)
    return [x.reshape(apart).sum(axis=3).astype(q.dtype) for x in gradients]


def _split_heads(programs: int, group: int) -> int:
    """Parts of a group of query heads that are summed apart, to fill the machine."""
    parts = 1
    while programs * parts < _ENOUGH_PROGRAMS and group % (2 * parts) == 0:
        parts *= 2
    return parts


def _key_kernel(
    options: Options,
    tiles: hopper.Tiles,
    wanted: tuple[str, ...],
    parts: int,
    *refs: Ref,
) -> None:
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref = refs[:6]
    query_ids_ref, prompt_ids_ref, key_ids_ref = refs[6:9]
    counts_ref, wholes_ref, blocks_ref, *rest = refs[9:]
    out_refs, rest = rest[: len(wanted)], rest[len(wanted) :]
    (
        k_memory,
        v_memory,
        key_ids_memory,
        q_memory,
        d_out_memory,
        lse_memory,
        delta_memory,
        query_ids_memory,
        prompt_ids_memory,
        rows_ready,
        q_ready,
        d_out_ready,
        q_free,
        d_out_free,
    ) = rest
    heads, width = q_ref.shape[2:]
    heads_per_part = heads // (k_ref.shape[2] * parts)
    step, stages = tiles.dkv_step, tiles.dkv_stages
    steps_per_block = BLOCK // step
    rows, columns = q_ref.shape[1] // BLOCK, k_ref.shape[1] // BLOCK
    batch, part = jax.lax.axis_index("batch"), jax.lax.axis_index("heads")
    kv_head = hopper.divide(part, parts)
    # Early keys are read by most queries: the longest walks start first.
    key_block = jax.lax.axis_index("blocks")
    column = batch * columns + key_block
    turns = counts_ref[column] * steps_per_block  # of one head
    whole_turns = wholes_ref[column] * steps_per_block
    group = jax.lax.axis_index("group")

    def first_query(turn: Array) -> Array:
        slot = column * rows + hopper.divide(turn, steps_per_block)
        offset = hopper.remainder(turn, steps_per_block) * step
        return blocks_ref[slot] * BLOCK + offset

    @pl.when(group == FEEDER)
    def _feed() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def feed_head(index: Array, _: None) -> None:
            head = part * heads_per_part + index

            def copy(turn: Array, _: None) -> None:
                place = index * turns + turn
                slot = hopper.remainder(place, stages)
                queries = pl.ds(first_query(turn), step)
                hopper.wait_for_slot(q_free, place, slot, stages)
                for source, target in (
                    (q_ref.at[batch, queries, head], q_memory),
                    (lse_ref.at[batch, head, queries], lse_memory),
                    (query_ids_ref.at[batch, queries], query_ids_memory),
                    (prompt_ids_ref.at[batch, queries], prompt_ids_memory),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], q_ready.at[slot])
                hopper.wait_for_slot(d_out_free, place, slot, stages)
                for source, target in (
                    (d_out_ref.at[batch, queries, head], d_out_memory),
                    (delta_ref.at[batch, head, queries], delta_memory),
                ):
                    plgpu.copy_gmem_to_smem(
                        source, target.at[slot], d_out_ready.at[slot]
                    )

            jax.lax.fori_loop(0, turns, copy, None)

        jax.lax.fori_loop(0, heads_per_part, feed_head, None)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        first_key = key_block * BLOCK + group * ROWS
        keys = pl.ds(first_key, ROWS)
        for source, target in (
            (k_ref.at[batch, keys, kv_head], k_memory),
            (v_ref.at[batch, keys, kv_head], v_memory),
            (key_ids_ref.at[batch, keys], key_ids_memory),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[group], rows_ready.at[group])
        plgpu.barrier_wait(rows_ready.at[group])
        shape = (ROWS, step)

        def per_column(memory: Ref, slot: Array) -> Array:
            x = hopper.place(options, memory[slot], hopper.PER_COLUMN)
            return hopper.over_columns(x, shape)

        def read_allowed(turn: Array, slot: Array) -> Array:
            key_ids = hopper.place(options, key_ids_memory[group], hopper.PER_ROW)
            key_ids = hopper.over_rows(key_ids, shape)
            allowed = per_column(query_ids_memory, slot) == key_ids
            allowed |= per_column(prompt_ids_memory, slot) == key_ids
            distance = hopper.iota(options, shape, 1) - hopper.iota(options, shape, 0)
            distance += first_query(turn) - first_key
            near = hopper.within_reach(options, distance)
            return allowed if near is None else allowed & near

        def visit(masked: bool, index: Array, turn: Array, totals: tuple) -> tuple:
            place = index * turns + turn
            slot = hopper.remainder(place, stages)
            plgpu.barrier_wait(q_ready.at[slot])
            raw, _ = hopper.product(
                k_memory.at[group], q_memory.at[slot].transpose((1, 0)), shape
            )
            logits = scale_scores(options, raw)

            def weigh() -> Array:
                weights = jnp.exp2(logits - per_column(lse_memory, slot))
                if not masked:
                    return weights
                return jnp.where(read_allowed(turn, slot), weights, 0.0)

            plgpu.barrier_wait(d_out_ready.at[slot])
            sums = dict(zip(wanted, totals, strict=True))
            if "k" in wanted:
                d_weights, weights = hopper.product(
                    v_memory.at[group],
                    d_out_memory.at[slot].transpose((1, 0)),
                    shape,
                    weigh,
                )
            else:
                weights = weigh()
            if "v" in wanted:
                sums["v"] = hopper.add_product(
                    options,
                    sums["v"],
                    weights.astype(v_ref.dtype),
                    d_out_memory.at[slot],
                )
            if "k" in wanted:
                delta = per_column(delta_memory, slot)
                slope = bend_slope(options, logits, weights * (d_weights - delta))
            plgpu.barrier_arrive(d_out_free.at[slot])
            if "k" in wanted:
                sums["k"] = hopper.add_product(
                    options, sums["k"], slope.astype(k_ref.dtype), q_memory.at[slot]
                )
            plgpu.barrier_arrive(q_free.at[slot])
            return tuple(sums[name] for name in wanted)

        def visit_head(index: Array, totals: tuple) -> tuple:
            whole = functools.partial(visit, False, index)
            masked = functools.partial(visit, True, index)
            totals = jax.lax.fori_loop(0, whole_turns, whole, totals)
            return jax.lax.fori_loop(whole_turns, turns, masked, totals)

        widths = {"k": width, "v": v_ref.shape[3]}
        zero = [
            hopper.constant(options, (ROWS, widths[name]), 0.0, hopper.TILE)
            for name in wanted
        ]
        totals = jax.lax.fori_loop(0, heads_per_part, visit_head, tuple(zero))
        totals = [
            total * options.scale if name == "k" else total
            for name, total in zip(wanted, totals, strict=True)
        ]
        if parts > 1:
            for total, ref in zip(totals, out_refs, strict=True):
                ref[batch, keys, part] = total
            return
        # The keys' own buffers take the results on their way out.
        memory_of = {"k": k_memory, "v": v_memory}
        buffers = [memory_of[name] for name in wanted]
        for memory, total in zip(buffers, totals, strict=True):
            memory[group] = total.astype(q_ref.dtype)
        plgpu.commit_smem()
        for memory, ref in zip(buffers, out_refs, strict=True):
            plgpu.copy_smem_to_gmem(memory.at[group], ref.at[batch, keys, part])
        plgpu.wait_smem_to_gmem(0)

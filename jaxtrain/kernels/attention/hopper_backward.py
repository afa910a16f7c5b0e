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
from jaxtyping import Array, Float

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.blocked import (
    Ids,
    Options,
    bend_slope,
    id_rows,
    scale_scores,
)
from jaxtrain.kernels.attention.hopper import BLOCK, FEEDER, GROUPS, ROWS, Ref
from jaxtrain.kernels.attention.schedule import Schedule

# Blocks of threads that fill the 132 multiprocessors a few times over.
_ENOUGH_PROGRAMS = 512


def backward(
    options: Options,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    ids: Ids,
    schedule: Schedule,
    tiles: hopper.Tiles | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    hopper.check_schedule(schedule)
    tiles = tiles or hopper.choose_tiles(q.shape[3])
    inputs = (q, k, v, d_out.astype(q.dtype), lse, delta, *id_rows(ids))
    dq = _query_gradient(options, tiles, inputs, schedule)
    if tiles.joint_dkv:
        dk, dv = _key_gradients(options, tiles, ("k", "v"), inputs, schedule)
    else:
        (dk,) = _key_gradients(options, tiles, ("k",), inputs, schedule)
        (dv,) = _key_gradients(options, tiles, ("v",), inputs, schedule)
    return dq, dk, dv


def _query_gradient(
    options: Options,
    tiles: hopper.Tiles,
    inputs: tuple[Array, ...],
    schedule: Schedule,
) -> Array:
    q, k = inputs[:2]
    batch, length, heads, width = q.shape
    step, stages = tiles.dq_step, tiles.dq_stages
    scratch = [
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.vector_memory((GROUPS, ROWS), jnp.float32),
        hopper.vector_memory((GROUPS, ROWS), jnp.float32),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        hopper.matrix_memory((stages, step, width), q.dtype),
        hopper.matrix_memory((stages, step, width), q.dtype),
        hopper.vector_memory((stages, step), jnp.int32),
        plgpu.Barrier(num_arrivals=6, num_barriers=GROUPS),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ]
    kernel = hopper.call(
        options,
        functools.partial(_query_kernel, options, tiles, heads // k.shape[2]),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=scratch,
        grid=(heads, length // BLOCK, batch),
        products=3,
    )
    walk = hopper.lists(schedule.key_counts, schedule.key_wholes, schedule.key_blocks)
    return kernel(*inputs, *walk)


def _query_kernel(
    options: Options,
    tiles: hopper.Tiles,
    heads_per_kv: int,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    query_ids_ref: Ref,
    prompt_ids_ref: Ref,
    key_ids_ref: Ref,
    counts_ref: Ref,
    wholes_ref: Ref,
    blocks_ref: Ref,
    dq_ref: Ref,
    q_memory: Ref,
    d_out_memory: Ref,
    lse_memory: Ref,
    delta_memory: Ref,
    query_ids_memory: Ref,
    prompt_ids_memory: Ref,
    k_memory: Ref,
    v_memory: Ref,
    key_ids_memory: Ref,
    rows_ready: Ref,
    k_ready: Ref,
    v_ready: Ref,
    k_free: Ref,
    v_free: Ref,
) -> None:
    width = q_ref.shape[3]
    step, stages = tiles.dq_step, tiles.dq_stages
    steps_per_block = BLOCK // step
    rows, columns = q_ref.shape[1] // BLOCK, k_ref.shape[1] // BLOCK
    batch, head = jax.lax.axis_index("batch"), jax.lax.axis_index("heads")
    # Late queries read most keys: the longest walks start first.
    query_block = rows - 1 - jax.lax.axis_index("blocks")
    row = batch * rows + query_block
    turns = counts_ref[row] * steps_per_block
    whole_turns = wholes_ref[row] * steps_per_block
    group = jax.lax.axis_index("group")

    def first_key(turn: Array) -> Array:
        slot = row * columns + hopper.divide(turn, steps_per_block)
        offset = hopper.remainder(turn, steps_per_block) * step
        return blocks_ref[slot] * BLOCK + offset

    @pl.when(group == FEEDER)
    def _feed() -> None:
        plgpu.set_max_registers(40, action="decrease")
        kv_head = hopper.divide(head, heads_per_kv)

        def copy(turn: Array, _: None) -> None:
            slot = hopper.remainder(turn, stages)
            keys = pl.ds(first_key(turn), step)
            hopper.wait_for_slot(k_free, turn, slot, stages)
            barrier = k_ready.at[slot]
            plgpu.copy_gmem_to_smem(
                k_ref.at[batch, keys, kv_head], k_memory.at[slot], barrier
            )
            plgpu.copy_gmem_to_smem(
                key_ids_ref.at[batch, keys], key_ids_memory.at[slot], barrier
            )
            hopper.wait_for_slot(v_free, turn, slot, stages)
            plgpu.copy_gmem_to_smem(
                v_ref.at[batch, keys, kv_head], v_memory.at[slot], v_ready.at[slot]
            )

        jax.lax.fori_loop(0, turns, copy, None)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        first_query = query_block * BLOCK + group * ROWS
        queries = pl.ds(first_query, ROWS)
        for source, target in (
            (q_ref.at[batch, queries, head], q_memory),
            (d_out_ref.at[batch, queries, head], d_out_memory),
            (lse_ref.at[batch, head, queries], lse_memory),
            (delta_ref.at[batch, head, queries], delta_memory),
            (query_ids_ref.at[batch, queries], query_ids_memory),
            (prompt_ids_ref.at[batch, queries], prompt_ids_memory),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[group], rows_ready.at[group])
        plgpu.barrier_wait(rows_ready.at[group])
        shape = (ROWS, step)

        def per_row(memory: Ref) -> Array:
            return hopper.place(options, memory[group], hopper.PER_ROW)

        def read_allowed(turn: Array, slot: Array) -> Array:
            keys = hopper.place(options, key_ids_memory[slot], hopper.PER_COLUMN)
            keys = hopper.over_columns(keys, shape)
            allowed = hopper.over_rows(per_row(query_ids_memory), shape) == keys
            allowed |= hopper.over_rows(per_row(prompt_ids_memory), shape) == keys
            distance = hopper.iota(options, shape, 0) - hopper.iota(options, shape, 1)
            distance += first_query - first_key(turn)
            near = hopper.within_reach(options, distance)
            return allowed if near is None else allowed & near

        def visit(masked: bool, turn: Array, total: Array) -> Array:
            slot = hopper.remainder(turn, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            raw = hopper.product(
                q_memory.at[group], k_memory.at[slot].transpose((1, 0)), shape
            )
            logits = scale_scores(options, raw)
            lse = hopper.over_rows(per_row(lse_memory), shape)
            weights = jnp.exp2(logits - lse)
            if masked:
                weights = jnp.where(read_allowed(turn, slot), weights, 0.0)
            plgpu.barrier_wait(v_ready.at[slot])
            d_weights = hopper.product(
                d_out_memory.at[group], v_memory.at[slot].transpose((1, 0)), shape
            )
            plgpu.barrier_arrive(v_free.at[slot])
            delta = hopper.over_rows(per_row(delta_memory), shape)
            slope = bend_slope(options, logits, weights * (d_weights - delta))
            total = hopper.add_product(
                options, total, slope.astype(k_ref.dtype), k_memory.at[slot]
            )
            plgpu.barrier_arrive(k_free.at[slot])
            return total

        dq = hopper.constant(options, (ROWS, width), 0.0, hopper.TILE)
        dq = jax.lax.fori_loop(0, whole_turns, functools.partial(visit, False), dq)
        dq = jax.lax.fori_loop(whole_turns, turns, functools.partial(visit, True), dq)
        q_memory[group] = (dq * options.scale).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_memory.at[group], dq_ref.at[batch, queries, head])
        plgpu.wait_smem_to_gmem(0)


def _key_gradients(
    options: Options,
    tiles: hopper.Tiles,
    wanted: tuple[str, ...],
    inputs: tuple[Array, ...],
    schedule: Schedule,
) -> list[Array]:
    q, k = inputs[:2]
    heads = q.shape[2]
    batch, keys, kv_heads, width = k.shape
    parts = _split_heads(batch * kv_heads * (keys // BLOCK), heads // kv_heads)
    step, stages = tiles.dkv_step, tiles.dkv_stages
    scratch = [
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        hopper.matrix_memory((stages, step, width), q.dtype),
        hopper.matrix_memory((stages, step, width), q.dtype),
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
    out = jax.ShapeDtypeStruct((batch, keys, kv_heads * parts, width), dtype)
    kernel = hopper.call(
        options,
        functools.partial(_key_kernel, options, tiles, wanted, parts),
        out_type=(out,) * len(wanted),
        scratch=scratch,
        grid=(kv_heads * parts, keys // BLOCK, batch),
        products=1 + len(wanted) + ("k" in wanted),
    )
    walk = (schedule.query_counts, schedule.query_wholes, schedule.query_blocks)
    gradients = kernel(*inputs, *hopper.lists(*walk))
    if parts == 1:
        return list(gradients)
    apart = (batch, keys, kv_heads, parts, width)
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
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    query_ids_ref: Ref,
    prompt_ids_ref: Ref,
    key_ids_ref: Ref,
    counts_ref: Ref,
    wholes_ref: Ref,
    blocks_ref: Ref,
    *rest: Ref,
) -> None:
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
            raw = hopper.product(
                k_memory.at[group], q_memory.at[slot].transpose((1, 0)), shape
            )
            logits = scale_scores(options, raw)
            weights = jnp.exp2(logits - per_column(lse_memory, slot))
            if masked:
                weights = jnp.where(read_allowed(turn, slot), weights, 0.0)
            plgpu.barrier_wait(d_out_ready.at[slot])
            sums = dict(zip(wanted, totals, strict=True))
            if "v" in wanted:
                sums["v"] = hopper.add_product(
                    options,
                    sums["v"],
                    weights.astype(v_ref.dtype),
                    d_out_memory.at[slot],
                )
            if "k" in wanted:
                d_weights = hopper.product(
                    v_memory.at[group], d_out_memory.at[slot].transpose((1, 0)), shape
                )
                delta = per_column(delta_memory, slot)
                slope = bend_slope(options, logits, weights * (d_weights - delta))
                plgpu.barrier_arrive(d_out_free.at[slot])
                sums["k"] = hopper.add_product(
                    options, sums["k"], slope.astype(k_ref.dtype), q_memory.at[slot]
                )
            else:
                plgpu.barrier_arrive(d_out_free.at[slot])
            plgpu.barrier_arrive(q_free.at[slot])
            return tuple(sums[name] for name in wanted)

        def visit_head(index: Array, totals: tuple) -> tuple:
            whole = functools.partial(visit, False, index)
            masked = functools.partial(visit, True, index)
            totals = jax.lax.fori_loop(0, whole_turns, whole, totals)
            return jax.lax.fori_loop(whole_turns, turns, masked, totals)

        zero = [
            hopper.constant(options, (ROWS, width), 0.0, hopper.TILE) for _ in wanted
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
        buffers = (k_memory, v_memory)[: len(wanted)]
        for memory, total in zip(buffers, totals, strict=True):
            memory[group] = total.astype(q_ref.dtype)
        plgpu.commit_smem()
        for memory, ref in zip(buffers, out_refs, strict=True):
            plgpu.copy_smem_to_gmem(memory.at[group], ref.at[batch, keys, part])
        plgpu.wait_smem_to_gmem(0)

"""Forward pass of flash attention on Hopper through Pallas Mosaic GPU.

FlashAttention (arXiv 2205.14135) with warp specialization (FlashAttention-3, arXiv
2407.08608): one warpgroup copies the listed key blocks into a ring, two compute.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxtrain.kernels.attention import hopper
from jaxtrain.kernels.attention.blocked import (
    LOG2_E,
    NEVER,
    Ids,
    Options,
    id_rows,
)
from jaxtrain.kernels.attention.hopper import BLOCK, FEEDER, GROUPS, ROWS, Ref
from jaxtrain.kernels.attention.schedule import Schedule


def forward(
    options: Options,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    ids: Ids,
    schedule: Schedule,
    tiles: hopper.Tiles | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention and the base-2 log-sum-exp of each query's logits."""
    hopper.check_schedule(schedule)
    batch, length, heads, width = q.shape
    tiles = tiles or hopper.choose_tiles(width)
    step, stages = tiles.forward_step, tiles.forward_stages
    scratch = [
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.matrix_memory((stages, step, width), q.dtype),
        hopper.matrix_memory((stages, step, width), q.dtype),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        hopper.vector_memory((GROUPS, ROWS), jnp.int32),
        hopper.vector_memory((stages, step), jnp.int32),
        hopper.vector_memory((GROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=GROUPS),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        plgpu.Barrier(num_arrivals=GROUPS),
    ]
    kernel = hopper.call(
        options,
        functools.partial(_kernel, options, tiles, heads // k.shape[2]),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch=scratch,
        grid=(heads, length // BLOCK, batch),
        products=2,
    )
    walk = hopper.lists(schedule.key_counts, schedule.key_wholes, schedule.key_blocks)
    return kernel(q, k, v, *id_rows(ids), *walk)


def _kernel(
    options: Options,
    tiles: hopper.Tiles,
    heads_per_kv: int,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    query_ids_ref: Ref,
    prompt_ids_ref: Ref,
    key_ids_ref: Ref,
    counts_ref: Ref,
    wholes_ref: Ref,
    blocks_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    q_memory: Ref,
    k_memory: Ref,
    v_memory: Ref,
    query_ids_memory: Ref,
    prompt_ids_memory: Ref,
    key_ids_memory: Ref,
    lse_memory: Ref,
    q_ready: Ref,
    k_ready: Ref,
    v_ready: Ref,
    k_free: Ref,
    v_free: Ref,
    turns_barrier: Ref,
) -> None:
    width = q_ref.shape[3]
    step, stages = tiles.forward_step, tiles.forward_stages
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
            k_barrier = k_ready.at[slot]
            plgpu.copy_gmem_to_smem(
                k_ref.at[batch, keys, kv_head], k_memory.at[slot], k_barrier
            )
            plgpu.copy_gmem_to_smem(
                key_ids_ref.at[batch, keys], key_ids_memory.at[slot], k_barrier
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
        barrier = q_ready.at[group]
        plgpu.copy_gmem_to_smem(
            q_ref.at[batch, queries, head], q_memory.at[group], barrier
        )
        plgpu.copy_gmem_to_smem(
            query_ids_ref.at[batch, queries], query_ids_memory.at[group], barrier
        )
        plgpu.copy_gmem_to_smem(
            prompt_ids_ref.at[batch, queries], prompt_ids_memory.at[group], barrier
        )
        plgpu.barrier_wait(barrier)

        def read_allowed(turn: Array, slot: Array) -> Array:
            shape = (ROWS, step)
            keys = hopper.place(options, key_ids_memory[slot], hopper.PER_COLUMN)
            own = hopper.place(options, query_ids_memory[group], hopper.PER_ROW)
            prompt = hopper.place(options, prompt_ids_memory[group], hopper.PER_ROW)
            keys = hopper.over_columns(keys, shape)
            allowed = hopper.over_rows(own, shape) == keys
            allowed |= hopper.over_rows(prompt, shape) == keys
            distance = hopper.iota(options, shape, 0) - hopper.iota(options, shape, 1)
            distance += first_query - first_key(turn)
            near = hopper.within_reach(options, distance)
            return allowed if near is None else allowed & near

        def hand_over() -> None:
            """Meets the other group, which is half a visit behind or ahead."""
            if tiles.take_turns:
                plgpu.barrier_arrive(turns_barrier)
                plgpu.barrier_wait(turns_barrier)

        factor = hopper.logit_factor(options)

        def visit(masked: bool, turn: Array, carry: tuple) -> tuple:
            out, highest, total = carry
            slot = hopper.remainder(turn, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            raw = hopper.product(
                q_memory.at[group],
                k_memory.at[slot].transpose((1, 0)),
                (ROWS, step),
                hand_over,
            )
            logits = hopper.unscaled_logits(options, raw)
            if masked:
                logits = jnp.where(read_allowed(turn, slot), logits, NEVER)
            plgpu.barrier_arrive(k_free.at[slot])
            new_highest = jnp.maximum(highest, logits.max(axis=1) * factor)
            fade = jnp.exp2(highest - new_highest)
            shift = hopper.over_rows(new_highest, logits.shape)
            weights = jnp.exp2(logits * factor - shift)
            total = total * fade + weights.sum(axis=1)
            out *= hopper.over_rows(fade, out.shape)
            hand_over()
            plgpu.barrier_wait(v_ready.at[slot])
            out = hopper.add_product(
                options, out, weights.astype(v_ref.dtype), v_memory.at[slot]
            )
            plgpu.barrier_arrive(v_free.at[slot])
            return out, new_highest, total

        # Above NEVER * factor: a masked entry underflows even where all are masked.
        lowest = NEVER / 2 * factor
        carry = (
            hopper.constant(options, (ROWS, width), 0.0, hopper.TILE),
            hopper.constant(options, (ROWS,), lowest, hopper.PER_ROW),
            hopper.constant(options, (ROWS,), 0.0, hopper.PER_ROW),
        )
        pl.when(group == 1)(hand_over)
        carry = jax.lax.fori_loop(
            0, whole_turns, functools.partial(visit, False), carry
        )
        carry = jax.lax.fori_loop(
            whole_turns, turns, functools.partial(visit, True), carry
        )
        pl.when(group == 0)(hand_over)
        out, highest, total = carry
        empty = total == 0.0
        divisor = jnp.where(empty, 1.0, total)
        out *= hopper.over_rows(1.0 / divisor, out.shape)
        lse = jnp.where(empty, -NEVER, highest + jnp.log(divisor) * LOG2_E)
        q_memory[group] = out.astype(q_ref.dtype)
        lse_memory[group] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_memory.at[group], out_ref.at[batch, queries, head])
        plgpu.copy_smem_to_gmem(lse_memory.at[group], lse_ref.at[batch, head, queries])
        plgpu.wait_smem_to_gmem(0)

"""Forward pass of flash attention on Hopper through Pallas Mosaic GPU.

FlashAttention (arXiv 2205.14135) with warp specialization and the two computing groups
taking turns (FlashAttention-3, arXiv 2407.08608).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxtrain.kernels.attention import hopper, hopper_keys
from jaxtrain.kernels.attention.blocked import LOG2_E, NEVER, Ids, Options, id_rows
from jaxtrain.kernels.attention.hopper import FEEDER, GROUPS, ROWS, Ref
from jaxtrain.kernels.attention.hopper_keys import Tile, Walk
from jaxtrain.kernels.attention.schedule import Schedule


def forward(
    options: Options,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    ids: Ids,
    schedule: Schedule,
    tiles: hopper.Tiles | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Attention and the base-2 log-sum-exp of each query's logits."""
    hopper.check_schedule(schedule)
    batch, length, heads, width = q.shape
    value_width = v.shape[3]
    tiles = tiles or hopper.choose_tiles(options, q, v)
    programs = hopper.count_programs(options, q, tiles.forward_programs)
    step, stages = tiles.forward_step, tiles.forward_stages
    columns = min(value_width, tiles.forward_columns)
    widths = (width, value_width)
    scratch = [
        *hopper_keys.buffers(widths, q.dtype, step, stages, row_copies=3),
        hopper.matrix_memory((GROUPS, ROWS, width), q.dtype),
        hopper.matrix_memory((GROUPS, ROWS, columns), q.dtype),
        hopper.vector_memory((GROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=GROUPS),
    ]
    kernel = hopper.call(
        options,
        functools.partial(_kernel, options, tiles, programs),
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], value_width), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch=scratch,
        grid={"programs": programs},
        products=(1, 1),
    )
    return kernel(q, k, v, *id_rows(ids), *hopper_keys.lists(schedule))


def _kernel(
    options: Options, tiles: hopper.Tiles, programs: int, q_ref: Ref, *refs: Ref
) -> None:
    inputs, (out_ref, lse_ref), buffers, scratch = hopper_keys.split(refs, own=2)
    q_memory, out_memory, lse_memory, turns_barrier = scratch
    value_width = inputs.v.shape[3]
    step, stages = tiles.forward_step, tiles.forward_stages
    walk = Walk(options, q_ref.shape, step, stages, programs, inputs, buffers)
    group = jax.lax.axis_index("group")

    @pl.when(group == FEEDER)
    def _feed() -> None:
        def copy_rows(tile: Tile, group: int) -> None:
            source = q_ref.at[tile.batch, walk.rows(tile, group), tile.head]
            ready = buffers.rows_ready.at[group]
            plgpu.copy_gmem_to_smem(source, q_memory.at[group], ready)

        walk.feed(copy_rows)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def hand_over() -> None:
            """Meets the other group, which is half a visit behind or ahead."""
            if tiles.take_turns:
                plgpu.barrier_arrive(turns_barrier)
                plgpu.barrier_wait(turns_barrier)

        factor = hopper.logit_factor(options)
        # Above NEVER * factor: a masked entry underflows even where all are masked.
        lowest = NEVER / 2 * factor

        def visit(
            tile: Tile, masked: bool, turn: Array, slot: Array, carry: tuple
        ) -> tuple:
            out, highest, total = carry
            plgpu.barrier_wait(buffers.k_ready.at[slot])
            raw, _ = hopper.product(
                q_memory.at[group],
                buffers.k.at[slot].transpose((1, 0)),
                (ROWS, step),
                hand_over,
            )
            logits = hopper.unscaled_logits(options, raw)
            if masked:
                allowed = walk.read_allowed(tile, turn, slot)
                logits = jnp.where(allowed, logits, NEVER)
            plgpu.barrier_arrive(buffers.k_free.at[slot])
            walk.release_rows(tile, turn)
            new_highest = jnp.maximum(highest, logits.max(axis=1) * factor)
            fade = jnp.exp2(highest - new_highest)
            shift = hopper.over_rows(new_highest, logits.shape)
            weights = jnp.exp2(logits * factor - shift)
            total = total * fade + weights.sum(axis=1)
            out *= hopper.over_rows(fade, out.shape)
            hand_over()
            plgpu.barrier_wait(buffers.v_ready.at[slot])
            out = hopper.add_product(
                options, out, weights.astype(q_ref.dtype), buffers.v.at[slot]
            )
            plgpu.barrier_arrive(buffers.v_free.at[slot])
            return out, new_highest, total

        def take(tile: Tile) -> None:
            carry = (
                hopper.constant(options, (ROWS, value_width), 0.0, hopper.TILE),
                hopper.constant(options, (ROWS,), lowest, hopper.PER_ROW),
                hopper.constant(options, (ROWS,), 0.0, hopper.PER_ROW),
            )
            out, highest, total = walk.visit(
                tile, functools.partial(visit, tile), carry
            )
            empty = total == 0.0
            divisor = jnp.where(empty, 1.0, total)
            out *= hopper.over_rows(1.0 / divisor, out.shape)
            lse = jnp.where(empty, -NEVER, highest + jnp.log(divisor) * LOG2_E)
            queries = walk.rows(tile, group)
            target = out_ref.at[tile.batch, queries, tile.head]
            hopper_keys.store_rows(out, out_memory.at[group], target)
            lse_memory[group] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                lse_memory.at[group], lse_ref.at[tile.batch, tile.head, queries]
            )

        pl.when(group == 1)(hand_over)
        walk.over_tiles(take)
        pl.when(group == 0)(hand_over)
        plgpu.wait_smem_to_gmem(0)

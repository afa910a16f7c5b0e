"""Flash attention for TPU through Pallas Mosaic, walking over the listed blocks.

FlashAttention-2 (arXiv 2307.08691) with every tile of scores transposed, [keys
queries]: the running maximum, the sum and the log-sum-exp of a tile are then rows,
which the vector unit reduces along sublanes and memory stores without padding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxtrain.kernels.attention.blocked import (
    NEVER,
    Ids,
    Kernels,
    Options,
    Saved,
    bend_slope,
    estimate_cost,
    id_rows,
    scale_scores,
)
from jaxtrain.kernels.attention.schedule import Schedule

_BLOCK = 512


def choose_blocks(length: int) -> tuple[int, int]:
    """Tiles of 512 by 512; whole lanes of 128 for a row shorter than that."""
    block = min(_BLOCK, -(-length // 128) * 128)
    return block, block


def forward(
    options: Options,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    ids: Ids,
    schedule: Schedule,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Attention and the base-2 log-sum-exp of each query's logits."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    batch, heads, length, _ = q.shape
    value_width, block_q = v.shape[3], schedule.block_q
    specs = _QuerySpecs(q, k, v, schedule)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, options, specs.grid[-1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=specs.grid,
            in_specs=[specs.query, specs.keys, specs.values, *specs.ids],
            out_specs=[specs.out, specs.stat],
            scratch_shapes=[
                pltpu.VMEM((1, block_q), jnp.float32),
                pltpu.VMEM((1, block_q), jnp.float32),
                pltpu.VMEM((value_width, block_q), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length, value_width), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=_compiler_params(parallel=3, sequential=1),
        cost_estimate=_estimate(options, (q, k, v), schedule, products=(1, 1)),
        interpret=options.interpret,
        name="attention_forward",
    )(*_key_lists(schedule), q, k, v, *_rows_and_column(ids))
    return out.swapaxes(1, 2), lse[:, :, 0]


class _QuerySpecs:
    """Block specs of a program (b, n, i, j): entry j of the list of query block i."""

    def __init__(self, q: Array, k: Array, v: Array, schedule: Schedule) -> None:
        batch, heads, length, _ = q.shape
        group = heads // k.shape[1]
        block_q, block_k = schedule.block_q, schedule.block_k
        rows, slots = length // block_q, schedule.key_blocks.shape[2]
        self.grid = (batch, heads, rows, slots)

        def key_block(b: Array, i: Array, j: Array, lists: tuple) -> Array:
            return lists[2][(b * rows + i) * slots + j]

        def of_query(width: int) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, None, block_q, width), lambda b, n, i, j, *lists: (b, n, i, 0)
            )

        def of_keys(width: int) -> pl.BlockSpec:
            def at(b: Array, n: Array, i: Array, j: Array, *lists: Array) -> tuple:
                return b, jax.lax.div(n, group), key_block(b, i, j, lists), 0

            return pl.BlockSpec((None, None, block_k, width), at)

        self.query, self.out = of_query(k.shape[3]), of_query(v.shape[3])
        self.keys, self.values = of_keys(k.shape[3]), of_keys(v.shape[3])
        self.stat = pl.BlockSpec(
            (None, None, 1, block_q), lambda b, n, i, j, *lists: (b, n, 0, i)
        )
        row = pl.BlockSpec((None, 1, block_q), lambda b, n, i, j, *lists: (b, 0, i))
        column = pl.BlockSpec(
            (None, block_k, 1),
            lambda b, n, i, j, *lists: (b, key_block(b, i, j, lists), 0),
        )
        self.ids = (row, row, column)


def _forward_kernel(options: Options, slots: int, *refs: Array) -> None:
    counts, wholes, blocks, q_ref, k_ref, v_ref, *rest = refs
    query_ids, prompt_ids, key_ids, out_ref, lse_ref, max_ref, sum_ref, acc_ref = rest
    i, j = pl.program_id(2), pl.program_id(3)
    row = pl.program_id(0) * pl.num_programs(2) + i

    @pl.when(j == 0)
    def _start() -> None:
        # Above NEVER, so that a masked entry underflows even where all are masked.
        max_ref[...] = jnp.full_like(max_ref, NEVER / 2)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    key_block = blocks[row * slots + j]

    def visit(masked: bool) -> None:
        logits = scale_scores(options, _product(k_ref[...], q_ref[...], 1, 1))
        if masked:
            allowed = _allowed(
                options, logits.shape, i, key_block, query_ids, prompt_ids, key_ids
            )
            logits = jnp.where(allowed, logits, NEVER)
        highest = jnp.maximum(max_ref[...], logits.max(axis=0, keepdims=True))
        weights = jnp.exp2(logits - highest)
        fade = jnp.exp2(max_ref[...] - highest)
        max_ref[...] = highest
        sum_ref[...] = sum_ref[...] * fade + weights.sum(axis=0, keepdims=True)
        values = _product(v_ref[...], weights.astype(v_ref.dtype), 0, 0)
        acc_ref[...] = acc_ref[...] * fade + values

    _visit_if_listed(j, counts[row], wholes[row], visit)

    @pl.when(j == slots - 1)
    def _finish() -> None:
        total = sum_ref[...]
        empty = total == 0
        out = acc_ref[...] / jnp.where(empty, 1.0, total)
        out_ref[...] = out.T.astype(out_ref.dtype)
        lse_ref[...] = jnp.where(empty, -NEVER, max_ref[...] + jnp.log2(total))


def backward(
    options: Options, saved: Saved, ids: Ids, schedule: Schedule
) -> tuple[Array, Array, Array]:
    """Gradients of q (walking over keys) and of k and v (walking over queries)."""
    *by_token, lse, delta, d_out = saved
    q, k, v, d_out = (x.swapaxes(1, 2) for x in (*by_token, d_out))
    inputs = (q, k, v, d_out, lse[:, :, None], delta[:, :, None])
    dq = _query_gradient(options, inputs, ids, schedule)
    dk, dv = _key_gradients(options, inputs, ids, schedule)
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _query_gradient(
    options: Options, inputs: tuple[Array, ...], ids: Ids, schedule: Schedule
) -> Array:
    q, k, v = inputs[:3]
    specs = _QuerySpecs(q, k, v, schedule)
    read = [specs.query, specs.keys, specs.values, specs.out]
    return pl.pallas_call(
        functools.partial(_query_gradient_kernel, options, specs.grid[-1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=specs.grid,
            in_specs=[*read, specs.stat, specs.stat, *specs.ids],
            out_specs=specs.query,
            scratch_shapes=[pltpu.VMEM((schedule.block_q, q.shape[3]), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_compiler_params(parallel=3, sequential=1),
        cost_estimate=_estimate(options, (q, k, v), schedule, products=(2, 1)),
        interpret=options.interpret,
        name="attention_query_gradient",
    )(*_key_lists(schedule), *inputs, *_rows_and_column(ids))


def _query_gradient_kernel(options: Options, slots: int, *refs: Array) -> None:
    """`refs`: three lists; q, k, v, d_out, lse, delta; three of ids; dq and its sum."""
    (counts, wholes, blocks), read, ids = refs[:3], refs[3:9], refs[9:12]
    dq_ref, acc_ref = refs[12:]
    i, j = pl.program_id(2), pl.program_id(3)
    row = pl.program_id(0) * pl.num_programs(2) + i

    @pl.when(j == 0)
    def _start() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    key_block = blocks[row * slots + j]

    def visit(masked: bool) -> None:
        _, slope = _weights_and_slope(options, masked, read, (i, key_block), ids)
        k = read[1][...]
        acc_ref[...] += _product(slope.astype(k.dtype), k, 0, 0)

    _visit_if_listed(j, counts[row], wholes[row], visit)

    @pl.when(j == slots - 1)
    def _finish() -> None:
        dq_ref[...] = (acc_ref[...] * options.scale).astype(dq_ref.dtype)


def _key_gradients(
    options: Options, inputs: tuple[Array, ...], ids: Ids, schedule: Schedule
) -> tuple[Array, Array]:
    q, k, v = inputs[:3]
    batch, heads, _, width = q.shape
    kv_heads, length, value_width = v.shape[1:]
    group = heads // kv_heads
    block_q, block_k = schedule.block_q, schedule.block_k
    slots = schedule.query_blocks.shape[2]

    def query_block(b: Array, j: Array, i: Array, lists: tuple) -> Array:
        return lists[2][(b * (length // block_k) + j) * slots + i]

    # g is the query head within the group of key-value head h.
    def of_query(width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, block_q, width),
            lambda b, h, j, g, i, *lists: (
                b, h * group + g, query_block(b, j, i, lists), 0
            ),
        )  # fmt: skip

    def of_key(width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, block_k, width), lambda b, h, j, g, i, *lists: (b, h, j, 0)
        )

    stat = pl.BlockSpec(
        (None, None, 1, block_q),
        lambda b, h, j, g, i, *lists: (
            b, h * group + g, 0, query_block(b, j, i, lists)
        ),
    )  # fmt: skip
    row = pl.BlockSpec(
        (None, 1, block_q),
        lambda b, h, j, g, i, *lists: (b, 0, query_block(b, j, i, lists)),
    )
    column = pl.BlockSpec((None, block_k, 1), lambda b, h, j, g, i, *lists: (b, j, 0))
    key, value = of_key(width), of_key(value_width)
    read = [of_query(width), key, value, of_query(value_width), stat, stat]
    dk, dv = pl.pallas_call(
        functools.partial(_key_gradients_kernel, options, slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, length // block_k, group, slots),
            in_specs=[*read, row, row, column],
            out_specs=[key, value],
            scratch_shapes=[
                pltpu.VMEM((block_k, width), jnp.float32),
                pltpu.VMEM((block_k, value_width), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_compiler_params(parallel=3, sequential=2),
        cost_estimate=_estimate(options, (q, k, v), schedule, products=(2, 2)),
        interpret=options.interpret,
        name="attention_key_gradients",
    )(
        schedule.query_counts.reshape(-1),
        schedule.query_wholes.reshape(-1),
        schedule.query_blocks.reshape(-1),
        *inputs,
        *_rows_and_column(ids),
    )
    return dk, dv


def _key_gradients_kernel(options: Options, slots: int, *refs: Array) -> None:
    """`refs`: as above; in place of the last two dk, dv and the sums of both."""
    (counts, wholes, blocks), read, ids = refs[:3], refs[3:9], refs[9:12]
    dk_ref, dv_ref, dk_acc, dv_acc = refs[12:]
    j, g, i = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    column = pl.program_id(0) * pl.num_programs(2) + j

    @pl.when((g == 0) & (i == 0))
    def _start() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    query_block = blocks[column * slots + i]

    def visit(masked: bool) -> None:
        place = (query_block, j)
        weights, slope = _weights_and_slope(options, masked, read, place, ids)
        d_out, q = read[3][...], read[0][...]
        dv_acc[...] += _product(weights.astype(d_out.dtype), d_out, 1, 0)
        dk_acc[...] += _product(slope.astype(q.dtype), q, 1, 0)

    _visit_if_listed(i, counts[column], wholes[column], visit)

    @pl.when((g == pl.num_programs(3) - 1) & (i == slots - 1))
    def _finish() -> None:
        dk_ref[...] = (dk_acc[...] * options.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _weights_and_slope(
    options: Options,
    masked: bool,
    refs: tuple[Array, ...],
    place: tuple[Array, Array],
    id_refs: tuple[Array, ...],
) -> tuple[Array, Array]:
    """Of one tile, [keys queries]: softmax weights, d loss / d raw product / scale."""
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref = refs
    logits = scale_scores(options, _product(k_ref[...], q_ref[...], 1, 1))
    weights = jnp.exp2(logits - lse_ref[...])
    if masked:
        allowed = _allowed(options, logits.shape, *place, *id_refs)
        weights = jnp.where(allowed, weights, 0.0)
    d_weights = _product(v_ref[...], d_out_ref[...], 1, 1)
    slope = weights * (d_weights - delta_ref[...])
    return weights, bend_slope(options, logits, slope)


def _allowed(
    options: Options,
    shape: tuple[int, ...],
    query_block: Array,
    key_block: Array,
    query_ids: Array,
    prompt_ids: Array,
    key_ids: Array,
) -> Array:
    """The mask of one tile, [keys queries]."""
    keys = key_ids[...]
    allowed = (query_ids[...] == keys) | (prompt_ids[...] == keys)
    if options.causal:
        block_k, block_q = shape
        key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        start = query_block * block_q + options.offset
        distance = (query - key) + (start - key_block * block_k)
        allowed &= distance >= 0
        if options.window is not None:
            allowed &= distance < options.window
    return allowed


def _visit_if_listed(
    slot: Array, count: Array, wholes: Array, visit: Callable[[bool], None]
) -> None:
    """`visit(masked)` where the list goes as far as `slot`."""
    pl.when(slot < wholes)(functools.partial(visit, False))
    pl.when((slot >= wholes) & (slot < count))(functools.partial(visit, True))


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The matrix product along the given axes, accumulated in float32."""
    dims = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _rows_and_column(ids: Ids) -> tuple[Array, Array, Array]:
    """Query and prompt ids as rows [B 1 T], key ids as columns [B T 1]."""
    queries, prompts, keys = id_rows(ids)
    return queries[:, None], prompts[:, None], keys[:, :, None]


def _key_lists(schedule: Schedule) -> tuple[Array, ...]:
    """The lists of key blocks, each of one axis, as scalar memory holds them."""
    lists = (schedule.key_counts, schedule.key_wholes, schedule.key_blocks)
    return tuple(each.reshape(-1) for each in lists)


def _estimate(
    options: Options,
    arrays: tuple[Array, Array, Array],
    schedule: Schedule,
    *,
    products: tuple[int, int],
) -> pl.CostEstimate:
    """Of q [B N T H], k [B K S H] and v [B K S V] of one device."""
    lengths = (arrays[0].shape[2], arrays[1].shape[2])
    blocks = (schedule.block_q, schedule.block_k)
    cost = estimate_cost(options, arrays, lengths, blocks, products=products)
    return pl.CostEstimate(**cost)


def _compiler_params(*, parallel: int, sequential: int) -> pltpu.CompilerParams:
    order = [pltpu.PARALLEL] * parallel + [pltpu.ARBITRARY] * sequential
    return pltpu.CompilerParams(dimension_semantics=order)


KERNELS = Kernels(forward, backward, choose_blocks, lambda width: width)

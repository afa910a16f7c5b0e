"""Flash attention for NVIDIA GPUs before Hopper, through Pallas' Triton lowering.

FlashAttention-2 (arXiv 2307.08691) over the listed blocks: one program takes a block
of queries (forward, dq) or of keys (dk, dv) and loops over the blocks on its list.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
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

Carry = TypeVar("Carry")
_BLOCK = 64  # 99 KiB of shared memory, as an L4 has, hold tiles of a 128-wide head


def choose_blocks(length: int) -> tuple[int, int]:
    """Tiles of 64 by 64 for any length."""
    return _BLOCK, _BLOCK


def choose_width(width: int) -> int:
    """The next power of two: Triton has no other tiles."""
    if width > 256:
        raise NotImplementedError(
            f"pallas_triton refuses head width {width}: at most 256; use 'xla'"
        )
    return max(16, 1 << (width - 1).bit_length())


def forward(
    options: Options,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    ids: Ids,
    schedule: Schedule,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Attention and the base-2 log-sum-exp of each query's logits."""
    batch, length, heads, width = q.shape
    specs = _QuerySpecs(k, v, heads // k.shape[2], schedule)
    return pl.pallas_call(
        functools.partial(_forward_kernel, options),
        grid=(length // _BLOCK, heads, batch),
        in_specs=[specs.query, specs.keys, specs.values, *specs.ids, *specs.lists],
        out_specs=[specs.out, specs.stat],
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=_compiler_params(width),
        cost_estimate=_estimate(options, (q, k, v), products=(1, 1)),
        interpret=options.interpret,
        name="attention_forward",
    )(q, k, v, *id_rows(ids), *_key_lists(schedule))


class _QuerySpecs:
    """Block specs of a program (i, n, b): query block i of head n of row b."""

    def __init__(self, k: Array, v: Array, group: int, schedule: Schedule) -> None:
        length = k.shape[1]
        _, rows, slots = schedule.key_blocks.shape

        def of_query(width: int) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, _BLOCK, None, width), lambda i, n, b: (b, i, n, 0)
            )

        def of_keys(width: int) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, length, None, width),
                lambda i, n, b: (b, 0, jax.lax.div(n, jnp.int32(group)), 0),
            )

        row = pl.BlockSpec((None, _BLOCK), lambda i, n, b: (b, i))
        keys = pl.BlockSpec((None, length), lambda i, n, b: (b, 0))
        count = pl.BlockSpec((None, rows), lambda i, n, b: (b, 0))
        self.query, self.out = of_query(k.shape[3]), of_query(v.shape[3])
        self.keys, self.values = of_keys(k.shape[3]), of_keys(v.shape[3])
        self.stat = pl.BlockSpec((None, None, _BLOCK), lambda i, n, b: (b, n, i))
        self.ids = (row, row, keys)
        listed = pl.BlockSpec((None, None, slots), lambda i, n, b: (b, i, 0))
        self.lists = (count, count, listed)


def _forward_kernel(options: Options, *refs: Array) -> None:
    q_ref, k_ref, v_ref, query_ids, prompt_ids, key_ids, *rest = refs
    counts, wholes, blocks, out_ref, lse_ref = rest
    i = pl.program_id(0)
    q = q_ref[...]

    def visit(masked: bool, slot: Array, carry: tuple) -> tuple:
        out, highest, total = carry
        block = blocks[slot]
        keys = pl.ds(block * _BLOCK, _BLOCK)
        logits = scale_scores(options, _product(q, k_ref[keys, :].T))
        if masked:
            allowed = _allowed(
                options, query_ids[...], prompt_ids[...], key_ids[keys], i, block
            )
            logits = jnp.where(allowed, logits, NEVER)
        new_highest = jnp.maximum(highest, logits.max(axis=1))
        fade = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(logits - new_highest[:, None])
        total = total * fade + weights.sum(axis=1)
        values = _product(weights.astype(v_ref.dtype), v_ref[keys, :])
        return out * fade[:, None] + values, new_highest, total

    carry = (
        jnp.zeros(out_ref.shape, jnp.float32),
        # Above NEVER: a masked entry underflows even where all are masked.
        jnp.full((_BLOCK,), NEVER / 2, jnp.float32),
        jnp.zeros((_BLOCK,), jnp.float32),
    )
    out, highest, total = _walk(counts[i], wholes[i], visit, carry)
    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)
    out_ref[...] = (out / divisor[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty, -NEVER, highest + jnp.log2(divisor))


def backward(
    options: Options, saved: Saved, ids: Ids, schedule: Schedule
) -> tuple[Array, Array, Array]:
    """Gradients of q (walking over keys) and of k and v (walking over queries)."""
    q, k, v, lse, delta, d_out = saved
    inputs = (q, k, v, d_out.astype(q.dtype), lse, delta, *id_rows(ids))
    dk, dv = _key_gradients(options, inputs, schedule)
    return _query_gradient(options, inputs, schedule), dk, dv


def _query_gradient(
    options: Options, inputs: tuple[Array, ...], schedule: Schedule
) -> Array:
    q, k, v = inputs[:3]
    batch, length, heads, width = q.shape
    specs = _QuerySpecs(k, v, heads // k.shape[2], schedule)
    read = [specs.query, specs.keys, specs.values, specs.out]
    return pl.pallas_call(
        functools.partial(_query_kernel, options),
        grid=(length // _BLOCK, heads, batch),
        in_specs=[*read, specs.stat, specs.stat, *specs.ids, *specs.lists],
        out_specs=specs.query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_compiler_params(width),
        cost_estimate=_estimate(options, (q, k, v), products=(2, 1)),
        interpret=options.interpret,
        name="attention_query_gradient",
    )(*inputs, *_key_lists(schedule))


def _query_kernel(options: Options, *refs: Array) -> None:
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *rest = refs
    query_ids, prompt_ids, key_ids, counts, wholes, blocks, dq_ref = rest
    i = pl.program_id(0)
    q, d_out, lse, delta = q_ref[...], d_out_ref[...], lse_ref[...], delta_ref[...]

    def visit(masked: bool, slot: Array, dq: Array) -> Array:
        block = blocks[slot]
        keys = pl.ds(block * _BLOCK, _BLOCK)
        k = k_ref[keys, :]
        logits = scale_scores(options, _product(q, k.T))
        weights = jnp.exp2(logits - lse[:, None])
        if masked:
            allowed = _allowed(
                options, query_ids[...], prompt_ids[...], key_ids[keys], i, block
            )
            weights = jnp.where(allowed, weights, 0.0)
        d_weights = _product(d_out, v_ref[keys, :].T)
        slope = bend_slope(options, logits, weights * (d_weights - delta[:, None]))
        return dq + _product(slope.astype(k.dtype), k)

    dq = jnp.zeros(q.shape, jnp.float32)
    dq = _walk(counts[i], wholes[i], visit, dq) * options.scale
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _key_gradients(
    options: Options, inputs: tuple[Array, ...], schedule: Schedule
) -> tuple[Array, Array]:
    q, k, v = inputs[:3]
    batch, length, heads, width = q.shape
    kv_heads, value_width = v.shape[2:]
    group = heads // kv_heads
    _, columns, slots = schedule.query_blocks.shape
    # A program (j, h, b) takes key block j of key-value head h of row b.
    key, value = (
        pl.BlockSpec((None, _BLOCK, None, x), lambda j, h, b: (b, j, h, 0))
        for x in (width, value_width)
    )
    queries, d_out = (
        pl.BlockSpec((None, length, group, x), lambda j, h, b: (b, 0, h, 0))
        for x in (width, value_width)
    )
    stat = pl.BlockSpec((None, group, length), lambda j, h, b: (b, h, 0))
    row = pl.BlockSpec((None, length), lambda j, h, b: (b, 0))
    key_row = pl.BlockSpec((None, _BLOCK), lambda j, h, b: (b, j))
    count = pl.BlockSpec((None, columns), lambda j, h, b: (b, 0))
    listed = pl.BlockSpec((None, None, slots), lambda j, h, b: (b, j, 0))
    read = [queries, key, value, d_out]
    lists = (schedule.query_counts, schedule.query_wholes, schedule.query_blocks)
    dk, dv = pl.pallas_call(
        functools.partial(_key_kernel, options, group),
        grid=(columns, kv_heads, batch),
        in_specs=[*read, stat, stat, row, row, key_row, count, count, listed],
        out_specs=[key, value],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_compiler_params(width),
        cost_estimate=_estimate(options, (q, k, v), products=(2, 2)),
        interpret=options.interpret,
        name="attention_key_gradients",
    )(*inputs, *lists)
    return dk, dv


def _key_kernel(options: Options, group: int, *refs: Array) -> None:
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *rest = refs
    query_ids, prompt_ids, key_ids, counts, wholes, blocks, dk_ref, dv_ref = rest
    j = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]

    def visit_head(g: Array, totals: tuple) -> tuple:
        def visit(masked: bool, slot: Array, totals: tuple) -> tuple:
            dk, dv = totals
            block = blocks[slot]
            queries = pl.ds(block * _BLOCK, _BLOCK)
            q, d_out = q_ref[queries, g, :], d_out_ref[queries, g, :]
            logits = scale_scores(options, _product(q, k.T))
            weights = jnp.exp2(logits - lse_ref[g, queries][:, None])
            if masked:
                ids = (query_ids[queries], prompt_ids[queries], key_ids[...])
                allowed = _allowed(options, *ids, block, j)
                weights = jnp.where(allowed, weights, 0.0)
            dv += _product(weights.astype(d_out.dtype).T, d_out)
            d_weights = _product(d_out, v.T)
            delta = delta_ref[g, queries][:, None]
            slope = bend_slope(options, logits, weights * (d_weights - delta))
            dk += _product(slope.astype(q.dtype).T, q)
            return dk, dv

        return _walk(counts[j], wholes[j], visit, totals)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    dk, dv = jax.lax.fori_loop(0, group, visit_head, zeros)
    dk_ref[...] = (dk * options.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _walk(
    count: Array, wholes: Array, visit: Callable[..., Carry], carry: Carry
) -> Carry:
    """`visit(masked, slot, carry)` over a list, whole blocks first."""
    carry = jax.lax.fori_loop(0, wholes, functools.partial(visit, False), carry)
    return jax.lax.fori_loop(wholes, count, functools.partial(visit, True), carry)


def _allowed(
    options: Options,
    query_ids: Array,
    prompt_ids: Array,
    key_ids: Array,
    query_block: Array,
    key_block: Array,
) -> Array:
    """The mask of one tile, [queries keys]."""
    keys = key_ids[None, :]
    allowed = (query_ids[:, None] == keys) | (prompt_ids[:, None] == keys)
    if options.causal:
        entry = jax.lax.iota(jnp.int32, _BLOCK)
        distance = entry[:, None] - entry[None, :]
        distance += (query_block - key_block) * _BLOCK
        # The first query's place in the row shifts the bounds.
        allowed &= distance >= -options.offset
        if options.window is not None:
            allowed &= distance < options.window - options.offset
    return allowed


def _product(left: Array, right: Array) -> Array:
    """left @ right, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precision, preferred_element_type=jnp.float32)


def _key_lists(schedule: Schedule) -> tuple[Array, Array, Array]:
    return schedule.key_counts, schedule.key_wholes, schedule.key_blocks


def _estimate(
    options: Options, arrays: tuple[Array, Array, Array], *, products: tuple[int, int]
) -> pl.CostEstimate:
    """Of q [B T N H], k [B S K H] and v [B S K V] of one device."""
    lengths = (arrays[0].shape[1], arrays[1].shape[1])
    blocks = (_BLOCK, _BLOCK)
    cost = estimate_cost(options, arrays, lengths, blocks, products=products)
    return pl.CostEstimate(**cost)


def _compiler_params(width: int) -> plgpu.CompilerParams:
    # With two stages, tiles of a 256-wide head exceed a B200's shared memory.
    return plgpu.CompilerParams(
        num_warps=4 if width <= 64 else 8, num_stages=2 if width <= 128 else 1
    )


KERNELS = Kernels(forward, backward, choose_blocks, choose_width)

"""Attention over the listed blocks in plain XLA, for devices without a kernel of ours.

The pairs of blocks that a schedule lists stand in one row, those of each block of
queries (or of keys) together: n pairs in all. They are cut into equal parts of `steps`
pairs, and a loop takes one pair of every part at a time: its products are large, and
there are `steps` of them. The parts are at least as long as the longest list of a
block, so that pairs of one block are less than a part away from each other: no two
parts are at the same block at once, and what they add needs no order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from jaxtrain.kernels.attention.blocked import (
    NEVER,
    Ids,
    Kernels,
    Options,
    Saved,
    bend_slope,
    id_rows,
    scale_scores,
)
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.schedule import Schedule, count_visits

Arrays = TypeVar("Arrays")
Carry = TypeVar("Carry")
# Scores that a step of the loop holds at most: 128 MiB of float32.
_MOST_SCORES = 2**25
# So many take a GPU longer than the start of a step's operations does.
_ENOUGH_SCORES = 2**23


def choose_blocks(length: int, block: int | None = None) -> tuple[int, int]:
    """Square tiles of `block`; a shorter row is one tile.

    By default 256 on a GPU, where a step is not worth its start otherwise, and 128 on a
    CPU, where documents' ends leave more out of smaller tiles.
    """
    if block is None:
        block = 128 if jax.default_backend() == "cpu" else 256
    block = min(block, -(-length // 8) * 8)
    return block, block


def choose_width(width: int) -> int:
    """Any width is taken as it is."""
    return width


class Walk(NamedTuple):
    """All pairs of a schedule, those of one block of a side, "home", together.

    Blocks are counted over all rows of the batch. `starts` are the places where each
    home block's pairs begin, and behind them their number; `away` lists the other
    side's blocks.
    """

    starts: Int32[Array, "B*I+1"]
    away: Int32[Array, "B*I J"]
    steps: Int32[Array, ""]
    parts: int
    most: int  # steps, whatever the documents are


class Pairs(NamedTuple):
    """The pairs of one step, one of each part.

    `target` is `home`, or a number beyond all blocks where a part has no pair left.
    """

    home: Int32[Array, "P"]
    away: Int32[Array, "P"]
    target: Int32[Array, "P"]


def make_walk(
    counts: Int32[Array, "B I"], lists: Int32[Array, "B I J"], visits: int, parts: int
) -> Walk:
    """The walk over lists of which the first `counts` entries each are to be visited.

    Args:
        visits: pairs of a row, at most.
        parts: how many pairs a step takes.
    """
    batch, homes, slots = lists.shape
    lengths = counts.reshape(-1)
    starts = jnp.pad(jnp.cumsum(lengths, dtype=jnp.int32), (1, 0))
    steps = jnp.maximum(-(-starts[-1] // parts), lengths.max())
    # A list has a slot for each block of the other side.
    away = lists + jnp.arange(batch, dtype=jnp.int32)[:, None, None] * slots
    most = max(-(-batch * visits // parts), slots)
    return Walk(starts, away.reshape(batch * homes, slots), steps, parts, most)


def take_step(walk: Walk, step: Int32[Array, ""]) -> Pairs:
    """The pairs that stand at place `step` of each part."""
    part = jnp.arange(walk.parts, dtype=jnp.int32)
    place = part * walk.steps + step
    blocks = walk.away.shape[0]
    # The last block that starts at or before this place: an empty list starts where
    # the next one does. All are compared at once, as a search would be a loop in here.
    starts = (walk.starts[None, :] <= place[:, None]).sum(axis=1, dtype=jnp.int32)
    home = starts - 1
    exists = home < blocks
    home = jnp.minimum(home, blocks - 1)
    slot = jnp.where(exists, place - walk.starts[home], 0)
    return Pairs(home, walk.away[home, slot], jnp.where(exists, home, blocks + part))


class _Queries(NamedTuple):
    """What belongs to blocks of queries."""

    q: Float[Array, "B*I K G Q H"]
    segments: Int32[Array, "B*I Q"]
    prompts: Int32[Array, "B*I Q"]


class _Keys(NamedTuple):
    """What belongs to blocks of keys."""

    k: Float[Array, "B*J K L H"]
    v: Float[Array, "B*J K L V"]
    ids: Int32[Array, "B*J L"]


class _Weighed(NamedTuple):
    """What the backward pass needs of queries beside what the forward pass does."""

    d_out: Float[Array, "B*I K G Q V"]
    lse: Float[Array, "B*I K G Q"]
    delta: Float[Array, "B*I K G Q"]


def forward(
    options: Options,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    ids: Ids,
    schedule: Schedule,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Attention and the base-2 log-sum-exp of each query's logits."""
    queries, keys = _cut(q, k, v, ids, schedule)

    def visit(pairs: Pairs, carry: tuple) -> tuple:
        home, away, target = pairs
        tile, others = _take(queries, home), _take(keys, away)
        out, highest, total = _take(carry, home)
        logits = _logits(options, tile, others)
        allowed = _allowed(options, schedule, (home, away), tile, others)
        logits = jnp.where(allowed, logits, NEVER)
        new_highest = jnp.maximum(highest, logits.max(axis=-1))
        fade = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(logits - new_highest[..., None])
        total = total * fade + weights.sum(axis=-1)
        values = _multiply("pkgqs,pksv->pkgqv", weights.astype(v.dtype), others.v)
        out = out * fade[..., None] + values
        return jax.tree.map(
            lambda every, new: every.at[target].set(
                new, mode="drop", unique_indices=True
            ),
            carry,
            (out, new_highest, total),
        )

    stat = queries.q.shape[:-1]
    carry = (
        jnp.zeros((*stat, v.shape[3]), jnp.float32),
        # Above NEVER: a masked entry underflows even where all are masked.
        jnp.full(stat, NEVER / 2, jnp.float32),
        jnp.zeros(stat, jnp.float32),
    )
    walk = _walk_over_keys(options, schedule, q.shape[2])
    out, highest, total = _loop(walk, visit, carry)
    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)
    out = (out / divisor[..., None]).astype(q.dtype)
    lse = jnp.where(empty, -NEVER, highest + jnp.log2(divisor))
    lse = _join_queries(lse[..., None], q)[..., 0]
    return _join_queries(out, q), lse.swapaxes(1, 2)


def backward(
    options: Options, saved: Saved, ids: Ids, schedule: Schedule
) -> tuple[Array, Array, Array]:
    """Gradients of q (walking over keys) and of k and v (walking over queries)."""
    q, k, v, lse, delta, d_out = saved
    queries, keys = _cut(q, k, v, ids, schedule)

    def cut(x: Array) -> Array:
        return _cut_queries(x, schedule.block_q, k.shape[2])

    stats = (cut(x.swapaxes(1, 2)[..., None])[..., 0] for x in (lse, delta))
    weighed = _Weighed(cut(d_out.astype(q.dtype)), *stats)
    dq = _query_gradient(options, schedule, queries, weighed, keys)
    dk, dv = _key_gradients(options, schedule, queries, weighed, keys)
    return (
        _join_queries((dq * options.scale).astype(q.dtype), q),
        _join_keys((dk * options.scale).astype(k.dtype), k),
        _join_keys(dv.astype(v.dtype), v),
    )


def _query_gradient(
    options: Options,
    schedule: Schedule,
    queries: _Queries,
    weighed: _Weighed,
    keys: _Keys,
) -> Float[Array, "B*I K G Q H"]:
    """Without the factor `scale`, in float32."""

    def visit(pairs: Pairs, dq: Array) -> Array:
        home, away, target = pairs
        tile, weigh = _take(queries, home), _take(weighed, home)
        others = _take(keys, away)
        allowed = _allowed(options, schedule, (home, away), tile, others)
        _, slope = _differentiate(options, tile, weigh, others, allowed)
        part = _multiply("pkgqs,pksh->pkgqh", slope, others.k)
        return dq.at[target].add(part, mode="drop", unique_indices=True)

    dq = jnp.zeros(queries.q.shape, jnp.float32)
    return _loop(_walk_over_keys(options, schedule, _heads(queries)), visit, dq)


def _key_gradients(
    options: Options,
    schedule: Schedule,
    queries: _Queries,
    weighed: _Weighed,
    keys: _Keys,
) -> tuple[Float[Array, "B*J K L H"], Float[Array, "B*J K L V"]]:
    """Without the factor `scale` of the first, in float32."""

    def visit(pairs: Pairs, totals: tuple) -> tuple:
        home, away, target = pairs
        tile, weigh = _take(queries, away), _take(weighed, away)
        others = _take(keys, home)
        allowed = _allowed(options, schedule, (away, home), tile, others)
        weights, slope = _differentiate(options, tile, weigh, others, allowed)
        dk, dv = totals
        dk_part = _multiply("pkgqs,pkgqh->pksh", slope, tile.q)
        dv_part = _multiply("pkgqs,pkgqv->pksv", weights, weigh.d_out)
        return (
            dk.at[target].add(dk_part, mode="drop", unique_indices=True),
            dv.at[target].add(dv_part, mode="drop", unique_indices=True),
        )

    zeros = (jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32))
    return _loop(_walk_over_queries(options, schedule, _heads(queries)), visit, zeros)


def _differentiate(
    options: Options,
    tile: _Queries,
    weigh: _Weighed,
    others: _Keys,
    allowed: Bool[Array, "P 1 1 Q L"],
) -> tuple[Float[Array, "P K G Q L"], Float[Array, "P K G Q L"]]:
    """Weights of the softmax, and d loss / d raw product but for `scale`."""
    logits = _logits(options, tile, others)
    weights = jnp.where(allowed, jnp.exp2(logits - weigh.lse[..., None]), 0.0)
    d_weights = _multiply("pkgqv,pksv->pkgqs", weigh.d_out, others.v)
    slope = weights * (d_weights - weigh.delta[..., None])
    slope = bend_slope(options, logits, slope)
    return weights.astype(tile.q.dtype), slope.astype(tile.q.dtype)


def _logits(
    options: Options, tile: _Queries, others: _Keys
) -> Float[Array, "P K G Q L"]:
    return scale_scores(options, _multiply("pkgqh,pksh->pkgqs", tile.q, others.k))


def _allowed(
    options: Options,
    schedule: Schedule,
    blocks: tuple[Array, Array],
    tile: _Queries,
    others: _Keys,
) -> Bool[Array, "P 1 1 Q L"]:
    """The mask of pairs of blocks, which are numbered over all rows."""
    keys = others.ids[:, None, :]
    allowed = (tile.segments[..., None] == keys) | (tile.prompts[..., None] == keys)
    if options.causal:
        query_block = blocks[0] % schedule.key_counts.shape[1]
        key_block = blocks[1] % schedule.query_counts.shape[1]
        query = jnp.arange(schedule.block_q, dtype=jnp.int32)[:, None]
        key = jnp.arange(schedule.block_k, dtype=jnp.int32)[None, :]
        first = query_block * schedule.block_q - key_block * schedule.block_k
        distance = query - key + (first + options.offset)[:, None, None]
        allowed &= distance >= 0
        if options.window is not None:
            allowed &= distance < options.window
    return allowed[:, None, None]


def _walk_over_keys(options: Options, schedule: Schedule, heads: int) -> Walk:
    """Blocks of queries are at home."""
    return _make_walk(
        options, schedule, (schedule.key_counts, schedule.key_blocks), heads
    )


def _walk_over_queries(options: Options, schedule: Schedule, heads: int) -> Walk:
    """Blocks of keys are at home."""
    return _make_walk(
        options, schedule, (schedule.query_counts, schedule.query_blocks), heads
    )


def _make_walk(
    options: Options, schedule: Schedule, visited: tuple[Array, Array], heads: int
) -> Walk:
    """`visited`: how many blocks each block at home sees, and which."""
    counts, blocks = visited
    parts = _count_parts(schedule, counts.size, heads)
    return make_walk(counts, blocks, _count_visits(options, schedule), parts)


def _count_visits(options: Options, schedule: Schedule) -> int:
    """Pairs of a row that causality and the window leave."""
    rule = Mask(causal=options.causal, window=options.window, offset=options.offset)
    _, blocks_q, blocks_k = schedule.key_blocks.shape
    blocks = (schedule.block_q, schedule.block_k)
    return count_visits(rule, (blocks_q * blocks[0], blocks_k * blocks[1]), blocks)


def _count_parts(schedule: Schedule, blocks: int, heads: int) -> int:
    """How many pairs a step takes, of a batch of so many blocks at home.

    A quarter of the blocks, or up to half where these are too few to be worth a step:
    the more there are, the sooner all wait for the longest list of a block.
    """
    pair = heads * schedule.block_q * schedule.block_k
    parts = max(blocks // 4, min(blocks // 2, _ENOUGH_SCORES // pair))
    return max(1, min(parts, _MOST_SCORES // pair))


def _loop(walk: Walk, visit: Callable[[Pairs, Carry], Carry], carry: Carry) -> Carry:
    """`visit` the pairs of every step."""

    def goes_on(state: tuple) -> Array:
        # The second bound never ends the loop. It tells those who count what a
        # program computes (jaxtrain.aot) how long the loop may be.
        return (state[0] < walk.steps) & (state[0] < np.int32(walk.most))

    def advance(state: tuple) -> tuple:
        step, carry = state
        return step + 1, visit(take_step(walk, step), carry)

    return jax.lax.while_loop(goes_on, advance, (jnp.int32(0), carry))[1]


def _heads(queries: _Queries) -> int:
    return queries.q.shape[1] * queries.q.shape[2]


def _multiply(equation: str, left: Array, right: Array) -> Array:
    """The product, accumulated in float32."""
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _take(arrays: Arrays, blocks: Int32[Array, "P"]) -> Arrays:
    """These blocks of each array."""
    return jax.tree.map(lambda x: x.at[blocks].get(mode="promise_in_bounds"), arrays)


def _cut(
    q: Array, k: Array, v: Array, ids: Ids, schedule: Schedule
) -> tuple[_Queries, _Keys]:
    """All blocks, those of all rows along one axis."""
    segments, prompts, key_ids = id_rows(ids)
    block_q, block_k = schedule.block_q, schedule.block_k
    queries = _Queries(
        _cut_queries(q, block_q, k.shape[2]),
        segments.reshape(-1, block_q),
        prompts.reshape(-1, block_q),
    )
    cut_k, cut_v = (_cut_queries(x, block_k, k.shape[2])[:, :, 0] for x in (k, v))
    return queries, _Keys(cut_k, cut_v, key_ids.reshape(-1, block_k))


def _cut_queries(
    x: Float[Array, "B T N H"], block: int, kv_heads: int
) -> Float[Array, "B*I K G Q H"]:
    heads, width = x.shape[2:]
    x = x.reshape(-1, block, kv_heads, heads // kv_heads, width)
    return x.transpose(0, 2, 3, 1, 4)


def _join_queries(
    x: Float[Array, "B*I K G Q H"], like: Float[Array, "B T N _"]
) -> Float[Array, "B T N H"]:
    return x.transpose(0, 3, 1, 2, 4).reshape(*like.shape[:3], -1)


def _join_keys(
    x: Float[Array, "B*J K L H"], like: Float[Array, "B S K H"]
) -> Float[Array, "B S K H"]:
    return x.swapaxes(1, 2).reshape(like.shape)


KERNELS = Kernels(forward, backward, choose_blocks, choose_width)


def with_blocks(block: int) -> Kernels:
    """Return `KERNELS` with other tiles, for tests and measurements."""
    return dataclasses.replace(
        KERNELS, choose_blocks=functools.partial(choose_blocks, block=block)
    )

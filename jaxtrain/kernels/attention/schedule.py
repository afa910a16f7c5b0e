"""Which blocks of scores a kernel visits: found once a batch, used by every layer.

The scores of a row are a grid of blocks. A mask leaves most of them empty (documents
do not read each other) and most of the rest whole (no entry masked). Kernels walk over
the listed blocks only, and apply the mask only where a block is not whole. The forward
and both backward kernels of all layers share the lists.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxtrain.kernels.attention.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Lists of blocks, for the walk over keys and for the walk over queries.

    `key_blocks[b, i, :key_counts[b, i]]` are the key blocks that query block i of row
    b visits; the first `key_wholes[b, i]` of them hold no masked entry. Later entries
    repeat the last one. `query_*` list, in the same way, the query blocks that visit
    key block j. `query_order`: a row's query blocks, those with most visits first.
    """

    key_counts: Int32[Array, "B I"]
    key_wholes: Int32[Array, "B I"]
    key_blocks: Int32[Array, "B I J"]
    query_counts: Int32[Array, "B J"]
    query_wholes: Int32[Array, "B J"]
    query_blocks: Int32[Array, "B J I"]
    query_order: Int32[Array, "B I"]
    block_q: int = dataclasses.field(metadata={"static": True})
    block_k: int = dataclasses.field(metadata={"static": True})


# Of whole rows, or of each part where devices share rows (context.py).
Plan = Schedule | tuple[Schedule, ...] | None


def make_schedule(
    mask: Mask,
    batch: int,
    length: int,
    keys: int | None = None,
    *,
    block_q: int,
    block_k: int,
) -> Schedule:
    """The blocks that `mask` leaves, from the smallest and largest ids of each block.

    Of `length` queries and `keys` keys (None: as many), whole blocks both.

    Never leaves out a block that holds an allowed entry, and never calls a block whole
    that holds a masked one, whatever the order of the ids; for ids that ascend along
    the row, as in packed data, it lists no empty block.

    Raises:
        ValueError: the blocks do not cut the rows.
    """
    keys = length if keys is None else keys
    if length % block_q or keys % block_k:
        raise ValueError(
            f"a row of {length} is not cut by blocks of {block_q} and {block_k}; "
            "pad the row"
        )
    visit, whole = _compare_blocks(mask, batch, (length, keys), (block_q, block_k))
    by_query = _list_blocks(visit, whole)
    by_key = _list_blocks(visit.swapaxes(1, 2), whole.swapaxes(1, 2))
    order = jnp.argsort(by_query[0], axis=-1, descending=True).astype(jnp.int32)
    return Schedule(*by_query, *by_key, order, block_q, block_k)


def count_visits(mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int]) -> int:
    """Blocks of one row that causality and the window leave, its ids apart.

    `lengths`, `blocks`: of queries and of keys.
    """
    first_query = np.arange(0, lengths[0], blocks[0])[:, None] + mask.offset
    first_key = np.arange(0, lengths[1], blocks[1])[None, :]
    visit = np.ones((first_query.size, first_key.size), bool)
    if mask.causal:
        visit &= first_key <= first_query + blocks[0] - 1
    if mask.window is not None:
        visit &= first_query - (first_key + blocks[1] - 1) < mask.window
    return int(visit.sum())


def _compare_blocks(
    mask: Mask, batch: int, lengths: tuple[int, int], blocks: tuple[int, int]
) -> tuple[Bool[Array, "B I J"], Bool[Array, "B I J"]]:
    """Whether each block may hold an allowed entry, and whether it holds no other."""
    (length, keys), (block_q, block_k) = lengths, blocks
    first_query = jnp.arange(0, length, block_q, dtype=jnp.int32)[:, None]
    first_query += mask.offset
    first_key = jnp.arange(0, keys, block_k, dtype=jnp.int32)[None, :]
    last_query, last_key = first_query + block_q - 1, first_key + block_k - 1
    shape = (batch, length // block_q, keys // block_k)
    visit = whole = jnp.ones(shape, bool)
    if mask.causal:
        visit &= first_key <= last_query
        whole &= last_key <= first_query
    if mask.window is not None:
        visit &= first_query - last_key < mask.window
        whole &= last_query - first_key < mask.window
    if mask.segment_ids is None:
        return visit, whole

    ids = mask.segment_ids
    low_q, high_q, real_q = _id_range(ids, block_q)
    key_ids = ids if mask.key_ids is None else mask.key_ids
    low_k, high_k, real_k = _id_range(key_ids, block_k)
    low_q, high_q, real_q = (x[:, :, None] for x in (low_q, high_q, real_q))
    low_k, high_k, real_k = (x[:, None, :] for x in (low_k, high_k, real_k))
    meets = (low_q <= high_k) & (low_k <= high_q)
    one_key_segment = real_k & (low_k == high_k)
    matches = (low_q == high_q) & (low_q == low_k)
    if mask.prompt_ids is not None:
        prompts = jnp.where(ids != 0, mask.prompt_ids, 0)
        low_p, high_p, all_have = _id_range(prompts, block_q)
        low_p, high_p, all_have = (x[:, :, None] for x in (low_p, high_p, all_have))
        meets |= (low_p <= high_k) & (low_k <= high_p)
        matches |= all_have & (low_p == high_p) & (low_p == low_k)
    return visit & meets, whole & real_q & one_key_segment & matches


def _id_range(
    ids: Int32[Array, "B T"], block: int
) -> tuple[Int32[Array, "B I"], Int32[Array, "B I"], Bool[Array, "B I"]]:
    """Smallest and largest id of each block, 0 left out, and whether it has no 0."""
    blocks = ids.reshape(ids.shape[0], -1, block)
    largest = jnp.iinfo(jnp.int32).max
    low = jnp.where(blocks == 0, largest, blocks).min(axis=-1)
    # A block of zeros gets the empty range [largest, -largest].
    high = jnp.where(blocks == 0, -largest, blocks).max(axis=-1)
    return low, high, (blocks != 0).all(axis=-1)


def _list_blocks(
    visit: Bool[Array, "B I J"], whole: Bool[Array, "B I J"]
) -> tuple[Int32[Array, "B I"], Int32[Array, "B I"], Int32[Array, "B I J"]]:
    """Counts of visited and of whole blocks, and the blocks, whole ones first."""
    whole &= visit
    counts = visit.sum(axis=-1, dtype=jnp.int32)
    wholes = whole.sum(axis=-1, dtype=jnp.int32)
    rank = jnp.where(whole, 0, jnp.where(visit, 1, 2))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    slots = jnp.arange(visit.shape[-1], dtype=jnp.int32)
    # Repeats of the last block cost a kernel no new copy.
    slots = jnp.minimum(slots, jnp.maximum(counts[..., None] - 1, 0))
    return counts, wholes, jnp.take_along_axis(order, slots, axis=-1)

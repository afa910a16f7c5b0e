"""Attention in plain XLA, by chunks of queries: any platform, bounded memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain.kernels.attention.masks import Mask, attends
from jaxtrain.kernels.attention.reference import attend_block, zero_padding

# Parts of a long row, each of which meets only the keys up to its own end.
_PARTS = 4


def attention_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    softcap: float | None,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
    chunk: int = 512,
) -> Float[Array, "B T N V"]:
    """Compute attention for `chunk` queries of each row at a time.

    A row of more than `chunk` queries is cut into up to four parts, and a scan runs
    over the chunks of each part. Keys that no query of a part can reach, because of
    causality or the window, are left out of that part's products. The backward pass
    computes the scores of each chunk again instead of keeping them.
    """
    (q,) = zero_padding(mask.segment_ids, q)
    k, v = zero_padding(mask.keys, k, v)
    attend = functools.partial(_attend_chunk, mask, softcap, scale, sinks)
    length, keys = q.shape[1], k.shape[1]
    if length <= chunk:
        queries = (mask.segment_ids, mask.prompt_ids)
        out = attend(q, k, v, *queries, mask.keys, mask.offset, 0)
        return zero_padding(mask.segment_ids, out)[0]
    part = -(-length // _PARTS)
    part = -(-part // chunk) * chunk
    outputs = []
    for start in range(0, length, part):
        stop = min(start + part, length)
        first, last = 0, keys
        if mask.window is not None:
            first = max(0, mask.offset + start - mask.window + 1)
        if mask.causal:
            last = mask.offset + stop
        output = _scan_chunks(
            attend,
            q[:, start:stop],
            k[:, first:last],
            v[:, first:last],
            _cut(mask.segment_ids, start, stop),
            _cut(mask.prompt_ids, start, stop),
            _cut(mask.keys, first, last),
            (mask.offset + start, first),
            chunk,
        )
        outputs.append(output)
    return zero_padding(mask.segment_ids, jnp.concatenate(outputs, axis=1))[0]


def _attend_chunk(
    mask: Mask,
    softcap: float | None,
    scale: float,
    sinks: Array | None,
    q: Array,
    k: Array,
    v: Array,
    query_ids: Array | None,
    prompt_ids: Array | None,
    key_ids: Array | None,
    query_start: Array | int,
    key_start: int,
) -> Array:
    query_index = query_start + jnp.arange(q.shape[1], dtype=jnp.int32)
    key_index = key_start + jnp.arange(k.shape[1], dtype=jnp.int32)
    allowed = attends(mask, query_index, key_index, query_ids, prompt_ids, key_ids)
    return attend_block(q, k, v, allowed, softcap=softcap, scale=scale, sinks=sinks)


def _scan_chunks(
    attend: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    query_ids: Array | None,
    prompt_ids: Array | None,
    key_ids: Array | None,
    starts: tuple[int, int],
    chunk: int,
) -> Array:
    """Run `attend` on one chunk of `q` after another.

    `starts`: index of the first query and of the first key in the whole row.
    """
    batch, length = q.shape[:2]
    count = -(-length // chunk)

    def split(x: Array) -> Array:
        """[B T ...] -> [chunks B chunk ...], the tail filled with zeros."""
        tail = [(0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, [(0, 0), *tail])
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    per_query = jax.tree.map(split, (q, query_ids, prompt_ids))
    offsets = starts[0] + jnp.arange(count, dtype=jnp.int32) * chunk

    @jax.checkpoint
    def body(_: None, inputs: tuple) -> tuple[None, Array]:
        offset, (queries, ids, prompts) = inputs
        return None, attend(queries, k, v, ids, prompts, key_ids, offset, starts[1])

    _, out = jax.lax.scan(body, None, (offsets, per_query))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, count * chunk, *out.shape[3:])
    return out[:, :length]


def _cut(ids: Array | None, start: int, stop: int) -> Array | None:
    return None if ids is None else ids[:, start:stop]

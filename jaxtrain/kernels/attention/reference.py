"""Attention as the equation says it, in float32: the yardstick of the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention.masks import Mask, whole_mask


def attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    softcap: float | None,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N V"]:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v, all scores in memory."""
    dtype = q.dtype
    (q,) = zero_padding(mask.segment_ids, q)
    k, v = zero_padding(mask.keys, k, v)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    allowed = whole_mask(mask, q.shape[1], k.shape[1])
    out = attend_block(q, k, v, allowed, softcap=softcap, scale=scale, sinks=sinks)
    # Once more, for the cotangents: what padding sends back may be NaN as well.
    return zero_padding(mask.segment_ids, out.astype(dtype))[0]


def attend_block(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    allowed: Array | None,
    *,
    softcap: float | None,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N V"]:
    """Attention of some queries to some keys, scores in float32.

    `allowed` is a mask [B T S] or [1 T S]; a query that may read no key gives zeros.
    `sinks` are logits that count in a head's softmax and have no value.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32
    )
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if allowed is not None:
        allowed = allowed[:, None, None]
        # Finite, so that a row without any key has no NaN in its gradient.
        scores = jnp.where(allowed, scores, jnp.float32(-1e30))
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        highest = jnp.maximum(highest, jax.lax.stop_gradient(sinks))
    weights = jnp.exp(scores - highest)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    total = weights.sum(axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks - highest)[..., 0]
    total = jnp.where(total == 0, 1.0, total).transpose(0, 3, 1, 2)[..., None]
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return (out / total).reshape(batch, length, heads, -1).astype(q.dtype)


def zero_padding(
    segment_ids: Int32[Array, "B T"] | None, *arrays: Float[Array, "B T _ H"]
) -> tuple[Array, ...]:
    """The arrays with rows of padding set to 0: 0 * NaN would leak what they hold."""
    if segment_ids is None:
        return arrays
    real = (segment_ids != 0)[:, :, None, None]
    return tuple(jnp.where(real, x, jnp.zeros((), x.dtype)) for x in arrays)

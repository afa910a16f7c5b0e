"""Noise on embeddings while training: NEFTune (arXiv:2310.05914)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

# Layers draw their dropout from the key folded with their number.
_STREAM = 2**31 - 1


def add_embedding_noise(
    x: Float[Array, "B T D"],
    segment_ids: Int32[Array, "B T"],
    key: Key[Array, ""],
    alpha: float,
) -> Float[Array, "B T D"]:
    """x + alpha / sqrt(L D) * u, with u uniform in [-1, 1) and L the row's tokens.

    Rows hold one example each; padding (segment 0) is not counted in L.
    """
    noise = jax.random.uniform(
        jax.random.fold_in(key, _STREAM), x.shape, jnp.float32, -1.0, 1.0
    )
    lengths = jnp.sum(segment_ids != 0, axis=-1, dtype=jnp.float32)
    scale = alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1.0) * x.shape[-1])
    return x + (scale[:, None, None] * noise).astype(x.dtype)

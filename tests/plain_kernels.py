"""Kernels in plain jax, for tests of what is made of their results."""

import jax.numpy as jnp

from jaxtrain.kernels.linear_cross_entropy import hopper


def weigh_plainly(tiles, hidden, table, targets, base, of_table):
    """What `fused.weigh_logits` does on a GPU."""
    vocab_axis, scale = of_table
    table = table if vocab_axis == 0 else table.T
    logits = scale * jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    base = jnp.where(logits.max(1) > base + hopper.FAR, logits.max(1), base)
    weights, rows = jnp.exp(logits - base[:, None]), jnp.arange(len(hidden))
    return hopper.Weights(
        weights.astype(hidden.dtype),
        base,
        weights.at[rows, targets].set(0).sum(1),
        (weights * logits).sum(1),
        logits[rows, targets],
        (logits.argmax(1) == targets).astype(jnp.float32),
    )

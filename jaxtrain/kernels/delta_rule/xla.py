"""The chunked delta rule through plain XLA: every platform, bounded memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxtrain.kernels.delta_rule.chunks import LENGTH, Chunk, advance, prepare

# Chunks whose part without the state is computed at once.
_GROUP = 16


def delta_rule_xla(
    rows: Chunk, state: Float32[Array, "B N K V"]
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N K V"]]:
    """Whole rows, laid out as `passes.Passes` says.

    The outer scan keeps one state for each group of chunks, and the backward pass
    computes what lies within a group again.
    """
    batch, length, heads, width = rows.v.shape
    kv_heads = rows.k.shape[2]
    count = length // LENGTH
    groups = -(-count // _GROUP)
    each = -(-count // groups)
    tail = groups * each - count

    def of_features(x: Array) -> Array:
        """[B T N H] -> [groups chunks B K heads L H], heads being those of one key."""
        x = jnp.pad(x, ((0, 0), (0, tail * LENGTH), (0, 0), (0, 0)))
        x = x.reshape(batch, groups, each, LENGTH, kv_heads, -1, x.shape[-1])
        return x.transpose(1, 2, 0, 4, 5, 3, 6)

    def of_tokens(x: Array) -> Array:
        """[B N C L] -> [groups chunks B K heads 1 L]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, tail), (0, 0)))
        outer = min(kv_heads, x.shape[1])  # resets have no heads
        x = x.reshape(batch, outer, -1, groups, each, 1, LENGTH)
        return x.transpose(3, 4, 0, 1, 2, 5, 6)

    chunks = Chunk(*map(of_features, rows[:3]), *map(of_tokens, rows[3:]))

    @jax.checkpoint
    def run_group(state: Array, group: Chunk) -> tuple[Array, Array]:
        def run(state: Array, inputs: tuple) -> tuple[Array, Array]:
            state, out = advance(state, *inputs)
            return state, out.astype(rows.v.dtype)

        return jax.lax.scan(run, state, (group, prepare(group)))

    shape = state.shape
    state = state.reshape(batch, kv_heads, -1, *shape[2:])
    state, out = jax.lax.scan(run_group, state, chunks)
    # [groups chunks B K heads L V] -> [B T N V]
    out = out.transpose(2, 0, 1, 5, 3, 4, 6).reshape(batch, -1, heads, width)
    return out[:, :length], state.reshape(shape)

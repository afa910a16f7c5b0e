"""The gated delta rule token by token: for generation, and as a yardstick."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


def run_tokens(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    log_decay: Float32[Array, "B T N"],
    beta: Float32[Array, "B T N"],
    restarts: Bool[Array, "B T"],
    state: Float32[Array, "B N H V"],
) -> tuple[Float32[Array, "B T N V"], Float32[Array, "B N H V"]]:
    """What each token reads and the last state; all in float32.

    The equations stand in chunks.py. A token where `restarts` starts with an empty
    state.
    """
    copies = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(x.astype(jnp.float32), copies, axis=2) for x in (q, k))
    tokens = (q, k, v.astype(jnp.float32), log_decay, beta, restarts)
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    highest = jax.lax.Precision.HIGHEST

    def run(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, log_decay, beta, restarts = token
        kept = jnp.where(restarts[:, None], 0.0, jnp.exp(log_decay))
        state = state * kept[..., None, None]
        missing = v - jnp.einsum("bnkv,bnk->bnv", state, k, precision=highest)
        added = beta[..., None] * missing
        state += k[..., None] * added[..., None, :]
        return state, jnp.einsum("bnkv,bnk->bnv", state, q, precision=highest)

    state, out = jax.lax.scan(run, state, by_time)
    return jnp.moveaxis(out, 0, 1), state

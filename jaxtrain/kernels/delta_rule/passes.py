"""What the Pallas kernels share: the derivative rule, whose passes they are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxtrain.kernels.delta_rule.chunks import Chunk


@dataclasses.dataclass(frozen=True)
class Passes:
    """One implementation's kernels over whole rows.

    Rows are a `Chunk` of more tokens: q and k [B T K H], v [B T N V], T a multiple of
    the chunk's length L; decays and betas [B N C L] and resets [B 1 C L], counted from
    each chunk's start. `forward(rows, state)` gives what tokens read, [B T N V], and
    the last state [B N H V]; `states(rows, state)` what the backward pass finds again,
    the state before each chunk among it; `backward(rows, found, d_out, d_state)` the
    gradients of q, k, v, decays, betas and the first state.
    """

    forward: Callable[..., tuple[Array, Array]]
    states: Callable[..., Any]
    backward: Callable[..., tuple[Array, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_rows(
    passes: Passes, rows: Chunk, state: Float32[Array, "B N H V"]
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N H V"]]:
    """What each token reads and the last state.

    Only the arguments are kept for the backward pass, which finds the states between
    chunks again: kept, they would take more room than all the rest of a layer.
    """
    return passes.forward(rows, state)


def _forward(passes: Passes, rows: Chunk, state: Array) -> tuple:
    return passes.forward(rows, state), (rows, state)


def _backward(passes: Passes, kept: tuple, cotangents: tuple) -> tuple:
    rows, state = kept
    d_out, d_last = cotangents
    *d_rows, d_state = passes.backward(rows, passes.states(rows, state), d_out, d_last)
    dq, dk, dv, d_decays, d_betas = d_rows
    # Integers have no gradient.
    return Chunk(dq, dk, dv, d_decays, d_betas, None), d_state  # type: ignore[arg-type]


run_rows.defvjp(_forward, _backward)


def sum_over_group(x: Array, kv_heads: int) -> Array:
    """[B T N H] -> [B T K H], the sum over the heads that share a key."""
    batch, length, _, width = x.shape
    shared = x.reshape(batch, length, kv_heads, -1, width)
    return shared.sum(axis=3, dtype=jnp.float32).astype(x.dtype)

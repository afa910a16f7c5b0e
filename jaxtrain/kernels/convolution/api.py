"""The short causal convolution of each channel over the tokens of a document."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def causal_convolution(
    x: Float[Array, "B T C"],
    taps: Float[Array, "W C"],
    segment_ids: Int32[Array, "B T"] | None = None,
) -> Float[Array, "B T C"]:
    """y_t = sum_w taps_w x_{t - W + 1 + w} over tokens of t's own document.

    Each channel is summed by itself, in float32, which is the type of the result. A
    document's tokens stand together and have one segment id; padding (id 0) is not
    read, whatever it holds, and its results are 0.
    """
    length, width = x.shape[1], taps.shape[0]
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    x = jnp.where((ids != 0)[..., None], x, jnp.zeros((), x.dtype))
    padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    padded_ids = jnp.pad(ids, ((0, 0), (width - 1, 0)))
    total = jnp.zeros(x.shape, jnp.float32)
    for w in range(width):
        read = padded[:, w : w + length].astype(jnp.float32)
        own = (padded_ids[:, w : w + length] == ids) & (ids != 0)
        total += jnp.where(own[..., None], read, 0.0) * taps[w].astype(jnp.float32)
    return total


def continue_convolution(
    x: Float[Array, "B T C"],
    taps: Float[Array, "W C"],
    is_token: Bool[Array, "B T"],
    state: Float[Array, "B W-1 C"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
    """The convolution of one document a row, whose earlier inputs are `state`.

    Padding may stand anywhere; it is passed over. The second result is what follows
    `state`: the last W - 1 inputs, those of a text's first tokens zeros before it.
    """
    before = state.shape[1]
    x = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    is_token = jnp.pad(is_token, ((0, 0), (before, 0)), constant_values=True)
    # The n-th input of a row, and how many there are up to each place.
    nth = jnp.argsort(~is_token, axis=1, stable=True)
    count = jnp.cumsum(is_token, axis=1)

    def at(rank: Array) -> Array:
        places = jnp.take_along_axis(nth, rank, axis=1)
        return jnp.take_along_axis(x, places[..., None], axis=1)

    total = jnp.zeros((x.shape[0], x.shape[1] - before, x.shape[2]), jnp.float32)
    for w in range(before + 1):
        read = at(count[:, before:] - 1 - before + w)
        total += read.astype(jnp.float32) * taps[w].astype(jnp.float32)
    last = at(count[:, -1:] - before + jnp.arange(before))
    total = jnp.where(is_token[:, before:, None], total, 0.0)
    return total, last.astype(state.dtype)

"""Short causal convolutions against their definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.kernels.convolution import causal_convolution, continue_convolution

BATCH, LENGTH, WIDTH, CHANNELS = 2, 23, 4, 3


def convolved(x, taps, ids):
    """Token by token, over the tokens before in the same document."""
    out = np.zeros(x.shape)
    for b in range(len(x)):
        for document in set(ids[b]) - {0}:
            where = np.flatnonzero(ids[b] == document)
            padded = np.concatenate(
                [np.zeros((len(taps) - 1, x.shape[2])), x[b, where]]
            )
            for i, t in enumerate(where):
                out[b, t] = (padded[i : i + len(taps)] * taps).sum(axis=0)
    return out


def make_inputs(seed):
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.choice(LENGTH, (BATCH, 3)), axis=1)
    ids = (np.arange(LENGTH)[:, None] >= ends[:, None]).sum(axis=2)  # 0 is padding
    x = rng.normal(size=(BATCH, LENGTH, CHANNELS))
    return x, rng.normal(size=(WIDTH, CHANNELS)), ids


def test_documents_of_packed_rows_are_convolved_alone():
    for seed in range(8):
        x, taps, ids = make_inputs(seed)
        want = convolved(x, taps, ids)
        x[ids == 0] = np.nan
        got = causal_convolution(jnp.asarray(x), jnp.asarray(taps), jnp.asarray(ids))
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_gradients_stay_within_their_document():
    x, taps, ids = make_inputs(1)
    weights = np.random.default_rng(2).normal(size=x.shape)

    def loss(x, taps):
        return (causal_convolution(x, taps, jnp.asarray(ids)) * weights).sum()

    d_x, d_taps = jax.grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(taps))
    step = 1e-6
    for place in ((0, 20, 0), (1, 22, 2), (1, 15, 1)):
        moved = x.copy()
        moved[place] += step
        slope = (
            (convolved(moved, taps, ids) - convolved(x, taps, ids)) * weights
        ).sum()
        np.testing.assert_allclose(d_x[place], slope / step, atol=1e-4)
    assert not np.asarray(d_x)[ids == 0].any()
    # The result is linear in the taps.
    for w, c in np.ndindex(*taps.shape):
        unit = np.zeros_like(taps)
        unit[w, c] = 1
        slope = (convolved(x, unit, ids) * weights).sum()
        np.testing.assert_allclose(d_taps[w, c], slope, rtol=1e-4, atol=1e-5)


def test_a_text_may_be_convolved_in_pieces_with_padding_on_either_side():
    rng = np.random.default_rng(3)
    x, taps, _ = make_inputs(3)
    want = convolved(x, taps, np.ones((BATCH, LENGTH), int))
    state = jnp.zeros((BATCH, WIDTH - 1, CHANNELS))
    done = [0] * BATCH
    for length in (2, 9, 1, 1, 9, 9):
        piece = rng.normal(size=(BATCH, length, CHANNELS))
        is_token = np.zeros((BATCH, length), bool)
        placed = []
        for b in range(BATCH):
            count = min(rng.integers(0, length + 1), LENGTH - done[b])
            first = rng.integers(0, length - count + 1)
            is_token[b, first : first + count] = True
            piece[b, first : first + count] = x[b, done[b] : done[b] + count]
            placed.append((first, done[b], count))
            done[b] += count
        got, state = jax.jit(continue_convolution)(
            jnp.asarray(piece), jnp.asarray(taps), jnp.asarray(is_token), state
        )
        assert not np.asarray(got)[~is_token].any()
        for b, (first, start, count) in enumerate(placed):
            np.testing.assert_allclose(
                got[b, first : first + count], want[b, start : start + count], atol=1e-5
            )
    assert max(done) > 10

"""The walk over pairs of blocks, and what the loop over them is used under.

Values and gradients are in attention_test.py, with all other implementations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.aot.jaxpr_cost import count_flops
from jaxtrain.kernels.attention import attention
from jaxtrain.kernels.attention.blocked import attention_blocked, plan
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.xla_blocks import make_walk, take_step, with_blocks


@functools.partial(jax.jit, static_argnums=2)
def steps_of(counts, lists, parts):
    """How many steps there are, and the pairs of as many as there may be."""
    aways = lists.shape[2]
    walk = make_walk(counts, lists, counts.shape[1] * aways, parts)
    return walk.steps, jax.vmap(lambda step: take_step(walk, step))(
        jnp.arange(walk.most, dtype=jnp.int32)
    )


@given(st.integers(0, 2**31), st.sampled_from([1, 3, 8]))
def test_every_pair_is_visited_once_and_no_two_of_a_step_share_a_home(seed, parts):
    rng = np.random.default_rng(seed)
    batch, homes, aways = 2, 5, 4
    counts = rng.integers(0, aways + 1, (batch, homes), dtype=np.int32)
    counts[rng.random(counts.shape) < 0.3] = 0
    lists = rng.permuted(np.tile(np.arange(aways), (batch, homes, 1)), axis=2)
    count, pairs = steps_of(counts, lists.astype(np.int32), parts)
    assert count <= len(pairs.home)
    steps = list(zip(*(np.asarray(x[:count]) for x in pairs), strict=True))
    visited = []
    for home, away, target in steps:
        assert len(set(target)) == parts
        exists = target < batch * homes
        np.testing.assert_array_equal(home[exists], target[exists])
        visited += zip(home[exists], away[exists], strict=True)
    wanted = [
        (b * homes + i, b * aways + away)
        for b, i in np.ndindex(batch, homes)
        for away in lists[b, i, : counts[b, i]]
    ]
    assert sorted(visited) == sorted(wanted)
    # No step is for nothing, but where the longest list needs one a pair.
    assert len(steps) == max(-(-len(wanted) // parts), counts.max())


def test_steps_go_by_what_documents_read():
    """Eight documents of two blocks each read 3 pairs each; one of 16 reads 136."""
    kernels = with_blocks(64)

    @jax.jit
    def count(ids):
        schedule = plan(kernels, Mask(ids), 1, 1024)
        lists = (schedule.key_counts, schedule.key_blocks)
        return make_walk(*lists, visits=136, parts=4).steps

    def steps(documents):
        ids = np.repeat(np.arange(1, documents + 1), 1024 // documents)
        return count(jnp.asarray(ids[None], jnp.int32))

    assert (steps(8), steps(1)) == (24 // 4, 136 // 4)


def test_the_loop_counts_as_what_causality_and_the_window_leave():
    """9 products of each pair of blocks: 2 forward, 3 and 4 backward."""
    shape = jax.ShapeDtypeStruct((2, 256, 4, 16), jnp.float32)
    mask = Mask(jnp.ones((2, 256), jnp.int32), window=64)

    def loss(q, k, v):
        options = {"softcap": None, "scale": 1.0}
        return attention_blocked(with_blocks(64), q, k, v, mask, **options).sum()

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape)
    # Of each row the diagonal and the one below: 14, in steps of half the blocks.
    pairs = 16
    assert pairs - 4 < 2 * (4 + 3) <= pairs
    product = 2 * 4 * 64 * 64 * 16
    delta = 2 * 2 * 256 * 4 * 16
    assert count_flops(traced) == 9 * pairs * product + delta


@pytest.mark.parametrize("transform", ["vmap", "checkpoint"])
def test_transforms_change_no_gradient(transform):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 70, n, 8)), jnp.float32) for n in (4, 2, 2)
    )
    # Rows of other lengths of documents, so that their loops differ too.
    ids = np.stack([np.repeat([1, 2, 0], [50, 15, 5]), np.repeat([1, 2], [8, 62])])
    call = functools.partial(attention, implementation="xla_blocks")

    def loss(q, k, v, ids):
        return jnp.sin(call(q, k, v, segment_ids=ids)).sum()

    def of_rows(q, k, v, ids):
        rows = (x[:, None] for x in (q, k, v, ids))
        return jax.vmap(loss)(*rows).sum()

    changed = {"vmap": of_rows, "checkpoint": jax.checkpoint(loss)}[transform]
    arrays = (q, k, v, jnp.asarray(ids, jnp.int32))
    have = jax.jit(jax.grad(changed, (0, 1, 2)))(*arrays)
    wanted = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    for one, other in zip(have, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)

"""Block lists against the dense mask they stand for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.kernels.attention.masks import Mask, whole_mask
from jaxtrain.kernels.attention.schedule import make_schedule


def read_lists(lists, rows, columns):
    """(visited, whole) as dense [B rows columns]."""
    counts, wholes, blocks = (np.asarray(x) for x in lists)
    visited = np.zeros((len(counts), rows, columns), bool)
    whole = np.zeros_like(visited)
    for b, i in np.ndindex(*counts.shape):
        listed, rest = np.split(blocks[b, i], [counts[b, i]])
        assert len(set(listed)) == len(listed), "a block is listed twice"
        assert not len(listed) or (rest == listed[-1]).all()
        visited[b, i, listed] = True
        whole[b, i, listed[: wholes[b, i]]] = True
    return visited, whole


def compare_with_dense(mask, block_q, block_k, exact):
    (batch, queries), keys = mask.segment_ids.shape, mask.keys.shape[1]
    blocks = {"block_q": block_q, "block_k": block_k}
    schedule = make_schedule(mask, batch, queries, keys, **blocks)
    rows, columns = queries // block_q, keys // block_k
    dense = np.broadcast_to(whole_mask(mask, queries, keys), (batch, queries, keys))
    dense = dense.reshape(batch, rows, block_q, columns, block_k)
    by_query = read_lists(
        (schedule.key_counts, schedule.key_wholes, schedule.key_blocks), rows, columns
    )
    by_key = read_lists(
        (schedule.query_counts, schedule.query_wholes, schedule.query_blocks),
        columns,
        rows,
    )
    for one, other in zip(by_query, by_key, strict=True):
        np.testing.assert_array_equal(one, other.swapaxes(1, 2))
    order = np.asarray(schedule.query_order)
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(rows), (batch, 1)))
    in_order = np.take_along_axis(np.asarray(schedule.key_counts), order, axis=1)
    assert (np.diff(in_order, axis=1) <= 0).all(), "the longest walks come first"
    visited, whole = by_query
    assert not (dense.any((2, 4)) & ~visited).any(), "an allowed entry is left out"
    assert not (whole & ~dense.all((2, 4))).any(), "a masked entry is called whole"
    if exact:
        np.testing.assert_array_equal(visited, dense.any((2, 4)))
        np.testing.assert_array_equal(whole, dense.all((2, 4)))


windows = st.none() | st.integers(1, 40)


@given(st.data(), windows, st.sampled_from([(4, 8), (8, 4), (8, 8)]), st.booleans())
def test_random_ids_lose_no_entry(data, window, blocks, is_part):
    ids = st.lists(st.integers(0, 3), min_size=32, max_size=32)
    segments = jnp.asarray([data.draw(ids), data.draw(ids)], jnp.int32)
    prompt_ids = None
    if data.draw(st.booleans(), "prompts are shared"):
        prompt_ids = jnp.asarray([data.draw(ids), data.draw(ids)], jnp.int32)
    mask = Mask(segments, prompt_ids, True, window)
    if is_part:
        mask = dataclasses.replace(
            mask,
            segment_ids=segments[:, 5:29],
            prompt_ids=None if prompt_ids is None else prompt_ids[:, 5:29],
            key_ids=segments,
            offset=5,
        )
    compare_with_dense(mask, *blocks, exact=False)


@pytest.mark.parametrize("window", [None, 24])
def test_packed_documents_are_listed_exactly(window):
    lengths = [[16, 40, 3, 5], [64], [30, 2]]
    rows = [np.repeat(np.arange(1, len(r) + 1), r) for r in lengths]
    segments = np.stack([np.pad(row, (0, 64 - len(row))) for row in rows])
    mask = Mask(jnp.asarray(segments, jnp.int32), None, True, window)
    # A window that starts inside a document can leave a corner empty.
    compare_with_dense(mask, 8, 8, exact=window is None)


def test_a_rejected_response_skips_the_chosen_one():
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [8, 16, 8], axis=1), jnp.int32)
    prompts = jnp.where(segments > 1, 1, 0)
    mask = Mask(segments, prompts)
    compare_with_dense(mask, 8, 8, exact=True)
    schedule = make_schedule(mask, 1, 32, block_q=8, block_k=8)
    assert schedule.key_blocks[0, 3].tolist() == [0, 3, 3, 3]  # the prompt, itself
    assert (schedule.key_wholes[0, 3], schedule.key_counts[0, 3]) == (1, 2)


def test_a_row_of_padding_visits_nothing():
    mask = Mask(jnp.zeros((1, 16), jnp.int32))
    schedule = make_schedule(mask, 1, 16, block_q=8, block_k=8)
    assert not schedule.key_counts.any() and not schedule.query_counts.any()


def test_a_length_no_block_cuts_is_refused():
    with pytest.raises(ValueError, match="30"):
        make_schedule(Mask(), 1, 30, block_q=8, block_k=8)

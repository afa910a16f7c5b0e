import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.batches.pack import pack_best_fit, split_documents, wrap_stream


def rows_of(lengths, capacity):
    offsets, documents = pack_best_fit(np.asarray(lengths), capacity)
    spans = itertools.pairwise(offsets)
    return [documents[a:b].tolist() for a, b in spans]


def best_fit_one_by_one(lengths, capacity):
    """The definition: the longest first, into the fullest row with room.

    Yields each length and the rooms that rows have left when all of it are placed, the
    smallest first. Of rows with the same room either may be taken: it changes no room.
    """
    left: list[int] = []
    for length, equal in itertools.groupby(sorted(lengths, reverse=True)):
        for _ in equal:
            space = min((room for room in left if room >= length), default=capacity)
            if space in left:
                left.remove(space)
            left.append(space - length)
        yield length, sorted(left)


def test_documents_fill_rows_best_fit_first():
    # 7 opens row 0 (1 left); 5 opens row 1 (3 left); 3 fits row 1; 1 fits row 0.
    assert rows_of([1, 5, 3, 7], 8) == [[3, 0], [1, 2]]


def test_a_row_takes_as_many_equal_documents_as_fit():
    assert rows_of([3] * 5, 8) == [[0, 1], [2, 3], [4]]
    assert rows_of([3, 2, 2], 8) == [[0, 1, 2]]  # room for two 3s, but there is one


@settings(max_examples=60)
@given(st.lists(st.integers(1, 17), max_size=60))
def test_packing_is_best_fit_decreasing(lengths):
    rows = [[lengths[d] for d in row] for row in rows_of(lengths, 17)]
    for length, left in best_fit_one_by_one(lengths, 17):
        placed = [[n for n in row if n >= length] for row in rows]
        assert sorted(17 - sum(row) for row in placed if row) == left


@given(st.lists(st.integers(1, 32), max_size=200))
def test_every_document_is_packed_once_and_no_row_overflows(lengths):
    rows = rows_of(lengths, 32)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in row) <= 32 for row in rows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 20))
def test_splitting_loses_no_token_and_crosses_no_document(lengths, capacity):
    lengths = np.asarray(lengths)
    starts = np.cumsum(lengths) - lengths
    new_starts, new_lengths = split_documents(starts, lengths, capacity)
    assert new_lengths.max() <= capacity and new_lengths.min() > 0
    covered = [
        np.arange(s, s + n) for s, n in zip(new_starts, new_lengths, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(covered), np.arange(lengths.sum()))
    document = np.repeat(np.arange(len(lengths)), lengths)
    assert all(len(set(document[span])) == 1 for span in covered)


def test_a_wrapped_stream_is_cut_into_full_rows():
    starts, lengths = wrap_stream(10, 4)
    assert starts.tolist() == [0, 4, 8] and lengths.tolist() == [4, 4, 2]


def test_packing_no_document_gives_no_row():
    assert rows_of([], 8) == []


@pytest.mark.parametrize("lengths", [[9], [0, 3]])
def test_a_document_that_no_row_can_hold_is_refused(lengths):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.8"):
        pack_best_fit(np.asarray(lengths), 8)


def test_a_million_documents_pack_in_seconds():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.0, 1_000_000).astype(int) + 1, 4096)
    start = time.process_time()
    offsets, documents = pack_best_fit(lengths, 4096)
    assert time.process_time() - start < 10
    assert len(documents) == 1_000_000
    assert lengths.sum() / (4096 * (len(offsets) - 1)) > 0.999

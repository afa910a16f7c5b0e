import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.batches.pipeline import (
    BatchShape,
    RowOrder,
    make_eval_iterator,
    steps_per_epoch,
)
from jaxtrain.record.diagnostics import named_arrays

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from iterators import make_train_iterator

STATS = DataStats()


def numbered_rows(count: int) -> PreparedDataset:
    """Row r holds the tokens [r, r, r + 1]: its first token tells its number."""
    rows = np.arange(count)
    store = TokenStore(
        tokens=np.stack([rows, rows, rows + 1], axis=1).ravel().astype(np.int32),
        trained=np.ones(3 * count, bool),
        starts=3 * rows,
        lengths=np.full(count, 3),
        row_documents=rows,
        row_offsets=np.arange(count + 1),
    )
    return PreparedDataset("next_token", {"": store}, 4, 0, STATS)


def row_numbers(batch) -> list[int]:
    """Rows of a batch, in order, empty ones left out."""
    real = batch.segment_ids[..., 0] > 0
    return batch.tokens[..., 0][real].tolist()


def test_an_epoch_has_as_many_steps_as_hugging_faces():
    assert steps_per_epoch(10, 4, 1) == 3
    assert steps_per_epoch(10, 4, 2) == 2
    assert steps_per_epoch(3, 4, 8) == 1


def test_batches_have_accumulation_and_rows_in_front():
    rows = make_train_iterator(
        numbered_rows(5), micro_batch_rows=2, accumulation_steps=2,
        shuffle=False, num_epochs=1,
    )  # fmt: skip
    first, last = list(rows)
    assert {a.shape for a in named_arrays(first).values()} == {(2, 2, 4)}
    assert first.tokens[..., 0].tolist() == [[0, 1], [2, 3]]
    assert last.tokens[..., 0].tolist() == [[4, 0], [0, 0]]
    assert last.segment_ids[..., 0].tolist() == [[1, 0], [0, 0]]
    assert last.loss_mask.sum() == 2


@settings(max_examples=10)
@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(
    rows, batch, accumulation, seed
):
    order = RowOrder(rows, BatchShape(batch, accumulation), seed=seed)
    epochs = []
    for epoch in range(3):
        steps = range(order.steps_per_epoch)
        places = [order.rows(epoch * order.steps_per_epoch + s).ravel() for s in steps]
        flat = np.concatenate(places)
        assert (flat[rows:] == -1).all()  # only the end of an epoch is filled up
        epochs.append(flat[:rows].tolist())
        assert sorted(epochs[-1]) == list(range(rows))
    if rows > 12:
        assert epochs[0] != epochs[1] != epochs[2]
        other = RowOrder(rows, BatchShape(rows), seed=seed ^ 1)
        assert epochs[0] != other.rows(0)[0].tolist()


@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 3),
    processes=st.integers(1, 4),
    step=st.integers(0, 30),
)
def test_processes_take_columns_of_one_global_batch(rows, batch, processes, step):
    alone = RowOrder(rows, BatchShape(batch * processes, 2), seed=7).rows(step)
    shares = [
        RowOrder(rows, BatchShape(batch, 2, index, processes), seed=7).rows(step)
        for index in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), alone)


def as_bytes(batch) -> bytes:
    return b"".join(array.tobytes() for _, array in sorted(named_arrays(batch).items()))


def iterator(**options):
    defaults = {"micro_batch_rows": 2, "accumulation_steps": 2, "num_epochs": 3}
    return make_train_iterator(numbered_rows(11), **(defaults | options))


@settings(max_examples=5)
@given(stop=st.integers(0, 9), prefetch=st.integers(1, 3))
def test_a_resumed_iterator_gives_the_same_bytes(stop, prefetch):
    whole = [as_bytes(batch) for batch in iterator()]
    interrupted = iterator(prefetch=prefetch)
    for _ in range(stop):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = iterator()
    resumed.set_state(state)
    assert len(resumed) == 9 - stop
    assert [as_bytes(batch) for batch in resumed] == whole[stop:]
    # Also going back on an iterator that has read on.
    interrupted.set_state(state)
    assert [as_bytes(batch) for batch in interrupted] == whole[stop:]


def test_the_state_holds_for_any_process_count():
    one = iterator(micro_batch_rows=4)
    next(one)
    two = [
        iterator(process_index=i, process_count=2, micro_batch_rows=2) for i in range(2)
    ]
    for half in two:
        half.set_state(one.get_state())
    expected = next(one)
    halves = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *map(next, two))
    assert as_bytes(halves) == as_bytes(expected)


@pytest.mark.slow
def test_worker_processes_change_nothing():
    whole = [as_bytes(batch) for batch in iterator()]
    two = iterator(num_workers=2)
    read = [as_bytes(next(two)) for _ in range(4)]
    state = two.get_state()
    two.close()
    one = iterator(num_workers=1)
    one.set_state(state)
    read += [as_bytes(batch) for batch in one]
    one.close()
    assert read == whole
    assert state == {**iterator().get_state(), "next_step": 4}


def test_a_state_of_other_data_or_order_is_refused():
    state = iterator().get_state()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        iterator(seed=1).set_state(state)
    other = make_train_iterator(
        numbered_rows(12), micro_batch_rows=2, accumulation_steps=2, num_epochs=3
    )
    with pytest.raises(
        ValueError, match=r"fingerprint was .*num_rows was 11 and is 12"
    ):
        other.set_state(state)


def test_steps_or_fractions_of_epochs_end_the_iteration():
    assert len(list(iterator(num_epochs=None, num_steps=4))) == 4
    assert len(list(iterator(num_epochs=0.5))) == 2  # ceil(0.5 * 3)
    done = iterator(num_epochs=None, num_steps=4)
    done.set_state(done.get_state(4))
    assert len(list(done)) == 0


@given(rows=st.integers(1, 20), batch=st.integers(1, 4), processes=st.integers(1, 3))
@settings(max_examples=10)
def test_evaluation_sees_every_row_once_in_order(rows, batch, processes):
    shares = [
        list(
            make_eval_iterator(
                numbered_rows(rows), BatchShape(batch, 1, index, processes)
            )
        )
        for index in range(processes)
    ]  # fmt: skip
    assert len({len(share) for share in shares}) == 1
    seen = []
    for batches in zip(*shares, strict=True):
        assert all(b.tokens.shape == (batch, 4) for b in batches)
        joined = jax.tree.map(lambda *x: np.concatenate(x), *batches)
        seen += row_numbers(joined)
    assert seen == list(range(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3}, "give exactly one"),
        ({"num_epochs": None}, "give exactly one"),
        ({"micro_batch_rows": 0}, "micro_batch_rows=0"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"process_index": 1}, "process_index=1 must lie in"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"prefetch": 0}, "prefetch=0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        iterator(**options)

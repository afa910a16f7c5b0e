"""Rows of one length, of which the loss head scores what is trained alone."""

import dataclasses

import numpy as np
import pytest

from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.batches.pipeline import (
    BatchShape,
    Reading,
    make_train_iterator,
    score_trained,
)
from jaxtrain.record.diagnostics import named_arrays

ROWS, LENGTH = 90, 256


def packed_rows(share=0.6, seed=0) -> PreparedDataset:
    """Rows of a few documents each, about so much of which is trained."""
    random = np.random.default_rng(seed)
    lengths = random.integers(20, 80, 3 * ROWS)
    documents = np.arange(3 * ROWS)
    total = int(lengths.sum())
    prompts = np.concatenate([np.arange(n) < (1 - share) * n for n in lengths])
    store = TokenStore(
        tokens=random.integers(1, 90, total).astype(np.int32),
        trained=~prompts,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        row_documents=documents,
        row_offsets=np.arange(0, 3 * ROWS + 1, 3),
    )
    return PreparedDataset("next_token", {"": store}, LENGTH, 0, DataStats())


def iterate(data, shards, shape=None, **options):
    batches = make_train_iterator(
        data, shape or BatchShape(8), Reading(seed=3), num_epochs=2, **options
    )
    score_trained(batches, shards)
    return batches


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_trained_prediction_has_its_place(shards):
    data = packed_rows()
    plain = make_train_iterator(data, BatchShape(8), Reading(seed=3), num_epochs=2)
    for expected, batch in zip(plain, iterate(data, shards), strict=True):
        lines = batch.loss_mask.reshape(1, shards, -1)
        assert batch.scored.shape[:2] == (1, shards)
        assert batch.scored.shape[2] % 128 == 0
        assert batch.scored.shape[2] <= 0.9 * lines.shape[2]
        for line, places in zip(lines[0], batch.scored[0], strict=True):
            inside = places[places < len(line)]
            assert inside.tolist() == np.flatnonzero(line).tolist()
        less = dataclasses.replace(batch, scored=None)
        wanted = named_arrays(expected)
        for name, array in named_arrays(less).items():
            np.testing.assert_array_equal(array, wanted[name])


def test_processes_read_the_columns_of_one_batch_and_agree():
    """Also where the rows of one of them alone are too full for the others' places."""
    data = packed_rows(share=0.4)
    both = [iterate(data, 4, BatchShape(4, 2, index, 2)) for index in range(2)]
    whole = iterate(data, 4, BatchShape(8, 2))
    for batches in (whole, *both):
        batches.reader = dataclasses.replace(
            batches.reader, scoring=whole.reader.scoring._replace(places=145)
        )
    kinds = set()
    for expected, *parts in zip(whole, *both, strict=True):
        kinds.add(expected.scored is None)
        if expected.scored is None:
            assert parts[0].scored is None and parts[1].scored is None
        else:
            joined = np.concatenate([part.scored for part in parts], axis=1)
            np.testing.assert_array_equal(joined, expected.scored)
    assert kinds == {False, True}


def test_where_most_is_trained_the_head_scores_all():
    assert iterate(packed_rows(share=1.0), 1).reader.scoring is not None  # padding
    store = packed_rows(share=1.0).stores[""]
    full = dataclasses.replace(packed_rows(), stores={"": store}, row_length=192)
    batches = iterate(full, 1)
    assert batches.reader.scoring is None and next(batches).scored is None


def test_short_rows_of_a_curriculum_are_scored_whole():
    scoring = iterate(packed_rows(), 1).reader.scoring
    data = packed_rows()
    rows = np.arange(8)[None]
    assert scoring.select(data.batch(rows), 1).scored is not None
    short = data.batch(rows, row_length=240)
    assert scoring._replace(places=1792).select(short, 1) is short

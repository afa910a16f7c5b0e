"""Packing each micro-batch: every example once, in its micro-batch, in few shapes."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.batches.layout import (
    MOST_SHAPES,
    RowPacking,
    RowShape,
    _least_padding,
    choose_packing,
    cover,
    lengths_of,
)
from jaxtrain.data.batches.pipeline import BatchShape, RowOrder


def log_normal_lengths(count, sides, seed=0):
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(np.log(218), 0.8, (count, sides)))
    return np.clip(lengths.astype(np.int64), 2, 1024)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),  # examples of the data
    st.integers(1, 9),  # examples of a micro-batch
    st.integers(1, 3),  # micro-batches of a step
    st.sampled_from([1, 2, 4]),  # devices
    st.sampled_from([1, 2]),  # rows side by side
    st.booleans(),
    st.integers(0, 99),
)
def test_every_example_is_in_one_row_of_its_micro_batch(
    count, examples, accumulation, shards, sides, varies_rows, seed
):
    lengths = log_normal_lengths(count, sides, seed)
    order = RowOrder(count, BatchShape(examples, accumulation), seed)
    packing = choose(lengths, order, shards, varies_rows=varies_rows)
    assert len(packing.shapes) <= MOST_SHAPES
    for step in range(2 * order.steps_per_epoch):
        drawn = order.rows(step)
        slots, (_, length, _) = packing.place(drawn, lengths_of(lengths, drawn))
        assert slots.shape[1] % shards == 0
        for held, asked in zip(slots, drawn, strict=True):
            assert sorted(held[held >= 0]) == sorted(asked[asked >= 0])
            gaps = np.diff((held >= 0).astype(int), axis=1) > 0
            assert not gaps.any(), "a row has a gap"
            filled = np.where(held[..., None] >= 0, lengths[held], 0).sum(1)
            assert filled.max() <= length


def choose(lengths, order, shards, *, varies_rows):
    return choose_packing(
        lengths,
        order.sample(),
        order.steps_per_epoch,
        shards=shards,
        row_length=int(lengths.max()) if varies_rows else None,
    )


@pytest.mark.parametrize("varies_rows", [False, True])
def test_a_step_that_fits_in_no_shape_gets_one_of_its_own(varies_rows):
    order = RowOrder(64, BatchShape(8), shuffle=False)
    packing = choose(np.full((64, 1), 10), order, 2, varies_rows=varies_rows)
    if varies_rows:
        packing = dataclasses.replace(packing, shapes=(RowShape(1, 700),))
    slots, (_, length, _) = packing.place(np.arange(8)[None], np.full((1, 8, 1), 600))
    assert sorted(slots[slots >= 0]) == list(range(8))
    assert (slots >= 0).sum(-1).max() * 600 <= length
    assert slots.shape[1] % 2 == 0


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("most", [1024, 2048])
def test_at_least_88_percent_of_the_computed_tokens_are_useful(shards, most):
    """Log-normal lengths, sigma 0.8, mean 300; 8 examples on each device."""
    random = np.random.default_rng(0)
    mean = np.log(300) - 0.8**2 / 2
    lengths = np.exp(random.normal(mean, 0.8, (50_000, 1))).astype(np.int64)
    lengths = np.clip(lengths, 2, most)
    order = RowOrder(len(lengths), BatchShape(8 * shards))
    packing = choose(lengths, order, shards, varies_rows=False)
    useful = computed = 0
    for drawn in order.sample()[: order.steps_per_epoch]:
        slots, shape = packing.place(drawn, lengths_of(lengths, drawn))
        useful += lengths[drawn].sum()
        computed += slots.shape[1] * shape.length
    assert useful / computed >= 0.88


@pytest.mark.parametrize("shards", [1, 2])
def test_rows_of_examples_as_long_as_any_hold_no_padding(shards):
    """Room for longer ones than the sample's would be for none that can come."""
    lengths = np.full((1_000, 1), 2048)
    lengths[::100] = 1900
    order = RowOrder(len(lengths), BatchShape(8 * shards))
    packing = choose(lengths, order, shards, varies_rows=False)
    assert packing.shapes[-1].tokens == 8 * 2048


@settings(deadline=None)
@given(
    st.integers(1, 12),  # examples of a micro-batch
    st.sampled_from([1, 2, 4]),  # devices
    st.sampled_from([1, 2]),  # rows side by side
    st.booleans(),
    st.integers(0, 99),
)
def test_the_largest_of_the_covering_shapes_holds_any_micro_batch(
    examples, shards, sides, varies_rows, seed
):
    short = np.full((64, sides), 10)
    order = RowOrder(64, BatchShape(examples), shuffle=False)
    packing = choose_packing(
        short,
        order.sample(),
        1000,
        shards=shards,
        row_length=256 if varies_rows else None,
        most_shapes=6,
    )
    packing = cover(packing, 256, examples)
    assert len(packing.shapes) <= MOST_SHAPES + 1
    tokens = [shape.tokens for shape in packing.shapes]
    assert tokens == sorted(tokens)
    assert tokens[-1] <= max(256, 128) * -(-examples // shards) + 128
    drawn = np.arange(examples)[None]
    random = np.random.default_rng(seed)
    lengths = random.choice([1, 2, 255, 256], (1, examples, sides))
    for each in (lengths, np.full_like(lengths, 256)):
        slots, shape = packing.place(drawn, each)
        assert shape in packing.shapes and slots.shape[1] == shards * shape.rows
        assert sorted(slots[slots >= 0]) == list(range(examples))
        held = np.where(slots[..., None] >= 0, each[0][slots], 0).sum(2)
        assert held.max() <= shape.length


def test_a_micro_batch_that_only_fits_with_as_many_examples_in_each_row_fits():
    """By tokens of both sides, the first device is full with the first pair alone."""
    packing = RowPacking(2, 4, (RowShape(1, 512),), varies_rows=False)
    lengths = np.asarray([[[256, 256], [200, 1], [200, 1], [200, 1]]])
    slots, shape = packing.place(np.arange(4)[None], lengths)
    assert shape.length == 512 and (slots >= 0).sum(-1).tolist() == [[2, 2]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4))
def test_the_chosen_sizes_leave_the_least_padding(needed, limit):
    found = _least_padding(np.asarray(needed), limit)

    def excess(sizes):
        if max(needed) > max(sizes):
            return np.inf
        return sum(min(s for s in sizes if s >= n) - n for n in needed)

    every = itertools.chain.from_iterable(
        itertools.combinations(sorted(set(needed)), k) for k in range(1, limit + 1)
    )
    assert len(found) <= limit
    assert excess(found) == min(map(excess, every))


@settings(deadline=None)
@given(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(0, 99))
def test_rows_have_room_for_all_that_they_train(shards, sides, seed):
    """The head scores less than whole rows, and whole rows where more is trained."""
    lengths = log_normal_lengths(200, sides, seed)
    random = np.random.default_rng(seed)
    trained = (lengths * random.uniform(0.2, 0.6, lengths.shape)).astype(np.int64)
    order = RowOrder(200, BatchShape(8 * shards), seed)
    packing = choose_packing(
        lengths, order.sample(), 4000, shards=shards, row_length=None, trained=trained
    )
    assert all(0 < shape.scored <= 0.9 * shape.length for shape in packing.shapes)
    for step in range(2 * order.steps_per_epoch):
        drawn = order.rows(step)
        own, some = (lengths_of(counts, drawn) for counts in (lengths, trained))
        slots, shape = packing.place(drawn, own, some)
        held = np.where(slots[..., None] >= 0, trained[slots], 0).sum(2)
        assert held.max() <= (shape.scored or shape.length)
        slots, shape = packing.place(drawn, own)  # as if all were trained
        held = np.where(slots[..., None] >= 0, lengths[slots], 0).sum(2)
        assert held.max() <= (shape.scored or shape.length)

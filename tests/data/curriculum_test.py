"""Curricula: stages and their order, by hand and by property."""

import dataclasses
import logging
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config import CurriculumSection
from jaxtrain.data.batches.curriculum import (
    first_steps,
    levels,
    make_first_pass,
    make_stages,
    plan_first_pass,
    round_length,
)
from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from iterators import make_train_iterator

STATS = DataStats()


def rows_of_lengths(lengths, row_length) -> PreparedDataset:
    """One document a row; its first token is the row's number."""
    lengths = np.asarray(lengths)
    starts = np.cumsum(lengths) - lengths
    tokens = np.zeros(lengths.sum(), np.int32)
    tokens[starts] = np.arange(len(lengths))
    store = TokenStore(
        tokens,
        np.ones(len(tokens), bool),
        starts,
        lengths,
        np.arange(len(lengths)),
        np.arange(len(lengths) + 1),
    )
    return PreparedDataset("next_token", {"": store}, row_length, 0, STATS)


def section(**options) -> CurriculumSection:
    given = {"enabled": True, "start_length": 16, "end_length": 128, "steps": 8}
    return CurriculumSection(**({"num_buckets": 4} | given | options))


def test_levels_are_evenly_spaced_on_a_logarithmic_scale():
    np.testing.assert_allclose(levels(128, 2048, 5), [128, 256, 512, 1024, 2048])
    assert levels(64, 64, 5).tolist() == [64]
    assert levels(16, 64, 1).tolist() == [64]


def test_a_level_starts_when_the_rising_limit_reaches_it():
    # 128 + 1920 s / 1000 reaches 256 at 66.7, 512 at 200, 1024 at 466.7.
    steps = first_steps(np.array([128, 256, 512, 1024, 2048.0]), 1000)
    assert steps.tolist() == [0, 67, 200, 467, 1000]


def test_lengths_are_rounded_up_to_what_kernels_like():
    assert [round_length(n) for n in (10, 16, 64, 65, 200)] == [16, 16, 64, 128, 256]


def test_stages_by_length_as_derived_by_hand():
    data = rows_of_lengths([100, 10, 30, 16, 128], 128)
    found = make_stages(data, np.arange(5), section())
    # Levels 16, 32, 64, 128; nothing is 33 to 64 tokens long, so that stage falls out.
    assert [(s.first_step, s.rows.tolist(), s.row_length) for s in found] == [
        (0, [1, 3], 16),
        (2, [1, 2, 3], 32),
        (8, [0, 1, 2, 3, 4], 128),
    ]


def test_stages_by_difficulty_take_the_easiest_share():
    data = rows_of_lengths([20] * 8, 64).with_difficulty(
        np.array([7, 0, 6, 1, 5, 2, 4, 3])
    )
    found = make_stages(data, np.arange(8), section(strategy="difficulty_based"))
    assert [s.rows.tolist() for s in found] == [
        [1],
        [1, 3],
        [1, 3, 5, 7],
        list(range(8)),
    ]
    assert {s.row_length for s in found} == {64}


def test_a_curriculum_whose_first_limit_holds_no_row_starts_with_the_next():
    found = make_stages(rows_of_lengths([40, 90], 128), np.arange(2), section())
    assert [(s.first_step, s.rows.tolist()) for s in found] == [(0, [0]), (8, [0, 1])]


lengths = st.lists(st.integers(2, 120), min_size=2, max_size=60)


@given(lengths, st.integers(1, 8), st.integers(1, 30), st.integers(0, 9), st.booleans())
def test_the_first_pass_has_every_row_within_the_limit_of_its_step(
    lengths, rows_per_step, steps, seed, shuffle
):
    data = rows_of_lengths(lengths, 128)
    stages = make_stages(data, np.arange(len(data)), section(steps=steps))
    found = make_first_pass(stages, rows_per_step, seed=seed, shuffle=shuffle)
    flat = found.rows.ravel()
    drawn = np.bincount(flat[flat >= 0], minlength=len(data))
    assert (drawn >= 1).all()
    for row_length, rows in zip(found.row_lengths, found.rows, strict=True):
        assert all(lengths[row] <= row_length for row in rows if row >= 0)
    assert (np.diff(found.row_lengths) >= 0).all()
    ramp = stages[-1].first_step
    assert (found.rows[:ramp] >= 0).all()  # only the pass's end is filled up
    # Where easy rows suffice, none is repeated: it is one epoch.
    eligible = [len(stage.rows) for stage in stages[:-1]]
    ends = [stage.first_step * rows_per_step for stage in stages[1:]]
    if all(end <= count for end, count in zip(ends, eligible, strict=True)):
        assert (drawn == 1).all()
    again = make_first_pass(stages, rows_per_step, seed=seed, shuffle=shuffle)
    assert again.fingerprint == found.fingerprint


def batches_of(data, **options):
    given = {
        "micro_batch_rows": 2,
        "accumulation_steps": 2,
        "num_steps": 30,
        "seed": 3,
        "curriculum": section(),
    }
    return make_train_iterator(data, **(given | options))


DATA = rows_of_lengths(np.random.default_rng(0).integers(4, 120, 60), 128)


def numbers_of(batch):
    return batch.tokens[..., 0][batch.segment_ids[..., 0] > 0].tolist()


def test_batches_grow_and_every_row_is_trained():
    batches = list(batches_of(DATA))
    shapes = [batch.tokens.shape for batch in batches]
    assert [shape[-1] for shape in shapes[:9]] == [16, 16, 32, 32, 64, 64, 64, 64, 128]
    assert {shape[:-1] for shape in shapes} == {(2, 2)}
    tokens = [np.count_nonzero(batch.segment_ids) / 4 for batch in batches]
    assert tokens[0] < 16 < np.mean(tokens[4:8]) < 64
    assert {n for batch in batches for n in numbers_of(batch)} == set(range(60))


def test_an_epoch_after_the_first_pass_is_an_ordinary_one():
    iterator = batches_of(DATA, num_steps=80)
    ordinary = batches_of(DATA, num_steps=80, curriculum=None)
    all_batches = list(iterator)
    # 8 rising steps draw 32 rows, some of them twice, and the rest follow.
    plan = plan_first_pass(
        DATA, section(), rows_per_step=4, num_steps=80, seed=3, shuffle=True
    )[1]
    tail = all_batches[len(plan) :]
    for ours, theirs in zip(tail, ordinary, strict=False):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@given(stop=st.integers(0, 29))
def test_resume_within_a_curriculum_gives_the_same_bytes(stop):
    whole = [batch.tokens.tobytes() for batch in batches_of(DATA)]
    state = batches_of(DATA).get_state() | {"next_step": stop}
    resumed = batches_of(DATA)
    resumed.set_state(state)
    assert [batch.tokens.tobytes() for batch in resumed] == whole[stop:]


def test_another_curriculum_refuses_the_state():
    state = batches_of(DATA).get_state()
    with pytest.raises(ValueError, match="curriculum was"):
        batches_of(DATA, curriculum=section(steps=9)).set_state(state)
    with pytest.raises(ValueError, match="curriculum was"):
        batches_of(DATA, curriculum=None).set_state(state)


def test_processes_share_one_global_batch():
    alone = list(batches_of(DATA, micro_batch_rows=4))
    halves = [
        list(batches_of(DATA, process_index=index, process_count=2))
        for index in range(2)
    ]
    for whole, *parts in zip(alone, *halves, strict=True):
        joined = np.concatenate([part.tokens for part in parts], axis=1)
        np.testing.assert_array_equal(joined, whole.tokens)


@pytest.mark.slow
def test_worker_processes_change_nothing():
    iterator = batches_of(DATA, num_workers=2, num_steps=12)
    read = [batch.tokens.tobytes() for batch in iterator]
    iterator.close()
    assert read == [b.tokens.tobytes() for b in batches_of(DATA, num_steps=12)]


def test_packed_documents_share_rows_with_their_like(bpe):
    texts = [{"text": "the sky " * n} for n in [1, 2, 3, 1, 2, 25, 30, 4, 5, 2, 1, 3]]
    data = prepare(
        texts,
        bpe,
        PrepareOptions(objective="next_token", max_length=128, packing="bfd"),
    )
    assert data.packed
    curriculum = section(start_length=16, end_length=128, num_buckets=2, steps=2)
    extended, plan = plan_first_pass(
        data, curriculum, rows_per_step=1, num_steps=50, seed=0, shuffle=True
    )
    assert len(extended) > len(data) and plan.rows.min() >= len(data)
    tokens = 0
    for row in np.unique(plan.rows):
        first, last = extended.stores[""].row_offsets[row : row + 2]
        inside = extended.stores[""].row_documents[first:last]
        short = extended.stores[""].lengths[inside] <= 16
        assert short.all() or not short.any()
        tokens += extended.stores[""].lengths[inside].sum()
    assert tokens == data.stats.tokens  # every document once
    batches = list(batches_of(data, curriculum=curriculum, num_steps=6))
    assert [batch.tokens.shape[-1] for batch in batches][:3] == [16, 16, 128]
    assert batches[0].segment_ids.max() > 1


def test_training_that_ends_before_the_first_pass_is_warned_of(caplog):
    list(batches_of(DATA, num_steps=3))
    assert "48 of 60 rows are never trained" in caplog.text
    assert "training.curriculum.steps" in caplog.text


def test_a_curriculum_that_does_nothing_is_warned_of(caplog):
    caplog.set_level(logging.INFO, logger="jaxtrain")
    batches_of(rows_of_lengths([8, 9, 10], 16))
    assert "does nothing" in caplog.text


def test_difficulty_is_needed_where_asked_for():
    curriculum = section(strategy="difficulty_based")
    with pytest.raises(ValueError, match=r"no difficulty.*curriculum\.column"):
        batches_of(DATA, curriculum=curriculum)
    with pytest.raises(ValueError, match="one finite number for each of the 60 rows"):
        DATA.with_difficulty(np.zeros(3))


def test_difficulty_comes_from_a_column(bpe, tmp_path):
    rows = [{"text": "the sky", "level": n} for n in (3, 1, 2.5)]
    data = prepare(
        rows,
        bpe,
        PrepareOptions(
            objective="next_token", max_length=64, difficulty_column="level"
        ),
    )
    assert data.difficulty.tolist() == [3, 1, 2.5]
    data.save(tmp_path)
    assert PreparedDataset.load(tmp_path).difficulty.tolist() == [3, 1, 2.5]
    rows[1]["level"] = "1.0"  # as a cell of a csv file
    options = PrepareOptions("next_token", 64, difficulty_column="level")
    assert prepare(rows, bpe, options).difficulty.tolist() == [3, 1, 2.5]
    rows[1]["level"] = "easy"
    with pytest.raises(ValueError, match=r"row 1: level is 'easy', expected a number"):
        prepare(
            rows,
            bpe,
            PrepareOptions(
                objective="next_token", max_length=64, difficulty_column="level"
            ),
        )


def test_the_difficulty_of_a_packed_row_is_the_mean_over_its_tokens(bpe):
    rows = [{"text": "the sky", "level": 1}, {"text": "the sky", "level": 2}]
    options = {"objective": "next_token", "max_length": 64}
    packed = prepare(
        rows, bpe, PrepareOptions(packing="bfd", difficulty_column="level", **options)
    )
    assert packed.difficulty.tolist() == [1.5]
    rows[0]["text"] *= 30
    split = prepare(
        rows,
        bpe,
        PrepareOptions(packing="bfd_split", difficulty_column="level", **options),
    )
    assert split.packed and set(split.difficulty) > {1.0}
    assert dataclasses.asdict(split.stats)["truncated"] == 0

import logging

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config import default_config, resolve
from jaxtrain.data.batches.mixture import Mixture, join, parse_mixture, rows_per_epoch
from jaxtrain.data.batches.pipeline import (
    BatchShape,
    Reading,
    RowOrder,
    make_train_iterator,
)
from jaxtrain.data.loading import load_training_rows, prepare_rows
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.record.diagnostics import named_arrays


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("a.jsonl", None),
        ("owner/name", None),
        ("a.jsonl:0.7,b.jsonl:0.3", (("a.jsonl", 0.7), ("b.jsonl", 0.3))),
        ("a.jsonl:1e-1, b:2", (("a.jsonl", 0.1), ("b", 2.0))),
        ([{"path": "a", "weight": 2}, {"path": "b"}], (("a", 2.0), ("b", 1.0))),
    ],
)
def test_a_mixture_is_told_from_a_path(train, expected):
    assert parse_mixture(train) == expected


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("a.jsonl:0.7,b.jsonl", "'b.jsonl' has no weight"),
        ("a:0", "positive number"),
        ([{"path": "a", "weight": "x"}], "weight of 'a' is 'x'"),
        ([{"path": "a", "share": 1}], "not a data set of a mixture"),
        ([{"weight": 1}], "not a data set of a mixture"),
    ],
)
def test_a_malformed_mixture_is_refused(train, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(train)


def test_shares_of_an_epoch_by_hand():
    assert rows_per_epoch([(100, 0.7), (100, 0.3)]) == [140, 60]
    assert rows_per_epoch([(5, 1), (5, 1), (1, 1)]) == [4, 4, 3]
    assert rows_per_epoch([(9, 1e9), (1, 1)]) == [9, 1]  # never nothing of one


parts = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=1, max_size=5
)


@given(parts)
def test_shares_add_up_to_all_rows_and_follow_the_weights(parts):
    quotas = rows_per_epoch(parts)
    total = sum(rows for rows, _ in parts)
    assert sum(quotas) == total and min(quotas) >= 1
    for quota, (_, weight) in zip(quotas, parts, strict=True):
        exact = total * weight / sum(w for _, w in parts)
        assert abs(quota - exact) < 1 + len(parts)


@given(parts, st.integers(0, 2**32 - 1), st.booleans())
def test_each_epoch_has_its_shares_and_every_row_comes_in_turn(parts, seed, shuffle):
    total = sum(rows for rows, _ in parts)
    order = RowOrder(
        total, BatchShape(3), seed=seed, shuffle=shuffle, parts=tuple(parts)
    )
    borders = np.cumsum([0, *(rows for rows, _ in parts)])
    drawn = [[] for _ in parts]
    for epoch in range(3):
        steps = range(
            epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch
        )
        rows = np.concatenate([order.rows(step).ravel() for step in steps])
        rows = rows[rows >= 0]
        assert len(rows) == total
        for part, quota in enumerate(rows_per_epoch(parts)):
            inside = rows[(rows >= borders[part]) & (rows < borders[part + 1])]
            assert len(inside) == quota
            drawn[part] += inside.tolist()
    for part, rows in enumerate(drawn):
        # Passes follow one another: no row is two passes ahead of another.
        size = parts[part][0]
        counts = np.bincount(np.array(rows) - borders[part], minlength=size)
        assert counts.max() - counts.min() <= 2


def prepared_parts(bpe):
    options = {"objective": "next_token", "max_length": 64}
    first = [{"text": "the sky " * n} for n in (1, 2, 3)]
    second = [{"prompt": "Hello", "completion": " there" * n} for n in (1, 9)]
    return [prepare(rows, bpe, PrepareOptions(**options)) for rows in (first, second)]


def test_joined_data_sets_have_each_others_rows(bpe):
    both = prepared_parts(bpe)
    joined = join(both, [1.0, 3.0])
    assert len(joined) == 5 and joined.parts == ((3, 1.0), (2, 3.0))
    length = joined.row_length
    every = joined.batch(np.arange(5))
    apart = [data.batch(np.arange(len(data)), row_length=length) for data in both]
    expected = named_arrays(jax.tree.map(lambda *x: np.concatenate(x), *apart))
    for name, array in named_arrays(every).items():
        np.testing.assert_array_equal(array, expected[name])
    assert joined.stats.rows == 5
    assert joined.stats.tokens == joined.row_lengths().sum()
    assert joined.stats.mean_length == pytest.approx(joined.row_lengths().mean())


def test_a_mixture_resumes_and_knows_its_weights(bpe):
    def batches(weights):
        return make_train_iterator(
            join(prepared_parts(bpe), weights), BatchShape(2), Reading(), num_steps=9
        )

    whole = [batch.tokens.tobytes() for batch in batches([1.0, 3.0])]
    state = batches([1.0, 3.0]).get_state() | {"next_step": 4}
    resumed = batches([1.0, 3.0])
    resumed.set_state(state)
    assert [batch.tokens.tobytes() for batch in resumed] == whole[4:]
    with pytest.raises(ValueError, match="parts was"):
        batches([1.0, 2.0]).set_state(state)


def test_a_configured_mixture_is_loaded_and_its_shares_logged(bpe, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="jaxtrain")
    for name, count in (("a", 4), ("b", 6)):
        lines = "".join(f'{{"text": "the sky {n}"}}\n' for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    config = default_config()
    config.data.train = f"{tmp_path}/a.jsonl:0.8,{tmp_path}/b.jsonl:0.2"
    config.data.cache_dir = str(tmp_path / "cache")
    run = resolve(config)
    rows = load_training_rows(run)
    assert isinstance(rows, Mixture)
    assert len(prepare_rows(run, rows, bpe)) == 10
    assert "a.jsonl gives 8 of 10 rows of an epoch (80.0%), 2.00 times its 4" in (
        caplog.text
    )
    config.data.train = [
        {"path": f"{tmp_path}/a.jsonl", "weight": 0.8}, {"path": f"{tmp_path}/b.jsonl"},
    ]  # fmt: skip
    assert [part.weight for part in load_training_rows(resolve(config)).parts] == [
        0.8,
        1.0,
    ]


def test_a_bad_row_names_its_data_set(bpe, tmp_path):
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    config = default_config()
    config.data.train = f"{tmp_path}/good.jsonl:1,{tmp_path}/bad.jsonl:1"
    config.data.cache = False
    run = resolve(config)
    with pytest.raises(
        ValueError, match=r"bad\.jsonl: 1 of 2 rows.*line 2: text is em"
    ):
        prepare_rows(run, load_training_rows(run), bpe)

"""Streamed batches: every row, exact resume anywhere, mixtures, bad rows, processes."""

import json
import logging
import pathlib
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.batch import Batch
from jaxtrain.data.batches.pipeline import (
    BatchShape,
    PackedRows,
    make_eval_iterator,
)
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.stream.batches import (
    BadRowsError,
    StreamRows,
    StreamSizes,
    join_states,
    prepare_stream,
)
from jaxtrain.data.stream.source import open_stream
from jaxtrain.record.diagnostics import named_arrays

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from iterators import make_stream_iterator, make_train_iterator

COUNT = 29
STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, text in (("text", "row"), ("other", "other")):
        rows = [{"text": f"{text} {i} " + "the dog " * (i % 5)} for i in range(COUNT)]
        write(folder / f"{name}.jsonl", rows)
    pairs = [
        {
            "prompt": f"{i}: ",
            "chosen": "the dog " * (1 + i % 3),
            "rejected": "fox" * (i % 4),
        }
        for i in range(COUNT)
    ]
    write(folder / "preference.jsonl", pairs)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stream(small, *paths, weights=None, **options):
    rows = StreamRows(
        tuple(open_stream(str(path)) for path in paths), weights or (1.0,) * len(paths)
    )
    sizes = StreamSizes(
        options.pop("window_rows", 5), options.pop("shuffle_buffer_size", 12)
    )
    defaults = {"objective": "next_token", "max_length": 64}
    return prepare_stream(rows, small, PrepareOptions(**(defaults | options)), sizes)


def iterate(data, **options):
    defaults = {"num_steps": STEPS, "micro_batch_rows": 4, "seed": 7, "shares": 2}
    return make_stream_iterator(data, **(defaults | options))


def as_bytes(batch):
    return b"".join(array.tobytes() for _, array in sorted(named_arrays(batch).items()))


def read(iterator):
    try:
        return [as_bytes(batch) for batch in iterator]
    finally:
        iterator.close()


def texts(small, batches):
    """The documents of batches, in order."""
    found = []
    for batch in batches:
        tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
        segments = batch.segment_ids.reshape(tokens.shape)
        for row, ids in zip(tokens, segments, strict=True):
            for segment in range(1, ids.max() + 1):
                text = small.decode(row[ids == segment], skip_special_tokens=True)
                found.append(text)
    return found


def test_without_shuffling_rows_come_in_order_epoch_after_epoch(small, folder):
    data = stream(small, folder / "text.jsonl")
    batches = iterate(data, shuffle=False, shares=1, accumulation_steps=2)
    first = next(batches)
    assert {a.shape for a in named_arrays(first).values()} == {(2, 4, 64)}
    found = texts(small, [first, *batches])
    numbers = [int(text.split()[1]) for text in found]
    assert numbers == [i % COUNT for i in range(8 * STEPS)]
    assert batches.epochs_done(STEPS) == 8 * STEPS // COUNT
    batches.close()


@pytest.mark.parametrize("packing", [None, "bfd"])
@pytest.mark.parametrize("shares", [1, 2])
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(
    small, folder, packing, shares
):
    """Share by share, in the order in which its columns come."""
    data = stream(small, folder / "text.jsonl", packing=packing)
    batches = iterate(data, shares=shares, num_steps=45 // shares)
    columns = [[] for _ in range(shares)]
    for batch in batches:
        for share, part in enumerate(np.split(batch.tokens, shares, axis=1)):
            ids = np.split(batch.segment_ids, shares, axis=1)[share]
            columns[share] += texts(
                small, [replace(batch, tokens=part, segment_ids=ids)]
            )
    batches.close()
    for epoch in range(2):
        seen = []
        for share, column in enumerate(columns):
            sizes = [len(range((s - e) % shares, COUNT, shares))
                     for e in range(3) for s in [share]]  # fmt: skip
            start = sum(sizes[:epoch])
            seen += column[start : start + sizes[epoch]]
        assert sorted(int(text.split()[1]) for text in seen) == list(range(COUNT))
        assert seen != sorted(seen, key=lambda text: int(text.split()[1]))
    assert columns[0][:10] != columns[0][COUNT // shares :][:10]


@settings(max_examples=12)
@given(
    stop=st.integers(0, STEPS),
    window=st.integers(1, 12),
    buffer=st.integers(1, 40),
    shares=st.sampled_from([1, 2, 4]),
    shuffle=st.booleans(),
    kind=st.sampled_from(
        ["text", "packed", "mixture", "preference", "pairs", "shared", "kto"]
    ),
    prefetch=st.integers(1, 3),
    by_batch=st.sampled_from([None, "long", "many"]),
)
def test_a_resumed_stream_gives_the_same_bytes(
    small, folder, stop, window, buffer, shares, shuffle, kind, prefetch, by_batch
):
    options = {"window_rows": window, "shuffle_buffer_size": buffer}
    paths, weights = [folder / "text.jsonl"], None
    if kind == "mixture":
        paths, weights = [*paths, folder / "other.jsonl"], (1.0, 3.0)
    options["share_prompts"] = kind == "shared"
    if kind in ("preference", "pairs", "shared", "kto"):
        paths = [folder / "preference.jsonl"]
        options["objective"] = "labeled" if kind == "kto" else "preference"
    made = {"shares": shares, "shuffle": shuffle, "accumulation_steps": 2}
    if by_batch is not None:
        made["rows"] = PackedRows(shares, by_batch == "long")
    elif kind in ("packed", "mixture", "pairs", "shared"):
        options["packing"] = "bfd"
    data = stream(small, *paths, weights=weights, **options)
    whole = read(iterate(data, **made))
    interrupted = iterate(data, prefetch=prefetch, **made)
    for _ in range(stop):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = iterate(data, **made)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert len(resumed) == STEPS - stop
    assert read(resumed) == whole[stop:]
    assert read(interrupted) == whole[stop:]
    assert resumed.get_state() == interrupted.get_state()
    # Also going back to a state that an iterator kept, once it has read on.
    interrupted.set_state(interrupted.get_state(max(stop, STEPS - 1)))
    assert read(interrupted) == whole[max(stop, STEPS - 1) :]


def documents(batch):
    """The (tokens, targets, mask) of all documents, by side and micro-batch."""
    found = {}
    for side, rows in by_side(batch).items():
        arrays = [rows.tokens, rows.targets, rows.loss_mask, rows.segment_ids]
        for number, micro_batch in enumerate(zip(*arrays, strict=True)):
            held = found[side, number] = []
            for *row, ids in zip(*micro_batch, strict=True):
                held += [
                    tuple(map(tuple, [array[ids == segment] for array in row]))
                    for segment in range(1, ids.max() + 1)
                ]
            held.sort()
    return found


def by_side(batch):
    if isinstance(batch, Batch):
        return {"": batch}
    return {k: v for k, v in vars(batch).items() if isinstance(v, Batch)}


@settings(max_examples=12)
@given(
    shards=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 2),
    are_long=st.booleans(),
    kind=st.sampled_from(["next_token", "preference", "labeled"]),
)
def test_packed_micro_batches_have_the_examples_of_padded_ones(
    small, folder, shards, accumulation, are_long, kind
):
    name = "text" if kind == "next_token" else "preference"
    data = stream(small, folder / f"{name}.jsonl", objective=kind)
    made = {"shares": shards, "accumulation_steps": accumulation}
    padded = iterate(data, **made)
    packed = iterate(data, rows=PackedRows(shards, are_long), **made)
    shapes = {shapes_of(batch) for batch in packed.empty_batches()}
    for batch, rows in zip(packed, padded, strict=True):
        assert documents(batch) == documents(rows)
        assert shapes_of(batch) in shapes
        if kind == "labeled":
            assert batch.desirable.sum() == rows.desirable.sum()
        tokens = next(iter(by_side(batch).values())).tokens
        assert tokens.shape[1] % shards == 0
        # A row of several examples is as long as a multiple of 128 tokens.
        assert tokens.size <= 4 * accumulation * max(data.row_length, 128)
    packed.close(), padded.close()


def shapes_of(batch):
    return tuple(array.shape for array in named_arrays(batch).values())


def test_a_shared_prompt_stands_once_and_a_model_may_refuse_that(small, folder):
    data = stream(
        small, folder / "preference.jsonl", objective="preference", share_prompts=True
    )
    apart = data.without_shared_prompts()
    assert (data.row_length, apart.row_length) == (128, 64)
    rows = PackedRows(2, are_long=True)
    for shared, alone in zip(
        iterate(data, rows=rows), iterate(apart, rows=rows), strict=True
    ):
        assert shared.shared is not None and alone.shared is None
        for side in ("chosen", "rejected"):
            trained = [
                sorted(getattr(b, side).targets[getattr(b, side).loss_mask > 0])
                for b in (shared, alone)
            ]
            assert trained[0] == trained[1]
        held = [np.count_nonzero(x.segment_ids) for x in by_side(alone).values()]
        assert np.count_nonzero(shared.shared.segment_ids) < sum(held)


@pytest.mark.parametrize("are_long", [False, True])
def test_longer_rows_than_the_first_fit_in_the_shapes_of_the_start(
    small, tmp_path, are_long
):
    """At most eight shapes, though nothing at the start tells what will come."""
    path = tmp_path / "growing.jsonl"
    write(path, [{"text": "the dog " * (1 + i // 40)} for i in range(3000)])
    data = stream(small, path, max_length=128)
    batches = iterate(
        data, rows=PackedRows(1, are_long), shares=1, micro_batch_rows=8,
        shuffle=False, num_steps=370,
    )  # fmt: skip
    known = {shapes_of(batch) for batch in batches.empty_batches()}
    assert 1 < len(known) <= 8
    found = [shapes_of(batch) for batch in batches]
    batches.close()
    assert set(found) <= known
    assert found[-1] != found[0], "the last rows are many times as long"


@pytest.mark.slow
def test_worker_processes_change_nothing(small, folder):
    data = stream(small, folder / "text.jsonl", packing="bfd")
    whole = read(iterate(data))
    none = iterate(data)
    found = [as_bytes(next(none)) for _ in range(3)]
    two = iterate(data, num_workers=2)
    two.set_state(none.get_state())
    found += [as_bytes(next(two)) for _ in range(3)]
    none.set_state(two.get_state())
    two.close()
    assert found + read(none) == whole


@pytest.mark.parametrize("packing", ["windows", "batch"])
def test_batches_do_not_depend_on_the_number_of_processes(small, folder, packing):
    """And a run of two processes goes on as one of four."""
    by_batch = packing == "batch"
    data = stream(small, folder / "text.jsonl", packing=None if by_batch else "bfd")

    def process(index, count):
        if by_batch:
            rows = PackedRows(4, are_long=True, share=(index, count))
            return iterate(data, shares=4, micro_batch_rows=8, rows=rows)
        return iterate(
            data, shares=4, micro_batch_rows=8 // count,
            process_index=index, process_count=count,
        )  # fmt: skip

    whole = list(process(0, 1))
    two = [process(index, 2) for index in range(2)]
    for step in range(4):
        halves = [next(half).tokens for half in two]
        np.testing.assert_array_equal(
            np.concatenate(halves, axis=1), whole[step].tokens
        )
    states = json.loads(json.dumps([half.get_state() for half in two]))
    if not by_batch:
        with pytest.raises(ValueError, match=r"no share \[2, 3\]"):
            process(1, 2).set_state(states[0])
    four = [process(index, 4) for index in range(4)]
    for quarter in four:
        quarter.set_state(join_states(states))
    for step in range(4, STEPS):
        quarters = [next(quarter).tokens for quarter in four]
        np.testing.assert_array_equal(
            np.concatenate(quarters, axis=1), whole[step].tokens
        )
    for iterator in (*two, *four):
        iterator.close()
    with pytest.raises(ValueError, match="different data positions"):
        join_states([states[0], states[1] | {"next_step": 5}])


def test_a_window_as_large_as_the_data_gives_the_rows_of_data_in_memory(small, folder):
    """Tokens, masks, targets, positions: those of `prepare`, in another order."""
    rows = [json.loads(line) for line in (folder / "text.jsonl").open()]
    options = {"objective": "next_token", "max_length": 64, "packing": "bfd"}
    prepared = prepare(rows, small, PrepareOptions(**options, pad_to="max_length"))
    expected = list(make_eval_iterator(prepared, BatchShape(1)))
    data = stream(small, folder / "text.jsonl", packing="bfd", window_rows=100)
    batches = iterate(
        data, shares=1, micro_batch_rows=1, shuffle=False, num_steps=len(prepared)
    )
    assert sorted(read(batches)) == sorted(as_bytes(batch) for batch in expected)


def test_packed_pairs_have_one_shape_and_are_whole(small, folder):
    data = stream(
        small, folder / "preference.jsonl", objective="preference", packing="bfd",
        window_rows=10,
    )  # fmt: skip
    batches = list(iterate(data, shares=1, num_steps=4))
    assert {batch.pair_ids.shape for batch in batches} == {(1, 4, 4)}
    for batch in batches:
        pairs = (batch.pair_ids > 0).sum(-1)
        for side in ("chosen", "rejected"):
            np.testing.assert_array_equal(
                getattr(batch, side).segment_ids.max(-1), pairs
            )
    assert max((batch.pair_ids > 0).sum(-1).max() for batch in batches) == 4


def test_a_mixture_has_its_weights_and_its_sources_go_round_by_themselves(
    small, folder
):
    data = stream(
        small, folder / "text.jsonl", folder / "other.jsonl", weights=(1.0, 3.0)
    )
    batches = iterate(data, num_steps=40)
    found = texts(small, batches)
    batches.close()
    for end in (40, 100, 160):  # any run of rows has the shares, and both mix
        other = sum(text.startswith("other") for text in found[:end])
        assert other == pytest.approx(0.75 * end, abs=4)
    for name, share in (("row", 40), ("other", 120)):
        numbers = [int(t.split()[1]) for t in found if t.startswith(name)]
        assert len(numbers) == pytest.approx(share, abs=2)
        counts = np.bincount(numbers, minlength=COUNT)
        assert counts.max() - counts.min() <= 2  # two shares, each on its own way


def test_only_a_block_is_read_ahead_and_the_state_does_not_grow(small, tmp_path):
    path = tmp_path / "long.jsonl"
    write(path, [{"text": f"row {i}"} for i in range(20_000)])
    states = []
    for buffer in (50, 5000):
        data = stream(small, path, shuffle_buffer_size=buffer)
        batches = iterate(data, shares=1)
        next(batches)
        state = batches.get_state()
        batches.close()
        states.append(len(json.dumps(state)))
        (reader,) = state["lanes"]["0"]["readers"]
        assert reader["counts"]["rows"] < 20
        assert reader["blocks"]["at"] is None  # the first block
    assert abs(states[0] - states[1]) < 10 and states[0] < 1000
    # A later position is a byte offset: nothing before it is read again.
    lines = path.read_text().splitlines(keepends=True)
    data = stream(small, path, shuffle_buffer_size=50)
    batches = iterate(data, shares=1, num_steps=200)
    expected = [as_bytes(batch) for batch in batches]
    state = batches.get_state(190)
    batches.close()
    at = state["lanes"]["0"]["readers"][0]["blocks"]["at"]["position"]
    assert at[1] > 700 and at[0] == len("".join(lines[: at[1]]))
    spoilt = "".join("x" * (len(line) - 1) + "\n" for line in lines[: at[1]])
    rest = "".join(lines[at[1] :])
    data = stream(small, path, shuffle_buffer_size=50)
    path.write_text(spoilt + rest)
    resumed = iterate(data, shares=1, num_steps=200)
    resumed.set_state(state)
    assert read(resumed) == expected[190:]


def test_bad_rows_are_errors_with_file_line_and_reason(small, tmp_path):
    path = tmp_path / "bad.jsonl"
    rows = [json.dumps({"text": f"row {i}"}) for i in range(20)]
    rows[13] = '{"text": 3}'
    rows[14] = '{"text"'
    path.write_text("\n".join(rows))
    batches = iterate(stream(small, path), shares=1, shuffle=False)
    next(batches), next(batches)
    expected = (
        r"2 rows .*bad.jsonl line 14: text is 3, expected a string.*"
        r"bad.jsonl line 15: is not JSON.*'skip'"
    )
    with pytest.raises(BadRowsError, match=expected):
        next(batches)
    with pytest.raises(BadRowsError):
        next(batches)
    batches.close()


def test_skipped_rows_are_counted_once_whatever_is_restored(small, tmp_path, caplog):
    path = tmp_path / "bad.jsonl"
    write(path, [{"text": f"row {i}"} if i % 10 else {"text": None} for i in range(40)])
    data = stream(small, path, on_bad_row="skip", packing="bfd")
    options = {"shares": 1, "micro_batch_rows": 1, "num_steps": 8, "shuffle": False}
    with caplog.at_level(logging.INFO, "jaxtrain"):
        batches = iterate(data, **options)
        found = texts(small, batches)
        state = batches.get_state(3)
        end = batches.get_state()["lanes"]["0"]["readers"][0]
        batches.close()
    assert "row 0" not in found and "row 10" not in found and "row 11" in found
    assert "skipped: bad.jsonl line 1: text is None, expected a string" in caplog.text
    assert "stream so far: 5 rows (1 bad" in caplog.text
    assert "stream so far: 40 rows (4 bad, 0 dropped, 0 truncated)" in caplog.text
    assert "filled" in caplog.text
    resumed = iterate(data, **options)
    resumed.set_state(state)
    list(resumed)
    assert resumed.get_state()["lanes"]["0"]["readers"][0] == end
    resumed.close()


def test_pairs_that_prefer_nothing_are_said_once(small, tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "chosen": "b", "rejected": "bc"[i % 2]} for i in range(20)]
    write(path, rows)
    data = stream(small, path, objective="preference", packing=None)
    with caplog.at_level(logging.INFO, "jaxtrain"):
        batches = iterate(data, shares=1, micro_batch_rows=1, num_steps=20)
        list(batches)
        batches.close()
    assert (
        caplog.text.count("chosen equals rejected in some pairs (pairs.jsonl line") == 1
    )
    assert "10 with chosen = rejected" in caplog.text


def test_rows_without_anything_to_train_on_end_the_run(small, tmp_path):
    path = tmp_path / "none.jsonl"
    write(path, [{"prompt": "the dog " * 50, "completion": "x"}] * 9)
    batches = iterate(stream(small, path, on_bad_row="skip"), shares=1)
    with pytest.raises(ValueError, match=r"whole epoch of .* has no usable row .0 bad"):
        next(batches)
    batches.close()
    write(path, [{"text": "alone"}])
    batches = iterate(stream(small, path))
    with pytest.raises(ValueError, match=r"no row for share . of 2"):
        next(batches)
    batches.close()


def test_other_data_other_settings_and_rows_of_another_kind_are_refused(small, folder):
    state = iterate(stream(small, folder / "text.jsonl")).get_state()
    with pytest.raises(ValueError, match="seed was 7 and is 8"):
        iterate(stream(small, folder / "text.jsonl"), seed=8).set_state(state)
    with pytest.raises(ValueError, match="fingerprint was"):
        iterate(stream(small, folder / "other.jsonl")).set_state(state)
    rows = [{"text": "in memory"}] * 4
    prepared = prepare(
        rows, small, PrepareOptions(objective="next_token", max_length=64)
    )
    in_memory = make_train_iterator(prepared, micro_batch_rows=4, num_steps=2)
    with pytest.raises(ValueError, match="cannot resume the data order"):
        in_memory.set_state(state)
    with pytest.raises(ValueError, match="cannot resume the data order"):
        iterate(stream(small, folder / "text.jsonl")).set_state(in_memory.get_state())
    with pytest.raises(
        ValueError, match=r"text.jsonl: the preference objective cannot"
    ):
        stream(small, folder / "text.jsonl", objective="preference")
    with pytest.raises(ValueError, match="behind step 3 is not kept"):
        iterate(stream(small, folder / "text.jsonl")).get_state(3)
    for options, message in (
        ({"shares": 3}, "shares=3 must"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            iterate(stream(small, folder / "text.jsonl"), **options)


def test_closing_leaves_no_thread(small, folder):
    before = threading.active_count()
    batches = iterate(stream(small, folder / "text.jsonl"), num_steps=1000)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_a_streams_fingerprint_has_the_options_that_make_its_rows(small, folder):
    """And no others: runs must resume though these change, or new ones come."""
    path = folder / "text.jsonl"
    fingerprint = stream(small, path).fingerprint
    for options in ({"on_bad_row": "skip"}, {"kind": "text"}, {"vocab_size": 300}):
        assert stream(small, path, **options).fingerprint == fingerprint
    for options in ({"max_length": 32}, {"packing": "bfd"}, {"window_rows": 6}):
        assert stream(small, path, **options).fingerprint != fingerprint


def test_a_streams_fingerprint_has_no_option_that_earlier_versions_had_not(
    small, folder, monkeypatch
):
    """Else no checkpoint of theirs would fit: a new one counts where it is set."""
    hashed = []
    dumps = json.dumps

    def look(described, **options):
        hashed.extend(name for _, items in described[2] for name, _ in items)
        return dumps(described, **options)

    monkeypatch.setattr(json, "dumps", look)
    assert stream(small, folder / "text.jsonl").fingerprint
    assert sorted({*hashed}) == [
        "assistant_marks", "assistant_only_loss", "batch_size",
        "completion_only_loss", "max_length", "max_prompt_length", "objective",
        "packing", "pad_to", "pad_to_multiple", "share_prompts",
    ]  # fmt: skip

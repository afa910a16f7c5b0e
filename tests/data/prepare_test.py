import dataclasses
import logging

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config import resolve
from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.batches.pack import pack_best_fit
from jaxtrain.data.loading import load_run_tokenizer, prepare_rows
from jaxtrain.data.prepare.kinds import mismatch_completions
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.prepare.sequences import Sequences
from jaxtrain.data.rows.tokenize import Example
from jaxtrain.record.diagnostics import named_arrays

LM = {"objective": "next_token", "max_length": 64}
PAIRS = [
    {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " No."},
    {"prompt": "Where is the sun?", "chosen": " Here.", "rejected": " It is there."},
]
STATS = DataStats()


def store_of(documents, trained, rows):
    """A TokenStore of given documents (lists of ids), masks and rows of documents."""
    lengths = np.array([len(d) for d in documents])
    return TokenStore(
        tokens=np.concatenate(documents).astype(np.int32),
        trained=np.concatenate(trained).astype(bool),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        row_documents=np.concatenate(rows),
        row_offsets=np.cumsum([0, *(len(r) for r in rows)]),
    )


def dataset_of(store, row_length, objective="next_token", pad_id=9):
    stores = {"": store} if objective == "next_token" else store
    return PreparedDataset(objective, stores, row_length, pad_id, STATS)


def test_a_packed_row_is_written_as_derived_by_hand():
    store = store_of([[5, 6, 7], [8, 4]], [[0, 1, 1], [1, 1]], [[0, 1]])
    batch = dataset_of(store, 7).batch(np.array([0, -1]))
    assert {name: array[0].tolist() for name, array in named_arrays(batch).items()} == {
        "tokens": [5, 6, 7, 8, 4, 9, 9],
        "targets": [6, 7, 9, 4, 9, 9, 9],  # no target crosses into the next document
        "segment_ids": [1, 1, 1, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0],
        "loss_mask": [1, 1, 0, 1, 0, 0, 0],
    }
    assert not batch.segment_ids[1].any() and not batch.loss_mask[1].any()
    kinds = {name: array.dtype.name for name, array in named_arrays(batch).items()}
    assert kinds.pop("loss_mask") == "float32" and set(kinds.values()) == {"int32"}


documents = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=16),
    min_size=1,
    max_size=30,
)


@given(documents)
def test_packed_rows_keep_every_token_mask_and_border(documents):
    tokens = [[token for token, _ in d] for d in documents]
    trained = [[flag for _, flag in d] for d in documents]
    offsets, order = pack_best_fit([len(d) for d in documents], 16)
    rows = np.split(order, offsets[1:-1])
    batch = dataset_of(store_of(tokens, trained, rows), 20).batch(np.arange(len(rows)))
    found = []
    for row in range(len(rows)):
        segments = batch.segment_ids[row]
        for segment in range(1, segments.max() + 1):
            (at,) = np.nonzero(segments == segment)
            assert (np.diff(at) == 1).all()
            assert batch.positions[row, at].tolist() == list(range(len(at)))
            ids = batch.tokens[row, at].tolist()
            assert batch.targets[row, at[:-1]].tolist() == ids[1:]
            assert batch.loss_mask[row, at[-1]] == 0
            found.append((ids, [False, *(batch.loss_mask[row, at[:-1]] > 0)]))
        assert not batch.loss_mask[row, segments == 0].any()
    # A document's first token is predicted by nothing.
    expected = [(t, [False, *m[1:]]) for t, m in zip(tokens, trained, strict=True)]
    assert sorted(found) == sorted(expected)


def test_statistics_count_what_happened(bpe, caplog):
    caplog.set_level(logging.DEBUG, logger="jaxtrain")
    rows = [
        {"prompt": "the sky", "completion": " is blue"},
        {"prompt": "the sky " * 40, "completion": " dropped"},
        {"prompt": "the sky", "completion": " is blue" * 40},
        {"prompt": None, "completion": "bad"},
    ]
    prepared = prepare(rows, bpe, PrepareOptions(on_bad_row="skip", **LM))
    stats = prepared.stats
    assert (stats.rows, stats.bad_rows, stats.dropped, stats.truncated) == (4, 1, 1, 1)
    lengths = prepared.row_lengths()
    assert (stats.packed_rows, stats.max_length) == (2, 64)
    assert stats.tokens == lengths.sum() and stats.mean_length == lengths.mean()
    batch = prepared.batch(np.arange(2))
    assert stats.trained_tokens == batch.loss_mask.sum()
    assert stats.packing_efficiency == lengths.sum() / 128
    assert "conversational" not in caplog.text
    assert "plain prompt_completion rows" in caplog.text
    assert "row 3: prompt is None" in caplog.text
    assert stats.describe() in caplog.text


@pytest.mark.parametrize("packing", ["bfd", "bfd_split", "wrapped"])
def test_packing_needs_fewer_rows_and_keeps_the_tokens(packing, bpe):
    rows = [{"text": "the sky " * n} for n in (1, 2, 3, 90, 5, 8)]
    plain = prepare(rows, bpe, PrepareOptions(objective="next_token", max_length=None))
    packed = prepare(rows, bpe, PrepareOptions(packing=packing, **LM))
    assert packed.row_length == 64
    assert packed.row_lengths().max() <= 64
    assert packed.stats.truncated == (packing == "bfd")
    lost = plain.row_lengths().max() - 64 if packing == "bfd" else 0
    assert packed.stats.tokens == plain.stats.tokens - lost
    assert packed.stats.packing_efficiency > 0.5


def test_one_static_length_holds_the_longest_row(bpe):
    rows = [{"text": "the sky " * n} for n in (1, 20)]
    options = {"objective": "next_token", "max_length": 100, "pad_to_multiple": 8}
    longest = prepare(rows, bpe, PrepareOptions(**options))
    assert longest.row_length == -(-longest.stats.max_length // 8) * 8
    full = prepare(rows, bpe, PrepareOptions(pad_to="max_length", **options))
    assert full.row_length == 104
    assert full.batch(np.arange(2)).tokens.shape == (2, 104)


def test_pairs_share_length_and_prompt(bpe):
    pairs = prepare(PAIRS, bpe, PrepareOptions(objective="preference", max_length=64))
    batch = pairs.batch(np.array([[0, 1], [-1, -1]]))
    assert batch.shared is None
    for side in (batch.chosen, batch.rejected):
        assert side.tokens.shape == (2, 2, pairs.row_length)
        assert not side.loss_mask[1].any()
    sides = [getattr(batch, side) for side in ("chosen", "rejected")]
    for row in range(2):
        prompts = [int(np.argmax(side.loss_mask[0, row])) + 1 for side in sides]
        assert prompts[0] == prompts[1]
        shared = [side.tokens[0, row, : prompts[0]] for side in sides]
        np.testing.assert_array_equal(*shared)


def test_packed_pairs_stand_in_the_same_rows_on_both_sides(bpe):
    rows = [
        {"prompt": "the sky", "chosen": " is blue" * a, "rejected": " no" * b}
        for a, b in ((1, 20), (8, 1), (2, 2), (1, 1), (3, 22))
    ]
    options = {"objective": "preference", "max_length": 64}
    plain = prepare(rows, bpe, PrepareOptions(**options))
    packed = prepare(rows, bpe, PrepareOptions(packing="bfd", **options))
    assert len(packed) < len(plain) and packed.packed
    for store in packed.stores.values():
        assert store.row_lengths().max() <= 64
    assert packed.stats.packing_efficiency > plain.stats.packing_efficiency
    batch = packed.batch(np.arange(-1, len(packed)))
    held = (batch.pair_ids > 0).sum(-1)
    assert held.tolist()[0] == 0 and held.sum() == 5
    found = []
    for row in range(1, len(packed) + 1):
        for pair in batch.pair_ids[row]:
            if pair:
                found.append(
                    tuple(
                        getattr(batch, side)
                        .tokens[row][getattr(batch, side).segment_ids[row] == pair]
                        .tobytes()
                        for side in ("chosen", "rejected")
                    )
                )
    alone = plain.batch(np.arange(5))
    expected = [
        tuple(
            getattr(alone, side)
            .tokens[row][getattr(alone, side).segment_ids[row] == 1]
            .tobytes()
            for side in ("chosen", "rejected")
        )
        for row in range(5)
    ]
    assert sorted(found) == sorted(expected)


def test_labeled_rows_have_completions_of_other_prompts(bpe):
    rows = [
        {"prompt": prompt, "completion": completion, "label": label}
        for prompt, completion, label in (
            ("the sky", " is blue", True),
            ("the sky", " is green", False),
            ("the dog", " is lazy", True),
            ("the dog", " is brown", False),
        )
    ]
    data = prepare(rows, bpe, PrepareOptions(objective="labeled", max_length=64))
    batch = data.batch(np.arange(-1, 4))
    assert batch.desirable.tolist() == [0, 1, 0, 1, 0]

    def texts(name):
        side = getattr(batch, name)
        return [
            bpe.decode(ids[mask > 0], skip_special_tokens=True)
            for ids, mask in zip(side.tokens, side.segment_ids, strict=True)
        ]

    assert texts("completions")[1:] == [
        "the sky is blue", "the sky is green", "the dog is lazy", "the dog is brown",
    ]  # fmt: skip
    assert texts("mismatched")[1:] == [
        "the sky is lazy", "the sky is brown", "the dog is blue", "the dog is green",
    ]  # fmt: skip
    trained = batch.mismatched.loss_mask[1:].sum(-1)
    np.testing.assert_array_equal(trained > 0, True)


@given(
    prompts=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    within=st.integers(0, 5),
)
def test_completions_change_places(prompts, within):
    """Each is there once, so that as many are good as among the rows themselves."""
    rows = [
        Example(np.array([prompt, 100 + i]), np.array([False, True]))
        for i, prompt in enumerate(prompts)
    ]
    answers = [Example(np.array([100 + i]), np.array([True])) for i in range(len(rows))]
    blocks = mismatch_completions(
        Sequences.of(rows), Sequences.of(answers), None, within
    )
    mixed = [example for block in blocks for example in block]
    assert [example.ids[0] for example in mixed] == prompts
    partners = [int(example.ids[1]) - 100 for example in mixed]
    assert sorted(partners) == list(range(len(rows)))
    if within > 1:  # as TRL: each block goes round by one
        theirs = []
        for first in range(0, len(rows), within):
            block = list(range(len(rows)))[first : first + within]
            theirs += [block[-1], *block[:-1]]
        assert partners == theirs
    elif len(rows) > 1:
        assert all(partner != row for row, partner in enumerate(partners))
    pairs = np.repeat(np.arange(len(prompts)), 2)  # as preferences are told apart
    rows = [Example(np.array([p, 100]), np.array([False, True])) for p in pairs]
    answers = [Example(np.array([p]), np.array([True])) for p in pairs]
    blocks = mismatch_completions(Sequences.of(rows), Sequences.of(answers), None, 0)
    own = [example.ids[0] == example.ids[1] for block in blocks for example in block]
    assert not any(own) or len(prompts) == 1


def test_a_shorter_prompt_leaves_more_of_the_other_completion(bpe):
    """It is cut behind the prompt that it is put to, not behind its own."""
    rows = [
        {"prompt": "a", "completion": " b c d e f", "label": True},
        {"prompt": "a b c d", "completion": " e f g h i", "label": False},
    ]
    data = prepare(rows, bpe, PrepareOptions(objective="labeled", max_length=8))
    batch = data.batch(np.arange(2))
    own = batch.completions.loss_mask.sum(-1)
    np.testing.assert_array_equal(batch.mismatched.loss_mask.sum(-1), own)
    assert own[0] > own[1]
    assert (batch.mismatched.segment_ids > 0).sum(-1).tolist() == [8, 8]


def test_a_preference_is_two_labeled_rows(bpe):
    data = prepare(PAIRS, bpe, PrepareOptions(objective="labeled", max_length=64))
    assert data.batch(np.arange(4)).desirable.tolist() == [1, 0, 1, 0]
    assert data.stats.rows == 2 and len(data) == 4
    rows = [{"prompt": "a", "completion": "b", "label": 2}]
    with pytest.raises(ValueError, match="row 0: label is 2, expected true or false"):
        prepare(rows, bpe, PrepareOptions(objective="labeled", max_length=64))


def test_reference_log_probs_ride_along(bpe):
    pairs = prepare(PAIRS, bpe, PrepareOptions(objective="preference", max_length=64))
    with_logps = pairs.with_reference_logps(np.array([-1.0, -2]), np.array([-3.0, -4]))
    batch = with_logps.batch(np.array([[1, 0], [-1, 1]]))
    assert batch.ref_chosen_logps.tolist() == [[-2, -1], [0, -2]]
    assert batch.ref_rejected_logps.dtype == np.float32
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        pairs.with_reference_logps(np.zeros(3), np.zeros(2))


def test_saved_data_loads_memory_mapped_and_equal(bpe, tmp_path):
    for rows, objective in ((PAIRS, "preference"), ([{"text": "a"}], "next_token")):
        made = prepare(rows, bpe, PrepareOptions(objective=objective, max_length=64))
        made.save(tmp_path / objective)
        loaded = PreparedDataset.load(tmp_path / objective)
        for store in loaded.stores.values():
            assert isinstance(store.tokens, np.memmap)
        assert loaded.fingerprint == made.fingerprint
        assert loaded.stats == made.stats and loaded.row_length == made.row_length
        every = np.arange(len(made))
        ours, theirs = (d.batch(every) for d in (made, loaded))
        assert str(ours) == str(theirs)


def test_the_fingerprint_tells_data_apart(bpe):
    same = prepare(PAIRS, bpe, PrepareOptions(objective="preference", max_length=64))
    again = prepare(PAIRS, bpe, PrepareOptions(objective="preference", max_length=64))
    other = prepare(
        PAIRS[::-1], bpe, PrepareOptions(objective="preference", max_length=64)
    )
    assert same.fingerprint == again.fingerprint != other.fingerprint


def test_bad_rows_stop_the_data_set_before_training(bpe):
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": ""}]
    with pytest.raises(ValueError, match=r"2 of 4 rows.*row 1: text is None.*row 3"):
        prepare(rows, bpe, PrepareOptions(**LM))
    assert (
        len(prepare(rows, bpe, PrepareOptions(on_bad_row="skip", batch_size=1, **LM)))
        == 2
    )


def test_rows_without_assistant_tokens_are_named(bpe):
    user, reply = ({"role": r, "content": "a"} for r in ("user", "assistant"))
    rows = [{"messages": [user, reply]}, {"messages": [user]}]
    with pytest.raises(ValueError, match=r"row 1: no token is the assistant's"):
        prepare(rows, bpe, PrepareOptions(assistant_only_loss=True, **LM))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo"}, "objective='dpo'"),
        ({"packing": "best"}, "packing='best'"),
        ({"packing": "bfd", "max_length": None}, "give the length of a row"),
        ({"max_length": 1}, "max_length=1"),
        ({"pad_to": "batch"}, "pad_to='batch'"),
        ({"max_prompt_length": 8}, "preference rows only"),
        ({"objective": "preference"}, "cannot train on plain text"),
        ({"objective": "preference", "packing": "wrapped"}, "never split"),
        ({"objective": "labeled", "packing": "bfd"}, "cannot be packed"),
        ({"objective": "preference", "max_prompt_length": 64}, "between 1 and"),
    ],
)
def test_options_that_cannot_hold_are_refused(options, message, bpe):
    with pytest.raises(ValueError, match=message):
        prepare([{"text": "a"}], bpe, PrepareOptions(**(LM | options)))


def test_nothing_left_to_train_on_is_refused(bpe):
    row = {"prompt": "the sky " * 40, "completion": "b"}
    with pytest.raises(
        ValueError, match=r"nothing to train on: of 1 rows.*raise max_len.*shorten the"
    ) as e:
        prepare([row], bpe, PrepareOptions(**LM))
    assert "max_prompt_length" not in str(e.value)  # which acts on pairs alone
    pair = {"prompt": row["prompt"], "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=r"of 1 rows.*, or set max_prompt_length"):
        prepare([pair], bpe, PrepareOptions("preference", 64))
    bad = {"prompt": 7, "completion": "b"}
    options = PrepareOptions(**(LM | {"on_bad_row": "skip"}))
    with pytest.raises(ValueError, match="of 2 rows 1 are bad and 1 have no trained"):
        prepare([row, bad], bpe, options)
    with pytest.raises(ValueError, match=r"of 1 rows 1 are bad; mend the bad rows$"):
        prepare([bad], bpe, options)


def test_pairs_that_prefer_nothing_are_trained_and_said(bpe, caplog):
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    options = PrepareOptions("preference", 64)
    with caplog.at_level(logging.INFO, "jaxtrain"):
        prepared = prepare([PAIRS[0], equal, PAIRS[0]], bpe, options)
    assert len(prepared) == 3 and prepared.stats.equal_pairs == 1
    assert "chosen equals rejected in 1 of 3 pairs (row 1)" in caplog.text
    assert "1 with chosen = rejected" in prepared.stats.describe()
    assert "chosen" not in prepare([PAIRS[0]], bpe, options).stats.describe()


def test_a_long_prompt_is_kept_by_its_end(bpe):
    row = PAIRS[0] | {"prompt": "Hello " * 80 + "Where is the sun?"}
    options = {"objective": "preference", "max_length": 64, "max_prompt_length": 8}
    pairs = prepare([row], bpe, PrepareOptions(**options))
    batch = pairs.batch(np.array([0])).chosen
    length = int(np.argmax(batch.loss_mask[0])) + 1
    assert length == 8
    assert bpe.decode(batch.tokens[0, :8]).endswith("Where is the sun?")
    assert dataclasses.asdict(pairs.stats)["truncated"] == 1


def test_rows_of_a_program_are_read_from_a_generator_and_from_no_mapping():
    run = resolve({"training": {"training_type": "sft"}}, device_count=1)
    tokenizer = load_run_tokenizer(run)
    rows = [{"prompt": "a", "completion": " b"}] * 6

    def prepared(given):
        return prepare_rows(run, given, tokenizer)

    assert prepared(row for row in rows).stats == prepared(rows).stats
    with pytest.raises(ValueError, match=r"mapping: give one of \['train'\]"):
        prepared(datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}))
    with pytest.raises(ValueError, match="name a file in data"):
        prepared("rows.jsonl")
    frame = datasets.Dataset.from_list(rows).to_pandas()
    with pytest.raises(ValueError, match=r'frame.to_dict\("records"\)'):
        prepared(frame)

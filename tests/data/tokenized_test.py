"""Rows of token ids: read as TRL's SFTTrainer reads them, and checked."""

import numpy as np
import pytest

from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.formats import detect_format

ROWS = [
    {"input_ids": [9, 8, 7, 6, 5]},
    {"input_ids": [30, 31, 32, 33], "labels": [-100, -100, 32, 33]},
    {"input_ids": [40, 41, 42], "completion_mask": [0, 1, 1]},
    {"input_ids": [50, 51, 52, 53], "assistant_masks": [0, 1, 0, 1]},
    {"input_ids": [60, 61, 62], "completion_mask": [0, 1, 1],
     "assistant_masks": [1, 0, 1]},
    {"input_ids": list(range(60, 90)), "completion_mask": [0] * 20 + [1] * 10},
]  # fmt: skip


def documents(rows, tokenizer, **options):
    prepared = prepare(rows, tokenizer, PrepareOptions("next_token", 16, **options))
    store = prepared.stores[""]
    spans = zip(store.starts, store.lengths, strict=True)
    return [
        (store.tokens[s : s + n].tolist(), store.trained[s : s + n].tolist())
        for s, n in spans
    ]


@pytest.mark.torch
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("completion_only", [True, False])
def test_tokens_and_masks_equal_trl(row, completion_only, small, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    ))  # fmt: skip
    config = trl.SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False,
        max_length=16, completion_only_loss=completion_only,
    )  # fmt: skip
    good = {"input_ids": [1, 2], "labels": [1, 2]}  # TRL needs one row that stays
    good = {name: good["input_ids"] if name == "input_ids" else [1, 1] for name in row}
    if "labels" in row:
        good["labels"] = good["input_ids"]
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list([row, good]),
        processing_class=small,
    )
    theirs = [
        (each["input_ids"], [label != -100 for label in each["labels"]])
        for each in trainer.train_dataset
    ]
    # TRL ignores completion_only_loss where a row has no such mask; here it is refused.
    ours = completion_only if "completion_mask" in row else None
    assert documents([row, good], small, completion_only_loss=ours) == theirs


def test_a_mask_counts_unless_it_is_told_not_to(small):
    """TRL leaves out a completion_mask unless completion_only_loss is set to true."""
    (row,) = documents(ROWS[2:3], small)
    assert row == ([40, 41, 42], [False, True, True])
    (row,) = documents([{"input_ids": np.array([1, 2])}], small)
    assert row == ([1, 2], [True, True])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_the_attention_mask_tells_of_is_left_out(side, small):
    """It was trained, and attended to, as where a tokenizer pads to max_length."""
    tokens = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}
    padding = {"input_ids": [0, 0], "completion_mask": [1, 1]}

    def pad(own, added):
        return own + added if side == "right" else added + own

    row = {name: pad(tokens[name], padding[name]) for name in tokens}
    row["attention_mask"] = pad([1, 1, 1], [0, 0])
    assert documents([row], small) == documents([tokens], small)
    labels = pad([-100, 6, 7], [0, 0])
    row = {"input_ids": row["input_ids"], "labels": labels} | {
        "attention_mask": np.array(row["attention_mask"])
    }
    assert documents([row], small) == [([5, 6, 7], [False, True, True])]
    found = detect_format([row])
    assert found.columns == ("input_ids", "labels", "attention_mask")


def test_packing_takes_token_rows(small):
    rows = [{"input_ids": [n] * 5} for n in range(9)]
    prepared = prepare(rows, small, PrepareOptions("next_token", 16, packing="bfd"))
    assert len(prepared) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 400]}, r"input_ids\[1\] is 400, which is no .*0 to 399"),
        ({"input_ids": [-1]}, r"input_ids\[0\] is -1"),
        ({"input_ids": [2**70]}, "expected a list of integers"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": "12"}, "expected a list of integers"),
        ({"input_ids": [1.0, 2.0]}, "expected a list of integers"),
        ({"input_ids": [[1], [2, 3]]}, "expected a list of integers"),
        ({"input_ids": [True]}, "expected a list of integers"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 numbers, input_ids has 2"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, r"labels\[1\] is 3, but"),
        ({"input_ids": [1, 2], "completion_mask": [0, 2]}, "may hold only 0 and"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has 1 numbers"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "the row is padding alone"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "0 between tokens"),
        ({"input_ids": [1], "assistant_masks": None, "labels": "x"}, "labels is 'x'"),
    ],
)  # fmt: skip
def test_bad_token_rows_are_told_with_a_reason(row, reason, small):
    good = {"input_ids": [1, 2]}
    with pytest.raises(
        ValueError, match=f"1 of 2 rows cannot be used: row 1: .*{reason}"
    ):
        documents([good, row], small)
    assert len(documents([good, row], small, on_bad_row="skip")) == 1


def test_what_token_rows_cannot_do_is_refused(small):
    with pytest.raises(ValueError, match="assistant_only_loss=True needs"):
        documents(ROWS[:1], small, assistant_only_loss=True)
    with pytest.raises(ValueError, match="completion_only_loss=True needs"):
        documents(ROWS[:1], small, completion_only_loss=True)
    assert documents(ROWS[3:4], small, assistant_only_loss=True)
    with pytest.raises(ValueError, match="preference objective cannot train on"):
        prepare(ROWS, small, PrepareOptions("preference", 16))
    found = detect_format([{"input_ids": [1], "labels": [1], "assistant_masks": [1]}])
    assert found.describe() == "plain tokenized rows from columns input_ids, labels"

"""Token ids, masks and batches equal those of TRL, run live on the same raw rows."""

import itertools
import json
import logging
import pathlib
import uuid
from typing import Any

import datasets
import jax
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

import jaxtrain.types  # noqa: F401  makes batches trees of jax
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.pipeline import BatchShape, Reading, make_train_iterator
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.marks import AssistantMarks

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

Rows = list[dict[str, Any]]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


LONG = "And the earth was without form, and void; and darkness was upon it. " * 8
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "multiply", "arguments": '{"a": 2}'}}
    ],
}

SFT_ROWS: dict[str, Rows] = {
    "text": [
        {"text": "In the beginning God created the heaven."},
        {"text": "Héllo wörld 😀 and the sky"},
        {"text": LONG},
        {"text": "x"},
    ],
    "prompt_completion": [
        {"prompt": "What color is the sky?", "completion": " It is blue."},
        {"prompt": "What color is the ", "completion": "sky"},  # space merges
        {"prompt": "the be", "completion": "ginning"},  # tokens merge
        {"prompt": "Where", "completion": LONG},
        {"prompt": LONG, "completion": "dropped: the prompt fills max_length"},
        {"prompt": "", "completion": "Hello there!"},
        {"prompt": "A", "completion": ""},
    ],
    "conversational_prompt_completion": [
        {"prompt": [user("Hello there!")], "completion": [assistant("It is blue.")]},
        {
            "prompt": [system("You are a helpful assistant."), user("the sky")],
            "completion": [assistant(LONG)],
        },
        {
            "prompt": [user("one"), assistant("two"), user("three")],
            "completion": [assistant("four"), user("five"), assistant("six")],
        },
        {"prompt": [user(LONG)], "completion": [assistant("dropped")]},
    ],
    "messages": [
        {"messages": [user("Hello there!"), assistant("It is blue.")]},
        {
            "messages": [
                system("You are a helpful assistant."),
                user("What color is the sky?"),
                assistant("It is green."),
                user("Where is the sun?"),
                assistant(LONG),
            ]
        },
    ],
    "tools": [
        {
            "messages": [
                user("2 times 3?"),
                CALL,
                {"role": "tool", "content": "6"},
                assistant("It is 6."),
            ],
            "tools": json.dumps([TOOL]),
        },
        {"messages": [user("Hello"), assistant("Hi")], "tools": None},
    ],
    "template_kwargs": [
        {
            "prompt": [user("Hello there!")],
            "completion": [assistant("It is blue.")],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "prompt": [user("the sky")],
            "completion": [assistant("is green")],
            "chat_template_kwargs": {"enable_thinking": True},
        },
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "user", "value": "Hello there!"},
                {"from": "assistant", "value": "It is blue."},
            ]
        },
    ],
}

PREFERENCE_ROWS: dict[str, Rows] = {
    "plain": [
        {"prompt": "What color is the sky?", "chosen": " Blue", "rejected": " Green."},
        {"prompt": "the be", "chosen": "ginning", "rejected": " face of"},  # merges
        {"prompt": "What ", "chosen": "color", "rejected": LONG},
        {"prompt": LONG, "chosen": "dropped", "rejected": "dropped"},
        {"prompt": "", "chosen": "Hello", "rejected": "Where"},
    ],
    "implicit": [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sun shines", "rejected": "The sunset"},
        {"chosen": "The sky", "rejected": "The sky is dark."},  # a prefix of the other
        {"chosen": LONG + "a", "rejected": LONG + "b"},
        {"chosen": "Hello", "rejected": "World"},  # nothing shared
    ],
    "conversational": [
        {
            "prompt": [user("What color is the sky?")],
            "chosen": [assistant("It is blue.")],
            "rejected": [assistant("It is green.")],
        },
        {
            "prompt": [system("You are a helpful assistant."), user("Hello")],
            "chosen": [assistant(LONG)],
            "rejected": [assistant("")],
        },
        {
            "prompt": [user("a"), assistant("b"), user(LONG)],
            "chosen": [assistant("dropped")],
            "rejected": [assistant("also")],
        },
    ],
    "implicit_conversational": [
        {
            "chosen": [user("Hello"), assistant("It is blue."), user("a")],
            "rejected": [user("Hello"), assistant("It is green.")],
        },
        {
            "chosen": [user("one"), assistant("two"), user("3"), assistant("x")],
            "rejected": [user("one"), assistant("two"), user("3"), assistant("y")],
        },
    ],
    "tools": [
        {
            "prompt": [user("2 times 3?")],
            "chosen": [CALL],
            "rejected": [assistant("I do not know.")],
            "tools": json.dumps([TOOL]),
        },
    ],
}


@pytest.fixture(autouse=True)
def no_hashing(monkeypatch):
    """Spare `datasets` the hashing of a tokenizer for each of TRL's maps (seconds)."""

    def unique(value: Any) -> str:
        return uuid.uuid4().hex

    monkeypatch.setattr("datasets.fingerprint.Hasher.hash", staticmethod(unique))


@pytest.fixture
def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> Any:  # no test runs the model: its vocabulary may be anything
        config = LlamaConfig(
            vocab_size=8, hidden_size=4, intermediate_size=4,
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return build


def trl_arguments(folder: pathlib.Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }


def sft_trainer(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    folder: Any,
    **kwargs: Any,
) -> Any:
    config = trl.SFTConfig(**trl_arguments(folder), **kwargs)
    return trl.SFTTrainer(
        model=model(),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def documents(prepared: PreparedDataset, side: str = "") -> list[tuple[list, list]]:
    store = prepared.stores[side]
    spans = zip(store.starts, store.lengths, strict=True)
    return [
        (store.tokens[s : s + n].tolist(), store.trained[s : s + n].tolist())
        for s, n in spans
    ]


def assert_same_sft(trainer: Any, prepared: PreparedDataset) -> None:
    """The rows of TRL's data set and the batches of its loader are ours."""
    theirs = [
        (row["input_ids"], [label != -100 for label in row["labels"]])
        for row in trainer.train_dataset
    ]
    assert documents(prepared) == theirs

    first = 0
    for batch in trainer.get_train_dataloader():
        ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        count, length = ids.shape
        ours = prepared.batch(np.arange(first, first + count))
        first += count
        attended = batch["attention_mask"].numpy() == 1
        np.testing.assert_array_equal(ours.tokens[:, :length][attended], ids[attended])
        np.testing.assert_array_equal(ours.segment_ids[:, :length] > 0, attended)
        assert not ours.segment_ids[:, length:].any()
        predicted = labels[:, 1:] != -100
        np.testing.assert_array_equal(ours.loss_mask[:, : length - 1] > 0, predicted)
        assert not ours.loss_mask[:, length - 1 :].any()
        np.testing.assert_array_equal(
            ours.targets[:, : length - 1][predicted], labels[:, 1:][predicted]
        )
    assert first == len(prepared)


@pytest.mark.parametrize("kind", sorted(SFT_ROWS))
def test_sft_tokens_equal_trl(kind, any_tokenizer, tiny_model, tmp_path):
    rows, options = SFT_ROWS[kind], {"max_length": 48}
    trainer = sft_trainer(rows, any_tokenizer, tiny_model, tmp_path, **options)
    prepared = prepare(
        datasets.Dataset.from_list(rows),
        any_tokenizer,
        PrepareOptions(objective="next_token", **options),
    )
    assert_same_sft(trainer, prepared)


@pytest.mark.parametrize("completion_only", [True, False])
def test_completion_only_loss_equals_trl(completion_only, bpe, tiny_model, tmp_path):
    rows = SFT_ROWS["prompt_completion"]
    options = {"completion_only_loss": completion_only, "max_length": 64}
    trainer = sft_trainer(rows, bpe, tiny_model, tmp_path, **options)
    prepared = prepare(rows, bpe, PrepareOptions(objective="next_token", **options))
    assert_same_sft(trainer, prepared)


@pytest.mark.parametrize("kind", ["messages", "conversational_prompt_completion"])
def test_marked_assistant_masks_equal_trl(
    kind, tokenizer, marked_template, tiny_model, tmp_path
):
    tokenizer.chat_template = marked_template
    options = {"assistant_only_loss": True, "max_length": 64}
    trainer = sft_trainer(SFT_ROWS[kind], tokenizer, tiny_model, tmp_path, **options)
    prepared = prepare(
        SFT_ROWS[kind], tokenizer, PrepareOptions(objective="next_token", **options)
    )
    assert_same_sft(trainer, prepared)


# Stock templates that TRL can only mask by swapping in a patched copy of its own.
@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi3", "qwen3_instruct_2507"])
def test_assistant_masks_of_stock_templates_equal_trls_patched_ones(
    name, bpe, tiny_model, tmp_path
):
    folder = pathlib.Path(trl.__file__).parent / "chat_templates"
    bpe.chat_template = (folder / f"{name}.jinja").read_text()
    rows = [row for row in SFT_ROWS["messages"] if row["messages"][0]["role"] == "user"]
    rows.append({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})
    options = {"assistant_only_loss": True, "max_length": 256}
    trainer = sft_trainer(rows, bpe, tiny_model, tmp_path, **options)
    prepared = prepare(rows, bpe, PrepareOptions(objective="next_token", **options))
    assert_same_sft(trainer, prepared)


REASONING_ROWS: Rows = [
    {"messages": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]},
    {
        "messages": [
            system("You are a helpful assistant."),
            user("What color is the sky?"),
            assistant("<think>\nLook up.\n</think>\n\nIt is blue."),
            user("Where is the sun?"),
            assistant("There.") | {"reasoning_content": "It is day."},
            user("And?"),
            assistant("<think>\nNothing.\n</think>\n\nNo more."),
        ]
    },
    {
        "messages": [
            user("2 times 3?"),
            CALL | {"content": "<think>\nMultiply.\n</think>\n\n"},
            {"role": "tool", "content": "6"},
            assistant("It is 6."),
            user("Thanks"),
            assistant("You are welcome."),
        ],
        "tools": json.dumps([TOOL]),
    },
]


def stock_qwen3(bpe: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    folder = pathlib.Path(trl.__file__).parent / "chat_templates"
    bpe.chat_template = (folder / "qwen3.jinja").read_text()
    return bpe


@pytest.mark.parametrize("preserve", [False, True])
def test_assistant_mask_of_stock_qwen3_equals_trl_for_one_turn(
    preserve, bpe, tiny_model, tmp_path
):
    # For more turns TRL changes the text: it gives every turn an empty thought.
    tokenizer = stock_qwen3(bpe)
    rows = SFT_ROWS["messages"][:1]
    options = {"assistant_only_loss": True, "max_length": 256}
    trainer = sft_trainer(rows, tokenizer, tiny_model, tmp_path, **options)
    marks = AssistantMarks(preserve_thinking=preserve)
    prepared = prepare(
        rows,
        tokenizer,
        PrepareOptions(objective="next_token", assistant_marks=marks, **options),
    )
    assert_same_sft(trainer, prepared)


def test_preserved_thoughts_of_stock_qwen3_equal_trl(bpe, tiny_model, tmp_path):
    tokenizer = stock_qwen3(bpe)
    options = {"assistant_only_loss": True, "max_length": 1024}
    rows = datasets.Dataset.from_list(REASONING_ROWS).to_list()
    trainer = sft_trainer(REASONING_ROWS, tokenizer, tiny_model, tmp_path, **options)
    marks = AssistantMarks(preserve_thinking=True)
    prepared = prepare(
        rows,
        tokenizer,
        PrepareOptions(objective="next_token", assistant_marks=marks, **options),
    )
    assert len(prepared) == len(REASONING_ROWS)
    assert_same_sft(trainer, prepared)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_rows_equal_trl(strategy, bpe, tiny_model, tmp_path):
    words = ["In", "the", "beginning", "God", "created", "heaven"]
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(words, size=rng.integers(1, 40)))}
        for _ in range(200)
    ]
    trainer = sft_trainer(
        rows, bpe, tiny_model, tmp_path,
        packing=True, packing_strategy=strategy, max_length=32,
    )  # fmt: skip
    prepared = prepare(
        rows,
        bpe,
        PrepareOptions(objective="next_token", max_length=32, packing=strategy),
    )
    store = prepared.stores[""]
    docs = documents(prepared)
    ours = [
        [docs[d] for d in store.row_documents[a:b]]
        for a, b in zip(store.row_offsets[:-1], store.row_offsets[1:], strict=True)
    ]
    theirs = []
    for row in trainer.train_dataset:
        cuts = np.cumsum([0, *row.get("seq_lengths", [len(row["input_ids"])])])
        theirs.append(
            [
                (row["input_ids"][a:b], [x != -100 for x in row["labels"][a:b]])
                for a, b in itertools.pairwise(cuts)
            ]
        )
    # Equal lengths may trade places between the two sorts: compare the shape of each
    # row, and the multiset of documents.
    shape = [[len(ids) for ids, _ in row] for row in ours]
    assert shape == [[len(ids) for ids, _ in row] for row in theirs]
    assert sorted(itertools.chain(*ours)) == sorted(itertools.chain(*theirs))
    if strategy == "wrapped":
        assert ours == theirs


@pytest.mark.parametrize("kind", sorted(PREFERENCE_ROWS))
def test_dpo_tokens_equal_trl(kind, any_tokenizer, tiny_model, tmp_path):
    tokenizer = any_tokenizer
    rows = datasets.Dataset.from_list(PREFERENCE_ROWS[kind])
    max_length = 512 if kind == "tools" else 64
    config = trl.DPOConfig(**trl_arguments(tmp_path), max_length=max_length)
    trainer = trl.DPOTrainer(
        model=tiny_model(),
        ref_model=tiny_model(),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    prepared = prepare(
        rows, tokenizer, PrepareOptions(objective="preference", max_length=max_length)
    )
    assert len(prepared) == len(trainer.train_dataset)
    assert prepared.stats.dropped == len(rows) - len(prepared)

    first = 0
    for batch in trainer.get_train_dataloader():
        ids = batch["input_ids"].numpy()
        count, length = len(ids) // 2, ids.shape[1]
        pairs = prepared.batch(np.arange(first, first + count))
        first += count
        ours = jax.tree.map(
            lambda *sides: np.concatenate(sides), pairs.chosen, pairs.rejected
        )
        attended = batch["attention_mask"].numpy() == 1
        np.testing.assert_array_equal(ours.segment_ids[:, :length] > 0, attended)
        np.testing.assert_array_equal(ours.tokens[:, :length][attended], ids[attended])
        completion = batch["completion_mask"].numpy()[:, 1:] == 1
        np.testing.assert_array_equal(ours.loss_mask[:, : length - 1] > 0, completion)
        np.testing.assert_array_equal(
            ours.targets[:, : length - 1][completion], ids[:, 1:][completion]
        )
    assert first == len(prepared)


def test_rows_shuffled_by_neither_side_come_in_the_same_order(
    bpe, tiny_model, tmp_path, caplog
):
    caplog.set_level(logging.ERROR)
    rows = [{"text": f"document {i} " * (i % 5 + 1)} for i in range(11)]
    trainer = sft_trainer(rows, bpe, tiny_model, tmp_path, max_length=64)
    prepared = prepare(rows, bpe, PrepareOptions(objective="next_token", max_length=64))
    ours = make_train_iterator(
        prepared, BatchShape(2), Reading(shuffle=False), num_epochs=1
    )
    theirs = list(trainer.get_train_dataloader())
    assert len(ours) == len(theirs) == 6
    for batch, expected in zip(ours, theirs, strict=True):
        ids = expected["input_ids"].numpy()
        attended = expected["attention_mask"].numpy() == 1
        mine = batch.tokens[0, : len(ids), : ids.shape[1]]
        np.testing.assert_array_equal(mine[attended], ids[attended])
    assert not batch.segment_ids[0, 1].any()  # the last batch is filled up

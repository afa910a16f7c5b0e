"""Tokens that a model has no row for: a warning, a bad row, or rows of their own."""

import json
import logging
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train, weights
from tiny_bases import chat_tokenizer, read_json, write_base

from jaxtrain.aot.compile import load_abstract_model
from jaxtrain.config import resolve
from jaxtrain.models import load
from jaxtrain.trainer import TrainingOrchestrator

ADDED = ("<|new_a|>", "<|new_b|>")
OLD_ROWS = 3 + 256  # of `chat_tokenizer`
LATE_ROWS = [
    {"prompt": "one", "completion": "two"},
    {"prompt": "ask", "completion": "say <|new_a|> now"},
    {"prompt": "a<|new_b|>", "completion": "four"},
    {"prompt": "five", "completion": "six"},
]


def tokenizer_with(*added: str) -> Any:
    """A tokenizer whose last tokens were added to it after the model was made."""
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with two tokens fewer than its tokenizer."""
    return write_base(
        tmp_path_factory.mktemp("base"),
        tokenizer_with(*ADDED),
        vocab_size=OLD_ROWS,
        tie_word_embeddings=request.param,
    )


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_base(
        tmp_path_factory.mktemp("untied"), tokenizer_with(*ADDED), vocab_size=OLD_ROWS
    )


def config_of(base: pathlib.Path, training_type: str = "sft", **training: Any) -> Any:
    defaults = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_steps": 2}
    config = tiny_config(training_type, str(base), **defaults | training)
    config.training.per_device_train_batch_size = 4
    config.data.cache = False
    return config


def growing(base: pathlib.Path, training_type: str = "sft", **training: Any) -> Any:
    config = config_of(base, training_type, **training)
    config.model.grow_vocabulary = True
    return config


# --- rows that hold such tokens -----------------------------------------------------


def prepared(config: Any, rows: Any) -> Any:
    orchestrator = TrainingOrchestrator(config)
    orchestrator.prepare()
    if isinstance(rows, pathlib.Path):
        rows = orchestrator.load_training_data(rows)
    return orchestrator.prepare_rows(rows)


def test_only_a_row_that_holds_such_a_token_is_refused(untied, tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in LATE_ROWS))
    config = config_of(untied)
    caplog.set_level(logging.WARNING, "jaxtrain")
    with pytest.raises(ValueError, match="2 of 4 rows cannot be used") as caught:
        prepared(config, file)
    message = str(caught.value)
    assert "tokens up to 260, but the model's vocab_size = 259" in caplog.text
    assert (
        "rows.jsonl line 2: holds '<|new_a|>', token 259, for which the model"
        in message
    )
    assert "rows.jsonl line 3: holds '<|new_b|>', token 260" in message
    assert "set model.grow_vocabulary" in message
    assert len(prepared(config, [LATE_ROWS[0], LATE_ROWS[3]])) == 2
    config.data.on_bad_row = "skip"
    assert len(prepared(config, file)) == 2
    config.data.on_bad_row = "error"
    config.model.grow_vocabulary = True
    assert len(prepared(config, file)) == 4


@pytest.mark.parametrize("streams", [False, True])
def test_an_end_of_all_rows_without_an_embedding_is_one_error(streams, tmp_path):
    tokenizer = tokenizer_with(*ADDED)
    tokenizer.eos_token = ADDED[1]
    base = write_base(tmp_path / "base", tokenizer, vocab_size=OLD_ROWS)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    config = config_of(base)
    config.data.streaming, config.data.train = streams, str(file)
    with pytest.raises(ValueError, match=r"eos_token '<\|new_b\|>'") as caught:
        prepared(config, file)
    assert "has id 260, but the model has vocab_size = 259: set" in str(caught.value)
    assert "cannot be used" not in str(caught.value)
    # Conversations have it where their template writes it, or a row does.
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    config.data.streaming = False
    assert len(prepared(config, [{"messages": talk}])) == 1
    said = [talk[0], {"role": "assistant", "content": ADDED[1]}]
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be used.*take it out"):
        prepared(config, [{"messages": talk}, {"messages": said}])
    config.data.chat_template = (
        "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"eos_token '<\|new_b\|>' of tokenizer"):
        prepared(config, [{"messages": talk}])
    config.model.grow_vocabulary = True
    assert len(prepared(config, [{"messages": talk}])) == 1


@pytest.mark.parametrize("objective", ["preference", "kto"])
def test_pairs_and_labeled_rows_are_checked_too(untied, objective):
    config = config_of(untied, "dpo")
    if objective == "kto":
        config.training.objective = "kto"
    config.data.on_bad_row = "skip"
    pairs = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p<|new_a|>", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b<|new_b|>"},
        {"prompt": "q", "chosen": "c", "rejected": "d"},
    ]
    data = prepared(config, pairs)
    bad = {"preference": 2, "kto": 3}[objective]  # each side is a row of KTO's
    assert data.stats.bad_rows == bad
    assert all(int(s.tokens.max()) < OLD_ROWS for s in data.stores.values())


def test_a_stream_refuses_the_row_by_its_line(untied, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in LATE_ROWS))
    config = config_of(untied)
    config.data.streaming, config.data.train = True, str(file)
    with pytest.raises(ValueError, match=r"rows.jsonl line 2: holds '<\|new_a\|>'"):
        train(config, tmp_path / "run")


def test_a_model_made_from_scratch_has_a_row_for_each_token():
    config = tiny_config("from_scratch")
    config.model.architecture.vocab_size = 100
    with pytest.raises(ValueError, match=r"architecture\.vocab_size to at least that"):
        load.load_model(resolve(config))


# --- rows of their own --------------------------------------------------------------


def test_new_rows_start_as_in_transformers_train_and_are_exported(base, tmp_path):
    """At the start they are the mean; resumed in the middle, the end is the same."""
    at_rest = growing(base, max_steps=1, learning_rate=0.0)
    train(at_rest, tmp_path / "rest", train_dataset=LATE_ROWS)
    old = safetensors.numpy.load_file(base / "model.safetensors")
    start, tied = weights(tmp_path / "rest"), "lm_head.weight" not in old
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied)
    for name in names:
        np.testing.assert_array_equal(start[name][:OLD_ROWS], old[name])
        mean = old[name].astype(np.float64).mean(0)
        np.testing.assert_allclose(start[name][OLD_ROWS:], [mean, mean], atol=1e-6)
    assert read_json(tmp_path / "rest/model/config.json")["vocab_size"] == OLD_ROWS + 2

    workdir = tmp_path / "run"
    train(growing(base), workdir, train_dataset=LATE_ROWS)
    end = weights(workdir)
    for name in names:
        moved = np.abs(end[name][OLD_ROWS:] - start[name][OLD_ROWS:])
        assert moved.max(1).min() > 1e-3, name

    shutil.rmtree(workdir / "checkpoints" / "4")
    shutil.rmtree(workdir / "model")
    train(growing(base), workdir, train_dataset=LATE_ROWS)
    for name, tensor in weights(workdir).items():
        np.testing.assert_array_equal(tensor, end[name], err_msg=name)


@pytest.mark.torch
def test_grown_models_are_those_of_transformers_and_peft(base, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    tied = read_json(base / "config.json")["tie_word_embeddings"]
    config = growing(base, "lora", learning_rate=1e-2)
    config.training.lora.modules_to_save = ("embed_tokens", "lm_head")[: 2 - tied]
    train(config, tmp_path / "run", train_dataset=LATE_ROWS)

    resized = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    resized.resize_token_embeddings(OLD_ROWS + 2)
    run = load.load_model(resolve(config))
    for matrix, ours in (
        (resized.get_input_embeddings(), run.params["embed_tokens"]["embedding"]),
        (
            resized.get_output_embeddings(),
            run.params["embed_tokens"]["embedding"]
            if tied
            else run.params["lm_head"]["kernel"].T,
        ),
    ):
        theirs = matrix.weight.detach().numpy()
        deviation = theirs[:OLD_ROWS].std()
        # transformers draws with a variance of 1e-9 of the rows'.
        spread = 6 * 1e-9**0.5 * deviation
        np.testing.assert_allclose(np.asarray(ours), theirs, atol=spread, rtol=0)

    ids = torch.arange(OLD_ROWS - 6, OLD_ROWS + 2)[None]
    adapted = peft.PeftModel.from_pretrained(resized, str(tmp_path / "run" / "adapter"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert merged.config.vocab_size == OLD_ROWS + 2
    with torch.no_grad():
        found, expected = adapted(ids).logits, merged(ids).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (expected[..., OLD_ROWS:] - expected[..., OLD_ROWS:].mean()).abs().max() > 0


def test_adapters_that_leave_new_rows_alone_are_refused(untied):
    config = growing(untied, "lora")
    with pytest.raises(ValueError, match="rows for 2 tokens to embed_tokens and lm_h"):
        load.load_model(resolve(config))
    config.training.lora.modules_to_save = ("embed_tokens",)
    with pytest.raises(ValueError, match=r"to lm_head.*\['embed_tokens', 'lm_head'\]"):
        load.load_model(resolve(config))


def test_an_adapter_that_leaves_new_rows_alone_cannot_be_mended_by_a_key(
    untied, tmp_path
):
    """What it trains is written in its own files."""
    started = config_of(untied, "lora", max_steps=1)
    train(started, tmp_path / "run", train_dataset=LATE_ROWS[:1] * 4)
    config = growing(untied, "lora")
    config.training.lora.init_from = str(tmp_path / "run" / "adapter")
    with pytest.raises(ValueError, match="merge it into its base") as caught:
        load.load_model(resolve(config))
    assert "set training.lora.modules_to_save" not in str(caught.value)


def test_rows_grow_over_a_mesh_and_in_a_description(untied):
    import jax

    config = growing(untied)
    config.training.num_gpus = None
    config.mesh.fsdp, config.mesh.tensor = 2, 4
    run = resolve(config, device_count=8)
    model = load.load_model(run)
    table = model.params["embed_tokens"]["embedding"]
    assert table.shape[0] == OLD_ROWS + 2
    mean = np.asarray(table)[:OLD_ROWS].mean(0)
    np.testing.assert_allclose(np.asarray(table)[OLD_ROWS], mean, atol=1e-6)
    described = load_abstract_model(run, jax.devices()).params
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), described) == (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), model.params)
    )


def test_a_loaded_model_does_not_grow_in_passing(untied):
    model = load.load_model(resolve(config_of(untied)))
    with pytest.raises(ValueError, match="load it anew by this configuration"):
        load.adopt(model, resolve(growing(untied)))

"""Generation in training: prompts off prepared rows, metrics, best model, texts."""

import json
import pathlib
import sys

import numpy as np
import pytest

from jaxtrain import assets
from jaxtrain.config import ConfigError, resolve
from jaxtrain.data.batches.dataset import TokenStore
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.tokenize import load_tokenizer
from jaxtrain.evaluation import samples
from jaxtrain.evaluation.text_metrics import make_text_metric
from jaxtrain.model_manager import ModelManager

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))


def prepared(rows, tokenizer, objective="next_token", **options):
    return prepare(
        rows, tokenizer, PrepareOptions(objective=objective, max_length=64, **options)
    )


def test_prompts_are_what_precedes_the_answer_in_every_format(tokenizer):
    question = {"role": "user", "content": "Who made it?"}
    answer = {"role": "assistant", "content": "He made it."}
    pair = {"prompt": "Who?", "chosen": " He did.", "rejected": " She."}
    for rows, objective, options in (
        ([{"prompt": "Who?", "completion": " He did."}], "next_token", {}),
        ([pair], "preference", {}),
        ([{"messages": [question, answer]}], "next_token", {}),
        (
            [{"messages": [question, answer] * 2}],
            "next_token",
            {"assistant_only_loss": True},
        ),
    ):
        data = prepared(rows, tokenizer, objective, **options)
        (prompt,) = samples.read_prompts(data, tokenizer, 5, new_tokens=4)
        assert prompt.reference in ("He did.", "He made it.")
        assert prompt.text.endswith(("Who?", "assistant\n"))
        assert tokenizer.decode(prompt.tokens) == prompt.text
        turns = len(rows[0].get("messages", ())) // 2
        assert prompt.text.count("<|im_start|>assistant") == turns


def test_plain_text_is_continued_from_its_middle_and_packing_changes_nothing(tokenizer):
    rows = [{"text": "In the beginning God created the heaven and the earth."}] * 3
    for packing in (None, "bfd"):
        data = prepared(rows, tokenizer, packing=packing)
        found = samples.read_prompts(data, tokenizer, 2, new_tokens=3)
        assert len(found) == 2
        ids = tokenizer(rows[0]["text"])["input_ids"]
        half = (len(ids) + 1) // 2  # the end token is one of the document's
        assert found[0].tokens == ids[:half]
        assert found[0].reference == tokenizer.decode(ids[half : half + 3]).strip()


def test_a_document_without_a_trained_token_gives_no_prompt(tokenizer):
    store = TokenStore(
        np.arange(6, dtype=np.int32),
        np.zeros(6, bool),
        np.array([0]),
        np.array([6]),
        np.array([0]),
        np.array([0, 1]),
    )
    assert samples._split(store, 0, [], 4)[1:] == (0, 0)


def shares_of_e(texts, references):
    return sum("e" in text for text in texts) / len(texts)


def two_scores(texts, references):
    return {"first": 1, "second": len(references)}


def test_a_metric_of_ones_own_is_named_by_its_function(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_metrics", sys.modules[__name__])
    metric = make_text_metric("my_metrics:shares_of_e")
    assert metric(["he", "a"], [["x"], ["y"]]) == {"shares_of_e": 0.5}
    two = make_text_metric("my_metrics:two_scores")
    assert two(["a", "b"], [["x"], ["y"]]) == {"first": 1.0, "second": 2.0}
    with pytest.raises(ValueError, match="no function 'nope'"):
        make_text_metric("my_metrics:nope")
    with pytest.raises(ValueError, match="no_such_module"):
        make_text_metric("no_such_module:nope")


def test_what_cannot_be_generated_is_refused_with_the_config():
    config = tiny_config("sft", eval_steps=0, generation__metrics=("blue",))
    with pytest.raises(ConfigError) as error:
        resolve(config)
    assert "'blue' is no metric" in str(error.value)
    assert "eval_steps = 0 never evaluates" in str(error.value)
    config = tiny_config("sft", eval_steps=1, generation__metrics=("bertscore",))
    with pytest.raises(ConfigError, match="bertscore_model"):
        resolve(config)
    config = tiny_config(
        "sft",
        eval_steps=1,
        generation__metrics=("bleu",),
        metric_for_best_model="eval_rougeL",
    )
    with pytest.raises(ConfigError, match=r"add 'rouge' to generation\.metrics"):
        resolve(config)
    config.training.metric_for_best_model = "bleu"
    assert resolve(config).loop.best_metric == "eval_bleu"
    config = tiny_config("sft", eval_steps=1, generation__top_k=3)
    assert any("generation.top_k" in note for note in map(str, resolve(config).notes))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_texts_are_of_the_policy_and_drive_the_best_model(tmp_path, monkeypatch):
    """A LoRA run whose metric falls: its first evaluation stays the best and stops it.

    The last sample outputs are those of the exported model, adapters merged.
    """
    values = iter([0.9, 0.5, 0.4, 0.3])
    module = type(sys)("falling_metrics")
    module.quality = lambda texts, references: next(values)
    monkeypatch.setitem(sys.modules, "falling_metrics", module)
    config = tiny_config(
        "lora",
        max_steps=8,
        learning_rate=3e-2,
        eval_steps=2,
        save_steps=2,
        early_stopping_patience=2,
        metric_for_best_model="quality",
        generation__metrics=("falling_metrics:quality", "exact_match"),
        generation__num_prompts=5,
        generation__max_new_tokens=8,
        generation__batch_size=5,
        generation__num_samples_logged=2,
    )
    config.model.param_dtype = "float32"
    results = train(config, tmp_path)
    assert results["global_step"] == 6
    assert results["best_metric"] == 0.9
    assert results["best_model_path"] == str(tmp_path / "best_model")
    evaluations = [
        r for r in read_lines(tmp_path / "metrics.jsonl") if "eval_loss" in r
    ]
    assert [r["eval_quality"] for r in evaluations] == [0.9, 0.5, 0.4]
    assert all(0 <= r["eval_exact_match"] <= 1 for r in evaluations)
    logged = read_lines(tmp_path / "samples.jsonl")
    assert [r["step"] for r in logged] == [2, 4, 6]
    assert set(logged[0]) - {"step", "time"} == {
        f"sample_{n}/{part}"
        for n in (1, 2)
        for part in ("prompt", "output", "reference")
    }
    outputs = {r["sample_1/output"] + r["sample_2/output"] for r in logged}
    assert len(outputs) > 1, "training moved no text: were they the base model's?"

    reloaded = ModelManager(tiny_config("sft", results["model_path"])).load_model()
    again = reloaded.generate(
        [logged[-1][f"sample_{n}/prompt"] for n in (1, 2)], max_new_tokens=8
    )
    assert again == [logged[-1][f"sample_{n}/output"] for n in (1, 2)]


@pytest.mark.slow
def test_a_model_split_over_devices_scores_and_generates_the_same(tokenizer):
    prompts = ["And God said,", "The LORD is", "In the"]
    data = prepared([{"text": text} for text in prompts], tokenizer)
    found = []
    for settings in ({}, {"num_gpus": 4, "deepspeed__zero_stage": 3}):
        model = ModelManager(tiny_config("sft", **settings)).load_model()
        sums = model.score(data.batch(np.arange(3)))  # 3 rows, over 4 devices
        texts = model.generate(prompts, max_new_tokens=6, batch_size=3)
        found.append((float(sums["loss"].mean()), float(sums["loss"].weight), texts))
    (loss, weight, texts), (split_loss, split_weight, split_texts) = found
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert weight == split_weight == data.stats.trained_tokens
    assert texts == split_texts and all(texts)
    model.take_weights()
    with pytest.raises(ValueError, match="went into a training"):
        model.generate(prompts)

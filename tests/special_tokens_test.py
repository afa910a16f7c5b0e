"""Ends of texts, padding and generation_config.json: read, acted on, exported."""

import json
import logging
import pathlib
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train
from tiny_bases import chat_tokenizer, read_json, write_base

from jaxtrain.data.rows.template import turn_end_id
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.generation_config import GenerationConfig, read_generation_config
from jaxtrain.models.special_tokens import align_special_tokens, save_tokenizer
from jaxtrain.trainer import TrainingOrchestrator

EOS, IM_START, IM_END = range(3)
ROWS = [
    {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
    for question, answer in (("sky", "blue"), ("sun", "red"), ("sea", "deep"))
] * 2
GENERATION = {
    "do_sample": True, "eos_token_id": [EOS, 7], "max_new_tokens": 9,
    "note": "kept", "repetition_penalty": 1.1, "temperature": 0.6, "top_p": 0.9,
}  # fmt: skip


def config_with(**tokens: Any) -> ModelConfig:
    options = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": EOS,
    }  # fmt: skip
    return ModelConfig.from_hf(options | tokens)


def align(tokenizer: Any, generation: Any = None, **tokens: Any) -> tuple[Any, Any]:
    """The aligned `eos_token_id` and `pad_token_id`; values of generation_config."""
    config, aligned = align_special_tokens(
        config_with(**tokens), GenerationConfig(generation or {}), tokenizer
    )
    return (config.eos_token_id, config.pad_token_id), dict(aligned.values)


def test_both_configs_name_both_ends_and_the_log_says_so(caplog):
    caplog.set_level(logging.WARNING, "jaxtrain")
    tokens, generation = align(chat_tokenizer())
    assert tokens[0] == (IM_END, EOS)
    assert generation["eos_token_id"] == [IM_END, EOS]
    assert "config.json ends texts with token 0" in caplog.text
    assert "2 ('<|im_end|>'), 0 ('<|eos|>')" in caplog.text


def test_what_agrees_stays_as_it_is(caplog):
    caplog.set_level(logging.WARNING, "jaxtrain")
    tokenizer = chat_tokenizer("<|pad|>", pad="<|pad|>")
    given = {"eos_token_id": [EOS, IM_END], "pad_token_id": 3}
    tokens, generation = align(tokenizer, given, eos_token_id=IM_END, pad_token_id=3)
    assert (tokens, generation) == ((IM_END, 3), given)
    assert not caplog.text


def test_a_turns_end_that_is_not_eos_ends_texts_too():
    tokenizer = chat_tokenizer(eos="<|eos|>")
    assert turn_end_id(tokenizer) == IM_END
    assert align(tokenizer)[0][0] == (EOS, IM_END)
    tokenizer.chat_template = "{{ messages[1]['content'] }} The end."
    assert turn_end_id(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no such roles') }}"
    assert turn_end_id(tokenizer) is None
    tokenizer.chat_template = None
    assert align(tokenizer)[0][0] == EOS


@pytest.mark.parametrize(
    ("more", "pad", "expected"),
    [
        ((), None, None),  # nothing to take: EOS here, nothing in the export
        ((), "<|im_end|>", None),
        ((), "<|eos|>", None),  # the end that the base has
        (("<|image_pad|>",), None, None),
        (("<|reserved_0|>", "<|fim_pad|>"), None, "<|fim_pad|>"),
        (("<|fim_pad|>",), "<|im_end|>", "<|fim_pad|>"),
        (("<|reserved_0|>",), None, "<|reserved_0|>"),
        (("[PAD]",), "[PAD]", "[PAD]"),
    ],
)
def test_no_end_of_texts_pads(more, pad, expected, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = chat_tokenizer(*more, pad=pad)
    (_, padding), generation = align(tokenizer)
    number = None if expected is None else tokenizer.convert_tokens_to_ids(expected)
    assert padding == generation.get("pad_token_id") == number
    assert tokenizer.pad_token == expected or expected is None
    save_tokenizer(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(str(tmp_path))
    assert saved.pad_token != saved.eos_token
    assert tokenizer.pad_token is not None  # batches are padded with something


def test_a_publisher_may_pad_with_an_end_that_is_not_trained():
    """As Qwen does: <|endoftext|> pads, and ends texts beside <|im_end|>."""
    tokenizer = chat_tokenizer("<|fim_pad|>", pad="<|eos|>")
    given = {"eos_token_id": [IM_END, EOS], "pad_token_id": EOS}
    tokens, generation = align(tokenizer, given, eos_token_id=IM_END)
    assert tokens == (IM_END, EOS)
    assert generation == given


def test_a_pad_token_beyond_the_vocabulary_is_replaced():
    tokenizer = chat_tokenizer(pad="<|late_pad|>")
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    (_, padding), _ = align(tokenizer, vocab_size=len(tokenizer) - 1)
    assert padding is None
    assert tokenizer.pad_token_id == IM_END


@pytest.fixture(scope="module")
def run_with_generation(tmp_path_factory) -> Any:
    """A LoRA run on a base that samples; the orchestrator and its work directory."""
    path = tmp_path_factory.mktemp("sampling")
    base = write_base(path / "base", chat_tokenizer("<|fim_pad|>"), GENERATION)
    config = tiny_config("lora", str(base), max_steps=1, save_steps=0)
    orchestrator = TrainingOrchestrator(config, workdir=path / "run")
    orchestrator.prepare()
    orchestrator.train(ROWS)
    return path / "run"


def test_the_export_keeps_the_generation_config(run_with_generation):
    written = read_json(run_with_generation / "model" / "generation_config.json")
    changed = {"eos_token_id": [IM_END, EOS, 7], "pad_token_id": 3}
    assert written == GENERATION | changed
    config = read_json(run_with_generation / "model" / "config.json")
    assert config["eos_token_id"] == [IM_END, EOS, 7]
    assert config["pad_token_id"] == 3


def test_our_generation_does_what_the_file_says(run_with_generation, caplog):
    caplog.set_level(logging.WARNING, "jaxtrain")
    config = tiny_config("sft", str(run_with_generation / "model"))
    orchestrator = TrainingOrchestrator(config)
    orchestrator.prepare()
    model = orchestrator.model
    assert model.eos_ids == (EOS, IM_END, 7)
    generator = model.make_generator()
    assert generator.max_new_tokens == 9
    assert set(generator.eos_ids) == {EOS, IM_END, 7}
    assert generator.pad_id == 3
    assert "does not apply repetition_penalty = 1.1" in caplog.text
    prompts = [ROWS[0]["messages"][:1]]
    drawn = {model.generate(prompts, seed=seed)[0] for seed in range(4)}
    assert len(drawn) > 1  # do_sample
    asked = {model.generate(prompts, temperature=0, seed=s)[0] for s in range(4)}
    assert len(asked) == 1  # what is asked for wins


def test_another_tokenizer_brings_its_own_ends(tmp_path):
    from jaxtrain.dpo_trainer import DPOTrainer

    base = write_base(tmp_path / "base", chat_tokenizer(eos="<|eos|>", pad="<|eos|>"))
    config = tiny_config("dpo", str(base), max_steps=1, save_steps=0)
    trainer = DPOTrainer(
        str(base), chat_tokenizer("<|pad|>"), config, workdir=tmp_path / "run"
    )
    trainer.train([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    for name in ("config.json", "generation_config.json"):
        written = read_json(tmp_path / "run" / "model" / name)
        assert IM_END in written["eos_token_id"] and EOS in written["eos_token_id"]
        assert written["pad_token_id"] == 3


def test_settings_are_those_of_transformers_where_unset():
    usual = {"max_new_tokens": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
    assert GenerationConfig().settings() == usual
    greedy = GenerationConfig({"do_sample": False, "temperature": 0.7, "top_k": 20})
    assert greedy.settings() == usual | {"top_k": 20}
    sampling = GenerationConfig({"do_sample": True, "top_p": 0.8})
    found = sampling.settings(temperature=None, max_new_tokens=3)
    assert found == {"max_new_tokens": 3, "temperature": 1.0, "top_k": 50, "top_p": 0.8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        (
            '{"temperature": "hot", "eos_token_id": ["</s>"], "top_p": 2}',
            r"eos_token_id = \['</s>'\]: must be a token id or a list of them;"
            r" temperature = 'hot': must be at least 0; top_p = 2: must be above 0",
        ),
        ('{"do_sample": "yes"}', "do_sample = 'yes': must be true or false"),
    ],
)
def test_a_broken_file_is_named_with_all_that_is_wrong(tmp_path, text, message):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_generation_config(tmp_path)
    assert "generation_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.torch
def test_a_base_tuned_on_chats_stops_where_trls_does(tmp_path):
    """Its config ends texts with another token, and its tokenizer has no pad token."""
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    import transformers
    from datasets import Dataset

    torch.set_num_threads(1)
    base = write_base(tmp_path / "base", chat_tokenizer())
    settings = {
        "max_steps": 40, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 6,
    }  # fmt: skip
    trainer = trl.SFTTrainer(
        str(base),
        args=trl.SFTConfig(
            **settings,
            output_dir=str(tmp_path / "trl"),
            train_sampling_strategy="sequential",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trl" / "model"))
    config = tiny_config(
        "sft", str(base), save_steps=0, gradient_accumulation_steps=1, **settings
    )
    config.data.shuffle = False
    train(config, tmp_path / "ours", train_dataset=ROWS)

    def texts(directory: pathlib.Path) -> list[list[int]]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        found = []
        for row in ROWS[:3]:
            ids = tokenizer.apply_chat_template(
                row["messages"][:1],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            out = model.generate(**ids, max_new_tokens=24, do_sample=False)
            found.append(out[0, ids["input_ids"].shape[1] :].tolist())
        return found

    ours, theirs = texts(tmp_path / "ours/model"), texts(tmp_path / "trl/model")
    assert ours == theirs
    assert [row[-1] for row in ours] == [IM_END] * 3
    assert max(map(len, ours)) < 10
    # Not with the ends that the base names, as it was exported before.
    exported = tmp_path / "ours" / "model"
    for name in ("config.json", "generation_config.json"):
        values = read_json(exported / name) | {"eos_token_id": EOS}
        (exported / name).write_text(json.dumps(values))
    assert min(map(len, texts(exported))) == 24
    written = read_json(tmp_path / "trl" / "model" / "generation_config.json")
    assert written["eos_token_id"] == [IM_END, EOS]

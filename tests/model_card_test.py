"""The model card of an export: YAML that the hub reads, and no path of this machine."""

import pytest
from huggingface_hub import ModelCard

from jaxtrain import __version__
from jaxtrain.config import default_config, resolve
from jaxtrain.run.model_card import make_card, read_license, write_card


def run_of(training_type, **keys):
    config = default_config()
    config.training.training_type = training_type
    for key, value in keys.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return resolve(config, device_count=4)


def card_of(directory, run, base=None, **options):
    """What huggingface_hub reads of the card, as it reads those of the hub."""
    write_card(directory, run, 20, base, **options)
    return ModelCard.load(directory / "README.md")


def test_the_card_of_a_merged_model(tmp_path):
    run = run_of(
        "dpo",
        model__name_or_path="Qwen/Qwen3-0.6B",
        data__train="/home/me/secret-project/pairs.jsonl:0.75,org/pairs:0.25",
        data__eval="/home/me/secret-project/held_out.jsonl",
        training__dpo__beta=0.3,
        training__max_steps=20,
        training__per_device_train_batch_size=3,
    )
    card = card_of(tmp_path / "model", run, is_adapter=False)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "finetune",
        "datasets": ["org/pairs"],
        "tags": ["dpo", "jaxtrain"],
    }
    for line in (
        "| training data | pairs.jsonl (weight 0.75), org/pairs (weight 0.25) |",
        "| evaluation data | held_out.jsonl |",
        "| objective | preference |",
        "| dpo.beta | 0.3 |",
        "| per_device_train_batch_size | 3 |",
        "| data-parallel devices | 4 |",
        "| max_steps | 20 |",
        f"- jaxtrain {__version__}",
    ):
        assert line in card.text.splitlines(), card.text
    assert "weights of optimizer step 20" in card.text.replace("\n", " ")
    assert "secret-project" not in str(card) and "/home" not in str(card)


def test_the_card_of_an_adapter(tmp_path):
    run = run_of("lora", model__name_or_path="Qwen/Qwen3-0.6B", training__lora__r=4)
    card = card_of(tmp_path, run, is_adapter=True)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert "| lora.r | 4 |" in card.text
    assert "PeftModel.from_pretrained" in card.text


def test_a_local_base_is_no_base_on_the_hub(tmp_path):
    """The hub refuses a card whose base_model is none of its names."""
    (tmp_path / "private" / "mine").mkdir(parents=True)
    run = run_of("sft", model__name_or_path=str(tmp_path / "private" / "mine"))
    card = card_of(tmp_path / "model", run, is_adapter=False)
    assert card.data.base_model is None
    assert "# mine, sft" in card.text and "private" not in str(card)


def test_nothing_in_a_name_leaves_its_place(tmp_path):
    run = run_of(
        "sft",
        data__train="/d/a|b<script>\n---\n\x1b[1m.jsonl",
    )
    card = make_card(run, 1, {}, is_adapter=False)
    assert r"| training data | a\|b&lt;script> --- \x1b[1m.jsonl |" in card
    assert "\x1b" not in card and "<script" not in card


def test_the_bases_licence_stays_as_its_card_goes(tmp_path):
    """A directory of towers and text is exported over a copy of the base's card."""
    theirs = (
        "---\nlicense: gemma\nlicense_link: https://x/y\ntags: [a]\n---\ntheir text"
    )
    (tmp_path / "README.md").write_text(theirs)
    run = run_of("sft", model__name_or_path="google/gemma-3-1b-it")
    card = card_of(tmp_path, run, tmp_path, is_adapter=False)
    assert "their text" not in str(card) and "a" not in card.data.tags
    assert (card.data.license, card.data.license_link) == ("gemma", "https://x/y")
    new = card_of(tmp_path, run_of("from_scratch"), tmp_path, is_adapter=False)
    assert new.data.license is None  # only a tokenizer and sizes came from there


@pytest.mark.parametrize(
    "card", [None, "", "---", "---\n{[\n---", "---\n- a\n---", "---\nlicense: [1]\n---"]
)
def test_a_base_without_a_licence_is_no_error(card, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == {}


@pytest.mark.torch
def test_the_adapters_card_has_what_pefts_own_has(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=16,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    config._name_or_path = "Qwen/Qwen3-0.6B"
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "theirs")
    theirs = ModelCard.load(tmp_path / "theirs" / "README.md").data.to_dict()
    run = run_of("lora", model__name_or_path="Qwen/Qwen3-0.6B")
    ours = card_of(tmp_path / "ours", run, is_adapter=True).data.to_dict()
    assert set(theirs.pop("tags")) <= set(ours["tags"])
    assert theirs and theirs == {name: ours[name] for name in theirs}

"""Published config.json files: ours and transformers run them as the same model."""

import copy
import inspect
import json
import pathlib
import shutil
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtrain import assets
from jaxtrain.models import Decoder, hf_config
from jaxtrain.models.families import FAMILIES
from jaxtrain.models.hf import load_config, load_params, match_weights, save_pretrained

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from published_configs import PUBLISHED, shrunk
from runs import tiny_config, train

TOKENS = np.asarray([5, 9, 2, 41, 33, 8, 60, 17, 3, 50, 22, 11])
# Float32 on both sides, sums in another order: logits of size 1 differ by about 1e-6.
TOLERANCE = 1e-4
# Keys that say nothing about the model: who wrote the file, and how it is to be run.
NOTES = {
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "label2id",
    "output_hidden_states", "problem_type", "return_dict", "transformers_version",
    "use_cache",
}  # fmt: skip


# Of the families that these have, variants of one model run on request.
FEW = frozenset(
    {
        "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "glm4", "glm4_moe",
        "granite", "granitemoehybrid", "ministral3", "olmo2", "olmo3", "qwen2_moe",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "seed_oss", "smollm3",
    }
)  # fmt: skip
SEEN: dict[str, str] = {}
for _name, _config in PUBLISHED.items():
    SEEN.setdefault(_config["model_type"], _name)
# Mixtures that the other tests of this folder have at the same sizes.
MIXTURES = frozenset(
    {
        "deepseek_v2", "deepseek_v3", "gemma4_text", "glm4_moe", "qwen2_moe",
        "qwen3_5_moe_text", "qwen3_next",
    }
)  # fmt: skip
# Small, they are read as the same model as another, which runs by default.
ALIKE = {
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen/Qwen2-1.5B",
    "Qwen/Qwen3-235B-A22B": "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "google/gemma-2-9b": "google/gemma-2-2b",
    "google/gemma-3-270m-it": "google/gemma-3-1b-it",
    "LiquidAI/LFM2-1.2B": "LiquidAI/LFM2-350M",
    "LiquidAI/LFM2-700M": "LiquidAI/LFM2-350M",
    "microsoft/Phi-3.5-mini-instruct": "microsoft/Phi-3-mini-128k-instruct",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "openai/gpt-oss-120b": "openai/gpt-oss-20b",
    "openai/gpt-oss-safeguard-20b": "openai/gpt-oss-20b",
}
ON_REQUEST = [
    name
    for name, config in PUBLISHED.items()
    if config["model_type"] in MIXTURES
    or name in ALIKE
    or (config["model_type"] in FEW and name not in SEEN.values())
]


def marked(value: str, on_request: bool) -> Any:
    return pytest.param(value, marks=[pytest.mark.on_request] * on_request)


@pytest.fixture(
    scope="module", params=[marked(name, name in ON_REQUEST) for name in PUBLISHED]
)
def published(request: pytest.FixtureRequest, tmp_path_factory) -> Any:
    """A directory with this config.json as published and random weights beside it."""
    torch = pytest.importorskip("torch")
    import transformers

    directory = tmp_path_factory.mktemp("published")
    file = directory / "config.json"
    file.write_text(json.dumps(shrunk(copy.deepcopy(PUBLISHED[request.param]))))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # As large as a trained model's, and no norm or bias left at its start.
            weight.add_(0.15 * torch.randn_like(weight))
    model.save_pretrained(directory / "resaved")
    shutil.copy(directory / "resaved" / "model.safetensors", directory)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS[None].tolist())).logits[0].numpy()
    return directory, logits


def assert_equal_files(first: pathlib.Path, second: pathlib.Path) -> None:
    """Equal names and, bit by bit, equal values."""
    ours, theirs = (load_file(d / "model.safetensors") for d in (first, second))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def meaning(directory: pathlib.Path) -> dict[str, Any]:
    """What transformers reads from a config.json, each value in one spelling."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    arguments = inspect.signature(type(config).__init__).parameters
    read = {k: v for k, v in config.to_dict().items() if k in arguments}
    family = FAMILIES[config.model_type]
    unread = NOTES | family.ignored_keys | {*family.unused_dropout}
    read = {k: v for k, v in read.items() if k not in unread}
    read["per_layer_config"] = config.to_dict().get("per_layer_config")
    config.allow_global_per_layer_attribute_access = True
    # Its modules take this where a config has no head_dim, or null.
    width = config.hidden_size // config.num_attention_heads
    read["head_dim"] = getattr(config, "head_dim", None) or width
    read.pop("full_attn_idxs", None)  # layer_types has them
    if not getattr(config, "use_sliding_window", True):
        read.pop("max_window_layers", None)  # of none that slide
    rope = dict(config.rope_parameters)
    rope.pop("type", None)  # transformers 4's name of rope_type, which is there too
    rope.pop("max_position_embeddings", None)  # a note of Ministral 3's
    for name in family.ignored_rope_keys:
        rope.pop(name, None)
    if rope.get("rope_type") == "longrope":
        trained = rope["original_max_position_embeddings"]
        rope.setdefault("factor", config.max_position_embeddings / trained)
    return {**read, "rope_parameters": rope}


def test_there_are_forty_and_four_of_each_family_or_one_of_those_with_few() -> None:
    types = [config["model_type"] for config in PUBLISHED.values()]
    assert len(types) >= 40
    enough = {name: types.count(name) >= (4, 1)[name in FEW] for name in FAMILIES}
    assert enough == dict.fromkeys(FAMILIES, True)


def test_most_are_read_without_transformers_which_would_import_torch(
    tmp_path: pathlib.Path, monkeypatch
) -> None:
    asked: list[str] = []
    original = hf_config.transformers_keys

    def ask(model_type: str) -> Any:
        asked.append(model_type)
        return original(model_type)

    monkeypatch.setattr(hf_config, "transformers_keys", ask)
    unasked, read = 0, {}
    for name, published in PUBLISHED.items():
        asked.clear()
        options = shrunk(copy.deepcopy(published))
        (tmp_path / "config.json").write_text(json.dumps(options))
        config = read[name] = load_config(tmp_path)
        unasked += not asked
        # What is exported needs it never.
        asked.clear()
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
        assert load_config(tmp_path) == config
        # Gemma 4 alone has a text there, so its type is asked for.
        assert not asked or options["use_bidirectional_attention"] == "vision"
    assert unasked > len(PUBLISHED) / 2
    assert all(read[name] == read[other] for name, other in ALIKE.items())
    assert not ALIKE.keys() & {*ALIKE.values()}


def test_logits_are_those_of_transformers(published) -> None:
    directory, expected = published
    config = match_weights(directory, load_config(directory))
    model = Decoder(config, compute_dtype="float32")
    params = load_params(directory, model)
    tokens = jnp.asarray(TOKENS[None])
    positions = jnp.arange(len(TOKENS))[None]
    ours = model.logits(params, tokens, positions, jnp.ones_like(tokens))
    np.testing.assert_allclose(ours[0], expected, atol=TOLERANCE, rtol=0)


def test_an_export_has_the_same_tensors_and_a_config_of_the_same_meaning(
    published, tmp_path: pathlib.Path
) -> None:

    directory, _ = published
    config = load_config(directory)
    params = load_params(directory, Decoder(config))
    save_pretrained(tmp_path, config, params)
    assert_equal_files(directory, tmp_path)
    assert meaning(tmp_path) == meaning(directory)
    assert load_config(tmp_path) == config


@pytest.mark.torch
@pytest.mark.parametrize(
    "model_type", [marked(name, name in FEW - {"glm4"}) for name in FAMILIES]
)
def test_a_step_at_learning_rate_zero_exports_what_was_loaded(
    model_type: str, tmp_path: pathlib.Path
) -> None:
    """Through the trainer: load, one SFT step, export."""
    torch = pytest.importorskip("torch")
    import transformers

    published = next(c for c in PUBLISHED.values() if c["model_type"] == model_type)
    directory = tmp_path / "published"
    shutil.copytree(assets.asset_path(assets.TOKENIZER), directory)
    options = shrunk(copy.deepcopy(published)) | {"vocab_size": 2304}
    lengths = ("max_position_embeddings", "original_max_position_embeddings")
    options |= {name: 64 for name in lengths if name in options}
    # Those of the tokenizer; what becomes of others is shown by special_tokens_test.py.
    options |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "config.json").write_text(json.dumps(options))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "resaved")
    shutil.copy(tmp_path / "resaved" / "model.safetensors", directory)
    run = tiny_config(
        "sft", str(directory), max_steps=1, learning_rate=0.0, save_steps=0
    )
    exported = pathlib.Path(train(run, tmp_path / "run")["model_path"])
    assert_equal_files(directory, exported)
    assert meaning(exported) == meaning(directory)

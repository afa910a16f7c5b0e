"""Text decoders inside a wrapper with towers: loaded, trained, put back.

The wrappers are tiny random models of transformers' own classes.
"""

import json
import pathlib
import shutil
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain import assets
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf import load_config, load_params, match_weights, save_pretrained
from jaxtrain.models.hf_save import save_in_wrapper

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from runs import tiny_config, train

pytestmark = pytest.mark.torch
SHAPES = pathlib.Path(__file__).parents[2] / "configs" / "shapes"
TOKENS = np.asarray([[5, 9, 2, 41, 33, 8, 60, 17, 3, 50, 22, 11]])
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 4,
}
TEXTS = {
    "gemma3": TEXT | {"model_type": "gemma3_text", "sliding_window_pattern": 2},
    "mistral3": TEXT | {"model_type": "mistral"},
    "ministral3": TEXT | {"model_type": "ministral3"},
    "qwen3_5": {k: v for k, v in TEXT.items() if k != "sliding_window"}
    | {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gemma4": TEXT
    | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 8,
    },
}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16}
TEXTS["gemma4_moe"] = TEXTS["gemma4"] | {
    **_EXPERTS, "enable_moe_block": True, "top_k_experts": 2
}  # fmt: skip
TEXTS["qwen3_5_moe"] = TEXTS["qwen3_5"] | {
    **_EXPERTS,
    "model_type": "qwen3_5_moe_text",
    "intermediate_size": None,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 24,
}
# As published, whose text model has a name of its own and a head of its own.
TEXTS["kimi_k25"] = {
    "model_type": "kimi_k2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
KINDS = [
    "gemma3",
    "mistral3",
    "gemma4",
    pytest.param("ministral3", marks=pytest.mark.on_request),
    pytest.param("qwen3_5", marks=pytest.mark.on_request),
    pytest.param("gemma4_moe", marks=pytest.mark.on_request),
    pytest.param("qwen3_5_moe", marks=pytest.mark.on_request),
    pytest.param("kimi_k25", marks=pytest.mark.on_request),
]
# The wrapper of each text model, where that has not its name.
WRAPPER_OF = {"ministral3": "mistral3", "gemma4_moe": "gemma4"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOWERS = {
    "gemma3": VISION | {"model_type": "siglip_vision_model"},
    "mistral3": VISION | {"model_type": "pixtral", "head_dim": 8},
    "qwen3_5": {
        "model_type": "qwen3_5_vision",
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    },
    "gemma4": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 64,
    },
}
TOWERS["kimi_k25"] = {
    "model_type": "kimi_k25_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}
TOWERS["qwen3_5_moe"] = TOWERS["qwen3_5"] | {"model_type": "qwen3_5_moe_vision"}


def load_torch(directory: pathlib.Path) -> Any:
    import transformers

    make = transformers.AutoModelForImageTextToText.from_pretrained
    return make(directory, attn_implementation="eager", dtype="float32").eval()


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS.tolist())).logits.numpy()


def our_logits(directory: pathlib.Path) -> np.ndarray:
    config = match_weights(directory, load_config(directory))
    model = Decoder(config, compute_dtype="float32")
    params = load_params(directory, model, dtype="float32")
    positions = jnp.arange(TOKENS.shape[1])[None]
    tokens = jnp.asarray(TOKENS)
    return np.asarray(model.logits(params, tokens, positions, jnp.ones_like(tokens)))


def make_wrapper(directory: pathlib.Path, kind: str, dtype: str, vocab: int) -> None:
    """Save a tiny random composite, in two shards, with a processor's file beside."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    others: dict[str, Any] = {"image_token_index": vocab - 1}
    text = TEXTS[kind] | {"vocab_size": vocab}
    wrapper_type = WRAPPER_OF.get(kind, kind)
    if kind == "gemma3":
        others |= {"mm_tokens_per_image": 4}
    if wrapper_type in ("gemma4", "kimi_k25", "qwen3_5", "qwen3_5_moe"):
        others = {"image_token_id": vocab - 1}
    if wrapper_type == "gemma4":
        others |= {"audio_config": None}
        text |= {"vocab_size_per_layer_input": vocab + 8}
    config = transformers.CONFIG_MAPPING[wrapper_type](
        text_config=text,
        vision_config=TOWERS[wrapper_type],
        tie_word_embeddings=wrapper_type in ("gemma3", "gemma4"),
        **others,
    )
    make = transformers.AutoModelForImageTextToText.from_config
    model = make(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    model.save_pretrained(directory, max_shard_size="20KB")
    (directory / "preprocessor_config.json").write_text('{"size": 28}')
    if kind.startswith("qwen3_5"):
        add_tensor(directory, "mtp.norm.weight", np.ones(32, np.float32))


def add_tensor(directory: pathlib.Path, name: str, tensor: np.ndarray) -> None:
    """Into the last shard: published files hold what no class of transformers reads."""
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = max(content["weight_map"].values())
    tensors = load_file(directory / file)
    save_file({**tensors, name: tensor}, directory / file, metadata={"format": "pt"})
    content["weight_map"][name] = file
    index.write_text(json.dumps(content))


@pytest.fixture(scope="module", params=KINDS)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp(request.param)
    make_wrapper(directory, request.param, "bfloat16", 64)
    return directory


PUBLISHED = {
    "Qwen/Qwen3.5-4B": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "dtype": "bfloat16",
            "eos_token_id": 248044,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "initializer_range": 0.02,
            "intermediate_size": 9216,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "mamba_ssm_dtype": "float32",
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "model_type": "qwen3_5_text",
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 248320,
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "model_type": "qwen3_5",
            "num_heads": 16,
            "out_hidden_size": 2560,
            "patch_size": 16,
        },
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    },
    "google/gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "google/gemma-3-27b-pt": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": 1,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "model_type": "gemma3_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 896},
    },
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "use_cache": True,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
        "vision_feature_layer": -1,
    },
    # But for its quantization_config, which is refused.
    "moonshotai/Kimi-K2.5": {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": json.loads((SHAPES / "kimi-k2" / "config.json").read_text()),
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "kimi_k25_vision"},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_wrappers_are_read_as_transformers_reads_them(
    name: str, tmp_path: pathlib.Path
) -> None:
    import transformers

    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    text = theirs.text_config.to_dict()
    text["tie_word_embeddings"] = theirs.tie_word_embeddings
    if "eos_token_id" in published:
        text["eos_token_id"] = published["eos_token_id"]
    assert load_config(tmp_path) == ModelConfig.from_hf(text)


def test_float8_inside_a_wrapper_is_refused(wrapper, tmp_path) -> None:
    options = json.loads((wrapper / "config.json").read_text())
    options["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=r"'fp8'.*in models of text alone"):
        load_config(tmp_path)


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def as_modules(directory: pathlib.Path, target: pathlib.Path) -> None:
    """The same wrapper by the names that its modules have in transformers 5."""
    shutil.copytree(directory, target)
    tensors = {
        name
        if name.startswith("mtp.")
        else f"model.{name.removeprefix('model.')}".replace(
            "model.language_model.model.", "model.language_model."
        )
        .replace("model.language_model.lm_head.", "lm_head.")
        .replace("model.lm_head.", "lm_head.")
        .replace("language_model.blocks.", "language_model.layers."): tensor
        for name, tensor in tensors_of(directory).items()
    }
    # And with a stored copy of an embedding that is the head.
    table = tensors["model.language_model.embed_tokens.weight"]
    tensors.setdefault("lm_head.weight", table.copy())
    for file in (*target.glob("*.safetensors"), *target.glob("*.index.json")):
        file.unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_logits_are_those_of_the_wrapper_by_either_names(wrapper, tmp_path) -> None:
    expected = torch_logits(load_torch(wrapper))
    np.testing.assert_allclose(our_logits(wrapper), expected, atol=1e-4, rtol=0)
    as_modules(wrapper, tmp_path / "new")
    names = tensors_of(tmp_path / "new")
    assert any(name.startswith("model.language_model.layers.") for name in names)
    np.testing.assert_array_equal(our_logits(tmp_path / "new"), our_logits(wrapper))


@pytest.mark.parametrize("names", ["old", "new"])
def test_put_back_unchanged_everything_is_as_it_was(wrapper, tmp_path, names) -> None:
    source = wrapper
    if names == "new":
        source = tmp_path / "new"
        as_modules(wrapper, source)
    config = match_weights(source, load_config(source))
    params = load_params(source, Decoder(config), dtype="float32")
    target = tmp_path / "target"
    save_in_wrapper(target, source, config, params)
    before, after = tensors_of(source), tensors_of(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    for file in source.glob("*.json"):
        ours = (target / file.name).read_text()
        if file.name.endswith(".index.json"):
            theirs = json.loads(file.read_text())["weight_map"]
            assert json.loads(ours)["weight_map"] == theirs
        else:
            assert ours == file.read_text(), file.name


def test_changed_weights_and_options_are_put_back(wrapper, tmp_path) -> None:
    """An untied head, tokens and a longer context; towers stay bit by bit."""
    import dataclasses

    config = load_config(wrapper)
    params = load_params(wrapper, Decoder(config), dtype="float32")
    rng = np.random.default_rng(0)
    head = np.asarray(rng.standard_normal((32, 66)), np.float32)
    params = {**params, "lm_head": {"kernel": jnp.asarray(head)}}
    table = jnp.pad(params["embed_tokens"]["embedding"], ((0, 2), (0, 0)))
    params["embed_tokens"] = {"embedding": table}
    params["norm"] = {"scale": params["norm"]["scale"] + 0.5}
    is_gemma4 = config.model_type == "gemma4_text"
    pad = 3 if is_gemma4 else None  # transformers' Gemma 4 needs one
    tokens = {"bos_token_id": 5, "eos_token_id": (65, 9), "pad_token_id": pad}
    config = dataclasses.replace(
        config, tie_word_embeddings=False, vocab_size=66, **tokens
    )
    kind = config.rope.kind if is_gemma4 else "linear"
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 2.0}
    if config.model_type == "ministral3":  # its queries go by a trained length
        scaling |= {"rope_type": "yarn", "original_max_position_embeddings": 8}
    config = config.with_rope_scaling(scaling)
    save_in_wrapper(tmp_path, wrapper, config, params, dtype="float32")
    assert load_config(tmp_path) == config
    theirs = load_torch(tmp_path)
    for options in (theirs.config, theirs.config.text_config):
        found = [getattr(options, name, None) for name in tokens]
        assert found == [5, [65, 9], pad]
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), head.T)
    np.testing.assert_allclose(
        our_logits(tmp_path), torch_logits(theirs), atol=1e-4, rtol=0
    )
    before, after = tensors_of(wrapper), tensors_of(tmp_path)
    towers = [name for name in before if "language_model" not in name]
    towers = [name for name in towers if not name.startswith("lm_head")]
    assert len(towers) > 10
    for name in towers:
        np.testing.assert_array_equal(before[name], after[name])


def test_the_text_model_alone_is_a_model_of_its_own(wrapper, tmp_path) -> None:
    import transformers

    config = match_weights(wrapper, load_config(wrapper))
    params = load_params(wrapper, Decoder(config), dtype="float32")
    save_pretrained(tmp_path, config, params)
    text = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    assert type(text).__name__ == config.family.architecture
    expected = torch_logits(load_torch(wrapper))
    np.testing.assert_allclose(torch_logits(text), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "text_only"),
    [
        ("gemma3", False),
        ("gemma3", True),
        pytest.param("gemma4", False, marks=pytest.mark.on_request),
    ],
)
def test_a_lora_run_exports_what_peft_and_transformers_find(
    tmp_path: pathlib.Path, kind: str, text_only: bool
) -> None:
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    source = tmp_path / "wrapper"
    shutil.copytree(assets.asset_path(assets.TOKENIZER), source)
    make_wrapper(source, kind, "float32", 2304)
    config = tiny_config("lora", str(source), max_steps=2, save_steps=0)
    config.training.learning_rate = 0.05
    config.model.export_text_only = text_only
    exported = pathlib.Path(train(config, tmp_path / "run")["model_path"])
    # The adapter on the class that transformers loads for the base: the wrapper's.
    base = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager"
    ).eval()
    assert type(base).__name__ == f"{kind.title()}ForConditionalGeneration"
    plain = torch_logits(base)
    adapted = peft.PeftModel.from_pretrained(base, exported.with_name("adapter")).eval()
    injected = [n for n, _ in adapted.named_parameters() if "lora_" in n]
    assert injected and all("language_model" in name for name in injected)
    # All of them come from the file: their B is not zero, as a new one's is.
    assert all(
        p.abs().max() > 0 for n, p in adapted.named_parameters() if "lora_B" in n
    )
    with torch.no_grad():
        tokens = torch.tensor(TOKENS.tolist())
        expected = adapted(input_ids=tokens).logits.numpy()
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(our_logits(exported), expected, atol=1e-4, rtol=0)
    is_text = json.loads((exported / "config.json").read_text())["model_type"]
    assert is_text == (f"{kind}_text" if text_only else kind)
    if not text_only:
        merged = torch_logits(load_torch(exported))
        np.testing.assert_allclose(merged, expected, atol=1e-4, rtol=0)
        before, after = tensors_of(source), tensors_of(exported)
        for name in before:
            if "language_model" not in name:
                np.testing.assert_array_equal(before[name], after[name])
        assert (exported / "preprocessor_config.json").is_file()
        # Training goes on from the adapter.
        config.training.lora.init_from = str(exported.with_name("adapter"))
        config.training.learning_rate = 0.0
        again = pathlib.Path(train(config, tmp_path / "again")["model_path"])
        np.testing.assert_allclose(our_logits(again), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_at_learning_rate_zero_exports_what_was_loaded(
    tmp_path: pathlib.Path, kind: str, text_only: bool
) -> None:
    """Through the trainer: load, one SFT step, export in either form."""
    source = tmp_path / "wrapper"
    shutil.copytree(assets.asset_path(assets.TOKENIZER), source)
    make_wrapper(source, kind, "float32", 2304)
    options = json.loads((source / "config.json").read_text())
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    options |= tokens | {"text_config": options["text_config"] | tokens}
    (source / "config.json").write_text(json.dumps(options))
    config = tiny_config("sft", str(source), max_steps=1, save_steps=0)
    config.training.learning_rate = 0.0
    config.model.export_text_only = text_only
    exported = pathlib.Path(train(config, tmp_path / "run")["model_path"])
    stored = tensors_of(source)
    if text_only:
        stored = {
            name.replace("model.language_model.", "model.")
            .removeprefix("language_model.")
            .replace("model.blocks.", "model.layers."): tensor
            for name, tensor in stored.items()
            if "language_model." in name or name == "lm_head.weight"
        }
    found = tensors_of(exported)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    assert load_config(exported) == load_config(source)
    if not text_only:
        ours, theirs = ((d / "config.json").read_text() for d in (exported, source))
        assert ours == theirs

"""Reading and writing configs: what is understood, and what is refused by name."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.families import FAMILIES

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_config_survives_the_way_to_hugging_face_and_back(config) -> None:
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config


def test_transformers_reads_what_is_written_as_the_same_config(config) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    assert ModelConfig.from_hf(theirs) == config


# Of some families only models that are not transformers' default are implemented.
ASKED_FOR: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 32,
        "num_local_experts": 0,
    },
}


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_absent_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    given = {"model_type": model_type, **ASKED_FOR.get(model_type, {})}
    theirs = transformers.AutoConfig.for_model(**given).to_dict()
    assert ModelConfig.from_hf(given) == ModelConfig.from_hf(theirs)


def test_number_of_weights_is_that_of_the_tree(config) -> None:
    leaves = jax.tree.leaves(Decoder(config).abstract_params())
    assert config.num_params() == sum(int(np.prod(leaf.shape)) for leaf in leaves)


def test_flops_are_six_a_weight_and_twelve_a_score() -> None:
    config = ModelConfig.from_hf(LLAMA)
    # q and o 8 x 8, k and v 8 x 4, three of 8 x 6; head 8 x 10; width of all heads 8.
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 48) + 80
    assert config.flops_per_token(16) == 6 * weights + 12 * 2 * 8 * 16
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    assert tied.flops_per_token(16) == config.flops_per_token(16)


def test_flops_count_no_more_keys_than_a_window_holds() -> None:
    config = ModelConfig.from_hf(
        {**LLAMA, "model_type": "mistral", "sliding_window": 4}
    )
    difference = config.flops_per_token(16) - config.flops_per_token(3)
    assert difference == 12 * 2 * 8 * (4 - 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 5e5, "rope_scaling": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 5e5,
                    "factor": 2.0,
                }
            },
        ),
    ],
)
def test_rope_options_of_transformers_4_and_5_mean_the_same(old, new) -> None:
    config = ModelConfig.from_hf({**LLAMA, **old})
    assert config == ModelConfig.from_hf({**LLAMA, **new})
    assert config.rope.theta == 5e5


def test_gemma_3_files_of_transformers_4_have_a_local_base() -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "gemma3_text",
            "rope_theta": 2e6,
            "rope_local_base_freq": 5e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "num_hidden_layers": 4,
            "sliding_window_pattern": 2,
        }
    )
    assert config.local_rope is not None
    assert (config.local_rope.kind, config.local_rope.theta) == ("default", 5e3)
    assert (config.rope.kind, config.rope.theta) == ("linear", 2e6)
    sliding, full = "sliding_attention", "full_attention"
    assert config.layer_types == (sliding, full, sliding, full)


def test_qwen_slides_only_where_it_is_told_to() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 4}
    off = ModelConfig.from_hf({**qwen, "max_window_layers": 1})
    assert off.layer_types == ("full_attention",) * 2
    on = ModelConfig.from_hf(
        {**qwen, "max_window_layers": 1, "use_sliding_window": True}
    )
    assert on.layer_types == ("full_attention", "sliding_attention")
    assert [on.window_of(kind) for kind in on.layer_types] == [None, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not a family.*llama, qwen2"),
        ({"model_type": "gemma3"}, "'gemma3' is not a family.*gemma3_text"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"clip_qkv": 8.0, "logit_scale": 2.0}, "clip_qkv = 8.0; logit_scale = 2.0"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "bidirect"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "softcapping"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk'.*dynamic.*yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "2 features.*least 4"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "factor = '2'.*finite number",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0.*above 0"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type = \['yarn'\]"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"missing \['factor'\]"),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}},
            r"unknown \['mrope_section'\]",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not implemented for llama",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "for each layer type are not implemented for llama",
        ),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 is not a multiple"),
        ({"hidden_act": "relu6"}, "hidden_act = 'relu6' is unknown.*silu"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"head_dim": 3}, "head_dim = 3.*even"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "names 1 layers, but num_hidden_layers = 2",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2},
            "sliding_window must be",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["linear_attention"] * 2},
            "'linear_attention'",
        ),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0, 2.0],
                },
            },
            "long_factor has 2 numbers.*needs 1",
        ),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAMA, **options})


def test_bookkeeping_and_options_that_are_off_are_passed_over() -> None:
    extra = {
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "_name_or_path": "x",
        "pretraining_tp": 4,
        "sliding_window": None,
        "rope_interleaved": False,
    }
    assert ModelConfig.from_hf({**LLAMA, **extra}) == ModelConfig.from_hf(LLAMA)

"""What config.json files say about experts, and layers that have none."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf import load_config, load_params, save_pretrained
from jaxtrain.models.mixtures import Routing

SHAPES = pathlib.Path(__file__).parents[2] / "configs" / "shapes"
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def qwen(**options: Any) -> ModelConfig:
    return ModelConfig.from_hf(
        {"model_type": "qwen3_moe", **SIZES, "num_experts": 4, **options}
    )


def glm(**options: Any) -> ModelConfig:
    given = {"model_type": "glm4_moe", **SIZES, "n_routed_experts": 8, **options}
    return ModelConfig.from_hf(given)


def deepseek(**options: Any) -> ModelConfig:
    sizes = SIZES | {"num_key_value_heads": 4}
    return ModelConfig.from_hf({"model_type": "deepseek_v2", **sizes, **options})


def stacks_with_experts(config: ModelConfig) -> dict[str, bool]:
    layers = Decoder(config).abstract_params()["layers"]
    if "mlp" in layers:
        return {"": "experts" in layers["mlp"]}
    return {name: "experts" in stack["mlp"] for name, stack in layers.items()}


def test_layers_without_experts_have_a_plain_mlp_of_the_usual_width() -> None:
    config = qwen(decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.dense_layers == (0, 2, 3, 4)
    assert stacks_with_experts(config) == {"0": False, "1": True, "2to4": False}
    layers = Decoder(config).abstract_params()["layers"]
    assert layers["0"]["mlp"]["up_proj"]["kernel"].shape == (1, 32, 48)
    assert layers["1"]["mlp"]["experts"]["up_proj"].shape == (1, 4, 32, 16)
    # As many operations as one layer with experts and four without need.
    dense = qwen(mlp_only_layers=[*range(5)]).flops_per_token(8)
    sparse = qwen().flops_per_token(8)
    expected = dense + (sparse - dense) / 5
    assert config.flops_per_token(8) == pytest.approx(expected, rel=1e-12)


def test_layers_of_one_kind_are_one_stack_whatever_names_them() -> None:
    assert stacks_with_experts(qwen(decoder_sparse_step=9)) == {"": False}
    assert stacks_with_experts(qwen(mlp_only_layers=[])) == {"": True}
    assert stacks_with_experts(glm(first_k_dense_replace=0)) == {"": True}
    assert stacks_with_experts(glm(first_k_dense_replace=2)) == {
        "0to1": False, "2to4": True
    }  # fmt: skip


def test_shared_experts_are_as_wide_as_so_many_experts() -> None:
    config = glm(n_shared_experts=3, first_k_dense_replace=0)
    layers = Decoder(config).abstract_params()["layers"]
    shared = layers["mlp"]["shared_experts"]
    assert shared["up_proj"]["kernel"].shape == (5, 32, 48)
    assert config.routing == Routing(1, 1, 1.0)
    assert config.to_hf()["n_shared_experts"] == 3


# In billions, of all weights and of those that a token meets, as their cards say; that
# of GLM-4.5 counts the layer for tokens further on too.
CARDS = {
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v3": (671, 37),
    "gemma-4-26b-a4b": (25.2, 3.8),
    "glm-4.5-air": (106, 12),
    "gpt-oss-120b": (116.8, 5.1),
    "kimi-k2": (1026, 32),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen3-next-80b-a3b": (80, 3),
    "qwen3.5-35b-a3b": (35, 3),
}


@pytest.mark.parametrize("name", CARDS)
def test_published_models_have_the_weights_that_they_are_known_for(name: str) -> None:
    config = load_config(SHAPES / name)
    every, met = CARDS[name]
    assert config.num_params() / 1e9 == pytest.approx(every, rel=0.01)
    # The table of embeddings is no product, and cards differ in what they count.
    assert config.flops_per_token(1) / 6e9 == pytest.approx(met, rel=0.25)


def test_kimi_k2_is_a_deepseek_v3_by_another_name() -> None:
    stored = json.loads((SHAPES / "kimi-k2" / "config.json").read_text())
    assert stored["model_type"] == "kimi_k2"
    expected = ModelConfig.from_hf({**stored, "model_type": "deepseek_v3"})
    assert load_config(SHAPES / "kimi-k2") == expected
    assert expected.to_hf()["model_type"] == "deepseek_v3"


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (qwen, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be a pos"),
        (qwen, {"mlp_only_layers": [5]}, r"mlp_only_layers = \[5\]: must be .* to 4"),
        (glm, {"first_k_dense_replace": -1}, "first_k_dense_replace = -1: must be"),
        (glm, {"n_shared_experts": 0}, "n_shared_experts = 0: must be a positive"),
        (glm, {"n_group": 3}, "n_group = 3 does not divide num_experts = 8"),
        (glm, {"n_group": 8}, "n_group = 8 .* groups of at least 2"),
        (glm, {"n_group": 2, "topk_group": 3}, "topk_group = 3: .* from 1 to 2"),
        (
            glm,
            {"n_group": 4, "num_experts_per_tok": 3},
            "topk_group = 1 groups of 2 experts have fewer than num_experts_per_tok",
        ),
        (deepseek, {"q_lora_rank": 0}, "q_lora_rank = 0: must be an integer from 1"),
        (deepseek, {"num_key_value_heads": 2}, "num_key_value_heads = 2: a deepseek"),
        (deepseek, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc': use 'gr"),
        (deepseek, {"norm_topk_prob": True}, r"norm_topk_prob = True \(only False\)"),
        (deepseek, {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        (glm, {"routed_scaling_factor": 0.0}, "routed_scaling_factor = 0.0: must be"),
    ],
)
def test_experts_that_cannot_be_are_refused(make, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_a_layer_for_tokens_further_on_is_passed_over(tmp_path) -> None:
    """It follows the others in published files; what follows it is no layer's."""
    decoder = Decoder(glm())
    params = decoder.init(jax.random.key(0))
    save_pretrained(tmp_path, decoder.config, params)
    assert decoder.config.to_hf()["num_nextn_predict_layers"] == 0
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name, extra = "model.layers.{}.eh_proj.weight", np.ones((2, 2), np.float32)
    save_file({**tensors, name.format(5): extra}, file)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, decoder), params)
    save_file({**tensors, name.format(6): extra}, file)
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.6\.eh_proj"):
        load_params(tmp_path, decoder)

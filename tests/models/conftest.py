"""Tiny models of every family, as transformers 5 would write their configs."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf import load_config, load_params
from jaxtrain.types import Params

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _options(model_type: str, **options: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_SIZES, **options}


_DELTA_NETS: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "head_dim": 24,
    "linear_conv_kernel_dim": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    # What a head reads first may be tiny: dividing by its size magnifies rounding.
    "rms_norm_eps": 1e-2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    },
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 40,
}
_SHARED_EXPERT: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}


# Each option of a family is on in at least one row, with a value that is not the
# default, so that leaving it out shows.
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": _options(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama_tied_linear": _options(
        "llama",
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        tie_word_embeddings=True,
        head_dim=24,
        rms_norm_eps=1e-3,
    ),
    "mistral": _options("mistral", sliding_window=5, head_dim=24),
    "qwen2": _options(
        "qwen2",
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen2_tied": _options("qwen2", tie_word_embeddings=True, rope_parameters=None),
    "qwen3": _options("qwen3", head_dim=24, attention_bias=True),
    "mixtral": _options(
        "mixtral",
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen3_moe": _options(
        "qwen3_moe",
        head_dim=24,
        attention_bias=True,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=True,
    ),
    "qwen3_moe_dense": _options(
        "qwen3_moe",
        num_hidden_layers=5,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "glm4_moe": _options(
        "glm4_moe",
        num_hidden_layers=4,
        head_dim=24,
        attention_bias=True,
        use_qk_norm=True,
        first_k_dense_replace=2,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
        },
    ),
    "deepseek_v3": _options(
        "deepseek_v3",
        **_LATENT,
        q_lora_rank=24,
        attention_bias=True,
        rms_norm_eps=1e-3,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "original_max_position_embeddings": 16,
        },
    ),
    "deepseek_v3_halves": _options(
        "deepseek_v3",
        **_LATENT,
        q_lora_rank=None,
        rope_interleave=False,
        first_k_dense_replace=2,
    ),
    "deepseek_v2": _options(
        "deepseek_v2",
        **_LATENT,
        q_lora_rank=None,
        mlp_bias=True,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "gpt_oss": _options(
        "gpt_oss",
        num_hidden_layers=4,
        head_dim=24,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=5,
        swiglu_limit=0.9,
        swiglu_alpha=1.3,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "beta_fast": 3.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    ),
    "gemma2": _options(
        "gemma2",
        head_dim=24,
        sliding_window=4,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": _options(
        "gemma3_text",
        head_dim=24,
        num_hidden_layers=3,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=20,
        final_logit_softcapping=6.0,
        rope_parameters={
            "full_attention": {
                "rope_type": "linear",
                "rope_theta": 1e5,
                "factor": 8.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma4": _options(
        "gemma4_text",
        num_hidden_layers=8,
        layer_types=["sliding_attention", "full_attention"] * 4,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        head_dim=16,
        global_head_dim=24,
        sliding_window=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
        final_logit_softcapping=4.0,
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e3,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma4_keys_as_values": _options(
        "gemma4_text",
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        head_dim=16,
        global_head_dim=24,
        sliding_window=4,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=40,
    ),
    "lfm2": _options(
        "lfm2",
        num_hidden_layers=5,
        layer_types=["conv", "full_attention"] * 2 + ["conv"],
        conv_L_cache=4,
        conv_bias=True,
        norm_eps=1e-3,
        block_ffn_dim_multiplier=1.2,
        block_multiple_of=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen3_5": _options("qwen3_5_text", **_DELTA_NETS),
    "qwen3_5_moe": _options(
        "qwen3_5_moe_text",
        **_DELTA_NETS,
        **_SHARED_EXPERT,
        intermediate_size=None,
        router_aux_loss_coef=0.3,
    ),
    "qwen3_next": _options(
        "qwen3_next",
        **{k: v for k, v in _DELTA_NETS.items() if k != "rope_parameters"},
        **_SHARED_EXPERT,
        mlp_only_layers=[1],
        rope_theta=1e4,
        partial_rotary_factor=0.5,
        norm_topk_prob=False,
    ),
    "qwen2_moe": _options(
        "qwen2_moe",
        **_SHARED_EXPERT,
        num_hidden_layers=5,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=4,
    ),
    "phi3": _options("phi3", sliding_window=6),
    "phi3_longrope": _options(
        "phi3",
        original_max_position_embeddings=10,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
        },
    ),
    "gemma": _options("gemma", head_dim=24, attention_bias=True),
    "glm4": _options("glm4", head_dim=24, rms_norm_eps=1e-3),
    "ministral3": _options(
        "ministral3",
        head_dim=24,
        sliding_window=9,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.7,
        },
    ),
    "olmo2": _options("olmo2", attention_bias=True, rms_norm_eps=1e-3),
    # Two periods of layers, and a window that documents reach beyond.
    "olmo3": _options(
        "olmo3",
        num_hidden_layers=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "smollm3": _options(
        "smollm3",
        num_hidden_layers=4,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
    ),
    "granite": _options(
        "granite",
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        logits_scaling=1.5,
    ),
    "granite4": _options(
        "granitemoehybrid",
        layer_types=["attention"] * 2,
        num_local_experts=0,
        shared_intermediate_size=80,
        tie_word_embeddings=True,
        position_embedding_type="rope",
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        logits_scaling=1.5,
    ),
    "granite4_nope": _options(
        "granitemoehybrid", layer_types=["full_attention"] * 2, num_local_experts=0
    ),
    "seed_oss": _options(
        "seed_oss", head_dim=24, attention_out_bias=True, mlp_bias=True
    ),
    "cohere2": _options(
        "cohere2",
        num_hidden_layers=4,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attention_bias=True,
        layer_norm_eps=1e-3,
        logit_scale=0.6,
    ),
}


class TorchModel(NamedTuple):
    """A model of transformers with random weights, and what we read from its files."""

    torch_model: Any
    directory: pathlib.Path
    model: Decoder
    params: Params

    def torch_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [T V] of one document, alone in its row."""
        return torch_logits(self.torch_model, tokens)


def torch_logits(torch_model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch_model(torch.tensor(tokens[None].tolist())).logits[0].numpy()


# Variants of what other rows show.
_ON_REQUEST = frozenset(
    {
        "deepseek_v2", "deepseek_v3_halves", "gemma", "glm4_moe", "granite4_nope",
        "olmo2", "qwen3_5_moe", "qwen3_moe_dense", "qwen3_next", "seed_oss",
    }
)  # fmt: skip


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=[pytest.mark.on_request] * (name in _ON_REQUEST))
        for name in FAMILY_OPTIONS
    ],
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def torch_model(family: str, tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**FAMILY_OPTIONS[family])
    torch_model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, weight in torch_model.named_parameters():
            # As large as a trained model's, and no norm or bias left at its start.
            deviation = 0.2 if weight.ndim == 1 or "embed" in name else 0.125
            weight.add_(deviation * torch.randn_like(weight))
            if name.endswith("A_log"):
                # Sums of fast decays are rounded so coarsely in float32, here and
                # there, that logits of either would be uncertain.
                weight.sub_(2.5)
        for name, buffer in torch_model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma 4's, which is stored
                buffer.mul_(1 + 0.2 * torch.rand_like(buffer))
            if name.endswith("e_score_correction_bias"):  # so are routers'
                buffer.add_(0.3 * torch.randn_like(buffer))
    directory = tmp_path_factory.mktemp(family)
    torch_model.save_pretrained(directory)
    model = Decoder(load_config(directory), compute_dtype="float32")
    return TorchModel(torch_model, directory, model, load_params(directory, model))


@pytest.fixture(scope="session")
def config(family: str) -> ModelConfig:
    return ModelConfig.from_hf(FAMILY_OPTIONS[family])


MakeModel = Callable[..., tuple[Decoder, Params]]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A function from a family's name and options to a decoder and random weights.

    The weights, adapters' too, are of a size that makes every part matter. In float32
    unless asked otherwise.
    """

    def make(family: str, **options: Any) -> tuple[Decoder, Params]:
        config = ModelConfig.from_hf(FAMILY_OPTIONS[family])
        model = Decoder(config, **{"compute_dtype": "float32", **options})
        leaves, tree = jax.tree.flatten(model.abstract_params())
        rng = np.random.default_rng(0)
        values = [
            0.15 * rng.standard_normal(leaf.shape) + 0.5 * (len(leaf.shape) == 1)
            for leaf in leaves
        ]
        arrays = map(jnp.asarray, values, [leaf.dtype for leaf in leaves])
        return model, tree.unflatten(arrays)

    return make

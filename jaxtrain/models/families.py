"""What the families of the decoder differ in, as data: one row for each.

Defaults are those of transformers 5, because a config.json leaves out what equals them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table. `defaults` also lists the config keys that it understands.

    `sandwich_norms`: a norm after attention and after the MLP as well as before.
    `unit_offset_norm`: a norm multiplies by 1 + scale (Gemma stores scale - 1).
    `window_rule`: which layers slide when `layer_types` is absent: "none", "all" of
    them if a window is given, those "from_layer" max_window_layers on, or all but
    each p-th ("pattern"); none in a family with `use_sliding_window` unless that is on.
    `expert_width_key`: of a mixture of experts, the config key of an expert's width.
    """

    architecture: str
    defaults: Mapping[str, Any]
    activation_key: str = "hidden_act"
    qk_norm: bool = False
    sandwich_norms: bool = False
    unit_offset_norm: bool = False
    scale_embeddings: bool = False
    fused_projections: bool = False
    always_qkv_bias: bool = False
    partial_rotary: bool = False
    local_rope: bool = False
    default_rope_theta: float = 10_000.0
    window_rule: Literal["none", "all", "from_layer", "pattern"] = "none"
    expert_width_key: str | None = None
    ignored_keys: frozenset[str] = frozenset()
    must_be_none: tuple[str, ...] = ()


_COMMON: dict[str, Any] = {
    "model_type": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_MISTRAL: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# An absent `num_experts` is read under its other name: see ModelConfig.from_hf.
_MIXTURE: dict[str, Any] = {
    "num_local_experts": None,
    "num_experts": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_GEMMA: dict[str, Any] = {
    **{key: value for key, value in _COMMON.items() if key != "hidden_act"},
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={
            **_COMMON,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ignored_keys=frozenset({"pretraining_tp"}),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={**_MISTRAL, "sliding_window": 4096},
        window_rule="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        always_qkv_bias=True,
        window_rule="from_layer",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        qk_norm=True,
        window_rule="from_layer",
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults={
            **_MISTRAL,
            **_MIXTURE,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        default_rope_theta=1_000_000.0,
        window_rule="all",
        expert_width_key="intermediate_size",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults={
            **_COMMON,
            **_MIXTURE,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        qk_norm=True,
        window_rule="all",
        expert_width_key="moe_intermediate_size",
        # Every layer has the same window here, whatever this key says.
        ignored_keys=frozenset({"max_window_layers"}),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_GEMMA,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        activation_key="hidden_activation",
        sandwich_norms=True,
        unit_offset_norm=True,
        scale_embeddings=True,
        window_rule="pattern",
        # Old files carry hidden_act too; transformers reads hidden_activation.
        ignored_keys=frozenset({"hidden_act"}),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": None,
        },
        activation_key="hidden_activation",
        qk_norm=True,
        sandwich_norms=True,
        unit_offset_norm=True,
        scale_embeddings=True,
        local_rope=True,
        default_rope_theta=1_000_000.0,
        window_rule="pattern",
        ignored_keys=frozenset({"hidden_act"}),
        # transformers reads this key and then leaves it out of the attention.
        must_be_none=("attn_logit_softcapping",),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={
            **_COMMON,
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        fused_projections=True,
        partial_rotary=True,
        window_rule="all",
    ),
}

# Options that this decoder has in one form only: the values that mean that form.
REFUSED_UNLESS: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "resid_pdrop": (0.0, None),
    "embd_pdrop": (0.0, None),
    "use_bidirectional_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "router_jitter_noise": (0, None),
    "quantization_config": (None,),
}

# Keys that say nothing about the maths of a forward pass.
BOOKKEEPING_KEYS = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "cache_implementation",
        "chunk_size_feed_forward", "dtype", "id2label", "label2id", "name_or_path",
        "num_labels", "output_attentions", "output_hidden_states", "problem_type",
        "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype",
        "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
    }
)  # fmt: skip

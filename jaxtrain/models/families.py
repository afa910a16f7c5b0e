"""What the families of the decoder differ in, as data: one row for each.

This module imports no jax, because the configuration reads the families' names here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    `keys`: the keys of a config.json that the family understands. One that is absent
    has the default that transformers gives it.
    `norms`: whether a layer normalizes what attention and the MLP read ("before"), or
    also what they add ("around").
    `qk_norm`: whether queries and keys are normalized, each head by itself ("head").
    `unit_offset_norm`: a norm multiplies by 1 + scale (Gemma stores scale - 1).
    `window_rule`: which layers slide when `layer_types` is absent: "none", "all" of
    them if a window is given, those "from_layer" max_window_layers on, or all but
    each p-th ("pattern"); none in a family with `use_sliding_window` unless that is on.
    `window_pattern`: p, where a config has no `sliding_window_pattern`.
    `expert_width_key`: of a mixture of experts, the config key of an expert's width.
    """

    architecture: str
    keys: frozenset[str]
    activation_key: str = "hidden_act"
    norms: Literal["before", "around"] = "before"
    qk_norm: Literal["none", "head"] = "none"
    unit_offset_norm: bool = False
    scale_embeddings: bool = False
    fused_projections: bool = False
    always_qkv_bias: bool = False
    partial_rotary: bool = False
    local_rope: bool = False
    default_rope_theta: float = 10_000.0
    window_rule: Literal["none", "all", "from_layer", "pattern"] = "none"
    window_pattern: int = 0
    expert_width_key: str | None = None
    ignored_keys: frozenset[str] = frozenset()
    must_be_none: tuple[str, ...] = ()


_COMMON = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers"
    " num_attention_heads num_key_value_heads head_dim hidden_act"
    " max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings"
    " bos_token_id eos_token_id pad_token_id rope_parameters rope_scaling rope_theta"
)
_QWEN = "use_sliding_window sliding_window max_window_layers layer_types"
_MIXTURE = (
    "num_local_experts num_experts num_experts_per_tok output_router_logits"
    " router_aux_loss_coef"
)
# Old files carry hidden_act too; transformers reads hidden_activation.
_GEMMA = (
    "hidden_activation attention_bias query_pre_attn_scalar sliding_window layer_types"
    " sliding_window_pattern final_logit_softcapping attn_logit_softcapping"
)


def _keys(*groups: str) -> frozenset[str]:
    """The common keys and those of `groups`, which are separated by spaces."""
    return frozenset(" ".join((_COMMON, *groups)).split())


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=_keys("attention_bias mlp_bias"),
        ignored_keys=frozenset({"pretraining_tp"}),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        keys=_keys(_QWEN),
        always_qkv_bias=True,
        window_rule="from_layer",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=_keys(_QWEN, "attention_bias"),
        qk_norm="head",
        window_rule="from_layer",
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=_keys("sliding_window"),
        window_rule="all",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        keys=_keys(_GEMMA),
        activation_key="hidden_activation",
        norms="around",
        unit_offset_norm=True,
        scale_embeddings=True,
        window_rule="pattern",
        window_pattern=2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        keys=_keys(_GEMMA, "rope_local_base_freq"),
        activation_key="hidden_activation",
        norms="around",
        qk_norm="head",
        unit_offset_norm=True,
        scale_embeddings=True,
        local_rope=True,
        default_rope_theta=1_000_000.0,
        window_rule="pattern",
        window_pattern=6,
        # transformers reads this key and then leaves it out of the attention.
        must_be_none=("attn_logit_softcapping",),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        keys=_keys(
            "original_max_position_embeddings partial_rotary_factor sliding_window"
        ),
        fused_projections=True,
        partial_rotary=True,
        window_rule="all",
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        keys=_keys(_MIXTURE, "sliding_window"),
        default_rope_theta=1_000_000.0,
        window_rule="all",
        expert_width_key="intermediate_size",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        keys=_keys(
            _MIXTURE,
            "attention_bias use_sliding_window sliding_window moe_intermediate_size",
            "norm_topk_prob decoder_sparse_step mlp_only_layers",
        ),
        qk_norm="head",
        window_rule="all",
        expert_width_key="moe_intermediate_size",
        # Every layer has the same window here, whatever this key says.
        ignored_keys=frozenset({"max_window_layers"}),
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

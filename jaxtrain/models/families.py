"""What the families of the decoder differ in, as data: one row for each.

This module imports no jax, because the configuration reads the families' names here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

# Which features of a head are rotated together (rope.py).
Pairs: TypeAlias = Literal["halves", "interleaved"]


@dataclasses.dataclass(frozen=True)
class LayerNorms:
    """What a layer's norms are called, as in its weights; None where there is none.

    `before_*` is what attention or the MLP reads, `after_*` what it adds to the stream.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None


# Which norms a layer has, and what they are usually called.
_NORMS: Mapping[str, LayerNorms] = {
    "before": LayerNorms(
        before_attention="input_layernorm", before_mlp="post_attention_layernorm"
    ),
    "after": LayerNorms(
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    "around": LayerNorms(
        before_attention="input_layernorm",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    "around_glm": LayerNorms(
        before_attention="input_layernorm",
        after_attention="post_self_attn_layernorm",
        before_mlp="post_attention_layernorm",
        after_mlp="post_mlp_layernorm",
    ),
    "shared": LayerNorms(before_attention="input_layernorm"),
}


@dataclasses.dataclass(frozen=True)
class MlpNames:
    """What a plain MLP is called in a layer, and its projections where fused."""

    module: str = "mlp"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    `defaults`: the keys of a config.json that the family understands, each with the
    value that transformers gives it where it is absent. They are written down here
    because asking transformers imports PyTorch, where that is installed.
    `activation_key`, `norm_eps_key`, `mlp_width_key`: what the family calls the
    activation, the epsilon of norms and the width of the MLP.
    `activation_names`: activations that the family means another by.
    `head_dim_is_share`: the heads always share hidden_size.
    `norms`: whether a layer normalizes what attention and the MLP read ("before"), what
    they add ("after") or both ("around"; "around_glm" under GLM-4's names), or has one
    norm that attention and the MLP both read, side by side ("shared").
    `norm_kind`: a norm divides by the root mean square ("rms"), or subtracts the mean
    first and divides by the standard deviation ("layer", without a bias).
    `qk_norm`: whether queries and keys are normalized, each head by itself ("head") or
    all heads as one vector ("width").
    `gated_attention`: what a head reads is multiplied by the sigmoid of a gate, which
    stands behind the head's query in the projection.
    `unit_offset_norm`: a norm multiplies by 1 + scale (Gemma stores scale - 1).
    `fused`: which projections are one matrix: none, gate and up of the MLP ("mlp"), or
    queries, keys and values too ("all").
    `o_bias_key`: the config key that gives the attention's output a bias, if any does.
    `rotary_pairs`: features that turn together: i and i + half ("halves"), or 2 i and
    2 i + 1 ("interleaved").
    `rotary_layers`: which layers turn queries and keys: "all", those that
    `no_rope_layers` has a 1 for ("listed"), those with a window ("sliding"), or all if
    `position_embedding_type` is "rope" and else none ("typed").
    `default_rotary_factor`: `partial_rotary_factor` where it is absent.
    `default_rope`: the rope parameters of a config that has none.
    `scales_queries`: queries grow with their position, by `llama_4_scaling_beta`.
    `local_rope`: the rotary embedding of sliding layers is that of the others ("none"),
    has a base of its own and is never scaled ("own_base", Gemma 3), or has the same
    base and leaves out the others' scaling ("unscaled", OLMo 3).
    `window_rule`: which layers slide when `layer_types` is absent: "none", "all" of
    them if a window is given, those "from_layer" max_window_layers on, all but each
    p-th ("pattern"), every other one up to max_window_layers ("every_other"), or those
    that do not turn queries and keys ("unturned"); none in a family with
    `use_sliding_window` unless that is on.
    `window_pattern`: p, where a config has no `sliding_window_pattern`.
    `attention_sinks`: a learned logit a head takes part in each softmax.
    `expert_width_key`: of a mixture of experts, the config key of an expert's width.
    `unused_dropout`: dropout that published configs ask for in training. It is not
    applied here; a warning says so.
    `exported`: keys of what the family has not here, with values that transformers'
    own checks take.
    `must_be`: keys of which only these values are implemented.
    `router`: an expert's score is its share of a softmax ("softmax"; in float32,
    "softmax_float32") or a sigmoid of its own, with a bias that only chooses
    ("sigmoid"), or a share of what a norm of its own and learned scales give
    ("scaled"; routers.py).
    `experts_beside`: where a layer has experts, they run beside its MLP (Gemma 4).
    `shared_expert`: what an MLP for every token is called, beside the experts;
    `gated_shared_expert`: the sigmoid of a gate is multiplied to what it adds.
    `fused_delta_net`: all inputs of a Gated DeltaNet are two projections, key head by
    key head (Qwen3-Next).
    `extra_layer`: published weights have a layer more than the config counts, which
    predicts tokens further on and is passed over.
    `biased_experts`: router and experts have biases, and what an expert multiplies is
    clamped (gpt-oss).
    `variety`: of a family whose layers are not alike, the name of its row in
    `layer_kinds.VARIETIES`.
    `module_names`: how published weights name modules that have other names here, by
    the name that they have here ("mlp.gate_proj").
    """

    architecture: str
    defaults: Mapping[str, Any]
    activation_key: str = "hidden_act"
    activation_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head_dim_is_share: bool = False
    norm_eps_key: str = "rms_norm_eps"
    mlp_width_key: str = "intermediate_size"
    norms: Literal["before", "after", "around", "around_glm", "shared"] = "before"
    norm_kind: Literal["rms", "layer"] = "rms"
    qk_norm: Literal["none", "head", "width"] = "none"
    gated_attention: bool = False
    unit_offset_norm: bool = False
    scale_embeddings: bool = False
    fused: Literal["none", "mlp", "all"] = "none"
    mlp_names: MlpNames = MlpNames()
    always_qkv_bias: bool = False
    o_bias_key: str | None = "attention_bias"
    partial_rotary: bool = False
    rotary_pairs: Pairs = "halves"
    rotary_layers: Literal["all", "listed", "sliding", "typed"] = "all"
    scales_queries: bool = False
    local_rope: Literal["none", "own_base", "unscaled"] = "none"
    default_rope_theta: float = 10_000.0
    default_rotary_factor: float = 1.0
    default_rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    window_rule: Literal[
        "none", "all", "from_layer", "pattern", "every_other", "unturned"
    ] = "none"
    window_pattern: int = 0
    attention_sinks: bool = False
    expert_width_key: str | None = None
    router: Literal["softmax", "softmax_float32", "sigmoid", "scaled"] = "softmax"
    experts_beside: bool = False
    shared_expert: str | None = None
    gated_shared_expert: bool = False
    fused_delta_net: bool = False
    extra_layer: bool = False
    biased_experts: bool = False
    variety: str | None = None
    module_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored_keys: frozenset[str] = frozenset()
    ignored_rope_keys: frozenset[str] = frozenset()
    unused_dropout: tuple[str, ...] = ()
    exported: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    must_be: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def norm_names(self) -> LayerNorms:
        """The names of a layer's norms."""
        return _NORMS[self.norms]

    @property
    def keys(self) -> frozenset[str]:
        """The keys of a config.json that the family understands."""
        return frozenset(self.defaults)

    def understands(self, key: str) -> bool:
        """Whether this decoder knows what a key of a config.json says, or that it says
        nothing about the maths."""
        known = self.keys | self.ignored_keys | self.must_be.keys() | BOOKKEEPING_KEYS
        known |= {*self.unused_dropout}
        return key in known or key.startswith("_")


def _without(keys: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


# The keys that every family understands, and the defaults that most of them share.
_COMMON: dict[str, Any] = {
    "model_type": None, "vocab_size": 32_000, "hidden_size": 4096,
    "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 131_072, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "rope_parameters": None, "rope_scaling": None,
    "rope_theta": None,
}  # fmt: skip
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32,
    "max_position_embeddings": 32_768, "bos_token_id": None, "eos_token_id": None,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "layer_types": None,
}  # fmt: skip
_MIXTURE: dict[str, Any] = {
    "num_local_experts": None, "num_experts": None, "num_experts_per_tok": None,
    "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
# Mixtures of Qwen's whose layers may also have a plain MLP.
_QWEN_MIXTURE: dict[str, Any] = _MIXTURE | {
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None,
}  # fmt: skip
# Three Gated DeltaNets to one layer of gated attention.
_QWEN_NEXT: dict[str, Any] = _COMMON | {
    "vocab_size": 248_320, "intermediate_size": 12_288, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 32_768,
    "bos_token_id": None, "eos_token_id": None, "attention_bias": False,
    "partial_rotary_factor": 0.25, "layer_types": None, "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}  # fmt: skip
# What transformers reads nothing of: notes, and heads that predict further on.
_QWEN_NOTES = frozenset(
    {
        "attn_output_gate", "mamba_ssm_dtype", "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
    }
)  # fmt: skip
# Mixtures after DeepSeek's: dense layers first, shared experts, experts in groups.
_GROUPED_MIXTURE: dict[str, Any] = {
    "num_local_experts": None, "num_experts": None, "n_routed_experts": 128,
    "n_shared_experts": 1, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "output_router_logits": False,
}  # fmt: skip
# Of layers that predict tokens further on, which are passed over.
_FURTHER_TOKENS = frozenset({"num_mtp_layers", "num_nextn_predict_layers"})
# Keys and values from a narrow vector. What transformers takes for a head's width is
# the part that turns, whatever a config has.
_DEEPSEEK: dict[str, Any] = _without(_COMMON, "head_dim") | _GROUPED_MIXTURE | {
    "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_DEEPSEEK_NOTES = _FURTHER_TOKENS | {
    "aux_loss_alpha", "ep_size", "head_dim", "pretraining_tp", "qk_head_dim", "seq_aux",
}  # fmt: skip
# Old files carry hidden_act too; transformers reads hidden_activation.
_GEMMA: dict[str, Any] = _COMMON | {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "attention_bias": False, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": None,
    "final_logit_softcapping": None, "attn_logit_softcapping": None,
}  # fmt: skip
_OLMO: dict[str, Any] = _COMMON | {
    "vocab_size": 50_304, "intermediate_size": 11_008, "num_key_value_heads": None,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": None,
    "eos_token_id": 50_279, "pad_token_id": 1, "attention_bias": False,
}  # fmt: skip
_GRANITE: dict[str, Any] = _COMMON | {
    "intermediate_size": 11_008, "num_key_value_heads": None,
    "max_position_embeddings": 2048, "attention_bias": False,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "attention_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=_COMMON
        | {
            "intermediate_size": 11_008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
        ignored_keys=frozenset({"pretraining_tp"}),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        always_qkv_bias=True,
        window_rule="from_layer",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN | {"head_dim": 128, "attention_bias": False},
        qk_norm="head",
        window_rule="from_layer",
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=_COMMON | {"sliding_window": 4096},
        window_rule="all",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        activation_key="hidden_activation",
        norms="around",
        unit_offset_norm=True,
        scale_embeddings=True,
        window_rule="pattern",
        window_pattern=2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults=_GEMMA | {"vocab_size": 262_208, "rope_local_base_freq": None},
        activation_key="hidden_activation",
        norms="around",
        qk_norm="head",
        unit_offset_norm=True,
        scale_embeddings=True,
        local_rope="own_base",
        default_rope_theta=1_000_000.0,
        window_rule="pattern",
        window_pattern=6,
        # transformers reads this key and then leaves it out of the attention.
        must_be={"attn_logit_softcapping": (None,)},
    ),
    "gemma4_text": Family(
        architecture="Gemma4ForCausalLM",
        defaults=_without(
            _GEMMA,
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "hidden_act",
            "sliding_window_pattern",
        )
        | {
            "vocab_size": 262_144,
            "num_hidden_layers": 30,
            "sliding_window": 512,
            "attention_k_eq_v": False,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
            "global_head_dim": 512,
            "num_global_key_value_heads": None,
            "per_layer_config": None,
            "enable_moe_block": False,
            "num_experts": None,
            "top_k_experts": None,
            "moe_intermediate_size": None,
        },
        activation_key="hidden_activation",
        norms="around",
        qk_norm="head",
        scale_embeddings=True,
        local_rope="own_base",
        default_rope_theta=1_000_000.0,
        window_rule="pattern",
        window_pattern=6,
        variety="gemma4_layers",
        module_names={
            "per_layer.table": "embed_tokens_per_layer",
            "per_layer.projection": "per_layer_model_projection",
            "per_layer.norm": "per_layer_projection_norm",
            "end.gate": "per_layer_input_gate",
            "end.projection": "per_layer_projection",
            "end.norm": "post_per_layer_input_norm",
            "end.scalar": "layer_scalar",
            "beside.norm_of_mlp": "post_feedforward_layernorm_1",
            "beside.norm_before": "pre_feedforward_layernorm_2",
            "beside.norm_after": "post_feedforward_layernorm_2",
            "beside.sparse.experts": "experts",
            "beside.sparse.gate": "router",
            "beside.sparse.gate.proj": "router.proj",
        },
        expert_width_key="moe_intermediate_size",
        experts_beside=True,
        router="scaled",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults=_COMMON
        | {
            "vocab_size": 32_064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
            "partial_rotary_factor": None,
            "sliding_window": None,
        },
        fused="all",
        partial_rotary=True,
        window_rule="all",
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        defaults=_COMMON
        | {
            "vocab_size": 256_000,
            "hidden_size": 3072,
            "intermediate_size": 24_576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "attention_bias": False,
        },
        unit_offset_norm=True,
        scale_embeddings=True,
        # The first published files say "gelu" and mean the approximation. Others have
        # hidden_activation too, but transformers reads hidden_act alone.
        activation_names={"gelu": "gelu_pytorch_tanh"},
        ignored_keys=frozenset({"hidden_activation"}),
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        defaults=_COMMON
        | {
            "vocab_size": 151_552,
            "intermediate_size": 13_696,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-7,
            "bos_token_id": None,
            "eos_token_id": (151_329, 151_336, 151_338),
            "pad_token_id": 151_329,
            "partial_rotary_factor": None,
            "attention_bias": True,
        },
        norms="around_glm",
        fused="mlp",
        o_bias_key=None,
        partial_rotary=True,
        default_rotary_factor=0.5,
        rotary_pairs="interleaved",
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        defaults=_COMMON
        | {
            "vocab_size": 131_072,
            "num_hidden_layers": 34,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 11,
            "sliding_window": None,
        },
        default_rope_theta=1_000_000.0,
        default_rope={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        scales_queries=True,
        window_rule="all",
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM", defaults=_OLMO, norms="after", qk_norm="width"
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        defaults=_OLMO | {"sliding_window": 4096, "layer_types": None},
        norms="after",
        qk_norm="width",
        default_rope_theta=500_000.0,
        local_rope="unscaled",
        window_rule="pattern",
        window_pattern=4,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults=_COMMON
        | {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        default_rope_theta=2_000_000.0,
        rotary_layers="listed",
        window_rule="unturned",
        # The published file carries these, but nothing reads them.
        ignored_keys=frozenset({"max_window_layers", "pretraining_tp"}),
    ),
    "granite": Family(
        architecture="GraniteForCausalLM", defaults=_GRANITE | {"mlp_bias": False}
    ),
    "granitemoehybrid": Family(
        architecture="GraniteMoeHybridForCausalLM",
        # Without layer_types, all layers are Mamba's.
        defaults={k: v for k, v in _GRANITE.items() if k != "intermediate_size"}
        | {
            "shared_intermediate_size": 1024,
            "layer_types": ("linear_attention",),
            "num_local_experts": 8,
            "position_embedding_type": None,
        },
        mlp_width_key="shared_intermediate_size",
        fused="mlp",
        mlp_names=MlpNames("shared_mlp", "input_linear", "output_linear"),
        rotary_layers="typed",
        # Of experts and of Mamba's layers, which the dense models have none of.
        ignored_keys=frozenset(
            {
                "intermediate_size",
                "mamba_chunk_size",
                "mamba_conv_bias",
                "mamba_d_conv",
                "mamba_d_head",
                "mamba_d_state",
                "mamba_expand",
                "mamba_n_groups",
                "mamba_n_heads",
                "mamba_proj_bias",
                "num_experts_per_tok",
                "output_router_logits",
                "router_aux_loss_coef",
                "time_step_limit",
            }
        ),
        exported={"mamba_n_heads": 1, "mamba_d_head": "auto"},
        must_be={"num_local_experts": (0,)},
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        defaults=_COMMON
        | {
            "vocab_size": 155_136,
            "intermediate_size": 27_648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "head_dim": 128,
            "max_position_embeddings": 524_288,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
        },
        o_bias_key="attention_out_bias",
        ignored_keys=frozenset({"pretraining_tp"}),
        unused_dropout=("attention_dropout", "residual_dropout"),
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        defaults={k: v for k, v in _COMMON.items() if k != "rms_norm_eps"}
        | {
            "vocab_size": 256_000,
            "hidden_size": 8192,
            "intermediate_size": 22_528,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "num_key_value_heads": None,
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 5,
            "eos_token_id": 255_001,
            "pad_token_id": 0,
            "attention_bias": False,
            "sliding_window": 4096,
            "sliding_window_pattern": None,
            "layer_types": None,
            "logit_scale": 0.0625,
        },
        norm_eps_key="layer_norm_eps",
        head_dim_is_share=True,
        norms="shared",
        norm_kind="layer",
        rotary_pairs="interleaved",
        rotary_layers="sliding",
        window_rule="pattern",
        window_pattern=4,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults=_COMMON
        | _MIXTURE
        | {
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        default_rope_theta=1_000_000.0,
        window_rule="all",
        expert_width_key="intermediate_size",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults=_COMMON
        | _MIXTURE
        | {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "bos_token_id": None,
            "eos_token_id": None,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        qk_norm="head",
        window_rule="all",
        expert_width_key="moe_intermediate_size",
        # Every layer has the same window here, whatever this key says.
        ignored_keys=frozenset({"max_window_layers"}),
    ),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        defaults=_COMMON
        | _GROUPED_MIXTURE
        | {
            "vocab_size": 151_552,
            "intermediate_size": 10_944,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
            "partial_rotary_factor": None,
            "attention_bias": False,
            "use_qk_norm": False,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_routed_experts": 128,
        },
        o_bias_key=None,
        qk_norm="head",
        partial_rotary=True,
        default_rotary_factor=0.5,
        expert_width_key="moe_intermediate_size",
        router="sigmoid",
        shared_expert="shared_experts",
        extra_layer=True,
        ignored_keys=_FURTHER_TOKENS,
        exported={"num_nextn_predict_layers": 0},
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        defaults=_DEEPSEEK
        | {
            "vocab_size": 102_400,
            "intermediate_size": 11_008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": None,
            "moe_intermediate_size": 1407,
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
        },
        variety="latent_heads",
        expert_width_key="moe_intermediate_size",
        router="softmax_float32",
        shared_expert="shared_experts",
        ignored_keys=_DEEPSEEK_NOTES,
        must_be={
            "scoring_func": ("softmax", None),
            "moe_layer_freq": (1, None),
            # transformers never does, whatever the key says.
            "norm_topk_prob": (False, None),
        },
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        defaults=_DEEPSEEK
        | {
            "vocab_size": 129_280,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "rope_interleave": True,
        },
        variety="latent_heads",
        expert_width_key="moe_intermediate_size",
        router="sigmoid",
        shared_expert="shared_experts",
        extra_layer=True,
        ignored_keys=_DEEPSEEK_NOTES,
        exported={"num_nextn_predict_layers": 0},
        must_be={
            "scoring_func": ("sigmoid", None),
            "topk_method": ("noaux_tc", None),
            "moe_layer_freq": (1, None),
        },
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        defaults=_COMMON
        | _MIXTURE
        | {
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        default_rope_theta=150_000.0,
        window_rule="pattern",
        window_pattern=2,
        default_rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        attention_sinks=True,
        expert_width_key="intermediate_size",
        biased_experts=True,
        # What other keys say, for OpenAI's own code.
        ignored_keys=frozenset({"experts_per_token", "initial_context_length"}),
    ),
    "lfm2": Family(
        architecture="Lfm2ForCausalLM",
        defaults=_without(_COMMON, "rms_norm_eps", "hidden_act")
        | {
            "vocab_size": 65_536,
            "hidden_size": 2560,
            "intermediate_size": 12_288,
            "max_position_embeddings": 128_000,
            "norm_eps": 1e-5,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "tie_embedding": None,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_ff_dim": None,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": None,
            "layer_types": None,
        },
        norm_eps_key="norm_eps",
        qk_norm="head",
        default_rope_theta=1_000_000.0,
        variety="short_convolutions",
        module_names={
            "input_layernorm": "operator_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
            "norm": "embedding_norm",
        },
    ),
    "qwen3_5_text": Family(
        architecture="Qwen3_5ForCausalLM",
        defaults=_QWEN_NEXT,
        qk_norm="head",
        gated_attention=True,
        unit_offset_norm=True,
        partial_rotary=True,
        variety="delta_nets",
        ignored_keys=_QWEN_NOTES | {"mlp_only_layers"},
        # Of images: in a text all positions of a token are the same.
        ignored_rope_keys=frozenset({"mrope_interleaved", "mrope_section"}),
    ),
    "qwen3_5_moe_text": Family(
        architecture="Qwen3_5MoeForCausalLM",
        defaults=_without(_QWEN_NEXT, "intermediate_size")
        | _MIXTURE
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        # Every layer has experts, so this is the width of a plain MLP beside them.
        mlp_width_key="shared_expert_intermediate_size",
        qk_norm="head",
        gated_attention=True,
        unit_offset_norm=True,
        partial_rotary=True,
        variety="delta_nets",
        expert_width_key="moe_intermediate_size",
        shared_expert="shared_expert",
        gated_shared_expert=True,
        ignored_keys=_QWEN_NOTES,
        ignored_rope_keys=frozenset({"mrope_interleaved", "mrope_section"}),
        must_be={"mlp_only_layers": ([], None)},
    ),
    "qwen3_next": Family(
        architecture="Qwen3NextForCausalLM",
        defaults=_QWEN_NEXT
        | _QWEN_MIXTURE
        | {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
        },
        qk_norm="head",
        gated_attention=True,
        unit_offset_norm=True,
        partial_rotary=True,
        variety="delta_nets",
        fused_delta_net=True,
        expert_width_key="moe_intermediate_size",
        shared_expert="shared_expert",
        gated_shared_expert=True,
        extra_layer=True,
        ignored_keys=_QWEN_NOTES,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        defaults=_COMMON
        | _QWEN_MIXTURE
        | {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32_768,
            "bos_token_id": None,
            "eos_token_id": None,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
        },
        always_qkv_bias=True,
        o_bias_key=None,
        window_rule="every_other",
        expert_width_key="moe_intermediate_size",
        shared_expert="shared_expert",
        gated_shared_expert=True,
        must_be={"qkv_bias": (True, None)},
    ),
}

# Models of text and images whose text decoder is one of these: the family it has where
# its part of the config.json, `text_config`, does not say so.
WRAPPERS: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}

# What publishers call a family whose code in transformers has another name.
OTHER_NAMES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}

# Options that this decoder has in one form only: the values that mean that form.
REFUSED_UNLESS: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "resid_pdrop": (0.0, None),
    "embd_pdrop": (0.0, None),
    # Of "vision" it is tokens of images that read ahead: a text has none.
    "use_bidirectional_attention": (False, None, "vision"),
    "enable_moe_block": (False, None),
    "is_encoder_decoder": (False, None),
    "router_jitter_noise": (0, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
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

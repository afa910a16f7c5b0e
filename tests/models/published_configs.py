"""config.json files in the style of published models, their sizes shrunk.

Each entry stands for the file of the model that it is named after: it has that file's
keys, those that nothing reads included, in the spelling of the transformers release
that wrote it, with values as far as they are known. `shrunk` makes the sizes those of a
model that a test can run, and keeps everything else, rope parameters included.
"""

import json
import pathlib
from typing import Any

_SHAPES = pathlib.Path(__file__).resolve().parents[2] / "configs" / "shapes"
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "type": "yarn",
}
_LONGROPE = {
    "long_factor": [1.08, 1.11, 1.14, 1.34, 1.59, 1.60, 1.62, 2.62],
    "short_factor": [1.05, 1.05, 1.05, 1.10, 1.15, 1.20, 1.25, 1.30],
}


def _llama(**options: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
        **options,
    }


def _llama3(**options: Any) -> dict[str, Any]:
    return _llama(
        **{
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rope_scaling": _LLAMA3,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
            "vocab_size": 128256,
            **options,
        }
    )


def _lfm25() -> dict[str, Any]:
    """As transformers 5 writes one: layer_types in place of indices."""
    gone = ("full_attn_idxs", "block_ff_dim", "rope_theta", "torch_dtype")
    old = {k: v for k, v in _shape("lfm2-1.2b").items() if k not in gone}
    return old | {
        "dtype": "bfloat16",
        "transformers_version": "5.0.0.dev0",
        "intermediate_size": 12288,
        "layer_types": ["conv", "conv", "full_attention"] * 3
        + ["conv", "full_attention"] * 3
        + ["conv"],
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "tie_embedding": True,
    }


def _qwen2(**options: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
        **options,
    }


def _qwen3(**options: Any) -> dict[str, Any]:
    return _qwen2(
        **{
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "transformers_version": "4.51.0",
            "vocab_size": 151936,
            **options,
        }
    )


def _qwen3_moe(**options: Any) -> dict[str, Any]:
    return _qwen3(
        **{
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            **options,
        }
    )


def _gpt_oss(**options: Any) -> dict[str, Any]:
    layers = options.get("num_hidden_layers", 24)
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
        **options,
    }


def _mistral(**options: Any) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
        **options,
    }


def _mixtral(**options: Any) -> dict[str, Any]:
    return _mistral(
        **{
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "model_type": "mixtral",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "transformers_version": "4.36.0.dev0",
            **options,
        }
    )


def _gemma3(**options: Any) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
        "vocab_size": 262144,
        **options,
    }


def _gemma3_270m(**options: Any) -> dict[str, Any]:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = _gemma3(
        _sliding_window_pattern=6,
        hidden_size=640,
        intermediate_size=2048,
        layer_types=kinds * 3,
        num_hidden_layers=18,
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        transformers_version="4.55.0.dev0",
        use_bidirectional_attention=False,
        **options,
    )
    del config["sliding_window_pattern"], config["cache_implementation"]
    return config


def _phi3(**options: Any) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
        "use_cache": True,
        "vocab_size": 32064,
        **options,
    }


def _shape(name: str) -> dict[str, Any]:
    """The config.json of a published model that jaxtrain ships for its sizes."""
    return json.loads((_SHAPES / name / "config.json").read_text())


def _resaved_gemma4() -> dict[str, Any]:
    """As transformers 5.24 writes it anew: sizes of full layers by their numbers."""
    config = _shape("gemma-4-e2b")
    config |= {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    del config["global_head_dim"], config["num_global_key_value_heads"]
    return config | {"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}}}


PUBLISHED: dict[str, dict[str, Any]] = {
    "google/gemma-4-E2B": _shape("gemma-4-e2b"),
    "google/gemma-4-E4B": _shape("gemma-4-e4b"),
    "google/gemma-4-31B": _shape("gemma-4-31b"),
    "google/gemma-4-E2B, saved anew": _resaved_gemma4(),
    "LiquidAI/LFM2-350M": _shape("lfm2-350m"),
    "LiquidAI/LFM2-700M": _shape("lfm2-700m"),
    "LiquidAI/LFM2-1.2B": _shape("lfm2-1.2b"),
    "LiquidAI/LFM2.5-1.2B-Instruct": _lfm25(),
    "meta-llama/Llama-2-7b-hf": _llama(
        max_position_embeddings=4096,
        num_key_value_heads=32,
        pretraining_tp=1,
        rope_scaling=None,
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama3(
        eos_token_id=128009, max_position_embeddings=8192, rope_scaling=None
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(),
    "meta-llama/Llama-3.2-1B": _llama3(
        eos_token_id=128001,
        head_dim=64,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        rope_scaling={**_LLAMA3, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama3(eos_token_id=128001),
    "unsloth/Llama-3.2-1B-Instruct": _llama3(
        pad_token_id=128004, unsloth_fixed=True, head_dim=64, hidden_size=2048
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(
        attention_bias=False,
        hidden_size=2048,
        intermediate_size=5632,
        max_position_embeddings=2048,
        num_hidden_layers=22,
        num_key_value_heads=4,
        pretraining_tp=1,
        rope_scaling=None,
        rope_theta=10000.0,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        **_llama(
            attention_bias=False,
            attention_dropout=0.0,
            eos_token_id=2,
            hidden_size=576,
            initializer_range=0.041666666666666664,
            intermediate_size=1536,
            is_llama_config=True,
            max_position_embeddings=8192,
            mlp_bias=False,
            num_attention_heads=9,
            num_hidden_layers=30,
            num_key_value_heads=3,
            pad_token_id=2,
            pretraining_tp=1,
            rope_interleaved=False,
            rope_scaling=None,
            rope_theta=100000,
            tie_word_embeddings=True,
            vocab_size=49152,
        ),
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "lmsys/vicuna-7b-v1.5-16k": _llama(
        _name_or_path="vicuna-7b-v1.5-16k",
        max_position_embeddings=4096,
        max_sequence_length=16384,
        num_key_value_heads=32,
        pad_token_id=0,
        pretraining_tp=1,
        rope_scaling={"factor": 4.0, "type": "linear"},
    ),
    "chargoddard/internlm2-7b-llama": _llama(
        attention_bias=False,
        bias=False,
        max_position_embeddings=32768,
        num_key_value_heads=8,
        pad_token_id=2,
        rope_scaling={"factor": 3.0, "type": "dynamic"},
        rope_theta=1000000,
    ),
    "01-ai/Yi-6B": _llama(
        max_position_embeddings=4096,
        num_key_value_heads=4,
        pad_token_id=0,
        rope_theta=5000000.0,
        vocab_size=64000,
    ),
    "huggyllama/llama-7b": _llama(
        max_position_embeddings=2048,
        max_sequence_length=2048,
        pad_token_id=0,
        rms_norm_eps=1e-06,
    ),
    "mistralai/Mistral-7B-v0.1": _mistral(),
    "mistralai/Mistral-7B-Instruct-v0.3": _shape("mistral-7b"),
    "mistralai/Mistral-Nemo-Instruct-2407": _mistral(
        attention_dropout=0.0,
        head_dim=128,
        hidden_size=5120,
        max_position_embeddings=131072,
        num_hidden_layers=40,
        rope_theta=1000000.0,
        sliding_window=None,
        vocab_size=131072,
    ),
    "mistralai/Ministral-8B-Instruct-2410": _mistral(
        attention_dropout=0.0,
        head_dim=128,
        num_hidden_layers=36,
        rope_theta=100000000.0,
        sliding_window=32768,
        vocab_size=131072,
    ),
    "HuggingFaceH4/zephyr-7b-beta": _mistral(
        _name_or_path="dpo-model",
        attention_dropout=0.0,
        pad_token_id=2,
        use_cache=True,
    ),
    "Qwen/Qwen2-1.5B": _qwen2(
        hidden_size=1536,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_mrope=False,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(
        hidden_size=896,
        max_window_layers=21,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        sliding_window=32768,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct with the YaRN of its model card": _qwen2(
        rope_scaling=_YARN
    ),
    "Qwen/Qwen2.5-7B-Instruct-1M": _qwen2(
        dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192},
        max_position_embeddings=1010000,
        rope_theta=10000000.0,
        sliding_window=1010000,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(
        eos_token_id=151643,
        hidden_size=1536,
        max_position_embeddings=131072,
        max_window_layers=21,
        num_attention_heads=12,
        num_key_value_heads=2,
        rope_theta=10000,
        sliding_window=4096,
        use_mrope=False,
    ),
    "Qwen/Qwen3-0.6B": _qwen3(
        hidden_size=1024,
        max_window_layers=28,
        num_attention_heads=16,
        num_hidden_layers=28,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(
        hidden_size=2560,
        max_position_embeddings=262144,
        rope_theta=5000000,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": _qwen3(),
    "Qwen/Qwen3-8B with the YaRN of its model card": _qwen3(
        max_position_embeddings=131072,
        rope_scaling={"rope_type": "yarn", **_YARN},
    ),
    "unsloth/Qwen3-0.6B": _qwen3(
        hidden_size=1024,
        num_attention_heads=16,
        pad_token_id=151654,
        tie_word_embeddings=True,
        unsloth_fixed=True,
    ),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _qwen3_moe(
        max_position_embeddings=262144, rope_theta=10000000
    ),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(
        hidden_size=4096,
        max_window_layers=94,
        moe_intermediate_size=1536,
        num_attention_heads=64,
        num_hidden_layers=94,
    ),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _qwen3_moe(
        max_position_embeddings=262144,
        qkv_bias=False,
        rope_theta=10000000,
        shared_expert_intermediate_size=0,
        use_qk_norm=True,
    ),
    # OpenAI's weights are in MXFP4, as `quantization_config` says: gpt_oss_test.py.
    "openai/gpt-oss-20b": _gpt_oss(),
    "openai/gpt-oss-120b": _gpt_oss(num_hidden_layers=36, num_local_experts=128),
    "openai/gpt-oss-safeguard-20b": _gpt_oss(swiglu_alpha=1.702),
    "unsloth/gpt-oss-20b-BF16": _gpt_oss(
        bos_token_id=199998,
        pad_token_id=200017,
        torch_dtype="bfloat16",
        unsloth_fixed=True,
    ),
    "mistralai/Mixtral-8x7B-v0.1": _mixtral(),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _mixtral(torch_dtype="bfloat16"),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _mixtral(
        hidden_size=6144,
        max_position_embeddings=65536,
        num_attention_heads=48,
        num_hidden_layers=56,
        router_aux_loss_coef=0.001,
        router_jitter_noise=0.0,
        vocab_size=32768,
    ),
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": _mixtral(
        _name_or_path="mixtral-hermes", eos_token_id=32000, use_cache=False
    ),
    "google/gemma-2-2b": _shape("gemma-2-2b"),
    "google/gemma-2-2b-it": _shape("gemma-2-2b")
    | {"eos_token_id": [1, 107], "torch_dtype": "bfloat16"},
    "google/gemma-2-9b": _shape("gemma-2-9b"),
    "google/gemma-2-27b-it": _shape("gemma-2-27b"),
    "google/gemma-3-1b-pt": _gemma3(eos_token_id=1),
    "google/gemma-3-1b-it": _gemma3(),
    "google/gemma-3-270m-it": _gemma3_270m(),
    "unsloth/gemma-3-270m-it": _gemma3_270m(
        eos_token_id=106, unsloth_fixed=True, pad_token_id=0
    ),
    "microsoft/Phi-3-mini-4k-instruct": _phi3(),
    "microsoft/Phi-3-mini-128k-instruct": _phi3(
        max_position_embeddings=131072,
        rope_scaling={**_LONGROPE, "type": "longrope"},
        sliding_window=262144,
    ),
    "microsoft/Phi-3.5-mini-instruct": _phi3(
        max_position_embeddings=131072,
        rope_scaling={**_LONGROPE, "type": "longrope"},
        sliding_window=262144,
        transformers_version="4.43.3",
    ),
    "microsoft/phi-4": _phi3(
        bos_token_id=100257,
        eos_token_id=100265,
        hidden_size=5120,
        max_position_embeddings=16384,
        num_attention_heads=40,
        num_hidden_layers=40,
        num_key_value_heads=10,
        original_max_position_embeddings=16384,
        pad_token_id=100349,
        rope_theta=250000,
        sliding_window=None,
        vocab_size=100352,
    ),
    "microsoft/Phi-4-mini-instruct": _phi3(
        bos_token_id=199999,
        eos_token_id=199999,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=24,
        num_key_value_heads=8,
        pad_token_id=199999,
        partial_rotary_factor=0.75,
        rope_scaling={**_LONGROPE, "type": "longrope"},
        sliding_window=262144,
        tie_word_embeddings=True,
        vocab_size=200064,
    ),
    "google/gemma-2b": _shape("gemma-2b"),
    "google/gemma-7b": _shape("gemma-7b"),
    "zai-org/GLM-4-9B-0414": _shape("glm-4-9b"),
    "zai-org/GLM-4-32B-0414": _shape("glm-4-32b"),
    "mistralai/Ministral-3-3B-Base-2512": _shape("ministral-3-3b"),
    "mistralai/Ministral-3-8B-Base-2512": _shape("ministral-3-8b"),
    "mistralai/Ministral-3-14B-Base-2512": _shape("ministral-3-14b"),
    "allenai/OLMo-2-0425-1B": _shape("olmo-2-1b"),
    "allenai/OLMo-2-1124-7B": _shape("olmo-2-7b"),
    "allenai/OLMo-2-0325-32B": _shape("olmo-2-32b"),
    "allenai/Olmo-3-7B-Instruct": _shape("olmo-3-7b"),
    "allenai/Olmo-3-32B-Think": _shape("olmo-3-32b"),
    "HuggingFaceTB/SmolLM3-3B": _shape("smollm3-3b"),
    "ibm-granite/granite-3.3-2b-instruct": _shape("granite-3.3-2b"),
    "ibm-granite/granite-3.3-8b-instruct": _shape("granite-3.3-8b"),
    "ibm-granite/granite-4.0-micro": _shape("granite-4.0-micro"),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": _shape("seed-oss-36b"),
    "Qwen/Qwen3.5-9B": _shape("qwen3.5-9b"),
    "CohereLabs/c4ai-command-r7b-12-2024": _shape("command-r7b"),
    "zai-org/GLM-4.5-Air": _shape("glm-4.5-air"),
    "zai-org/GLM-4.5": _shape("glm-4.5"),
    "deepseek-ai/DeepSeek-V2-Lite": _shape("deepseek-v2-lite"),
    "deepseek-ai/DeepSeek-V3": _shape("deepseek-v3"),
    "Qwen/Qwen1.5-MoE-A2.7B": _shape("qwen1.5-moe-a2.7b"),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": _shape("qwen3-next-80b-a3b"),
    "Qwen/Qwen3.5-35B-A3B": _shape("qwen3.5-35b-a3b"),
    "google/gemma-4-26B-A4B": _shape("gemma-4-26b-a4b"),
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same file with small sizes: two layers of width 32, a vocabulary of 64."""
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    small = dict(config)
    small |= {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kv_heads is not None:
        small["num_key_value_heads"] = 2 if kv_heads == heads else 1
    if config.get("head_dim"):
        # Cohere 2's heads share the width whatever this key says.
        is_wide = config["head_dim"] > 100 and config["model_type"] != "cohere2"
        small["head_dim"] = 24 if is_wide else 16
    for name, size in _EXPERTS.items():
        if config.get(name):
            small[name] = size
    if config.get("sliding_window"):
        # A window of the whole context stays one.
        whole = config["sliding_window"] >= config["max_position_embeddings"]
        small["sliding_window"] = 64 if whole else 4
    if "max_window_layers" in config:
        whole = config["max_window_layers"] >= config["num_hidden_layers"]
        small["max_window_layers"] = 2 if whole else 1
    for name in ("layer_types", "no_rope_layers"):
        if name in config:
            small[name] = config[name][-2:]
    if "full_attention_interval" in config:
        small["full_attention_interval"] = 2
    if "full_attn_idxs" in config:
        small["full_attn_idxs"] = [1]
    if "block_multiple_of" in config:
        small["block_multiple_of"] = 16
    if "block_ff_dim" in config:
        small["block_ff_dim"] = 48
    if "linear_num_value_heads" in config:
        small |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
        small |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    if "kv_lora_rank" in config:
        rank = config["q_lora_rank"] and 12
        small |= {"q_lora_rank": rank, "kv_lora_rank": 20, "v_head_dim": 12}
        small |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
        small |= dict.fromkeys(("n_group", "topk_group"), 2 if rank else 1)
    if "sliding_window_pattern" in config:
        small["sliding_window_pattern"] = 2
    if config["model_type"] == "gemma4_text":
        small |= _small_gemma4(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        small |= {name: _small_id(config[name])} if config.get(name) else {}
    return small | _small_lengths(config)


def _small_gemma4(config: dict[str, Any]) -> dict[str, Any]:
    """Four layers, of which the last two read others' keys where any did."""
    sizes = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2 if config["num_kv_shared_layers"] else 0,
        "vocab_size_per_layer_input": 2304,
        "hidden_size_per_layer_input": 8
        if config["hidden_size_per_layer_input"]
        else 0,
        "global_head_dim": 32,
        "num_global_key_value_heads": config.get("num_global_key_value_heads") and 1,
    }
    if not config.get("enable_moe_block"):
        sizes |= {"num_experts": None, "moe_intermediate_size": None}
    return {name: size for name, size in sizes.items() if name in config}


_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "shared_intermediate_size": 48,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
}


def _small_id(token: int | list[int]) -> int | list[int]:
    return (
        [_small_id(each) for each in token] if isinstance(token, list) else token % 64
    )


def _small_lengths(config: dict[str, Any]) -> dict[str, Any]:
    """Lengths, and rope parameters of a narrower head, where context is stretched."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(key)
    if not scaling:
        return {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "dynamic":  # stretches beyond max_position_embeddings
        return {"max_position_embeddings": 8}
    small: dict[str, Any] = {"max_position_embeddings": 64}
    outside = "original_max_position_embeddings"
    if outside in config:
        small[outside] = 8
    if kind == "longrope":
        pairs = int(16 * config.get("partial_rotary_factor", 1.0)) // 2
        cut = {name: factors[:pairs] for name, factors in _LONGROPE.items()}
        return small | {key: {**scaling, **cut}}
    if outside in scaling:
        small[key] = {**scaling, outside: 8}
    return small

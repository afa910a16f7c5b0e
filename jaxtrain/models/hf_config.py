"""Reading a published config.json: which of its keys mean what.

A key is one of four kinds. This decoder understands it. Or transformers knows it (an
attribute of the family's config class, or an option of generation) and its value
changes nothing. Or transformers knows it, the value is not the default and this decoder
has nothing like it: refused. Or transformers does not know it either, so that it is a
note of whoever published the model: named in a warning and passed over.
"""

import functools
import inspect
import logging
import operator
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxtrain.models.config import ModelConfig, family_of, refused_options
from jaxtrain.models.families import REFUSED_UNLESS, Family
from jaxtrain.models.hf_composite import is_composite, text_options
from jaxtrain.models.hf_files import read_json
from jaxtrain.models.problems import Problems
from jaxtrain.models.rope import unread_parameters
from jaxtrain.record.safe_text import shown

logger = logging.getLogger(__name__)

_Number = int | float
# Values of these types are right for every family, which spares asking transformers:
# that imports PyTorch, where it is installed. Values of others are judged by it.
_RIGHT_TYPES: Mapping[str, Any] = {
    "architectures": list[str] | None,
    "attention_bias": bool,
    "attention_dropout": _Number,
    "attention_k_eq_v": bool,
    "attention_multiplier": _Number,
    "attention_out_bias": bool,
    "attn_logit_softcapping": float | None,
    "block_auto_adjust_ff_dim": bool,
    "block_ff_dim": int,
    "block_ffn_dim_multiplier": _Number,
    "block_multiple_of": int,
    "bos_token_id": int | None,
    "chunk_size_feed_forward": int,
    "conv_bias": bool,
    "conv_L_cache": int,
    "decoder_sparse_step": int,
    "dtype": str | None,
    "embd_pdrop": _Number,
    "embedding_multiplier": _Number,
    "enable_moe_block": bool,
    "eos_token_id": int | list[int] | None,
    "experts_per_token": int,
    "final_logit_softcapping": float | None,
    "first_k_dense_replace": int,
    "full_attn_idxs": list[int] | None,
    "global_head_dim": int,
    "head_dim": int,
    "hidden_act": str,
    "hidden_activation": str,
    "hidden_size": int,
    "hidden_size_per_layer_input": int,
    "initial_context_length": int,
    "initializer_range": float,
    "intermediate_size": int,
    "is_encoder_decoder": bool,
    "kv_lora_rank": int,
    "layer_norm_eps": float,
    "layer_types": list[str] | None,
    "linear_conv_kernel_dim": int,
    "linear_key_head_dim": int,
    "linear_num_key_heads": int,
    "linear_num_value_heads": int,
    "linear_value_head_dim": int,
    "logit_scale": float,
    "logits_scaling": _Number,
    "mamba_d_head": int | str,
    "mamba_n_heads": int,
    "max_position_embeddings": int,
    "max_window_layers": int,
    "mlp_bias": bool,
    "mlp_only_layers": list[int] | None,
    "moe_intermediate_size": int,
    "moe_layer_freq": int,
    "n_group": int,
    "n_routed_experts": int,
    "n_shared_experts": int,
    "no_rope_layer_interval": int,
    "no_rope_layers": list[int] | None,
    "norm_eps": float,
    "norm_topk_prob": bool,
    "num_attention_heads": int,
    "num_experts": int,
    "num_experts_per_tok": int,
    "num_global_key_value_heads": int | None,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "num_kv_shared_layers": int,
    "num_local_experts": int,
    "num_nextn_predict_layers": int,
    "original_max_position_embeddings": int,
    "output_router_logits": bool,
    "pad_token_id": int | None,
    "partial_rotary_factor": _Number | None,
    "position_embedding_type": str | None,
    "pretraining_tp": int,
    "q_lora_rank": int | None,
    "qk_nope_head_dim": int,
    "qk_rope_head_dim": int,
    "qkv_bias": bool,
    "query_pre_attn_scalar": int,
    "resid_pdrop": _Number,
    "residual_dropout": _Number,
    "residual_multiplier": _Number,
    "rms_norm_eps": float,
    "rope_interleave": bool,
    "rope_local_base_freq": _Number | None,
    "rope_parameters": dict | None,
    "rope_scaling": dict | None,
    "rope_theta": _Number | None,
    "routed_scaling_factor": float,
    "router_aux_loss_coef": float,
    "router_jitter_noise": float,
    "scoring_func": str,
    "shared_expert_intermediate_size": int,
    "shared_intermediate_size": int,
    "sliding_window": int | None,
    "sliding_window_pattern": int | None,
    "swiglu_alpha": float,
    "swiglu_limit": float,
    "tie_embedding": bool,
    "tie_word_embeddings": bool,
    "topk_group": int,
    "topk_method": str,
    "transformers_version": str | None,
    "use_bidirectional_attention": type(None),
    "use_cache": bool,
    "use_double_wide_mlp": bool,
    "use_qk_norm": bool,
    "use_sliding_window": bool,
    "v_head_dim": int,
    "vocab_size": int,
    "vocab_size_per_layer_input": int,
}
# Keys whose values transformers judges by no type.
_OF_ANY_TYPE = frozenset(
    {
        "attn_implementation", "auto_map", "cache_implementation", "model_type",
        "name_or_path", "num_labels", "output_attentions", "task_specific_params",
        "tokenizer_class", "torch_dtype", "unsloth_fixed", "unsloth_version",
    }
)  # fmt: skip
# Keys that no config class of the family need have, but transformers reads.
_READ_BESIDES: Mapping[str, Any] = {
    "head_dim": int | None,
    "num_experts": int | None,
    "num_local_experts": int | None,
    "original_max_position_embeddings": int | None,
    "partial_rotary_factor": _Number | None,
    "per_layer_config": dict | None,
    "quantization_config": dict | None,
    "rope_local_base_freq": _Number | None,
    "rope_parameters": dict | None,
    "rope_scaling": dict | None,
    "rope_theta": _Number | None,
    "sliding_window_pattern": int | None,
}
# How types are called in messages.
_WORDS: Mapping[Any, str] = {
    int: "an integer",
    float: "a number with a decimal point",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a directory's config.json, of transformers 4 or 5.

    Keys that neither this decoder nor transformers knows are passed over; one warning
    names them.

    Raises:
        ValueError: there is no such file, it is damaged, or it asks for what the
            decoder has not; a line for each problem.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: {path} is no Hugging Face model")
    stored = read_json(file)
    options = text_options(stored)
    try:
        family = family_of(options.get("model_type"))
        problems = Problems(_wrong_types(options))
        problems.lines += _quantized_otherwise(
            options.get("quantization_config"), in_wrapper=is_composite(stored)
        )
        kept, unknown = _sort_keys(options, family)
        if problems.lines:  # values of a wrong type can't be read any further
            problems.lines += refused_options(kept, family)
        else:
            with problems.noted():
                config = ModelConfig.from_hf(kept)
        problems.check()
    except ValueError as error:
        lines = str(error).splitlines()
        raise ValueError("\n".join(f"{file}: {line}" for line in lines)) from error
    dropout = {name: options.get(name) for name in family.unused_dropout}
    if any(dropout.values()):
        logger.warning(
            "%s asks for dropout in training, %s, which is not applied here",
            file,
            ", ".join(f"{name} = {value}" for name, value in dropout.items() if value),
        )
    if unknown:
        logger.warning(
            "%s has keys that neither this decoder nor transformers knows; they are"
            " passed over: %s",
            file,
            ", ".join(unknown),
        )
    return config


def fp8_block(path: str | os.PathLike[str]) -> tuple[int, int]:
    """The block of float8 weights, in rows and columns, that shares one scale.

    As the config.json in the model's directory gives it; (128, 128) where it does not.
    """
    file = pathlib.Path(path) / "config.json"
    options = text_options(read_json(file)) if file.is_file() else {}
    settings = options.get("quantization_config") or {}
    rows, columns = settings.get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """The type that a directory's config.json says the weights are kept in.

    It is float32 where config.json names none, or one that nothing is computed in.
    """
    stored = read_json(pathlib.Path(path) / "config.json")
    parts = (text_options(stored), stored)  # a wrapper may say it for both
    found = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    named = next(filter(None, found), None)
    return named if named in ("float32", "bfloat16", "float16") else "float32"


def _sort_keys(
    options: Mapping[str, Any], family: Family
) -> tuple[dict[str, Any], list[str]]:
    """The options that `ModelConfig.from_hf` is to judge; the names of unknown ones.

    What is in neither is known and changes nothing.
    """
    kept, unknown = {}, []
    for name, value in options.items():
        if name == "quantization_config":
            continue  # see `_quantized_otherwise`
        if family.understands(name) or value in REFUSED_UNLESS.get(name, ()):
            kept[name] = value
            continue
        known = transformers_keys(options["model_type"])
        if name in known:
            if name in REFUSED_UNLESS or value != known[name].default:
                kept[name] = value
        elif name in REFUSED_UNLESS and name in _READ_BESIDES:
            kept[name] = value
        elif name not in _generation_keys():
            unknown.append(name)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(kept.get(name), Mapping):
            kept[name], unread = _read_by_rope(kept[name], family)
            unknown += [f"{name}.{each}" for each in unread]
    return kept, unknown


def _read_by_rope(
    parameters: Mapping[str, Any], family: Family
) -> tuple[dict[str, Any], list[str]]:
    """Rope parameters without those that their kind does not read; and these."""
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        unread = unread_parameters(parameters, family)
        return {k: v for k, v in parameters.items() if k not in unread}, unread
    # One set for each type of layer. What is nested deeper is no set of parameters:
    # it is judged as a value, so that this can't recurse without end.
    read, unread = dict(parameters), []
    for name, below in parameters.items():
        if isinstance(below, Mapping):
            names = unread_parameters(below, family)
            read[name] = {k: v for k, v in below.items() if k not in names}
            unread += [f"{name}.{each}" for each in names]
    return read, unread


@functools.cache
def _generation_keys() -> frozenset[str]:
    """Options of generation, which old files keep among those of the model."""
    from transformers import GenerationConfig  # slow, and rarely needed

    return frozenset(vars(GenerationConfig()))


@functools.cache
def transformers_keys(model_type: str) -> Mapping[str, inspect.Parameter]:
    """The keys that transformers' config class has, with their defaults and types.

    Its signature is read, not an instance, which has computed values in place of some
    defaults.
    """
    from transformers import CONFIG_MAPPING  # slow, and rarely needed

    return inspect.signature(CONFIG_MAPPING[model_type].__init__).parameters


def _wrong_types(options: Mapping[str, Any]) -> list[str]:
    """A line for each value that is not of the type that transformers wants."""
    wrong = []
    for name, value in options.items():
        if name in _OF_ANY_TYPE or name.startswith("_"):
            continue
        if name in _RIGHT_TYPES and _is_of(value, _RIGHT_TYPES[name]):
            continue
        arguments = transformers_keys(options["model_type"])
        wanted = arguments[name].annotation if name in arguments else Any
        if name in _READ_BESIDES and wanted is Any:
            wanted = _READ_BESIDES[name]
        if not _is_of(value, wanted):
            given = _words(type(value))
            wrong.append(
                f"{name} = {shown(value)}: must be {_words(wanted)}, not {given}"
            )
    return wrong


def _is_of(value: Any, wanted: Any) -> bool:
    """Whether a value of JSON is of an annotated type; True for those not judged."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, each) for each in typing.get_args(wanted))
    if origin is list:
        of = functools.reduce(operator.or_, typing.get_args(wanted))
        return isinstance(value, list) and all(_is_of(each, of) for each in value)
    if wanted is float and isinstance(value, dict):
        return value.keys() == {"__float__"}  # how transformers writes infinity
    if wanted is type(None):
        return value is None
    if typing.is_typeddict(wanted) or wanted is dict or origin is dict:
        return isinstance(value, dict)
    if wanted in (int, float, str, bool):
        return type(value) is wanted
    return True


def _words(wanted: Any) -> str:
    """A type in a message: "an integer or null"."""
    parts = typing.get_args(wanted)
    if typing.get_origin(wanted) is list:
        return f"a list (each of it {_words(parts[0])})"
    if parts:
        return " or ".join(dict.fromkeys(map(_words, parts)))
    if wanted is dict or typing.is_typeddict(wanted):
        return "an object of keys"
    return _WORDS.get(wanted, "a list" if wanted is list else str(wanted))


def _quantized_otherwise(settings: Any, *, in_wrapper: bool) -> list[str]:
    """A line if the weights are quantized in a way that is not undone on loading."""
    if not isinstance(settings, Mapping):
        return []
    method = settings.get("quant_method")
    if method in ("fp8", "mxfp4") and not in_wrapper:
        return []
    if method is None and (
        settings.get("load_in_4bit") or settings.get("load_in_8bit")
    ):
        method = "bitsandbytes"
    way = " with training.lora.quantization = 'nf4' or 'int8'"
    return [
        f"quantization_config.quant_method = {shown(method)}: these weights are"
        " quantized already, and only fp8 with weight_scale_inv and mxfp4 are undone on"
        " loading,"
        " in models of text alone. Train the"
        " model that they were made from"
        + (way if method == "bitsandbytes" else "")
        + ", or write them as whole weights: transformers'"
        " AutoModelForCausalLM.from_pretrained(...).dequantize().save_pretrained(...)"
    ]

"""Write the table of families into docs/models.md, from the code and its tests.

python docs/make_models.py
"""

import logging
import pathlib
import runpy
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import FAMILIES, REFUSED_UNLESS, WRAPPERS, Family
from jaxtrain.models.hf_config import load_config

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "docs" / "models.md"
BEGIN, END = (
    "<!-- families: made by docs/make_models.py -->",
    "<!-- end of families -->",
)
_TESTS = REPOSITORY / "tests" / "models"
_COMPARED = runpy.run_path(str(_TESTS / "conftest.py"))
_SHAPES = REPOSITORY / "configs" / "shapes"
_HEADER = """
| `model_type` | published sizes, in billions of weights | what differs from a Llama | tested with | refused |
|---|---|---|---|---|
"""  # noqa: E501
# What a field of Family means if it is not at its default.
_WORDS: Mapping[str, Mapping[Any, str]] = {
    "norms": {
        "after": "norms after attention and MLP instead of before them",
        "around": "norms before and after attention and MLP",
        "around_glm": "norms before and after attention and MLP",
        "shared": "attention and MLP in parallel, after one norm",
    },
    "norm_kind": {"layer": "LayerNorm without bias"},
    "qk_norm": {
        "head": "norms of each head's queries and keys",
        "width": "norms of queries and keys over all heads",
    },
    "unit_offset_norm": {True: "norms multiply by 1 + scale"},
    "scale_embeddings": {True: "embeddings multiplied by the root of their width"},
    "fused": {
        "mlp": "gate and up projections in one matrix",
        "all": "one matrix for queries, keys and values, and one for gate and up",
    },
    "always_qkv_bias": {True: "biases of queries, keys and values"},
    "partial_rotary": {True: "rotary embedding of a part of each head"},
    "rotary_pairs": {"interleaved": "rotary embedding of neighbouring features"},
    "rotary_layers": {
        "listed": "layers without rotary embedding",
        "sliding": "no rotary embedding in full-attention layers",
        "typed": "rotary embedding is optional",
    },
    "scales_queries": {True: "queries scaled by their position"},
    "gated_attention": {True: "a gate on the output of each head"},
    "attention_sinks": {True: "attention sinks: a learned logit in each softmax"},
    "router": {
        "softmax_float32": "a router in float32",
        "sigmoid": "a sigmoid router in float32, with a bias on the choice",
    },
    "shared_expert": {
        "shared_expert": "a shared expert",
        "shared_experts": "a shared expert",
    },
    "gated_shared_expert": {True: "a gate on the shared expert"},
    "extra_layer": {True: "its layer for multi-token prediction is ignored"},
    "experts_beside": {True: "optional experts in parallel to each layer's MLP"},
    "biased_experts": {True: "experts with biases, clamped"},
    "variety": {
        "delta_nets": "three Gated DeltaNet layers for each layer of attention",
        "short_convolutions": "short convolutions in most layers",
        "latent_heads": "latent attention: keys and values from a narrow vector",
        "gemma4_layers": "wider heads in full-attention layers, layers that share"
        " keys and values, per-layer embeddings",
    },
    "local_rope": {
        "own_base": "another rotary base in sliding-window layers",
        "unscaled": "rotary scaling in full-attention layers only",
    },
    "window_rule": {
        "all": "an optional sliding window in every layer",
        "from_layer": "an optional sliding window from some layer on",
        "pattern": "alternating sliding-window and full-attention layers",
        "every_other": "an optional sliding window in every other layer",
        "unturned": "an optional window in layers without rotary embedding",
    },
}
_OPTIONS: Mapping[str, str] = {
    "final_logit_softcapping": "soft caps",
    "embedding_multiplier": "multipliers of embeddings, branches, scores and logits",
    "logit_scale": "a factor on logits",
    "mlp_only_layers": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "first_k_dense_replace": "the first layers have a plain MLP",
}


def differences(family: Family) -> str:
    """The differences between a family and a Llama, in words."""
    found = [
        words[getattr(family, name)]
        for name, words in _WORDS.items()
        if getattr(family, name) in words
    ]
    is_mixture = family.expert_width_key is not None
    for key, words in _OPTIONS.items():
        about_experts = "experts" in words
        if key in family.keys and words not in found and about_experts <= is_mixture:
            found.append(words)
    return "; ".join(found)


def tested_with(model_type: str) -> str:
    """The options of the models that tests compare with those of transformers."""
    rows = [
        row
        for row in _COMPARED["FAMILY_OPTIONS"].values()
        if row["model_type"] == model_type
    ]
    names = {name for row in rows for name in row if row[name] is not None}
    names -= {"model_type", *_COMPARED["_SIZES"]}
    return ", ".join(f"`{name}`" for name in sorted(names))


def refused(family: Family) -> str:
    """The options of a family that are not implemented."""
    parts = [
        f"`{name}` other than {' or '.join(f'`{each!r}`' for each in allowed)}"
        for name, allowed in family.must_be.items()
    ]
    if family.unused_dropout:
        names = " and ".join(f"`{name}`" for name in family.unused_dropout)
        parts.append(f"not applied, with a warning: {names}")
    return "; ".join(parts)


def sizes(models: Mapping[str, ModelConfig], model_type: str) -> str:
    """Published models of a family, each with its number of weights."""
    counts = {
        name: config.num_params()
        for name, config in models.items()
        if config.model_type == model_type
    }
    named = sorted(counts.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {weights / 1e9:.3g}" for name, weights in named)


def rows() -> Iterator[str]:
    models = {each.name: load_config(each) for each in sorted(_SHAPES.iterdir())}
    for name, family in FAMILIES.items():
        cells = (
            f"`{name}`",
            sizes(models, name),
            differences(family),
            tested_with(name),
            refused(family),
        )
        yield f"| {' | '.join(cells)} |\n"


def make_table() -> str:
    wrappers = ", ".join(f"`{name}`" for name in WRAPPERS)
    never = ", ".join(f"`{name}`" for name in REFUSED_UNLESS)
    return (
        f"{BEGIN}\n{_HEADER}{''.join(rows())}\nWrappers of models of text and images:"
        f" {wrappers}. In every family these keys are refused if their value would have"
        f" an effect: {never}.\n{END}"
    )


def make_page() -> str:
    page = OUTPUT.read_text()
    before, rest = page.split(BEGIN)
    return before + make_table() + rest.split(END)[1]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    OUTPUT.write_text(make_page())

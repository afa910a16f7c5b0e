"""The unembedding and its adapter: what turns hidden states into logits."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.linear_cross_entropy.api import HeadAdapter, TokenShards
from jaxtrain.kernels.linear_cross_entropy.partition import serves
from jaxtrain.models import layers
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import Options
from jaxtrain.types import Params

# Modules outside the layers that an adapter may stand beside.
END_TARGETS = frozenset({"embed_tokens", "lm_head", "per_layer_model_projection"})


def get_unembedding(config: ModelConfig, params: Params) -> tuple[Array, Literal[0, 1]]:
    """The unembedding, and which of its axes is the vocabulary."""
    if config.tie_word_embeddings:
        return params["embed_tokens"]["embedding"], 0
    return params["lm_head"]["kernel"], 1


def share_tokens(options: Options, shape: tuple[int, ...]) -> TokenShards:
    """How the devices of a mesh share the tokens of rows [B T], for the loss head."""
    layout = options.layout or Layout()
    count = layout.count(layout.sharing(*shape))
    whole = layout.count(layout.weights) == 1  # the unembedding, on each device
    return TokenShards(count, options.constrain if whole and count > 1 else None)


def is_on_shards(options: Options, hidden: Float[Array, "B T D"]) -> bool:
    """Whether kernels score each device's own tokens, of several devices."""
    layout = options.layout
    if layout is None or layout.mesh is None or layout.mesh.size == 1:
        return False
    return has_kernels(options, hidden)


def has_kernels(options: Options, hidden: Float[Array, "B T D"]) -> bool:
    """Whether kernels serve this head; one with an adapter is none of theirs."""
    config, layout = options.config, options.layout or Layout()
    plain = config.final_logit_softcapping is None and config.logit_multiplier > 0
    return plain and serves(layout, hidden, config.vocab_size, options.device)


def make_head_adapter(
    options: Options,
    params: Params,
    hidden: Float[Array, "M D"],
    dropout_key: Key[Array, ""] | None = None,
) -> HeadAdapter | None:
    """What the head's adapter adds to the logits of `hidden`; None without one.

    With `lora.ties_head`, a tied head acts as (E + s A B)^T, of the embedding's own
    adapter: its A is B^T, its B is A^T.
    """
    config, lora = options.config, options.lora
    leaves, path = params.get("lm_head", {}), "lm_head"
    if "lora_a" not in leaves:
        below = params["embed_tokens"]
        ties = lora is not None and lora.ties_head and config.tie_word_embeddings
        if not ties or "lora_a" not in below:
            return None
        leaves = {"lora_a": below["lora_b"].T, "lora_b": below["lora_a"].T}
        path = "embed_tokens"
    assert lora is not None  # binding refuses adapters without their shape
    _, scaling = lora.rank_and_scaling(path)
    dtype = hidden.dtype
    a, b = leaves["lora_a"], leaves["lora_b"]
    with jax.named_scope("lora"):
        own_key = layers.fold_in_name(dropout_key, "lm_head")
        seen = layers.drop_inputs(hidden, lora.dropout, own_key)
        low = seen @ a.astype(dtype) * scaling
        gain = None
        if lora.use_dora:
            table, vocab_axis = get_unembedding(config, params)
            matrix = table.T if vocab_axis == 0 else table
            gain = layers.dora_gain(matrix, a, b, leaves["lora_magnitude"], scaling)
        return HeadAdapter(low, b.astype(dtype), gain)


def unembed(
    options: Options, params: Params, hidden: Float[Array, "B T D"]
) -> Float32[Array, "B T V"]:
    """Logits of hidden states, scaled and after the final soft cap."""
    config = options.config
    table, vocab_axis = get_unembedding(config, params)
    rows = hidden.reshape(-1, hidden.shape[-1])
    with jax.named_scope("unembed"):
        logits = jnp.einsum(
            "BTD,VD->BTV" if vocab_axis == 0 else "BTD,DV->BTV",
            hidden,
            table.astype(options.compute_dtype),
            preferred_element_type=jnp.float32,
        )
        adapter = make_head_adapter(options, params, rows)
        if adapter is not None:
            added = jnp.matmul(
                adapter.low, adapter.up, preferred_element_type=jnp.float32
            )
            logits += added.reshape(logits.shape)
            if adapter.gain is not None:
                logits *= adapter.gain
    if config.logit_multiplier != 1.0:
        logits *= config.logit_multiplier
    logits = options.constrain(logits, ("batch", "sequence", "vocab"))
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * jnp.tanh(logits / cap)

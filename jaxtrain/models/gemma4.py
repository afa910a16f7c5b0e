"""Gemma 4's attention: values normalized, keys as values, keys of earlier layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from jaxtrain.models.layer_kinds import FULL, Gemma4Layers
from jaxtrain.models.layers import (
    Attention,
    HandedOn,
    LayerInputs,
    LayerOptions,
    Linear,
    RMSNorm,
    normalize,
)
from jaxtrain.models.rope import rotate


class Gemma4Attention(nnx.Module):
    """Grouped-query attention whose scores are not scaled.

    Queries and keys are normalized with learned scales, values without. Some layers
    take the raw keys as values; some have neither, but read those that the last layer
    of their type handed on.
    """

    name = "self_attn"
    flops = staticmethod(Attention.flops)

    @staticmethod
    def init_state(options: LayerOptions, batch: int, max_len: int) -> dict[str, Array]:
        """An empty cache of one layer; nothing where it reads another's."""
        if options.kind.shares == "reads":
            return {}
        return Attention.init_state(options, batch, max_len)

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        config = options.config
        width, head_dim = config.hidden_size, config.head_dim
        q_width = config.num_attention_heads * head_dim
        kv_width = config.num_key_value_heads * head_dim

        def project(name: str, outputs: int, axis: str) -> Linear:
            sizes, axes = (width, outputs), ("embed", axis)
            path = f"{self.name}.{name}"
            return Linear(path, sizes, axes, options, rngs, bias=config.qkv_bias)

        self.q_proj = project("q_proj", q_width, "heads")
        self.q_norm = RMSNorm(head_dim, None, options)
        if options.kind.shares != "reads":
            self.k_proj = project("k_proj", kv_width, "kv_heads")
            self.k_norm = RMSNorm(head_dim, None, options)
            if not self._keys_are_values:
                self.v_proj = project("v_proj", kv_width, "kv_heads")
        sizes, axes, bias = (q_width, width), ("heads", "embed"), config.o_bias
        self.o_proj = Linear("self_attn.o_proj", sizes, axes, options, rngs, bias=bias)

    @property
    def _layer_type(self) -> str:
        return self.options.config.layer_types[0]

    @property
    def _keys_are_values(self) -> bool:
        variety = self.options.config.variety
        assert isinstance(variety, Gemma4Layers)
        return variety.keys_are_values and self._layer_type == FULL

    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: LayerInputs,
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        constrain, shares = self.options.constrain, self.options.kind.shares
        heads = (*x.shape[:2], -1, self.options.config.head_dim)
        q = self.q_norm(self.q_proj(x, dropout_key).reshape(heads))
        q = rotate(q, *given.rotary)
        q = checkpoint_name(constrain(q, ("batch", "sequence", "heads", None)), "query")
        if shares == "reads":
            k, v = given.shared[self._layer_type]
        else:
            k, v = self._keys_and_values(x, given, dropout_key)
        context, kept = given.attend(q, k, v)
        if shares == "gives":
            read = (k, v) if kept is None else kept.read
            kept = HandedOn(kept, {self._layer_type: read})
        context = constrain(context, ("batch", "sequence", "heads", None))
        return self.o_proj(context.reshape(*x.shape[:2], -1), dropout_key), kept

    def _keys_and_values(
        self,
        x: Float[Array, "B T D"],
        given: LayerInputs,
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        config, axes = self.options.config, ("batch", "sequence", "kv_heads", None)
        heads = (*x.shape[:2], -1, config.head_dim)
        k = v = self.k_proj(x, dropout_key).reshape(heads)
        if not self._keys_are_values:
            v = self.v_proj(x, dropout_key).reshape(heads)
        k = rotate(self.k_norm(k), *given.rotary)
        v = normalize(v, jnp.ones(config.head_dim, jnp.float32), config.rms_norm_eps)
        k = checkpoint_name(self.options.constrain(k, axes), "key")
        return k, checkpoint_name(self.options.constrain(v, axes), "value")

"""Attention whose keys and values come from one narrow vector of a token (DeepSeek).

arXiv:2405.04434, section 2.1. Here keys and values are expanded for every head, in
training and in the cache of generation alike.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layer_kinds import LatentHeads
from jaxtrain.models.layers import (
    KEYS_VALUES,
    LayerInputs,
    LayerOptions,
    Linear,
    RMSNorm,
)
from jaxtrain.models.rope import rotate

# Of the norms of what is narrow, whatever the config has for the others.
_EPSILON = 1e-6


class LatentAttention(nnx.Module):
    """Attention with narrow projections before those of queries, keys and values.

    Of each head's query and key, a part is turned by its position; the key's is the
    same for all heads. Values may be narrower than keys.
    """

    name = "self_attn"

    @staticmethod
    def flops(config: ModelConfig, keys_read: int) -> int:
        """FLOPs of scores and weighted values, forward, a token."""
        widths = config.head_dim + config.value_head_dim
        return 2 * config.num_attention_heads * widths * keys_read

    @staticmethod
    def init_state(options: LayerOptions, batch: int, max_len: int) -> dict[str, Array]:
        """An empty cache of one layer: room for the keys and values of each row."""
        config = options.config
        sizes = (batch, max_len, config.num_attention_heads)
        widths = (config.head_dim, config.value_head_dim)
        return {
            name: jnp.zeros((*sizes, width), options.compute_dtype)
            for name, width in zip(KEYS_VALUES, widths, strict=True)
        }

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        config, latent = options.config, _settings(options.config)
        width, heads = config.hidden_size, config.num_attention_heads

        def narrow(name: str, outputs: int) -> Linear:
            sizes, axes = (width, outputs), ("embed", None)
            path = f"{self.name}.{name}"
            return Linear(path, sizes, axes, options, rngs, bias=config.qkv_bias)

        def expand(name: str, inputs: int, of_head: int) -> Linear:
            sizes, axes = (inputs, heads * of_head), ("embed", "heads")
            return Linear(f"{self.name}.{name}", sizes, axes, options, rngs)

        rank = latent.query_rank
        if rank is None:
            self.q_proj = expand("q_proj", width, config.head_dim)
        else:
            self.q_a_proj = narrow("q_a_proj", rank)
            self.q_a_layernorm = RMSNorm(rank, None, options, epsilon=_EPSILON)
            self.q_b_proj = expand("q_b_proj", rank, config.head_dim)
        rank, name = latent.key_rank, "kv_a_proj_with_mqa"
        self.kv_a_proj_with_mqa = narrow(name, rank + latent.turned_width)
        self.kv_a_layernorm = RMSNorm(rank, None, options, epsilon=_EPSILON)
        both = latent.unturned_width + latent.value_width
        self.kv_b_proj = expand("kv_b_proj", rank, both)
        sizes, axes = (heads * latent.value_width, width), ("heads", "embed")
        bias, path = config.o_bias, f"{self.name}.o_proj"
        self.o_proj = Linear(path, sizes, axes, options, rngs, bias=bias)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: LayerInputs,
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        constrain, rows = self.options.constrain, ("batch", "sequence")
        q = self._queries(x, given, dropout_key)
        k, v = self._keys_and_values(x, given, dropout_key)
        q = checkpoint_name(constrain(q, (*rows, "heads", None)), "query")
        k = checkpoint_name(constrain(k, (*rows, "kv_heads", None)), "key")
        v = checkpoint_name(constrain(v, (*rows, "kv_heads", None)), "value")
        context, kept = given.attend(q, k, v)
        context = constrain(context, (*rows, "heads", None))
        return self.o_proj(context.reshape(*x.shape[:2], -1), dropout_key), kept

    def _queries(
        self, x: Array, given: LayerInputs, dropout_key: Array | None
    ) -> Float[Array, "B T N H"]:
        config, latent = self.options.config, _settings(self.options.config)
        if latent.query_rank is None:
            q = self.q_proj(x, dropout_key)
        else:
            narrow = self.q_a_layernorm(self.q_a_proj(x, dropout_key))
            q = self.q_b_proj(narrow, dropout_key)
        q = q.reshape(*x.shape[:2], -1, config.head_dim)
        fixed, turning = jnp.split(q, [latent.unturned_width], axis=-1)
        return jnp.concatenate([fixed, self._turned(turning, given)], axis=-1)

    def _keys_and_values(
        self, x: Array, given: LayerInputs, dropout_key: Array | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N V"]]:
        latent = _settings(self.options.config)
        narrow = self.kv_a_proj_with_mqa(x, dropout_key)
        narrow, turning = jnp.split(narrow, [latent.key_rank], axis=-1)
        both = self.kv_b_proj(self.kv_a_layernorm(narrow), dropout_key)
        widths = latent.unturned_width + latent.value_width
        both = both.reshape(*x.shape[:2], -1, widths)
        fixed, v = jnp.split(both, [latent.unturned_width], axis=-1)
        turned = self._turned(turning[:, :, None], given)
        turned = jnp.broadcast_to(turned, (*fixed.shape[:3], latent.turned_width))
        return jnp.concatenate([fixed, turned], axis=-1), v

    def _turned(self, x: Float[Array, "B T N R"], given: LayerInputs) -> Array:
        assert given.rotary is not None  # as every layer of attention has one
        cos, sin = given.rotary.cos, given.rotary.sin
        is_interleaved = _settings(self.options.config).is_interleaved
        return rotate(x, cos, sin, "interleaved" if is_interleaved else "halves")


def _settings(config: ModelConfig) -> LatentHeads:
    assert isinstance(config.variety, LatentHeads)
    return config.variety

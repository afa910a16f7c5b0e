"""Running a decoder one step at a time, with a cache of keys and values."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jaxtrain.kernels.attention.reference import attend_block
from jaxtrain.models import head, parts
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import Attend, Options
from jaxtrain.types import Params

Cache = dict[str, Array]


def init_cache(options: Options, batch: int, max_len: int) -> Cache:
    """An empty cache: room for `max_len` tokens in each row."""
    config = options.config
    sizes = (config.num_hidden_layers, batch, max_len)
    heads = (config.num_key_value_heads, config.head_dim)
    return {
        "key": jnp.zeros(sizes + heads, options.compute_dtype),
        "value": jnp.zeros(sizes + heads, options.compute_dtype),
        "positions": jnp.zeros(sizes[1:], jnp.int32),
        "segment_ids": jnp.zeros(sizes[1:], jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }


def decode(
    options: Options,
    params: Params,
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    cache: Cache,
    segment_ids: Int32[Array, "B T"] | None,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Append to the cache and score what follows; see `Decoder.decode`."""
    batch, length = tokens.shape
    places = cache["positions"].shape[1]
    if length > places:
        raise ValueError(f"{length} tokens do not fit a cache of max_len={places}")
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    start = cache["length"]
    cache = cache | {
        name: jax.lax.dynamic_update_slice(cache[name], new, (0, start))
        for name, new in (("positions", positions), ("segment_ids", segment_ids))
    }
    windows = parts.layer_windows(options.config, places)
    choices = tuple(dict.fromkeys(windows))
    choice_of_layer = jnp.asarray([choices.index(w) for w in windows])
    readable = jnp.stack(
        [_readable(cache, start, positions, segment_ids, w) for w in choices]
    )
    rotary_of_layer = parts.layer_rotary(options.config, positions, segment_ids)
    bind_layer = parts.layer_binder(options, params)

    def body(
        carry: tuple[Array, Array, Array], inputs: tuple[Params, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        x, keys, values = carry
        layer_params, index = inputs
        allowed = readable[choice_of_layer[index]]
        attend = _attend_to_cache(options.config, (keys, values), index, start, allowed)
        layer = bind_layer(layer_params)
        x, (keys, values), _ = layer(
            x, rotary_of_layer(index), attend, segment_ids != 0
        )
        return (x, keys, values), None

    ends = parts.bind_ends(options, params)
    layers = parts.scanned_layers(options, params)
    carry = (ends.embed_tokens(tokens), cache["key"], cache["value"])
    (x, keys, values), _ = jax.lax.scan(body, carry, layers)
    last = length - 1 - jnp.argmax(segment_ids[:, ::-1] != 0, axis=1)
    hidden = ends.norm(x[jnp.arange(batch), last][:, None])
    cache |= {"key": keys, "value": values, "length": start + length}
    return head.unembed(options, params, hidden)[:, 0], cache


def _attend_to_cache(
    config: ModelConfig,
    keys_and_values: tuple[Array, Array],
    layer: Array,
    start: Array,
    allowed: Array,
) -> Attend:
    """Write this layer's keys and values at `start`; read all that is allowed."""

    def attend(
        q: Array, k: Array, v: Array, sinks: Array | None = None
    ) -> tuple[Array, tuple[Array, ...]]:
        written = tuple(
            jax.lax.dynamic_update_slice(old, new[None], (layer, 0, start, 0, 0))
            for old, new in zip(keys_and_values, (k, v), strict=True)
        )
        keys, values = (
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in written
        )
        options: dict[str, Any] = {
            "softcap": config.attn_logit_softcapping,
            "scale": config.attention_scale,
            "sinks": sinks,
        }
        return attend_block(q, keys, values, allowed, **options), written

    return attend


def _readable(
    cache: Cache,
    start: Int32[Array, ""],
    positions: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
    window: int | None,
) -> Array:
    """Which places of the cache each new token reads: a mask [B T S].

    The window counts positions, not places: padding between a prompt and what follows
    it takes places.
    """
    place = jnp.arange(cache["positions"].shape[1])
    own_place = start + jnp.arange(positions.shape[1])
    own_segment, segment = segment_ids[:, :, None], cache["segment_ids"][:, None]
    allowed = (segment == own_segment) & (segment != 0)
    allowed &= place <= own_place[:, None]
    if window is not None:
        distance = positions[:, :, None] - cache["positions"][:, None]
        allowed &= distance < window
    return allowed

"""Run a decoder one step at a time, with a cache of what each layer keeps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jaxtrain.kernels.attention.reference import attend_block
from jaxtrain.models import head, parts
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.decoder_layer import MIXERS
from jaxtrain.models.layer_kinds import LayerKind, config_of_kind
from jaxtrain.models.layers import KEYS_VALUES, Attend, HandedOn, LayerInputs, Options
from jaxtrain.models.parts import Stack
from jaxtrain.types import Params

Cache = dict[str, Any]


def init_cache(options: Options, batch: int, max_len: int) -> Cache:
    """Return an empty cache with room for `max_len` tokens in each row.

    "layers" holds what each layer keeps of earlier tokens (keys and values, or the
    state of a recurrent layer), stacked in the same way as the layers' weights. The
    other entries give the position and the segment of the token in each place of a row,
    and the number of places that are in use.
    """

    def init_stack(stack: Stack) -> dict[str, Array]:
        own = parts.layer_options(options, stack)
        state = MIXERS[stack.kind.mixer].init_state(own, batch, max_len)
        count = len(stack.layers)
        return {n: jnp.zeros((count, *x.shape), x.dtype) for n, x in state.items()}

    return {
        "layers": parts.by_stack(options.config, init_stack),
        "positions": jnp.zeros((batch, max_len), jnp.int32),
        "segment_ids": jnp.zeros((batch, max_len), jnp.int32),
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
    step = _Step(options, cache, positions, segment_ids, start)
    ends = parts.bind_ends(options, params)
    x = ends.embed_tokens(tokens)
    (x, states), _ = parts.run_layers(
        options,
        params,
        _layer_steps(step, params),
        ((x, cache["layers"]), parts.init_shared(options, batch, places)),
        per_layer=ends.embed_for_layers(tokens, x),
    )
    last = length - 1 - jnp.argmax(segment_ids[:, ::-1] != 0, axis=1)
    hidden = ends.norm(x[jnp.arange(batch), last][:, None])
    cache |= {"layers": states, "length": start + length}
    return head.unembed(options, params, hidden)[:, 0], cache


def _layer_steps(
    step: "_Step", params: Params
) -> Callable[[parts.Stack], parts.LayerStep]:
    """What `parts.run_layers` runs layers by: the stream, and the stacks' caches."""
    inputs_of_kind = functools.cache(step.inputs_of_layer)

    def make_step(stack: Stack) -> parts.LayerStep:
        bind_layer = parts.layer_binder(step.options, params, stack)
        inputs_of_layer = inputs_of_kind(stack.kind)

        def run(
            passing: parts.Passing, inputs: tuple[Params, Array, Any]
        ) -> tuple[parts.Passing, None]:
            ((x, states), shared), (weights, layer, per_layer) = passing, inputs
            place = (layer - stack.layers.start) // stack.layers.step
            given = inputs_of_layer(layer, place, stack.of(states))
            given = given._replace(shared=shared, per_layer=per_layer)
            x, kept, _ = bind_layer(weights)(x, given, step.segment_ids != 0)
            if isinstance(kept, HandedOn):
                kept, shared = kept.kept, {**shared, **kept.shared}
            if not isinstance(kept, _Written):
                kept = {
                    name: jax.lax.dynamic_update_index_in_dim(old, kept[name], place, 0)
                    for name, old in stack.of(states).items()
                }
            kept = dict(kept)
            new = kept if stack.name is None else {**states, stack.name: kept}
            return ((x, new), shared), None

        return run

    return make_step


class _Written(dict[str, Array]):
    """A stack's cache after a layer has written to it.

    `read` holds the keys and values that the layer then attended to.
    """

    read: tuple[Array, Array] | None = None


@dataclasses.dataclass(frozen=True)
class _Step:
    """The tokens of one call, which are appended to a cache at index `start`."""

    options: Options
    cache: Cache
    positions: Int32[Array, "B T"]
    segment_ids: Int32[Array, "B T"]
    start: Int32[Array, ""]

    def inputs_of_layer(
        self, kind: LayerKind
    ) -> Callable[[Array, Array, Mapping[str, Array]], LayerInputs]:
        """Return a function that makes the inputs of a layer of this kind.

        It takes the layer's number, its place in the stack and the stack's cache.
        """
        if not kind.attends:

            def with_state(
                layer: Array, place: Array, states: Mapping[str, Array]
            ) -> LayerInputs:
                del layer
                own = {
                    name: jax.lax.dynamic_index_in_dim(x, place, keepdims=False)
                    for name, x in states.items()
                }
                return LayerInputs(self.segment_ids, state=own)

            return with_state
        config = config_of_kind(self.options.config, kind)
        windows = parts.layer_windows(config, self.cache["positions"].shape[1])
        choices = tuple(dict.fromkeys(windows))
        choice_of_layer = jnp.asarray([choices.index(w) for w in windows])
        readable = jnp.stack([self._readable(window) for window in choices])
        rotary_of_layer = parts.layer_rotary(config, self.positions, self.segment_ids)

        def with_attention(
            layer: Array, place: Array, states: Mapping[str, Array]
        ) -> LayerInputs:
            allowed = readable[choice_of_layer[layer] if len(choices) > 1 else 0]
            attend = _attend_to_cache(config, states, place, self.start, allowed)
            if kind.shares == "reads":
                attend = functools.partial(_attend_to_shared, config, allowed)
            return LayerInputs(self.segment_ids, rotary_of_layer(layer), attend)

        return with_attention

    def _readable(self, window: int | None) -> Array:
        """Which places of the cache each new token may attend to: a mask [B T S].

        The window is measured in positions and not in places, because padding between a
        prompt and its continuation takes up places.
        """
        written = self.cache["positions"]
        place = jnp.arange(written.shape[1])
        own_place = self.start + jnp.arange(self.positions.shape[1])
        own_segment = self.segment_ids[:, :, None]
        segment = self.cache["segment_ids"][:, None]
        allowed = (segment == own_segment) & (segment != 0)
        allowed &= place <= own_place[:, None]
        if window is not None:
            distance = self.positions[:, :, None] - written[:, None]
            allowed &= distance < window
        return allowed


def _attend_to_cache(
    config: ModelConfig,
    states: Mapping[str, Array],
    place: Array,
    start: Array,
    allowed: Array,
) -> Attend:
    """Write this layer's keys and values at `start`, then attend where allowed."""

    def attend(
        q: Array, k: Array, v: Array, sinks: Array | None = None
    ) -> tuple[Array, _Written]:
        written = {
            name: jax.lax.dynamic_update_slice(
                states[name], new[None], (place, 0, start, 0, 0)
            )
            for name, new in zip(KEYS_VALUES, (k, v), strict=True)
        }
        keys, values = (
            jax.lax.dynamic_index_in_dim(written[name], place, keepdims=False)
            for name in KEYS_VALUES
        )
        scale, softcap = config.attention_scale, config.attn_logit_softcapping
        context = attend_block(
            q, keys, values, allowed, softcap=softcap, scale=scale, sinks=sinks
        )
        kept = _Written(written)
        kept.read = keys, values
        return context, kept

    return attend


def _attend_to_shared(
    config: ModelConfig, allowed: Array, q: Array, keys: Array, values: Array
) -> tuple[Array, _Written]:
    """Attend to the keys and values of an earlier layer, where allowed."""
    scale, softcap = config.attention_scale, config.attn_logit_softcapping
    context = attend_block(q, keys, values, allowed, softcap=softcap, scale=scale)
    return context, _Written()

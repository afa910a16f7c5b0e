"""What running a decoder over whole rows and one step at a time have in common.

These are functions of a decoder's `Options` and its weights: modules bound to weights,
and what each layer is given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxtrain.models.binding import bind, paths_with
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.decoder_layer import DecoderLayer
from jaxtrain.models.layers import EmbeddingAndHead, Options
from jaxtrain.models.quantization import CODES, SCALES, is_quantized
from jaxtrain.models.rope import Rotary, make_rotary
from jaxtrain.types import Params


def bind_ends(options: Options, params: Params) -> EmbeddingAndHead:
    """The modules on either side of the layers, with these weights."""
    ends = {name: leaf for name, leaf in params.items() if name != "layers"}
    return bind(EmbeddingAndHead, adapted_options(options, ends), ends)


def layer_binder(options: Options, params: Params) -> Callable[[Params], DecoderLayer]:
    """A function from one layer's weights to its module, adapters where present."""
    adapted = adapted_options(options, params["layers"])
    return functools.partial(bind, DecoderLayer, adapted)


def adapted_options(options: Options, part: Params) -> Options:
    """The options of a part of the model: adapters where its weights have them.

    Raises:
        ValueError: it has adapters, and the options do not say how to scale them.
    """
    adapted = paths_with("lora_a", part)
    if adapted and options.lora is None:
        raise ValueError(
            f"params hold adapters of {sorted(adapted)}, but the decoder has no"
            " LoraShape to scale them by; pass lora=LoraShape(...)"
        )
    lora = options.lora and dataclasses.replace(options.lora, targets=adapted)
    quantization = options.quantization if is_quantized(part) else None
    return dataclasses.replace(options, lora=lora, quantization=quantization)


def scanned_layers(options: Options, params: Params) -> tuple[Params, Array]:
    """What the scan runs over: each layer's weights and its number.

    Weights of matrix products are cast here, all at once: cast within the scan, a
    second copy of them would be stacked up for the backward pass.
    """

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        whole = ("scale", "sinks", "lora_magnitude", CODES, SCALES)
        is_whole = path[-1].key in whole
        return leaf if is_whole else leaf.astype(options.compute_dtype)

    layers = jax.tree_util.tree_map_with_path(cast, params["layers"])
    return layers, jnp.arange(options.config.num_hidden_layers)


def layer_windows(config: ModelConfig, length: int) -> list[int | None]:
    """Each layer's window; None where it reaches over all `length` tokens."""
    windows = map(config.window_of, config.layer_types)
    return [w if w is not None and w < length else None for w in windows]


def layer_rotary(
    config: ModelConfig,
    positions: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
) -> Callable[[Array], Rotary]:
    """A function from a layer's number to its rotary tables, computed once."""
    choices = tuple(dict.fromkeys(config.ropes))
    with jax.named_scope("rotary"):
        tables = [
            make_rotary(rope, config.head_dim, positions, segment_ids)
            for rope in choices
        ]
    if len(tables) == 1:
        return lambda index: tables[0]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *tables)
    choice_of_layer = jnp.asarray([choices.index(rope) for rope in config.ropes])

    def rotary_of_layer(index: Array) -> Rotary:
        choice = choice_of_layer[index]
        return jax.tree.map(lambda table: table[choice], stacked)

    return rotary_of_layer

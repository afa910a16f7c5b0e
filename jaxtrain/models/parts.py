"""What running a decoder over whole rows and one step at a time have in common.

These are functions of a decoder's `Options` and its weights: the stacks that layers are
kept in, modules bound to weights, what each layer is given, and the loop over layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.fp8 import Weight
from jaxtrain.models.binding import bind, paths_with
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.decoder_layer import DecoderLayer
from jaxtrain.models.fp8 import cast_master, in_fp8
from jaxtrain.models.gradient_layout import updated_in_place
from jaxtrain.models.layer_kinds import LayerKind, config_of_kind, kinds_of, segments_of
from jaxtrain.models.layers import LayerOptions, Options
from jaxtrain.models.per_layer import Ends
from jaxtrain.models.quantization import is_kept, is_part, is_quantized
from jaxtrain.models.recompute import Recompute, count_kept_bytes
from jaxtrain.models.rope import Rotary, make_rotary
from jaxtrain.models.stacks import LAYERS, stack_name
from jaxtrain.types import Params


class Stack(NamedTuple):
    """Layers whose weights are stacked: where they stand, and which they are.

    `name` is None where all layers are alike, and `params["layers"]` is the stack.
    """

    name: str | None
    layers: range
    kind: LayerKind

    def of(self, layers: Mapping[str, Any]) -> Any:
        """What belongs to this stack, of a tree such as `params["layers"]`."""
        return layers if self.name is None else layers[self.name]


@functools.lru_cache(maxsize=256)
def segments(config: ModelConfig) -> tuple[tuple[Stack, ...], ...]:
    """The stacks of each segment of layers (stacks.py), in order."""
    kinds = kinds_of(config)
    if len(set(kinds)) == 1:
        return ((Stack(None, range(len(kinds)), kinds[0]),),)
    return tuple(
        tuple(
            Stack(stack_name(layers), layers, kinds[layers[0]])
            for layers in segment.stacks
        )
        for segment in segments_of(config)
    )


def stacks(config: ModelConfig) -> tuple[Stack, ...]:
    """The stacks of all segments."""
    return tuple(stack for segment in segments(config) for stack in segment)


def by_stack(config: ModelConfig, make: Callable[[Stack], Any]) -> Any:
    """A tree such as `params["layers"]`, of what `make` gives for each stack."""
    made = {stack.name: make(stack) for stack in stacks(config)}
    return made.get(None, made)


def layer_options(options: Options, stack: Stack) -> LayerOptions:
    """What the modules of a stack's layers share: its sizes, and its adapters."""
    shared = {field.name: getattr(options, field.name) for field in _OPTIONS}
    lora = options.lora
    if lora is not None and stack.name is not None:
        prefix = f"{stack.name}."
        lora = lora.renamed(
            lambda path: path.removeprefix(prefix) if path.startswith(prefix) else None
        )
    config = config_of_kind(options.config, stack.kind)
    return LayerOptions(**shared | {"config": config, "lora": lora}, kind=stack.kind)


_OPTIONS = dataclasses.fields(Options)
# Weights of no matrix product, which are used as they are kept.
_WHOLE = {"scale", "sinks", "lora_magnitude", "A_log", "dt_bias"}
_WHOLE |= {"router_scale", "per_expert_scale"}
_O = TypeVar("_O", bound=Options)


def bind_ends(options: Options, params: Params) -> Ends:
    """The modules on either side of the layers, with these weights."""
    ends = {name: leaf for name, leaf in params.items() if name != LAYERS}
    ends = updated_in_place(options, ends)
    return bind(Ends, adapted_options(options, ends), ends)


def layer_binder(
    options: Options, params: Params, stack: Stack
) -> Callable[[Params], DecoderLayer]:
    """A function from one layer's weights to its module, adapters where present."""
    own = stack.of(params[LAYERS])
    adapted = adapted_options(layer_options(options, stack), own)
    return functools.partial(bind, DecoderLayer, adapted)


def adapted_options(options: _O, part: Params) -> _O:
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


_NARROW = 2**20  # numbers of a layer, as norms, biases and adapters have at most

# One layer as a step of the scan. It is given what passes from layer to layer, of which
# the second part is what layers hand on to later ones; its weights, its number, and
# what it alone is given.
Passing = tuple[Any, Mapping[str, Any]]
LayerStep = Callable[[Passing, tuple[Params, Array, Any]], tuple[Passing, Any]]


def run_layers(
    options: Options,
    params: Params,
    make_step: Callable[[Stack], LayerStep],
    passing: Passing,
    *,
    per_layer: Float[Array, "L B T P"] | None = None,
    unroll: bool = False,
    recompute: Recompute = Recompute(),  # noqa: B008  (frozen)
) -> tuple[Any, list[Any]]:
    """Run all layers, each segment as one scan over the repeats of its pattern.

    Args:
        make_step: gives the step of a stack's layers.
        passing: what the first layer is given.
        per_layer: what each layer is given of its own.
        unroll: compile every layer by itself.
        recompute: which layers keep what for the backward pass.

    Returns:
        The first part of what passes on from the last layer; and of each stack what its
        steps gave beside, stacked over its layers.
    """
    gave: list[Any] = []
    for segment in segments(options.config):
        repeats = len(segment[0].layers)
        apart = unroll or repeats == 1
        # Outside of a loop a copy of one layer's weights is freed behind its backward
        # pass. Of narrow ones a copy of all is one kernel in place of many.
        late = apart and not options.fp8
        cast = functools.partial(_cast_weights, options)
        weights = [cast(stack.of(params[LAYERS]), narrow=late) for stack in segment]
        layers = tuple(
            (own, *_given(stack, per_layer))
            for stack, own in zip(segment, weights, strict=True)
        )
        read = functools.partial(_read_layer, options, cast if late else None)
        x, shared = passing
        # What no layer of the segment changes is not passed on from one to the next:
        # the backward pass would keep a copy of it for each.
        gives = any(stack.kind.shares == "gives" for stack in segment)

        def pattern(
            changing: Any, inputs: Any, steps: Any, fixed: Any = shared,
            gives: bool = gives, weights: Any = weights,
        ) -> tuple[Any, Any]:  # fmt: skip
            outputs = []
            passing = changing if gives else (changing, fixed)
            for step, stacked, layer in zip(steps, weights, inputs, strict=True):
                own, place, *rest = layer
                passing, output = step(passing, ((stacked, own, place), *rest))
                outputs.append(output)
            return passing if gives else passing[0], tuple(outputs)

        changed, outputs = passing if gives else x, []
        first, period = segment[0].layers.start, len(segment)
        for part, policy in recompute.cut(first, period, repeats):
            steps = [
                recompute.wrap(make_step(stack), read, policy, apart=apart)
                for stack in segment
            ]
            body = functools.partial(pattern, steps=steps)
            # As a call it is lowered once, however often it is repeated.
            changed, output = jax.lax.scan(
                jax.jit(body) if apart else body,
                changed,
                _pick(layers, part, repeats),
                unroll=apart,
            )
            outputs.append(output)
        passing = changed if gives else (changed, shared)
        gave.extend(_join(outputs))
    return passing[0], gave


def kept_by_layers(
    options: Options,
    params: Params,
    make_step: Callable[[Stack], LayerStep],
    passing: Passing,
    per_layer: Float[Array, "L B T P"] | None,
) -> list[tuple[int, int, int, int]]:
    """Of each segment first layer, period, repeats; and bytes that one repeat keeps."""
    found = []

    def inputs_of(stack: Stack) -> tuple[Passing, tuple[Params, Array, Any]]:
        layer = jax.tree.map(lambda leaf: leaf[0], stack.of(params[LAYERS]))
        own = None if per_layer is None else per_layer[0]
        number = jnp.int32(stack.layers.start)
        return passing, (_cast_weights(options, layer), number, own)

    for segment in segments(options.config):
        kept = sum(
            count_kept_bytes(
                make_step(stack), *jax.eval_shape(functools.partial(inputs_of, stack))
            )
            for stack in segment
        )
        shape = (segment[0].layers.start, len(segment), len(segment[0].layers))
        found.append((*shape, kept))
    return found


def _pick(layers: Any, part: slice, repeats: int) -> Any:
    """These repeats of what a segment's layers are given."""
    if part == slice(0, repeats):
        return layers
    return jax.tree.map(lambda leaf: leaf[part], layers)


def _join(parts: list[Any]) -> Any:
    """What a segment's parts gave, as one."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def init_shared(
    options: Options, batch: int, length: int
) -> dict[str, tuple[Array, Array]]:
    """What layers hand on before any has: keys and values of 0, by type of layer."""
    shared = {}
    for stack in stacks(options.config):
        if stack.kind.shares == "gives":
            config = config_of_kind(options.config, stack.kind)
            sizes = (batch, length, config.num_key_value_heads, config.head_dim)
            zeros = jnp.zeros(sizes, options.compute_dtype)
            shared[config.layer_types[0]] = (zeros, zeros)
    return shared


def _cast_weights(options: Options, layers: Params, narrow: bool = False) -> Params:
    """Weights of matrix products in the compute type, of a layer or of a stack.

    A scan is given a whole stack that is cast already: if it cast each layer itself, it
    would keep a second stack for the backward pass. `narrow`: only cast narrow weights
    of a stack.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, Weight):
            return cast_master(leaf, options.compute_dtype)
        is_kernel = path[-1].key == "kernel"
        if narrow and (is_kernel or leaf.size > _NARROW * len(leaf)):
            return leaf
        if path[-1].key in _WHOLE or is_kept(path):
            return leaf
        if options.reduces_in_float32 and is_kernel:
            return leaf  # cast where it is read, so that its gradient is not
        own = leaf.astype(options.compute_dtype)
        return in_fp8(leaf, master=own) if options.fp8 and is_kernel else own

    return jax.tree_util.tree_map_with_path(
        cast, layers, is_leaf=lambda x: isinstance(x, Weight)
    )


def _read_layer(
    options: Options,
    cast: Callable[[Params], Params] | None,
    stacked: Params,
    own: Params,
    place: Array,
) -> Params:
    """A layer's weights in the compute type, which in a loop they have already.

    Outside of one, a kernel that reads one layer of a stack at a place that the
    compiler knows is compiled again for each layer. So vectors, and matrices that are
    cast, are read at a number that it cannot know. Other matrices are operands of
    products as they lie.

    Args:
        cast: None in a loop.
        stacked: the weights of all layers of the stack, and `own` those of this one.
        place: which of them it is.
    """
    if cast is None:
        return updated_in_place(options, own)
    place = jax.lax.optimization_barrier(place)

    def read(path: tuple[Any, ...], whole: Array, leaf: Array, wanted: Array) -> Array:
        as_it_lies = wanted.ndim > 1 and wanted.dtype == leaf.dtype
        if as_it_lies or is_part(path[-1].key):
            return wanted
        value = _read_at(leaf, jax.lax.stop_gradient(whole), place)
        return value.astype(wanted.dtype)

    weights = jax.tree_util.tree_map_with_path(read, stacked, own, cast(own))
    return updated_in_place(options, weights)


@jax.custom_vjp
def _read_at(own: Array, whole: Array, place: Array) -> Array:
    """`own`, read as `whole[place]`; the gradient is that of `own`."""
    return jax.lax.dynamic_index_in_dim(whole, place, keepdims=False)


_read_at.defvjp(lambda *args: (_read_at(*args), None), lambda _, ct: (ct, None, None))


def _given(
    stack: Stack, per_layer: Array | None
) -> tuple[np.ndarray, Array, Array | None]:
    """What the scan runs over beside weights.

    A layer's place in its stack, its number among all layers, and what it is given.
    """
    places = np.arange(len(stack.layers))
    numbers = jnp.arange(len(stack.layers))
    if stack.name is not None:
        numbers = stack.layers.start + stack.layers.step * numbers
    if per_layer is not None:
        per_layer = per_layer[
            stack.layers.start : stack.layers.stop : stack.layers.step
        ]
    return places, numbers, per_layer


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
            make_rotary(rope, config.rotary_head_dim, positions, segment_ids)
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

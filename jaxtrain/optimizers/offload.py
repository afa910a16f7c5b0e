"""Update optimizer state that is kept in host memory, one layer at a time.

If the whole state were fetched at once, the moments and the gradients would be in
device memory together, at the moment when memory is shortest, and offloading would not
lower the peak. So a loop fetches the state of one layer, updates it and writes it back.
Weights outside the layers (embeddings, head, final norm) are updated in one piece. The
result is the same as that of a whole update, because every optimizer here treats each
layer's matrices separately.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array

from jaxtrain import sharding
from jaxtrain.models.stacks import LAYERS, iterate_stacks
from jaxtrain.step import StepOptions, UpdateFn, make_whole_update
from jaxtrain.tree import get, nest, overlay
from jaxtrain.types import Params, TrainState


def make_streamed_update(
    optimizer: optax.GradientTransformation, parameters: Any, opt_state: Any
) -> UpdateFn:
    """Build `update(grads, opt_state, params, good) -> (params, opt_state)`.

    If `good` is False nothing is changed; None means always apply the update. The
    results are in the same memory as the arguments.

    Args:
        parameters, opt_state: shardings of the trained parameters and of the
            optimizer's state as they are stored, in host memory or on the device.
    """

    whole = make_whole_update(optimizer)

    def update(
        grads: Params, state: Any, params: Params, good: Array | None
    ) -> tuple[Params, Any]:
        def step(
            grads: Params, state: Any, params: Params, layouts: tuple[Any, Any]
        ) -> tuple[Params, Any]:
            """Update these arrays and return them to the memory they came from."""
            on_device = sharding.on_device(layouts)
            params, state = _move((params, state), layouts, on_device)
            return _move(whole(grads, state, params, good), layouts, layouts)

        new_params: Params = {}
        new_states = []
        roots = [root for root, _ in iterate_stacks(grads)]
        if grads.keys() - {LAYERS}:
            roots.insert(0, ())
        for root in roots:
            trees = (grads, state, params, (parameters, opt_state))
            part = [_only(tree, root) for tree in trees]
            part_params, part_state = _by_layer(step, *part) if root else step(*part)
            new_params = overlay(new_params, part_params)
            new_states.append(part_state)
        return new_params, _join(state, new_states)

    return update


def _by_layer(
    step: Callable[..., tuple[Params, Any]],
    grads: Params,
    state: Any,
    params: Params,
    layouts: tuple[Any, Any],
) -> tuple[Params, Any]:
    """Apply `step` to the slice of each layer of stacked trees, one after another."""
    paths, structure = jax.tree.flatten_with_path((params, state))
    leaves = [leaf for _, leaf in paths]
    # Step counts and the like belong to no layer, so each turn must see the old ones.
    is_stacked = [
        any(getattr(key, "key", None) == LAYERS for key in path) for path, _ in paths
    ]

    def turn(index: Array, carry: list[Array]) -> list[Array]:
        def slice_of(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, index, 1)

        given = [
            slice_of(now) if stacked else before
            for now, before, stacked in zip(carry, leaves, is_stacked, strict=True)
        ]
        layer_params, layer_state = jax.tree.unflatten(structure, given)
        layer_grads = jax.tree.map(slice_of, grads)
        done = step(layer_grads, layer_state, layer_params, layouts)
        return [
            jax.lax.dynamic_update_slice_in_dim(before, new, index, 0) if part else new
            for before, new, part in zip(
                carry, jax.tree.leaves(done), is_stacked, strict=True
            )
        ]

    count = jax.tree.leaves(grads)[0].shape[0]
    return jax.tree.unflatten(structure, jax.lax.fori_loop(0, count, turn, leaves))


def _is_parameters(node: Any) -> bool:
    """Whether a node of an optimizer state is a dict shaped like the parameters."""
    return isinstance(node, Mapping) and LAYERS in node


def _only(tree: Any, root: tuple[str, ...]) -> Any:
    """Reduce each dict of parameters in `tree` to the stack at `root`.

    With an empty `root`, reduce it to the weights that belong to no layer.
    """

    def choose(node: Any) -> Any:
        if not _is_parameters(node):
            return node
        if not root:
            return {k: v for k, v in node.items() if k != LAYERS}
        return nest({root: get(node, root)})

    return jax.tree.map(choose, tree, is_leaf=_is_parameters)


def _join(state: Any, parts: list[Any]) -> Any:
    """Undo `_only` on a state; other entries, such as counts, come from the last."""

    def join(node: Any, *parts: Any) -> Any:
        return functools.reduce(overlay, parts) if _is_parameters(node) else parts[-1]

    return jax.tree.map(join, state, *parts, is_leaf=_is_parameters)


def _move(tree: Any, stored: Any, to: Any) -> Any:
    """Move the arrays that are stored in host memory; leave all others in place.

    Args:
        stored: shardings of `tree` between steps.
        to: shardings that are wanted now.
    """

    def move(x: Array, kept: Any, wanted: Any) -> Array:
        return jax.device_put(x, wanted) if kept.memory_kind == "pinned_host" else x

    return jax.tree.map(move, tree, stored, to)


def offload(
    options: StepOptions,
    plan: sharding.ShardingPlan,
    optimizer: optax.GradientTransformation,
    layouts: TrainState,
) -> StepOptions:
    """Return step options that fetch state from host memory where it is needed.

    Args:
        layouts: where each leaf of the state is kept, as a tree of shardings.
    """
    if plan.offload_optimizer or plan.offload_params:
        update = make_streamed_update(optimizer, layouts.trainable, layouts.opt_state)
        options = dataclasses.replace(options, update=update)
    if not plan.offload_params:
        return options
    wanted = sharding.on_device((layouts.trainable, layouts.frozen))

    def fetch(state: TrainState) -> TrainState:
        trainable, frozen = jax.device_put((state.trainable, state.frozen), wanted)
        return dataclasses.replace(state, trainable=trainable, frozen=frozen)

    return dataclasses.replace(options, fetch=fetch)

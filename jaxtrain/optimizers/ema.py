"""The exponential moving average of the weights, kept with the optimizer's state.

After each step average = d * average + (1 - d) * weights, beginning at the first
weights (arXiv:2411.18704). Evaluations and exports take the average; training goes on
with the weights themselves.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.tree import overlay
from jaxtrain.types import Params, TrainState


class EmaState(NamedTuple):
    """The optimizer's own state, and the average of the weights in float32."""

    inner: Any
    average: Params


def with_ema(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """The same optimizer, which averages the weights that its updates lead to.

    Args:
        decay: d, the share of the average that stays at each step.
    """

    def init(params: Params) -> EmaState:
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return EmaState(optimizer.init(params), average)

    def update(
        grads: Params, state: EmaState, params: Params | None = None
    ) -> tuple[Params, EmaState]:
        assert params is not None  # the train step gives them
        updates, inner = optimizer.update(grads, state.inner, params)
        # As they will be, rounding to the type that they are kept in included.
        weights = optax.apply_updates(params, updates)
        average = jax.tree.map(
            lambda a, w: decay * a + (1 - decay) * w.astype(jnp.float32),
            state.average,
            weights,
        )
        return updates, EmaState(inner, average)

    return optax.GradientTransformation(init, update)


def averaged(state: TrainState) -> TrainState:
    """The state with the average in place of the weights; as it is without one."""
    if not isinstance(state.opt_state, EmaState):
        return state
    weights = jax.tree.map(
        lambda a, w: a.astype(w.dtype), state.opt_state.average, state.trainable
    )
    return dataclasses.replace(state, trainable=weights)


def averaged_policy(state: TrainState) -> Params:
    """All weights of the policy, the frozen ones too, as `averaged` has them."""
    return overlay(state.frozen, averaged(state).trainable)


def only_average(state: TrainState) -> EmaState | None:
    """The part of the optimizer's state that holds weights, to restore it alone."""
    if not isinstance(state.opt_state, EmaState):
        return None
    return EmaState(None, state.opt_state.average)


def describe_average(state: TrainState) -> EmaState:
    """The average of described weights, to restore it without an optimizer."""
    average = jax.tree.map(lambda w: w.update(dtype=jnp.float32), state.trainable)
    return EmaState(None, average)

"""What a run reports of a mixture's routers, and the loss on their logits' size.

The router z-loss (ST-MoE, arXiv:2202.08906, equation 5) is the mean of log^2 Z over
tokens and layers, Z the denominator of the router's softmax. It keeps logits small,
where their rounding changes choices least.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxtrain.models.moe import RouterLoad
from jaxtrain.models.z_loss import Score
from jaxtrain.types import (
    Batch,
    LogProbsFn,
    Metrics,
    Objective,
    TokenLogProbs,
    WeightedSum,
)

Z_LOSS = "router_z_loss"


def summarize(load: RouterLoad) -> dict[str, Array]:
    """A mixture's routers in few numbers, all but the z-loss without a gradient.

    `router_load`: tokens of the most popular expert over those of the mean one, layers
    averaged; 1 where all have as many, E / K at worst. `router_entropy`: of the
    routers' probabilities, in nats, over tokens and layers; log E where they have no
    preference. `router_dropped`: 0, as each expert takes whatever it is sent.

    Args:
        load: of every layer, stacked on the first axis.
    """
    assert load.entropy is not None and load.squares is not None  # measured together
    tokens = jnp.maximum(load.tokens.sum(), 1)
    means = jnp.maximum(load.assigned.mean(axis=-1), 1e-9)
    numbers = {
        "router_load": (load.assigned.max(axis=-1) / means).mean(),
        "router_entropy": load.entropy.sum() / tokens,
        "router_dropped": jnp.float32(0),
    }
    return jax.lax.stop_gradient(numbers) | {Z_LOSS: load.squares.sum() / tokens}


def with_report(
    objective: Objective, score: Score, z_loss_weight: float | None
) -> tuple[Objective, Score]:
    """The objective with the router z-loss and `summarize`'s metrics; the score for it.

    As the load-balancing loss is, they are each micro-batch's own, and averaged as the
    micro-batches' losses are.

    Args:
        z_loss_weight: None and 0 report the z-loss and leave the loss as it is.
    """

    def reporting(
        policy: LogProbsFn, reference: LogProbsFn | None, batch: Any
    ) -> tuple[WeightedSum, Metrics]:
        found: list[dict[str, Array]] = []

        def recorded(rows: Batch) -> TokenLogProbs:
            scored = policy(rows)
            assert scored.router is not None  # the score function was told to give it
            found.append(scored.router)
            return _without(scored)

        second = reference and (lambda rows: _without(reference(rows)))
        loss, metrics = objective(recorded, second, batch)
        numbers = {
            name: WeightedSum(value * loss.weight, loss.weight)
            for name, value in found[0].items()
        }
        if z_loss_weight:
            total = loss.total + z_loss_weight * numbers[Z_LOSS].total
            loss = WeightedSum(total, loss.weight)
        return loss, metrics | numbers

    return reporting, functools.partial(score, with_router=True)


def _without(scored: TokenLogProbs) -> TokenLogProbs:
    """An objective must not see what is not one number per token."""
    return dataclasses.replace(scored, router=None)

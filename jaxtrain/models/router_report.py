"""Statistics of the routers in a mixture of experts, and the router z-loss.

The router z-loss (ST-MoE, arXiv:2202.08906, equation 5) is the mean of log^2 Z over
tokens and layers, where Z is the denominator of the router's softmax. It keeps the
logits small, so that their rounding rarely changes which experts are chosen.
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
    """Summarize the routers; only the z-loss has a gradient.

    `router_load`: tokens of the most popular expert divided by the mean over experts,
    averaged over layers; 1 if all get the same number, E / K at worst.
    `router_entropy`: the entropy of the routers' probabilities in nats, averaged over
    tokens and layers; log E if they have no preference. `router_dropped`: always 0,
    because experts take every token that is sent to them.

    Args:
        load: the loads of all layers, stacked on the first axis.
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
    """Wrap an objective so that it adds the router z-loss and `summarize`'s metrics.

    Each micro-batch computes them over its own tokens, as it does the load-balancing
    loss, and they are averaged over micro-batches with the weights of the losses.

    Args:
        score: the score function of the objective.
        z_loss_weight: None or 0 reports the z-loss without adding it to the loss.

    Returns:
        The wrapped objective, and the score function that it needs.
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
    """Remove the router's statistics: objectives see only numbers per token."""
    return dataclasses.replace(scored, router=None)

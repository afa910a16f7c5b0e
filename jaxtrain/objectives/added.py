"""Losses that are added to an objective: one's own, and a mixture's router loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain import types

AddedLoss = Callable[[types.TokenLogProbs, types.Batch], types.WeightedSum | jax.Array]


def with_added_loss(
    objective: types.Objective, added_loss: AddedLoss, weight: float
) -> types.Objective:
    """Return `objective` + weight * `added_loss` of the policy's first call.

    The added loss is a scalar, or a `WeightedSum` of which the mean counts. It is
    reported as `aux_loss`, or as `router_aux_loss` where the objective already has an
    `aux_loss`.
    """

    def with_loss(
        policy: types.LogProbsFn, reference: types.LogProbsFn | None, batch: Any
    ) -> tuple[types.WeightedSum, types.Metrics]:
        calls: list[tuple[types.TokenLogProbs, types.Batch]] = []

        def recorded(rows: types.Batch) -> types.TokenLogProbs:
            outputs = policy(rows)
            calls.append((outputs, rows))
            return outputs

        loss, metrics = objective(recorded, reference, batch)
        extra = added_loss(*calls[0])
        mean = extra.mean() if isinstance(extra, types.WeightedSum) else extra
        # In the loss's own weight, so that micro-batches still add up.
        added = types.WeightedSum(mean * loss.weight, loss.weight)
        total = types.WeightedSum(loss.total + weight * added.total, loss.weight)
        name = "router_aux_loss" if "aux_loss" in metrics else "aux_loss"
        return total, metrics | {name: added}

    return with_loss


def with_router_loss(objective: types.Objective, coefficient: float) -> types.Objective:
    """Return `objective` + coefficient * how unevenly a mixture of experts was used.

    TRL's and transformers' sum: `TokenLogProbs.router_loss` is a product of means over
    all tokens of a micro-batch, whatever the mesh, so each micro-batch has its own, as
    in TRL. They are averaged as the micro-batches' losses are: by trained tokens for
    the next-token loss (TRL: equally), equally for preferences.
    """

    def without(score: types.LogProbsFn) -> types.LogProbsFn:
        """The objective must not see the router's loss, which is not one per token."""
        return lambda rows: dataclasses.replace(score(rows), router_loss=None)

    def alone(policy: types.LogProbsFn, reference: Any, batch: Any) -> Any:
        return objective(without(policy), reference and without(reference), batch)

    def router_loss(outputs: types.TokenLogProbs, rows: types.Batch) -> jax.Array:
        assert outputs.router_loss is not None  # the score function was told to give it
        return outputs.router_loss

    return with_added_loss(alone, router_loss, coefficient)

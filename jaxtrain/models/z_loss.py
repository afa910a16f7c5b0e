"""The z-loss: keep the softmax's denominator Z near 1 (PaLM, arXiv:2204.02311).

loss = -log p(target) + w log^2 Z, for each trained token. Logits then do not drift
away, which low-precision products of large models suffer from.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxtrain.types import (
    Batch,
    LogProbsFn,
    Metrics,
    Objective,
    TokenLogProbs,
    WeightedSum,
)

Score = Callable[..., TokenLogProbs]  # `step.ScoreFn`


def with_z_loss(
    objective: Objective, score: Score, weight: float | None
) -> tuple[Objective, Score]:
    """The objective with the z-loss added, and the score that tells it log Z.

    Args:
        objective: of next-token rows, whose loss is a sum over trained tokens.
        weight: w; None leaves both as they are.
    """
    if weight is None:
        return objective, score

    def with_penalty(
        policy: LogProbsFn, reference: LogProbsFn | None, batch: Batch
    ) -> tuple[WeightedSum, Metrics]:
        scored: list[TokenLogProbs] = []

        def recorded(rows: Batch) -> TokenLogProbs:
            scored.append(policy(rows))
            return scored[-1]

        loss, metrics = objective(recorded, reference, batch)
        log_total: Any = scored[0].log_total
        squares = jnp.sum(jnp.square(log_total) * batch.loss_mask)
        penalty = WeightedSum(squares, loss.weight)
        total = loss.total + weight * squares
        return WeightedSum(total, loss.weight), metrics | {"z_loss": penalty}

    return with_penalty, functools.partial(score, with_log_total=True)

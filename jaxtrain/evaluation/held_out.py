"""Held-out loss, perplexity and the objective's metrics over a whole evaluation set."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxtrain.types import Metrics, TrainState, WeightedSum


def add_metrics(total: Metrics | None, new: Metrics) -> Metrics:
    """Add two steps' sums, name by name."""
    if total is None:
        return new
    return {name: total[name] + new[name] for name in total}


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Divide each sum by its weight, on the host. This waits for the device."""
    return {name: to_float(sums) for name, sums in jax.device_get(metrics).items()}


def to_float(sums: WeightedSum) -> float:
    """`sums.mean()` of numbers on the host, which the device has no part in."""
    return float(sums.total) / float(sums.weight) if sums.weight else 0.0


def evaluate(
    eval_step: Callable[[TrainState, Any], Metrics],
    state: TrainState,
    batches: Iterable[Any],
    *,
    with_perplexity: bool,
    added_losses: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Metrics of `batches`, named `eval_*`: sums over all rows, divided once.

    Args:
        eval_step: `step.make_eval_step`'s, jitted.
        batches: placed batches; padding rows carry a loss mask of 0.
        with_perplexity: add `eval_perplexity` = exp(eval_loss), which is right where
            the loss is a mean over tokens.
        added_losses: metrics that are in the loss beside it, and their weights; they
            are no part of the perplexity.

    Raises:
        ValueError: no batch, or no counted prediction in any of them.
    """
    steps = (eval_step(state, batch) for batch in batches)
    total = functools.reduce(add_metrics, steps, None)
    if total is None or float(total["loss"].weight) == 0:
        raise ValueError("the evaluation set has no row with a token to predict")
    total.pop("num_tokens", None)  # counts what was trained on
    result = to_floats(total)
    if with_perplexity:
        result["perplexity"] = perplexity(without_added(result, added_losses or {}))
    return {f"eval_{name}": value for name, value in result.items()}


def without_added(metrics: Mapping[str, float], added: Mapping[str, float]) -> float:
    """The loss less what was added to it: metrics by name, times their weights."""
    return metrics["loss"] - sum(w * metrics[name] for name, w in added.items())


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where that overflows."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf

"""Several evaluation sets: each measured by itself, its metrics under its own name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtrain.config import eval_sets
from jaxtrain.evaluation.held_out import evaluate
from jaxtrain.types import Metrics, TrainState


def evaluate_sets(
    eval_step: Callable[[TrainState, Any], Metrics],
    state: TrainState,
    sets: Mapping[str, Iterable[Any]],
    *,
    with_perplexity: bool,
    added_losses: Mapping[str, float],
) -> dict[str, float]:
    """The metrics of `held_out.evaluate` for each set: `eval_helpful_loss`.

    Args:
        sets: placed batches by name; of a single set, the name is "".

    Raises:
        ValueError: a set has no batch, or no counted prediction; names it.
    """
    metrics: dict[str, float] = {}
    for name, batches in sets.items():
        try:
            found = evaluate(
                eval_step,
                state,
                batches,
                with_perplexity=with_perplexity,
                added_losses=added_losses,
            )
        except ValueError as error:
            raise ValueError(f"{eval_sets.key_of(name)}: {error}") from error
        metrics |= {
            eval_sets.prefix_of(name) + metric.removeprefix("eval_"): value
            for metric, value in found.items()
        }
    return metrics


def add_scores(
    metrics: dict[str, float], scores: Mapping[str, float], prefix: str = "eval_"
) -> None:
    """Add what functions of the user's own, or generated texts, gave to an evaluation.

    Raises:
        ValueError: there is a metric of this name.
    """
    for name, value in scores.items():
        if prefix + name in metrics:
            raise ValueError(
                "training.row_metrics or training.generation.metrics: one of them gave"
                f" {name!r}, which is a metric already; give it another name"
            )
        metrics[prefix + name] = value

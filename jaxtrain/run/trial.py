"""Trace an objective on a batch that has only shapes, before there is a model."""

import dataclasses
import traceback
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.config import RunConfig, eval_sets
from jaxtrain.config.sections import TEXT_METRIC_SCORES
from jaxtrain.schema import did_you_mean
from jaxtrain.types import (
    Batch,
    LabeledBatch,
    Objective,
    PairBatch,
    TokenLogProbs,
    WeightedSum,
)

_ROWS, _TOKENS = 2, 8
# What a run may add to the metrics of its objective.
_ADDED = ("aux_loss", "router_aux_loss")


def check_objective(
    run: RunConfig, objective: Objective, sets: Collection[str] | None = None
) -> None:
    """Trace an objective with shapes, and check that it returns the ranking metric.

    Args:
        sets: names of the evaluation sets, or [""] for a single set without a name.
            None while they are not final, because a program may still pass its own.

    Raises:
        ValueError: the user's own objective takes other arguments, raises, or does not
            return a loss and a dict of metrics; or no evaluation reports the metric
            that `metric_for_best_model` names.
    """
    own = ":" in run.objective
    try:
        result = jax.eval_shape(_on(objective, run), *_inputs(run))
    except Exception as error:  # whatever the user's function raises
        if not own:
            return  # one that a program brings, and that may ask for more
        raise ValueError(_describe(run, error)) from error
    if not _is_loss_with_metrics(result):
        raise ValueError(
            f"training.objective = {run.objective!r} does not return a WeightedSum and"
            " a dict of them by metric: see jaxtrain.objectives.load_objective"
        )
    _check_best_metric(run, {"loss", *result[1]}, sets)


def _on(objective: Objective, run: RunConfig) -> Callable[..., Any]:
    """The objective with stand-ins for the models, which give zeros."""
    dpo, compares = run.dpo, run.objective_row.has_reference
    if dpo is None or dpo.reference_free or dpo.precompute_ref_log_probs:
        compares = False

    def call(batch: Any) -> Any:
        return objective(_stand_in, _stand_in if compares else None, batch)

    return call


def _stand_in(batch: Batch) -> TokenLogProbs:
    zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
    return TokenLogProbs(zeros, zeros, zeros, zeros, collision=zeros)


def _inputs(run: RunConfig) -> tuple[Any]:
    """A batch of the run's kind, as shapes."""
    tokens = jax.ShapeDtypeStruct((_ROWS, _TOKENS), jnp.int32)
    numbers = jax.ShapeDtypeStruct((_ROWS, _TOKENS), jnp.float32)
    row = jax.ShapeDtypeStruct((_ROWS,), jnp.float32)
    rows = Batch(tokens, tokens, tokens, tokens, numbers)
    kind = run.objective_row.row_kind
    if kind == "next_token":
        return (rows,)
    if kind == "labeled":
        return (LabeledBatch(rows, row, mismatched=rows),)
    pairs = PairBatch(rows, rows)
    if run.dpo is not None and run.dpo.precompute_ref_log_probs:
        pairs = dataclasses.replace(pairs, ref_chosen_logps=row, ref_rejected_logps=row)
    return (pairs,)


def _is_loss_with_metrics(result: Any) -> bool:
    if not isinstance(result, tuple) or len(result) != 2:
        return False
    loss, metrics = result
    sums = [loss, *metrics.values()] if isinstance(metrics, dict) else [None]
    return all(isinstance(each, WeightedSum) for each in sums)


def _describe(run: RunConfig, error: Exception) -> str:
    """What the user's function said, and where."""
    module = run.objective.partition(":")[0].rpartition(".")[2]
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if f.filename.endswith(f"{module}.py")]
    where = f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""
    given = (
        f" with objective_kwargs = {kw}" if (kw := run.loop.objective_kwargs) else ""
    )
    first = (str(error).strip() or "no message").splitlines()[0]
    return (
        f"training.objective = {run.objective!r}{given}: {type(error).__name__}:"
        f" {first}{where}"
    )


def choose_best_metric(
    run: RunConfig, objective: Objective, sets: Collection[str]
) -> RunConfig:
    """Return the run with a ranking metric that one of these evaluation sets reports.

    Args:
        sets: names of the evaluation sets, which a program may have passed without
            the configuration naming them; [""] for a single set without a name.

    Raises:
        ValueError: no set reports the metric that `metric_for_best_model` names.
    """
    loop, names = run.loop, list(sets)
    if not names:
        return run
    try:
        best = eval_sets.choose_metric(
            loop.best_metric, names, decides=loop.ranks_by_metric
        )
    except ValueError as error:
        given = loop.metric_for_best_model
        raise ValueError(
            f"training.metric_for_best_model = {given!r}: {error}"
        ) from None
    if best != loop.best_metric:
        loop = dataclasses.replace(loop, metric_for_best_model=best)
        run = dataclasses.replace(run, loop=loop)
    check_objective(run, objective, names)
    return run


def _check_best_metric(
    run: RunConfig, names: set[str], sets: Collection[str] | None
) -> None:
    if run.loop.eval_steps == 0 and not run.loop.eval_on_start:
        return
    if run.loop.row_metrics or any(":" in name for name in run.generation.metrics):
        return  # a function of the user's own may give a score of any name
    names = names - {"num_tokens"}
    if run.objective == "next_token":
        names.add("perplexity")
    if run.generation.enabled:
        names.add("generated_words")
    for metric in run.generation.metrics:
        names |= {*TEXT_METRIC_SCORES[metric]}
    best = run.loop.best_metric
    prefixes = [
        eval_sets.prefix_of(name)
        for name in (run.data.eval_paths if sets is None else sets)
    ]
    known = sorted(f"{prefix}{name}" for prefix in prefixes for name in names)
    if sets is None and _may_be_of_a_named_set(run, best, names):
        return
    if best not in (*known, *(f"{p}{name}" for p in prefixes for name in _ADDED)):
        given = run.loop.metric_for_best_model
        hint = did_you_mean(best, known)
        raise ValueError(
            f"training.metric_for_best_model = {given!r} is not an evaluation metric;"
            f" {hint}these are: {', '.join(known)}"
        )


def _may_be_of_a_named_set(run: RunConfig, best: str, names: set[str]) -> bool:
    """Whether a program may still pass an evaluation set that reports this metric.

    If so, `choose_best_metric` checks the metric later, when the names are known.
    """
    if run.data.eval or run.data.eval_split:
        return False
    plain = best.removeprefix("eval_")
    return any(plain.endswith(f"_{name}") for name in names)

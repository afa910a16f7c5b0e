"""Metrics of the user's own on held-out rows: their texts and log-probs.

`training.row_metrics` names functions as `module:function`. Each gets a list of
`ScoredRow` at an evaluation, and returns a number, which is called as the function is,
or a dict of numbers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain import sharding
from jaxtrain.config import RunConfig
from jaxtrain.config.own_parts import bind_own
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.evaluation.sets import add_scores
from jaxtrain.models.load import LoadedModel
from jaxtrain.types import Batch, Params

_KEY = "training.row_metrics"


class ScoredRow(NamedTuple):
    """A held-out example under the weights of the moment.

    Attributes:
        text: all of it, decoded, special tokens included.
        trained: the part that the loss counts, decoded: of a prompt with a completion,
            the completion.
        tokens: int[N], the ids of that part.
        logps: float32[N], the log-probability of each of these tokens, in nats.
    """

    text: str
    trained: str
    tokens: np.ndarray
    logps: np.ndarray


def load_row_metrics(run: RunConfig) -> dict[str, Callable[..., Any]]:
    """The functions by their names.

    Raises:
        ValueError: a function cannot be had, or takes other arguments; or several
            processes each hold a part of the rows.
    """
    if run.loop.row_metrics and jax.process_count() > 1:
        raise ValueError(
            f"{_KEY} = {[*run.loop.row_metrics]}: each of {jax.process_count()}"
            " processes has only a part of the rows; unset it, and measure checkpoints"
            " with `jaxtrain eval` in one process"
        )
    keywords = run.loop.function_kwargs
    return {
        path.partition(":")[2]: bind_own(_KEY, path, keywords, "rows")
        for path in run.loop.row_metrics
    }


def make_row_metrics(
    run: RunConfig, model: LoadedModel
) -> Callable[[Params, PreparedDataset], dict[str, float]]:
    """Build `measure(params, data) -> numbers by name`; every process calls it."""
    functions = load_row_metrics(run)
    plan, tokenizer = model.plan, model.tokenizer
    size = plan.fill_up(run.loop.per_device_eval_batch_size)

    def score(params: Params, batch: Batch) -> jax.Array:
        return model.decoder.token_log_probs(params, batch).logps

    jitted = plan.jit(score, out_shardings=plan.replicated)

    def measure(params: Params, data: PreparedDataset) -> dict[str, float]:
        rows: list[ScoredRow] = []
        for start in range(0, len(data), size):
            numbers = np.arange(start, start + size)
            numbers = np.where(numbers < len(data), numbers, -1)  # -1 is an empty row
            batch: Any = data.batch(numbers)
            placed = sharding.place_batch(batch, plan.batch())
            logps = np.asarray(jitted(params, placed), np.float32)
            rows += _examples(batch, logps, tokenizer)
        numbers_by_name: dict[str, float] = {}
        for name, function in functions.items():
            add_scores(numbers_by_name, _as_numbers(name, function(rows)), prefix="")
        return numbers_by_name

    return measure


def _examples(batch: Batch, logps: np.ndarray, tokenizer: Any) -> list[ScoredRow]:
    """The examples of a batch in order; a packed row holds several."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    found = []
    for row in range(len(batch.tokens)):
        segments = np.asarray(batch.segment_ids[row])
        for segment in np.unique(segments[segments > 0]):
            own = segments == segment
            trained = own & (np.asarray(batch.loss_mask[row]) > 0)
            ids = np.asarray(batch.targets[row])[trained]
            text = decode(np.asarray(batch.tokens[row])[own])
            found.append(ScoredRow(text, decode(ids), ids, logps[row][trained]))
    return found


def _as_numbers(name: str, result: Any) -> dict[str, float]:
    values = result if isinstance(result, Mapping) else {name: result}
    try:
        return {str(key): float(value) for key, value in values.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_KEY}: {name} returned {type(result).__name__}; return a number or a"
            " dict of numbers"
        ) from error

"""How hard each row is to the model before training, for a curriculum."""

import functools
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.pipeline import make_eval_iterator
from jaxtrain.objectives.preference import row_sums, score_pairs
from jaxtrain.passes.reference import rows_on_host
from jaxtrain.step import ScoreFn
from jaxtrain.types import Batch, LabeledBatch, PairBatch, Params, TokenLogProbs

logger = logging.getLogger(__name__)


def row_difficulty(
    score: ScoreFn, params: Params, batch: Batch | PairBatch | LabeledBatch
) -> Float[Array, "B"]:
    """Mean -log p a trained token (nats); of a pair, the chosen's less the rejected's.

    So a pair is hard where the model prefers the rejected completion.
    """

    def loss(scored: TokenLogProbs, side: Batch) -> Float[Array, "B"]:
        sums = row_sums(-scored.logps, side.loss_mask)
        return sums / jnp.maximum(side.loss_mask.sum(-1), 1.0)

    if isinstance(batch, PairBatch):
        chosen, rejected = score_pairs(functools.partial(score, params), batch)
        return loss(chosen, batch.chosen) - loss(rejected, batch.rejected)
    side = batch.completions if isinstance(batch, LabeledBatch) else batch
    return loss(score(params, side), side)


def measure(
    data: PreparedDataset,
    score: ScoreFn,
    params: Params,
    place: Callable[[Any], Any],
    *,
    process_rows: int,
    readers: tuple[int, int] = (0, 1),
    folder: str | os.PathLike[str],
    jit: Callable[..., Any] = jax.jit,
) -> PreparedDataset:
    """The same rows with `difficulty`, measured once.

    A resumed run finds the numbers in `folder`, so that its order is the same even
    where another machine would round differently. `process_rows`: rows of a batch on
    this process; `readers`: which share of the rows it reads, and of how many; `jit`:
    `ShardingPlan.jit` of the mesh that holds `params`.
    """
    path = pathlib.Path(folder) / f"difficulty-{data.fingerprint}.npy"
    if path.is_file():
        return data.with_difficulty(np.load(path))
    batches = make_eval_iterator(
        data,
        micro_batch_rows=process_rows,
        process_index=readers[0],
        process_count=readers[1],
    )
    of_batch = jit(lambda params, batch: row_difficulty(score, params, batch))
    found = [rows_on_host(of_batch(params, place(batch))) for batch in batches]
    difficulty = np.concatenate(found)[: len(data)].astype(np.float32)
    logger.info(
        "difficulty of %d rows: %.3f to %.3f nats a token",
        len(data), np.min(difficulty), np.max(difficulty),
    )  # fmt: skip
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"new-{path.name}")
        np.save(aside, difficulty)
        os.replace(aside, path)
    return data.with_difficulty(difficulty)

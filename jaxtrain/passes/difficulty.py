"""How hard each row is to the model before training, for a curriculum."""

import functools
import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.objectives.preference import row_sums, score_pairs
from jaxtrain.run.feed import Feed
from jaxtrain.sharding import to_host
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
    feed: Feed,
    folder: str | os.PathLike[str],
) -> PreparedDataset:
    """Return the same rows with `difficulty`, measured once.

    A resumed run finds the numbers in `folder`, so that its order is the same even
    where another machine would round differently.
    """
    path = pathlib.Path(folder) / f"difficulty-{data.fingerprint}.npy"
    if path.is_file():
        return data.with_difficulty(np.load(path))
    of_batch = feed.plan.jit(lambda params, batch: row_difficulty(score, params, batch))
    found = [
        to_host(of_batch(params, feed.place(batch)))
        for batch in feed.eval_batches(data)
    ]
    difficulty = np.concatenate(found)[: len(data)].astype(np.float32)
    told = "difficulty of %d rows: %.3f to %.3f nats a token"
    logger.info(told, len(data), np.min(difficulty), np.max(difficulty))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"new-{path.name}")
        np.save(aside, difficulty)
        os.replace(aside, path)
    return data.with_difficulty(difficulty)

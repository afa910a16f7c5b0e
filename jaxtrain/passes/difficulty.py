"""How hard each row is to the model before training, for a curriculum."""

import functools
import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.objectives.preference import (
    count_trained,
    example_sums,
    score_pairs,
)
from jaxtrain.run.feed import Feed
from jaxtrain.sharding import to_host
from jaxtrain.step import ScoreFn
from jaxtrain.types import Batch, LabeledBatch, PairBatch, Params, TokenLogProbs

logger = logging.getLogger(__name__)


def row_difficulty(
    score: ScoreFn,
    params: Params,
    batch: Batch | PairBatch | LabeledBatch,
    most: int | None = None,
) -> Float[Array, "B *P"]:
    """Mean -log p a trained token (nats); of a pair, the chosen's less the rejected's.

    So a pair is hard where the model prefers the rejected completion.

    Args:
        most: rows are packed, with up to so many examples. None: a row is an example.
    """

    def loss(
        scored: TokenLogProbs, side: Batch, ids: Array | None
    ) -> Float[Array, "B *P"]:
        sums = example_sums(-scored.logps, side.loss_mask, side, ids)
        means = sums / jnp.maximum(count_trained(side, ids), 1.0)
        return means if ids is None else means.reshape(ids.shape)

    if isinstance(batch, PairBatch):
        chosen, rejected = score_pairs(functools.partial(score, params), batch)
        ids = batch.pair_ids
        return loss(chosen, batch.chosen, ids) - loss(rejected, batch.rejected, ids)
    if isinstance(batch, LabeledBatch):
        rows = batch.completions
        return loss(score(params, rows), rows, batch.example_ids)
    ids = None
    if most is not None:
        shape = (len(batch.tokens), most)
        ids = jnp.broadcast_to(jnp.arange(1, most + 1), shape)
    return loss(score(params, batch), batch, ids)


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
    # The folder may be on the first process's disk alone.
    is_first = jax.process_index() == 0
    is_known = np.int32(is_first and path.is_file())
    if multihost_utils.broadcast_one_to_all(is_known):
        known = np.load(path) if is_first else np.zeros(len(data), np.float32)
        return data.with_difficulty(multihost_utils.broadcast_one_to_all(known))
    batches = feed.eval_batches(data)
    most = batches.most_examples
    of_batch = feed.plan.jit(
        lambda params, batch: row_difficulty(score, params, batch, most)
    )
    found = [
        batches.in_order(to_host(of_batch(params, feed.place(batch))))
        for batch in batches
    ]
    difficulty = np.concatenate(found).astype(np.float32)
    told = "difficulty of %d rows: %.3f to %.3f nats a token"
    logger.info(told, len(data), np.min(difficulty), np.max(difficulty))
    if is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"new-{path.name}")
        np.save(aside, difficulty)
        os.replace(aside, path)
    return data.with_difficulty(difficulty)

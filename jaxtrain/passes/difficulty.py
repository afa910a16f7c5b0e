"""How hard each row is to the model before training, for a curriculum."""

import contextlib
import functools
import io
import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from jaxtrain.config.sections import CurriculumSection
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.objectives.preference import count_trained, example_sums, score_pairs
from jaxtrain.run.durable import write_whole
from jaxtrain.run.feed import Feed, Prepared
from jaxtrain.sharding import to_host
from jaxtrain.step import ScoreFn
from jaxtrain.types import Batch, LabeledBatch, PairBatch, Params, TokenLogProbs

logger = logging.getLogger(__name__)

_CHECKSUM_BYTES = 8


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


def is_wanted(curriculum: CurriculumSection, data: Prepared) -> bool:
    """Whether the curriculum needs the model's own judgement of the rows."""
    if not curriculum.enabled or curriculum.strategy != "difficulty_based":
        return False
    return isinstance(data, PreparedDataset) and data.difficulty is None


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
    kept = _read(path) if is_first else None
    if multihost_utils.broadcast_one_to_all(np.int32(kept is not None)):
        known = np.zeros(len(data), np.float32) if kept is None else kept
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
        buffer = io.BytesIO()
        np.save(buffer, difficulty)
        content = buffer.getvalue()
        # Behind the array, where np.load does not look.
        write_whole(path, content + xxhash.xxh3_64_digest(content))
    return data.with_difficulty(difficulty)


def _read(path: pathlib.Path) -> np.ndarray | None:
    """What was measured before; None if nothing was, or it is damaged and set aside."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    array, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(array) == checksum:
        return np.load(io.BytesIO(array))
    with contextlib.suppress(ValueError, EOFError, OSError):
        file = io.BytesIO(content)
        found = np.load(file)
        if file.tell() == len(content):
            return found  # an earlier release took no checksum
    path.replace(path.with_name(f"{path.name}.damaged"))
    logger.warning(
        "the difficulties of rows in %s do not match their checksum: they are measured"
        " again, and the old ones were moved to %s.damaged; check the disk",
        *(path, path.name),
    )
    return None

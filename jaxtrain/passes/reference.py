"""Reference log-probs, computed once before training: no second model in the step.

They are streamed to `<workdir>/reference/<name>/`, so that a run that was stopped goes
on where it was, and a second run on the same model and data computes nothing
(`sums_cache.py`).
"""

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, UInt32

from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.models.load import LoadedModel
from jaxtrain.objectives.preference import example_sums, score_pairs
from jaxtrain.passes.sums_cache import SumsCache
from jaxtrain.run.feed import Feed
from jaxtrain.sharding import to_host
from jaxtrain.step import ScoreFn
from jaxtrain.types import Batch, PairBatch, Params, TokenLogProbs

logger = logging.getLogger(__name__)


class ReferenceScorer:
    """Sum the reference's log-probs over the completions of a preference data set."""

    def __init__(
        self,
        score: ScoreFn,
        params: Params,
        feed: Feed,
        directory: pathlib.Path,
        identity: Mapping[str, str],
    ) -> None:
        """Score by `params`, in the evaluation batches of `feed`.

        Args:
            directory: where the first process keeps the sums.
            identity: what they depend on besides the weights and the data, by name.
        """
        self._params = params
        self._feed = feed
        self._directory = directory
        self._identity = {"weights": fingerprint(params), **identity}

        def sums(params: Params, batch: PairBatch) -> tuple[jax.Array, jax.Array]:
            chosen, rejected = score_pairs(functools.partial(score, params), batch)
            return (
                _sums(chosen, batch.chosen, batch.pair_ids),
                _sums(rejected, batch.rejected, batch.pair_ids),
            )

        self._sums = feed.plan.jit(sums)

    def attach(self, data: PreparedDataset, name: str) -> PreparedDataset:
        """The same pairs with `reference_logps`, on every process for all of them.

        What is kept of another model or of other data, or is damaged, is set aside
        with a warning and computed anew.

        Args:
            name: of the data set, "train" or "eval"; each has a cache of its own.
        """
        identity = {**self._identity, "data": data.fingerprint}
        cache = SumsCache(self._directory / name)
        # Only the first process looks and writes; the others begin where it does.
        done = cache.open(identity) if jax.process_index() == 0 else 0
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
        global_rows = self._feed.eval_rows * self._feed.readers
        first = len(data)
        if done < first:
            first = done // global_rows * global_rows
            self._score_from(first, data, cache)
        told = "reference log-probs of %d %s pairs: %d are new, all in %s"
        logger.info(told, len(data), name, len(data) - first, cache.directory)
        multihost_utils.sync_global_devices(f"reference {name}")
        if jax.process_count() == 1:
            return data.with_reference_logps(*cache.read(len(data)))
        # The folder may be on the first process's disk alone.
        pairs = np.zeros((2, len(data)), np.float32)
        if jax.process_index() == 0:
            pairs = np.stack(cache.read(len(data)))
        pairs = np.asarray(multihost_utils.broadcast_one_to_all(pairs))
        return data.with_reference_logps(*pairs)

    def _score_from(self, first: int, data: PreparedDataset, cache: SumsCache) -> None:
        batches = self._feed.eval_batches(data)
        global_rows = self._feed.eval_rows * self._feed.readers
        batches.set_state({"next_step": first // global_rows})
        writes = jax.process_index() == 0
        if writes:
            cache.truncate(first)
        for batch in batches:
            sums = self._sums(self._params, self._feed.place(batch))
            pairs = batches.in_order(np.stack([to_host(side) for side in sums], -1))
            if writes:
                cache.append(pairs)
        batches.close()
        if writes:
            cache.flush()


def _sums(
    scored: TokenLogProbs, rows: Batch, ids: jax.Array | None
) -> Float[Array, "B *P"]:
    sums = example_sums(scored.logps, rows.loss_mask, rows, ids)
    return sums if ids is None else sums.reshape(ids.shape)


# --- what the numbers depend on ----------------------------------------------------


def fingerprint(tree: Any) -> str:
    """A hash of names, types and every bit of a tree of arrays; any layout gives it."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(_hash_bits(leaf)).tobytes())
    return digest.hexdigest()


def describe(model: LoadedModel) -> dict[str, str]:
    """What reference log-probs depend on besides weights and data, by name."""
    return {
        "model": model.decoder.describe(),
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and chat template."""
    described = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=8).hexdigest()


@jax.jit
def _hash_bits(x: Array) -> UInt32[Array, "2"]:
    """Two sums modulo 2^32 of each number's bits mixed with its place.

    Such sums are the same in any order, so the array may lie over any devices.
    """
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(size) + along
    seeds = (jnp.uint32(0x9E3779B9), jnp.uint32(0x7F4A7C15))
    mixed = (_mix(bits ^ _mix(place + seed)) for seed in seeds)
    return jnp.stack([numbers.sum(dtype=jnp.uint32) for numbers in mixed])


def _mix(x: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """An invertible map that lets every bit change about half of all others."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)

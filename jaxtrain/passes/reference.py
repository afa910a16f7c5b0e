"""Reference log-probs, computed once before training: no second model in the step.

They are streamed to `<workdir>/reference/<name>/`, so that a run that was stopped goes
on where it was, and a second run on the same model and data computes nothing.
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
from jaxtrain.run.feed import Feed
from jaxtrain.sharding import to_host
from jaxtrain.step import ScoreFn
from jaxtrain.types import Batch, PairBatch, Params, TokenLogProbs

logger = logging.getLogger(__name__)

_ROW_BYTES = 8  # float32 sums of chosen and rejected


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
            directory: where the sums are kept, shared by all processes.
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

        Args:
            name: of the data set, "train" or "eval"; each has a cache of its own.

        Raises:
            ValueError: the cache of that name is another model's, or other data's.
        """
        cache = _Cache(
            self._directory / name, {**self._identity, "data": data.fingerprint}
        )
        global_rows = self._feed.eval_rows * self._feed.readers
        first = len(data)
        if cache.rows() < first:
            # Every process starts where the first one, which writes, will.
            done = multihost_utils.broadcast_one_to_all(np.int32(cache.rows()))
            first = int(done) // global_rows * global_rows
            self._score_from(first, data, cache)
        told = "reference log-probs of %d %s pairs: %d are new, all in %s"
        logger.info(told, len(data), name, len(data) - first, cache.directory)
        multihost_utils.sync_global_devices(f"reference {name}")
        return data.with_reference_logps(*cache.read(len(data)))

    def _score_from(self, first: int, data: PreparedDataset, cache: "_Cache") -> None:
        batches = self._feed.eval_batches(data)
        global_rows = self._feed.eval_rows * self._feed.readers
        batches.set_state({"next_step": first // global_rows})
        cache.truncate(first)
        for batch in batches:
            sums = self._sums(self._params, self._feed.place(batch))
            pairs = np.stack([to_host(side) for side in sums], axis=-1)
            cache.append(batches.in_order(pairs))
        batches.close()


def _sums(
    scored: TokenLogProbs, rows: Batch, ids: jax.Array | None
) -> Float[Array, "B *P"]:
    sums = example_sums(scored.logps, rows.loss_mask, rows, ids)
    return sums if ids is None else sums.reshape(ids.shape)


class _Cache:
    """float32[rows, 2] in a file that grows, beside the identity that it belongs to."""

    def __init__(self, directory: pathlib.Path, identity: Mapping[str, str]) -> None:
        self.directory = directory
        self._file = directory / "logps.float32"
        described = directory / "identity.json"
        if described.is_file():
            found = json.loads(described.read_text())
            if differing := sorted(
                {key for key, _ in found.items() ^ identity.items()}
            ):
                raise ValueError(
                    f"the reference log-probs in {directory} are stale: they belong to"
                    f" other {' and '.join(differing)}. Delete that folder to compute"
                    " them anew, or use a new workdir"
                )
        elif jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            partial = directory / "identity.partial"
            partial.write_text(json.dumps(dict(identity), indent=2))
            partial.replace(described)

    def rows(self) -> int:
        """Whole rows on disk."""
        size = self._file.stat().st_size if self._file.is_file() else 0
        return size // _ROW_BYTES

    def truncate(self, rows: int) -> None:
        """Keep the first so many; a batch that was cut off is written again."""
        if jax.process_index() == 0:
            with self._file.open("ab") as file:
                file.truncate(rows * _ROW_BYTES)

    def append(self, pairs: np.ndarray) -> None:
        if jax.process_index() == 0:
            with self._file.open("ab") as file:
                file.write(np.ascontiguousarray(pairs, np.float32).tobytes())

    def read(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Both sides, mapped into memory."""
        pairs = np.memmap(self._file, np.float32, "r", shape=(rows, 2))
        return pairs[:, 0], pairs[:, 1]


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

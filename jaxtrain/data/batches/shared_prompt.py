"""Preference pairs in one row: the prompt once, then both completions.

Pair p of a row (1, 2, ...) lies in three segments: 3 p - 2 is its prompt without the
last token, 3 p - 1 and 3 p are the chosen and the rejected completion. Each of those
starts with the prompt's last token, because that predicts another token in each, and
its `prompt_ids` name the prompt. Positions go on after the prompt in both.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.batch import Batch, PairBatch

if TYPE_CHECKING:  # that module lays out rows by this one
    from jaxtrain.data.batches.dataset import TokenStore

SIDES = ("chosen", "rejected")
_BLOCK = 10_000  # documents


def share_prompts(rows: Batch, **fields: Any) -> PairBatch:
    """The pairs of rows that are laid out as above. `fields`: of the result."""

    def less(other: int) -> Batch:
        kept = (rows.segment_ids % 3 != other) | (rows.segment_ids == 0)
        return dataclasses.replace(
            rows,
            segment_ids=rows.segment_ids * kept,
            loss_mask=rows.loss_mask * kept,
            scored=None,
        )

    return PairBatch(chosen=less(0), rejected=less(2), shared=rows, **fields)


def prompt_lengths(stores: Mapping[str, "TokenStore"]) -> np.ndarray:
    """int64[documents]: the tokens before the first trained one, the same in a pair."""
    return np.minimum(*(_untrained_prefix(stores[side]) for side in SIDES))


def pair_lengths(stores: Mapping[str, "TokenStore"]) -> np.ndarray:
    """int64[documents]: tokens of a pair laid out as above."""
    both = stores["chosen"].lengths.astype(np.int64) + stores["rejected"].lengths
    return both - np.maximum(prompt_lengths(stores) - 1, 0)


def _untrained_prefix(store: "TokenStore") -> np.ndarray:
    count = len(store.starts)
    prefixes = np.empty(count, np.int64)
    for begin in range(0, count, _BLOCK):  # a block's places at a time in memory
        block = slice(begin, begin + _BLOCK)
        starts = store.starts[block].astype(np.int64)
        lengths = store.lengths[block].astype(np.int64)
        low, high = int(np.min(starts)), int(np.max(starts + lengths))
        trained = np.append(low + np.flatnonzero(store.trained[low:high]), high)
        first = trained[np.searchsorted(trained, starts)]
        prefixes[block] = np.minimum(first - starts, lengths)
    return prefixes


def write_documents(
    stores: Mapping[str, "TokenStore"],
    prompts: np.ndarray,
    documents: np.ndarray,
    out: Batch,
) -> None:
    """Write pairs behind one another into `out`, an empty row of [T].

    Args:
        prompts: `prompt_lengths(stores)`.
    """
    assert out.prompt_ids is not None
    at = 0
    for pair, document in enumerate(documents, start=1):
        shared = max(int(prompts[document]) - 1, 0)
        segments = [("chosen", 0, shared), *((side, shared, None) for side in SIDES)]
        for number, (side, first, last) in enumerate(segments, start=3 * pair - 2):
            start = int(stores[side].starts[document])
            length = int(stores[side].lengths[document])
            stop = length if last is None else last
            end = at + stop - first
            # The prompt's last shared token predicts the one that both sides start
            # with; the last token of a side predicts nothing.
            targets = min(stop, length - 1) - first
            tokens = stores[side].tokens[start : start + length]
            out.tokens[at:end] = tokens[first:stop]
            out.targets[at : at + targets] = tokens[first + 1 : first + 1 + targets]
            out.segment_ids[at:end] = number
            out.positions[at:end] = np.arange(first, stop)
            if last is None:
                trained = stores[side].trained[start + first + 1 : start + length]
                out.loss_mask[at : at + targets] = trained
                out.prompt_ids[at:end] = 3 * pair - 2
            at = end

"""Mixtures: several data sets with weights, as one.

The weights are the shares of rows in an epoch. An epoch has as many rows as all data
sets together, so a data set whose share is above its size repeats some of its rows,
and one below it leaves some to a later epoch: each goes through its own rows in an
order of its own, pass after pass. `pipeline.RowOrder` draws them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.record.safe_text import shown

_WEIGHTED = re.compile(r"(.+):([0-9.]+(?:[eE][-+]?[0-9]+)?)")


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a mixture: its raw rows, its name for messages, its weight."""

    name: str
    rows: Any  # a `datasets.Dataset`, or a list of mappings
    weight: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Raw rows of several data sets."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)


def parse_mixture(
    train: str | Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, float], ...] | None:
    """The (path, weight) of each data set that `data.train` names; None: it is a path.

    Takes "a.jsonl:0.7,b.jsonl:0.3" or [{"path": "a.jsonl", "weight": 0.7}, ...].

    Raises:
        ValueError: a weight is missing or not positive, or a key is unknown.
    """
    if isinstance(train, str):
        pieces = [piece.strip() for piece in train.split(",")]
        found = [_WEIGHTED.fullmatch(piece) for piece in pieces]
        if not any(found):
            return None
        if not all(found):
            raise ValueError(
                f"data.train = {shown(train)}: {shown(pieces[found.index(None)])} has"
                " no weight; write path:weight for each data set, separated by commas"
            )
        named = [(match[1], match[2]) for match in found if match]
    else:
        named = []
        for entry in train:
            if set(entry) - {"path", "weight"} or "path" not in entry:
                raise ValueError(
                    f"data.train: {shown(dict(entry))} is not a data set of a mixture;"
                    " write {'path': 'a.jsonl', 'weight': 0.7}"
                )
            named.append((str(entry["path"]), entry.get("weight", 1.0)))
    parts = []
    for path, text in named:
        try:
            weight = float(text)
        except (TypeError, ValueError):
            weight = float("nan")
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"data.train: the weight of {shown(path)} is {shown(text)}; give a "
                "positive number"
            )
        parts.append((path, weight))
    return tuple(parts) or None


def rows_per_epoch(parts: Sequence[tuple[int, float]]) -> list[int]:
    """How many rows of each (rows, weight) an epoch takes; they add up to all rows.

    Shares are rounded by largest remainder, and no data set gets none.
    """
    total = sum(rows for rows, _ in parts)
    weights = np.asarray([weight for _, weight in parts])
    exact = total * weights / weights.sum()
    quotas = np.maximum(np.floor(exact + 1e-9).astype(int), 1)
    while quotas.sum() < total:
        quotas[np.argmax(exact - quotas)] += 1
    while quotas.sum() > total:
        quotas[np.argmax(np.where(quotas > 1, quotas - exact, -np.inf))] -= 1
    return list(quotas.tolist())


def join(
    prepared: Sequence[PreparedDataset], weights: Sequence[float]
) -> PreparedDataset:
    """Prepared data sets behind one another, as a mixture of these weights."""
    first = prepared[0]
    stores = {
        name: _join_stores([data.stores[name] for data in prepared])
        for name in first.stores
    }
    values = {
        name: np.concatenate([data.row_values[name] for data in prepared])
        for name in first.row_values
    }
    found = [data.difficulty for data in prepared if data.difficulty is not None]
    difficulty = np.concatenate(found) if len(found) == len(prepared) else None
    return PreparedDataset(
        first.objective,
        stores,
        max(data.row_length for data in prepared),
        first.pad_id,
        sum((data.stats for data in prepared), DataStats()),
        row_values=values,
        difficulty=difficulty,
        parts=tuple(
            (len(data), weight) for data, weight in zip(prepared, weights, strict=True)
        ),
        shares_prompts=first.shares_prompts,
    )


def _join_stores(stores: Sequence[TokenStore]) -> TokenStore:
    def shifted(name: str, counts: Sequence[int]) -> np.ndarray:
        shifts = np.cumsum([0, *counts[:-1]])
        return np.concatenate(
            [getattr(s, name) + by for s, by in zip(stores, shifts, strict=True)]
        )

    ends = shifted("row_offsets", [len(s.row_documents) for s in stores])
    # Each store's offsets start at 0, which is where the one before ends.
    borders = np.cumsum([0, *(len(s.row_offsets) for s in stores[:-1])])
    return TokenStore(
        np.concatenate([s.tokens for s in stores]),
        np.concatenate([s.trained for s in stores]),
        shifted("starts", [len(s.tokens) for s in stores]),
        np.concatenate([s.lengths for s in stores]),
        shifted("row_documents", [len(s.lengths) for s in stores]),
        np.delete(ends, borders[1:]),
    )

"""Some rows of several prepared data sets, as one small data set of their own."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore


def gather_rows(taken: Sequence[tuple[PreparedDataset, int]]) -> PreparedDataset:
    """Copy rows, each given by its data set and its number there, in this order.

    The data sets were prepared alike. Only the tokens of these rows are copied.
    """
    first = taken[0][0]
    stores = {
        name: _gather([(data.stores[name], row) for data, row in taken])
        for name in first.stores
    }
    values = {
        name: np.asarray([data.row_values[name][row] for data, row in taken])
        for name in first.row_values
    }
    return dataclasses.replace(
        first, stores=stores, row_values=values, stats=DataStats()
    )


def _gather(rows: Sequence[tuple[TokenStore, int]]) -> TokenStore:
    found = [(store, store.documents_of(np.asarray([row]))) for store, row in rows]
    offsets = np.cumsum([0, *(len(documents) for _, documents in found)])
    spans = [
        (store, slice(start, start + length))
        for store, documents in found
        for start, length in zip(
            store.starts[documents].tolist(),
            store.lengths[documents].tolist(),
            strict=True,
        )
    ]
    lengths = np.asarray([span.stop - span.start for _, span in spans], np.int64)
    return TokenStore(
        np.concatenate([store.tokens[span] for store, span in spans]),
        np.concatenate([store.trained[span] for store, span in spans]),
        np.cumsum(lengths) - lengths,
        lengths,
        np.arange(len(spans)),
        offsets,
    )

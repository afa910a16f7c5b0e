"""The classes of `datasets`, which is imported where it reads: it takes a second.

An object of one of its classes can only be there once something has imported it.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
else:
    Dataset = IterableDataset = Any  # in annotations, which run as types are declared


def is_data_set(rows: Any) -> bool:
    """Whether rows are a `datasets.Dataset`."""
    return _is_a("Dataset", rows)


def is_stream(rows: Any) -> bool:
    """Whether rows are a `datasets.IterableDataset`."""
    return _is_a("IterableDataset", rows)


def _is_a(name: str, rows: Any) -> bool:
    library = sys.modules.get("datasets")
    return library is not None and isinstance(rows, getattr(library, name))

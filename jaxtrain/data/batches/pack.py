"""Put several documents into one row: best-fit decreasing, or one cut stream.

Documents are (start, length) spans of one flat token array, so splitting and cutting
never copy tokens.
"""

import itertools

import numpy as np

STRATEGIES = ("bfd", "bfd_split", "wrapped")


def pack_best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing bin packing, as in arXiv:2404.10830.

    The longest document first; each goes to the fullest row that still has room, the
    earliest such row on a tie. Documents of one length are placed together: a row with
    `space` left takes `space // length` of them in turn, because it stays the best fit.
    So the work grows with the number of distinct lengths, not of documents.

    Args:
        lengths: int[documents], each from 1 to capacity.
        capacity: tokens in a row.

    Returns:
        offsets int64[rows + 1] and documents int64[documents]: row r holds
        `documents[offsets[r]:offsets[r + 1]]`.

    Raises:
        ValueError: a length is out of range.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(
            f"document lengths span {lengths.min()}..{lengths.max()}: they must lie "
            f"in 1..{capacity} (capacity); cut or split longer documents first"
        )
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    row_of = np.empty(lengths.size, np.int64)  # of each document in `order`
    bins = _Bins(capacity)
    cuts = np.flatnonzero(np.diff(descending)) + 1
    edges = np.concatenate([[0], cuts, [lengths.size]])
    for begin, end in itertools.pairwise(edges.tolist()):
        bins.place(int(descending[begin]), row_of[begin:end])
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=bins.count)
    return np.concatenate([[0], np.cumsum(counts)]), order[by_row]


def limit_documents(offsets: np.ndarray, most: int) -> np.ndarray:
    """The same documents in rows of at most `most`; fuller rows are cut in several."""
    cut = [
        np.arange(first, last, most)
        for first, last in itertools.pairwise(offsets.tolist())
    ]
    return np.concatenate([*cut, offsets[-1:]])


def split_documents(
    starts: np.ndarray, lengths: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split documents longer than capacity into pieces of at most capacity tokens."""
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    shift = (np.arange(len(document)) - first) * capacity
    return (starts[document] + shift, np.minimum(lengths[document] - shift, capacity))


def wrap_stream(total: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a stream of `total` tokens into spans of capacity; the last may be shorter.

    TRL's 'wrapped': every row is full, and rows cross document borders.
    """
    starts = np.arange(0, total, capacity, dtype=np.int64)
    return starts, np.minimum(total - starts, capacity)


class _Bins:
    """Open rows by the space left in them."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self._capacity = capacity
        # space left -> arrays of row numbers, the earliest first
        self._by_space: dict[int, list[np.ndarray]] = {}
        self._occupied = 0  # bit s is set where a row has s tokens left

    def place(self, length: int, row_of: np.ndarray) -> None:
        """Choose rows for `len(row_of)` documents of one length, in order."""
        done = 0
        while done < len(row_of):
            space, rows = self._best_fit(length, len(row_of) - done)
            each = space // length
            full, rest = divmod(min(len(row_of) - done, each * len(rows)), each)
            used = full + (rest > 0)
            placed = full * each + rest
            row_of[done : done + placed] = np.repeat(rows[:used], each)[:placed]
            done += placed
            self._put(space, rows[used:], front=True)
            self._put(space - each * length, rows[:full])
            self._put(space - rest * length, rows[full:used])

    def _best_fit(self, length: int, documents: int) -> tuple[int, np.ndarray]:
        """Take out the rows of the smallest space that fits, or open new ones."""
        fitting = self._occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            self._occupied ^= 1 << space
            return space, np.concatenate(self._by_space.pop(space))
        opened = -(-documents // (self._capacity // length))
        rows = np.arange(self.count, self.count + opened)
        self.count += opened
        return self._capacity, rows

    def _put(self, space: int, rows: np.ndarray, *, front: bool = False) -> None:
        if space == 0 or not len(rows):
            return
        held = self._by_space.setdefault(space, [])
        held.insert(0 if front else len(held), rows)
        self._occupied |= 1 << space

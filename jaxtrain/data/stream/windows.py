"""A stream of rows to prepared rows: shuffled in blocks, packed in windows, mixed.

One share reads a block of raw rows, shuffles it, and cuts it into windows, which are
tokenized and packed each by itself, here or in worker processes: a window depends on
its rows and its number alone. So the state of a share is where its block starts, the
window in it and the row in that, a few integers whatever the buffer's size. To restore
it, one block is read and one window is prepared again.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.batches.dataset import DataStats, PreparedDataset
from jaxtrain.data.prepare.kinds import Recipe
from jaxtrain.data.prepare.prepare import lay_out, tokenize
from jaxtrain.data.rows.formats import RowProblems
from jaxtrain.data.stream.source import RawRow, Share, Source, State, random_order

logger = logging.getLogger(__name__)

Key = tuple[int, int, int]  # epoch, block in it, window in that
Make = Callable[[list[RawRow], Key, Share], "Window"]

_SHOWN_EQUAL = 5
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, for evenly spread draws


@dataclasses.dataclass(frozen=True)
class Window:
    """Some rows, prepared: which of them to take, in order, and what became of all.

    `problems` are (place, reason) of bad rows, `equal` the first places of pairs whose
    chosen equals rejected.
    """

    data: PreparedDataset | None
    order: np.ndarray
    problems: tuple[tuple[str, str], ...]
    stats: DataStats
    equal: tuple[str, ...] = ()


def make_window(
    recipe: Recipe, rows: Sequence[RawRow], key: Key, share: Share
) -> Window:
    """Check, tokenize and pack raw rows; a pure function of its arguments."""
    problems = RowProblems("skip", shown=len(rows))
    tokenized = tokenize([row.row for row in rows], recipe, problems)
    data = lay_out(tokenized, recipe)
    found = tuple((rows[number].place, reason) for number, reason in problems.first)
    equal = tuple(rows[number].place for number in problems.equal[:_SHOWN_EQUAL])
    if data is None:
        return Window(None, np.arange(0), found, tokenized.stats, equal)
    order = np.arange(len(data))
    if data.packed and share.seed is not None:
        order = random_order(len(data), share.seed, share.index, *key)
    elif data.packed:
        order = _stream_order(data)
    return Window(data, order, found, data.stats, equal)


def _stream_order(data: PreparedDataset) -> np.ndarray:
    """Packed rows by their earliest document; packing puts the longest first."""
    store = next(iter(data.stores.values()))
    first = np.minimum.reduceat(store.row_documents, store.row_offsets[:-1])
    return np.argsort(first, kind="stable")


class BlockReader:
    """Blocks of a source's raw rows, epoch after epoch, in the order of training."""

    def __init__(self, source: Source, share: Share, block_rows: int) -> None:
        self.source = source
        self.share = share
        self.epoch = self.block = 0
        self._block_rows = block_rows
        self._at: State | None = None
        self._cursor: Any = None

    def get_state(self) -> State:
        """Where the next block starts."""
        return {"epoch": self.epoch, "block": self.block, "at": self._at}

    def set_state(self, state: State) -> None:
        """Go to where a block starts."""
        self.epoch, self.block = int(state["epoch"]), int(state["block"])
        self._at, self._cursor = state["at"], None

    def __next__(self) -> list[RawRow]:
        """The next block, which is never empty; `epoch` and `block` are its own.

        Raises:
            ValueError: an epoch has no row for this share.
        """
        for _ in range(2):
            if self._cursor is None:
                self._cursor = self.source.open(self.share, self.epoch, self._at)
            rows = self._read()
            if rows:
                self._at = self._cursor.get_state()
                self.block += 1
                return rows
            self.epoch, self.block = self.epoch + 1, 0
            self._at = self._cursor = None
        raise ValueError(
            f"{self.source.name}: an epoch holds no row for share {self.share.index} of"
            f" {self.share.count} (one a device of mesh.data and mesh.fsdp): give more "
            "rows, or set data.streaming = false"
        )

    def _read(self) -> list[RawRow]:
        seed, size = self.share.seed, self._block_rows
        key = (seed or 0, self.share.index, self.epoch, self.block)
        if seed is not None and self.epoch and not self.block and size > 1:
            # Blocks of each epoch start elsewhere, so that other rows meet.
            random = np.random.Philox(np.random.SeedSequence([*key, 1]))
            size -= int(random.random_raw() % (size // 2))
        rows = list(itertools.islice(self._cursor, size))
        if seed is None:
            return rows
        return [rows[index] for index in random_order(len(rows), *key)]


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A window that is being made: where its block starts, its number there."""

    blocks: State
    window: int
    epoch: int
    made: "concurrent.futures.Future[Window]"


class WindowReader:
    """Prepared rows of one source in one share."""

    def __init__(
        self,
        blocks: BlockReader,
        pool: concurrent.futures.Executor,
        make: Make,
        *,
        window_rows: int,
        ahead: int,
        on_bad_rows: Callable[[Sequence[tuple[str, str]]], None],
    ) -> None:
        """Windows of at most `window_rows` raw rows, `ahead` of them made in advance.

        `on_bad_rows` is told of every window's bad rows as the window is opened.
        """
        self._blocks = blocks
        self._pool, self._make = pool, make
        self._window_rows = window_rows
        self._ahead = ahead
        self._on_bad_rows = on_bad_rows
        self._said_equal = False
        self._pending: collections.deque[_Pending] = collections.deque()
        counts = dataclasses.asdict(DataStats())
        start = {"blocks": blocks.get_state(), "window": 0, "row": 0, "counts": counts}
        self.set_state(start)

    def take(self) -> tuple[PreparedDataset, int]:
        """The next row: a data set and the row's number in it.

        Raises:
            ValueError: a bad row that `on_bad_rows` refuses, or nothing to train on.
        """
        barren_since: int | None = None
        while self._window is None or self._row >= len(self._window.order):
            if self._window is not None and not len(self._window.order):
                barren_since = self.epoch if barren_since is None else barren_since
                if self.epoch > barren_since + 1:
                    raise ValueError(
                        f"nothing to train on: a whole epoch of "
                        f"{self._blocks.source.name} has no usable row "
                        f"({self.counts.bad_rows} bad, {self.counts.dropped} with"
                        " no trained token within max_length)"
                    )
            self._open_next()
        assert self._window.data is not None
        row = int(self._window.order[self._row])
        self._row += 1
        return self._window.data, row

    def get_state(self) -> State:
        """JSON values, from which `set_state` goes on with the same next row."""
        return self._start | {"row": self._row}

    def set_state(self, state: State) -> None:
        """Go on at a saved state."""
        self._pending.clear()
        self._blocks.set_state(state["blocks"])
        self._made = self._make_windows(int(state["window"]))
        self._window: Window | None = None
        self._start = state  # where the window starts, and what was counted before it
        self._row = 0
        self.epoch = int(state["blocks"]["epoch"])  # epochs that are done
        self.counts = DataStats(**state["counts"])  # the current window's too
        if state["row"]:
            self._open_next(quietly=True)  # its bad rows were reported
            self._row = int(state["row"])

    def _open_next(self, *, quietly: bool = False) -> None:
        while len(self._pending) <= self._ahead:
            self._pending.append(next(self._made))
        opened = self._pending.popleft()
        window = self._window = opened.made.result()
        counts = dataclasses.asdict(self.counts)
        self._start = dict(blocks=opened.blocks, window=opened.window, counts=counts)
        self._row, self.epoch = 0, opened.epoch
        self.counts += window.stats
        if window.problems and not quietly:
            self._on_bad_rows(window.problems)
        if window.equal and not self._said_equal:
            self._said_equal = True  # how many there are is in the stream's counts
            logger.warning(
                "chosen equals rejected in some pairs (%s, ...): they are trained, but"
                " express no preference",
                ", ".join(window.equal),
            )

    def _make_windows(self, first: int) -> Iterator[_Pending]:
        """Every window from the `first` of the next block on."""
        blocks = self._blocks
        while True:
            start = blocks.get_state()
            rows = next(blocks)
            count = -(-len(rows) // self._window_rows)
            parts = np.array_split(np.arange(len(rows)), count)
            for number in range(first, count):
                key = (blocks.epoch, blocks.block - 1, number)
                window = [rows[i] for i in parts[number]]
                made = self._pool.submit(self._make, window, key, blocks.share)
                yield _Pending(start, number, blocks.epoch, made)
            first = 0


class Lane:
    """The rows of one share: of one source, or of several by their weights."""

    def __init__(
        self,
        readers: Sequence[WindowReader],
        weights: Sequence[float],
        index: int,
        seed: int,
    ) -> None:
        self.readers = readers
        self._shares = np.cumsum(weights) / np.sum(weights)
        random = np.random.SeedSequence([seed, index])
        self._phase = int(random.generate_state(1, np.uint64)[0])
        self._drawn = 0

    def take(self) -> tuple[PreparedDataset, int]:
        """The next row. Draws are spread evenly: any run of them has the shares."""
        point = (self._phase + self._drawn * _GOLDEN) % 2**64 / 2**64
        part = int(np.searchsorted(self._shares, point, side="right"))
        self._drawn += 1
        return self.readers[min(part, len(self.readers) - 1)].take()

    @property
    def epoch(self) -> int:
        """Epochs done, of the source that has done the fewest."""
        return min(reader.epoch for reader in self.readers)

    def get_state(self) -> State:
        """JSON values."""
        states = [reader.get_state() for reader in self.readers]
        return {"drawn": self._drawn, "readers": states}

    def set_state(self, state: State) -> None:
        """Go on at a saved state."""
        self._drawn = int(state["drawn"])
        for reader, saved in zip(self.readers, state["readers"], strict=True):
            reader.set_state(saved)

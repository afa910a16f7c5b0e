"""Rows of local files that stay in their files: an index of where each begins."""

import dataclasses
import itertools
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.rows.files import Item, Unit, is_compressed, make_units
from jaxtrain.storage.reading import AnyFile

_CHUNK = 1 << 20

Row = Mapping[str, Any]


class FileRows(Sequence[Row]):
    """The rows of local files, parsed each time they are asked for.

    Held in memory are 24 bytes a row, not the rows. So it is cheap to pickle, and a
    copy in another process opens the files again by their paths.

        len(rows)          rows
        rows[i]            a row; an `UnreadableRow` where the file has none there
        rows[i:j]          a list of rows, for the cost of parsing these: files are
                           not read up to i, but for .gz and within a parquet row group
        iter(rows)         one row after the other
        rows.place(i)      "train.jsonl line 8", for messages
        rows.contents()    the bytes of the files, for a fingerprint

    Slices in rising order, even with gaps, read a .gz once from front to back. An
    instance may be shared by threads, which wait for one another.
    """

    def __init__(
        self, units: Sequence[Unit], indices: Sequence[np.ndarray], count: int
    ) -> None:
        """The first `count` rows of units, whose `Unit.index` these are."""
        self.units = tuple(units)
        self._indices = tuple(indices)
        lengths = [len(index) for index in self._indices]
        self._firsts = np.cumsum([0, *lengths])  # number of each unit's first row
        self._count = min(count, int(self._firsts[-1]))
        self._stamps = {unit.path: _stamp(unit.path) for unit in self.units}
        self._start_reading()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            number = range(self._count)[index]  # IndexError, and negative numbers
            return self[number : number + 1][0]
        start, stop, step = index.indices(self._count)
        if step != 1:
            return [self[number] for number in range(start, stop, step)]
        with self._lock:
            self._go_to(start)
            taken = itertools.islice(self._items, max(stop - start, 0))
            rows = [unit.row(item) for unit, item in taken]
            self._next = start + len(rows)
        if len(rows) < stop - start:
            raise ValueError(f"{self.units[0].path} changed while it was read")
        return rows

    def __iter__(self) -> Iterator[Row]:
        items = itertools.islice(self._items_from(0), self._count)
        return (unit.row(item) for unit, item in items)

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_lock", "_items", "_next")
        return {k: v for k, v in vars(self).items() if k not in passing}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._start_reading()

    def first(self, count: int | None) -> "FileRows":
        """The first rows; all if None."""
        rows = self._count if count is None else count
        return FileRows(self.units, self._indices, min(rows, self._count))

    def place(self, number: int) -> str:
        """The file and the line, or the row, where row `number` stands."""
        unit, row = self._locate(number)
        return self.units[unit].place(int(self._indices[unit][row, 2]))

    def contents(self) -> Iterator[bytes]:
        """All bytes of the files behind how they are read, and how many rows count."""
        yield b"%d" % self._count
        readers = {unit.path: unit.reader for unit in self.units}
        for path, reader in readers.items():
            yield f"{self._stamps[path][0]} {reader}".encode()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk

    def _start_reading(self) -> None:
        self._lock = threading.Lock()
        self._items: Iterator[tuple[Unit, Item]] = iter(())
        self._next = -1  # number of the row that `_items` gives next; -1: none

    def _locate(self, number: int) -> tuple[int, int]:
        """The unit of a row, and the row's number in it."""
        unit = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return unit, number - int(self._firsts[unit])

    def _go_to(self, number: int) -> None:
        """Let `_items` give row `number` next."""
        if number == self._next:
            return
        if 0 <= self._next < number < self._count:
            unit, _ = self._locate(number)
            same = unit == self._locate(self._next)[0]
            if same and not _seeks(self.units[unit]):
                skipped = itertools.islice(self._items, number - self._next)
                for _ in skipped:
                    pass
                return
        self._items, self._next = self._items_from(number), number

    def _items_from(self, number: int) -> Iterator[tuple[Unit, Item]]:
        if number >= self._count:
            return
        first, row = self._locate(number)
        for unit, index in zip(self.units[first:], self._indices[first:], strict=True):
            if row < len(index):
                if _stamp(unit.path) != self._stamps[unit.path]:
                    raise ValueError(f"{unit.path} changed while it was read")
                position = (int(index[row, 0]), int(index[row, 1]))
                yield from ((unit, item) for item in unit.items(position))
            row = 0


def index_files(files: Sequence[pathlib.Path]) -> FileRows:
    """The rows of files in order, for which each file is read once.

    Raises:
        ValueError: a file cannot be read; names it.
    """
    units = [unit for file in files for unit in make_units(file)]
    indices = [unit.index() for unit in units]
    units = [dataclasses.replace(unit, is_checked=True) for unit in units]
    return FileRows(units, indices, sum(map(len, indices)))


def _seeks(unit: Unit) -> bool:
    """Whether going to a row costs less than reading up to it."""
    return not (is_compressed(unit.path) or unit.reader == "parquet")


def _stamp(path: AnyFile) -> tuple[int, int]:
    """What another content of a file changes: its size and time."""
    assert isinstance(path, pathlib.Path)  # of a bucket, a copy: source.load_rows
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns

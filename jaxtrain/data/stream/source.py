"""Where streamed rows come from, and which of them each share of the devices reads.

A stream is dealt out in `share.count` shares, one a data-parallel device, whichever
process holds it. Whole units (files, parquet row groups) go to a share where their
number divides evenly; otherwise every share reads all units and keeps one row in
`share.count`. Which ones moves on from epoch to epoch, and so does the units' order.
"""

import abc
import copy
import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxtrain.data.rows.files import START, Item, Unit, drop_filled, make_units
from jaxtrain.data.rows.folders import looks_local
from jaxtrain.data.rows.hf_datasets import IterableDataset
from jaxtrain.data.rows.places import HeldRows
from jaxtrain.data.rows.remote import copy_data, stream_files
from jaxtrain.data.rows.source import data_files, load_hub, load_saved
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.reading import AnyFile

logger = logging.getLogger(__name__)

State = dict[str, Any]  # JSON values


@dataclasses.dataclass(frozen=True)
class RawRow:
    """A row as it was read (an `UnreadableRow` where none is), and where it stands."""

    place: str
    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Share:
    """One of `count` shares of a stream; `seed` None keeps the units' order."""

    index: int = 0
    count: int = 1
    seed: int | None = None


class Cursor(abc.ABC, Iterator[RawRow]):
    """The rows of one epoch in one share. The state is behind the last row given.

    A share that reads units of its own takes all that it reads (`whole`), another one
    row in `share.count`.
    """

    _reading: Iterator[Any]

    def __init__(
        self, share: Share, epoch: int, limit: int | None, *, whole: bool, rows: int
    ) -> None:
        self._dealt = 1 if whole else share.count
        self._mine = 0 if whole else (share.index + epoch) % share.count
        self._limit = limit
        self._rows = rows  # read so far

    def __next__(self) -> RawRow:
        while self._limit is None or self._rows < self._limit:
            read = next(self._reading)
            self._rows += 1
            if (self._rows - 1) % self._dealt == self._mine:
                return self._make_row(read)
        raise StopIteration

    @abc.abstractmethod
    def _make_row(self, read: Any) -> RawRow: ...

    @abc.abstractmethod
    def get_state(self) -> State:
        """JSON values."""


def random_order(count: int, *key: int) -> np.ndarray:
    """int64[count]: a permutation drawn from a key of non-negative integers."""
    # Raw bits: the same under every numpy.
    random = np.random.Philox(np.random.SeedSequence(key))
    return np.argsort(random.random_raw(count), kind="stable")


def open_stream(
    path_or_name: str, *, split: str = "train", max_rows: int | None = None
) -> "Source":
    """A file, a folder (see `source.load_rows`), in a bucket too, or of the hub.

    Args:
        max_rows: read only the first rows.

    Raises:
        ValueError: nothing to read there, or no way to read it as a stream.
    """
    path = pathlib.Path(path_or_name).expanduser()
    files: Sequence[AnyFile] | None = None
    if is_remote(path_or_name):
        files = stream_files(path_or_name, split)
        if files is None:
            path = copy_data(path_or_name, split)
    if files is not None:
        pass
    elif path.is_dir():
        saved = load_saved(path, split)
        if saved is None:
            files = data_files(path, split)
        else:
            files = [pathlib.Path(file["filename"]) for file in saved.cache_files]
    elif path.exists():
        files = data_files(path, split)
    elif looks_local(path_or_name):
        raise ValueError(
            f"data path {path_or_name!r} does not exist: check the spelling, and that"
            " it is relative to the current folder"
        )
    else:
        rows = load_hub(path_or_name, split, streaming=True)
        return HubSource(path_or_name, rows, max_rows)
    units = tuple(unit for file in files for unit in make_units(file))
    logger.info(
        "streaming %s: %d files, %.1f MB",
        path_or_name, len(files), sum(file.stat().st_size for file in files) / 1e6,
    )  # fmt: skip
    return FileSource(path_or_name, units, max_rows)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Files on the disk, or in a bucket."""

    name: str
    units: tuple[Unit, ...]
    max_rows: int | None = None

    def open(self, share: Share, epoch: int, at: State | None) -> Cursor:
        """The rows of a share in an epoch, from its start or from a saved state."""
        return _FileCursor(self, share, epoch, at)

    def identity(self) -> list[Any]:
        """What makes the rows and their order: names and sizes of the files."""
        files = {unit.path: unit.path.stat().st_size for unit in self.units}
        named = [[path.name, size] for path, size in files.items()]
        return [*named, len(self.units), self.max_rows]


class _FileCursor(Cursor):
    def __init__(
        self, source: FileSource, share: Share, epoch: int, at: State | None
    ) -> None:
        at = at or {"unit": 0, "position": START, "rows": 0}
        count, limit = len(source.units), source.max_rows
        whole = limit is None and count % share.count == 0
        super().__init__(share, epoch, limit, whole=whole, rows=int(at["rows"]))
        order = np.arange(count)
        if share.seed is not None and limit is None:
            order = random_order(count, share.seed, epoch)
        if whole:
            order = order[share.index :: share.count]
        self._units = [source.units[number] for number in order]
        self._unit = int(at["unit"])
        self._position = (int(at["position"][0]), int(at["position"][1]))
        self._reading = self._read()

    def get_state(self) -> State:
        position = list(self._position)
        return {"unit": self._unit, "position": position, "rows": self._rows}

    def _read(self) -> Iterator[tuple[Unit, Item]]:
        while self._unit < len(self._units):
            unit = self._units[self._unit]
            for item in unit.items(self._position):
                self._position = item.end
                yield unit, item
            self._unit, self._position = self._unit + 1, START

    def _make_row(self, read: tuple[Unit, Item]) -> RawRow:
        unit, item = read
        return RawRow(unit.place(item.number), unit.row(item))


@dataclasses.dataclass(frozen=True)
class HubSource:
    """A stream of `datasets`: of the hub, or one that the caller made.

    One that shuffles by itself forgets its buffer when restored: leave that to us.
    """

    name: str
    rows: IterableDataset
    max_rows: int | None = None

    def open(self, share: Share, epoch: int, at: State | None) -> Cursor:
        """The rows of a share in an epoch, from its start or from a saved state."""
        return _HubCursor(self, share, epoch, at)

    def identity(self) -> list[Any]:
        """What makes the rows and their order, as far as it can be told."""
        return [self.name, self.rows.num_shards, self.max_rows]


class _HubCursor(Cursor):
    def __init__(
        self, source: HubSource, share: Share, epoch: int, at: State | None
    ) -> None:
        limit = source.max_rows
        whole = limit is None and source.rows.num_shards % share.count == 0
        rows = int(at["rows"]) if at else 0
        super().__init__(share, epoch, limit, whole=whole, rows=rows)
        # `shard` copies: a data set keeps its state, and each cursor needs its own.
        self._dataset = source.rows.shard(
            share.count if whole else 1,
            (share.index + epoch) % share.count if whole else 0,
            contiguous=False,
        )
        self._place = f"{source.name} row"
        if whole and share.count > 1:
            self._place = f"{source.name} (share {share.index} of {share.count}) row"
        if at is not None:
            self._dataset.load_state_dict(copy.deepcopy(at["hub"]))
        self._reading = iter(self._dataset)

    def get_state(self) -> State:
        hub = copy.deepcopy(self._dataset.state_dict())
        return {"hub": hub, "rows": self._rows}

    def _make_row(self, read: Mapping[str, Any]) -> RawRow:
        return RawRow(f"{self._place} {self._rows}", drop_filled(read))


Source: TypeAlias = FileSource | HubSource


def head(source: Source, count: int | None) -> HeldRows:
    """The first rows of a stream, in the order of its files; all if None."""
    rows = list(itertools.islice(source.open(Share(), 0, None), count))
    return HeldRows(tuple(r.row for r in rows), tuple(r.place for r in rows))

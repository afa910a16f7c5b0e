"""Where streamed rows come from, and which of them each share of the devices reads.

A stream is dealt out in `share.count` shares, one a data-parallel device, whichever
process holds it. Whole units (files, parquet row groups) go to a share where their
number divides evenly; otherwise every share reads all units and keeps one row in
`share.count`. Which ones moves on from epoch to epoch, and so does the units' order.
"""

import copy
import dataclasses
import itertools
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import datasets
import numpy as np

from jaxtrain.data.rows.files import START, Unit, make_units
from jaxtrain.data.rows.formats import BadRow, UnreadableRow
from jaxtrain.data.rows.places import HeldRows
from jaxtrain.data.rows.source import load_hub, looks_local, split_aliases, split_files

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


class Cursor(Protocol):
    """The rows of one epoch in one share. The state is behind the last row given."""

    def __iter__(self) -> Iterator[RawRow]: ...

    def __next__(self) -> RawRow: ...

    def get_state(self) -> State: ...


class Source(Protocol):
    """A data set that is read as a stream."""

    @property
    def name(self) -> str: ...

    def open(self, share: Share, epoch: int, at: State | None) -> Cursor: ...

    def identity(self) -> list[Any]: ...


def random_order(count: int, *key: int) -> np.ndarray:
    """int64[count]: a permutation drawn from a key of non-negative integers."""
    # Raw bits: the same under every numpy.
    random = np.random.Philox(np.random.SeedSequence(key))
    return np.argsort(random.random_raw(count), kind="stable")


def open_stream(
    path_or_name: str, *, split: str = "train", max_rows: int | None = None
) -> Source:
    """A file, a folder (see `source.load_rows`) or a data set of the hub.

    Args:
        max_rows: read only the first rows.

    Raises:
        ValueError: nothing to read there, or no way to read it as a stream.
    """
    path = pathlib.Path(path_or_name).expanduser()
    if path.is_dir():
        files = _saved_files(path, split) or split_files(path, split)
    elif path.exists():
        files = [path]
    elif looks_local(path_or_name):
        raise ValueError(f"data path {path_or_name!r} does not exist")
    else:
        rows = load_hub(path_or_name, split, streaming=True)
        return HubSource(path_or_name, rows, max_rows)
    units = tuple(unit for file in files for unit in make_units(file))
    readers = sorted({unit.reader for unit in units})
    if len(readers) > 1:
        raise ValueError(f"{path} mixes formats {readers}: keep one in a folder")
    logger.info(
        "streaming %s: %d files, %.1f MB",
        path, len(files), sum(file.stat().st_size for file in files) / 1e6,
    )  # fmt: skip
    return FileSource(path_or_name, units, max_rows)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Local files."""

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


class _FileCursor:
    def __init__(
        self, source: FileSource, share: Share, epoch: int, at: State | None
    ) -> None:
        count, limit = len(source.units), source.max_rows
        order = np.arange(count)
        if share.seed is not None and limit is None:
            order = random_order(count, share.seed, epoch)
        by_unit = limit is None and count % share.count == 0
        if by_unit:
            order = order[share.index :: share.count]
        self._units = [source.units[number] for number in order]
        self._dealt = 1 if by_unit else share.count
        self._mine = 0 if by_unit else (share.index + epoch) % share.count
        self._limit = limit
        at = at or {"unit": 0, "position": START, "rows": 0}
        self._unit, self._rows = int(at["unit"]), int(at["rows"])
        self._position = (int(at["position"][0]), int(at["position"][1]))
        self._reading = self._read()

    def __iter__(self) -> Iterator[RawRow]:
        return self

    def __next__(self) -> RawRow:
        return next(self._reading)

    def get_state(self) -> State:
        return {
            "unit": self._unit,
            "position": list(self._position),
            "rows": self._rows,
        }

    def _read(self) -> Iterator[RawRow]:
        while self._unit < len(self._units):
            unit = self._units[self._unit]
            for item in unit.items(self._position):
                if self._limit is not None and self._rows >= self._limit:
                    return
                self._position = item.end
                self._rows += 1
                if (self._rows - 1) % self._dealt != self._mine:
                    continue
                try:
                    yield RawRow(unit.place(item), unit.parse(item))
                except BadRow as bad:
                    yield RawRow(unit.place(item), UnreadableRow(str(bad)))
            self._unit, self._position = self._unit + 1, START


@dataclasses.dataclass(frozen=True)
class HubSource:
    """A stream of `datasets`: of the hub, or one that the caller made.

    One that shuffles by itself forgets its buffer when restored: leave that to us.
    """

    name: str
    rows: datasets.IterableDataset
    max_rows: int | None = None

    def open(self, share: Share, epoch: int, at: State | None) -> Cursor:
        """The rows of a share in an epoch, from its start or from a saved state."""
        return _HubCursor(self, share, epoch, at)

    def identity(self) -> list[Any]:
        """What makes the rows and their order, as far as it can be told."""
        return [self.name, self.rows.num_shards, self.max_rows]


class _HubCursor:
    def __init__(
        self, source: HubSource, share: Share, epoch: int, at: State | None
    ) -> None:
        by_shard = source.max_rows is None and source.rows.num_shards % share.count == 0
        mine = (share.index + epoch) % share.count
        # `shard` copies: a data set keeps its state, and each cursor needs its own.
        rows = source.rows.shard(
            share.count if by_shard else 1, mine if by_shard else 0, contiguous=False
        )
        self._dealt = 1 if by_shard else share.count
        self._mine = 0 if by_shard else mine
        self._dataset, self._limit = rows, source.max_rows
        self._place = f"{source.name} row"
        if by_shard and share.count > 1:
            self._place = f"{source.name} (share {share.index} of {share.count}) row"
        self._rows = 0
        if at is not None:
            self._rows = int(at["rows"])
            rows.load_state_dict(copy.deepcopy(at["hub"]))
        self._iterator = iter(rows)

    def __iter__(self) -> Iterator[RawRow]:
        return self

    def __next__(self) -> RawRow:
        while True:
            if self._limit is not None and self._rows >= self._limit:
                raise StopIteration
            row = next(self._iterator)
            self._rows += 1
            if (self._rows - 1) % self._dealt == self._mine:
                return RawRow(f"{self._place} {self._rows}", row)

    def get_state(self) -> State:
        hub = copy.deepcopy(self._dataset.state_dict())
        return {"hub": hub, "rows": self._rows}


def head(source: Source, count: int | None) -> HeldRows:
    """The first rows of a stream, in the order of its files; all if None."""
    rows = list(itertools.islice(source.open(Share(), 0, None), count))
    return HeldRows(tuple(r.row for r in rows), tuple(r.place for r in rows))


def _saved_files(folder: pathlib.Path, split: str) -> list[pathlib.Path] | None:
    """The files of a folder that `save_to_disk` wrote, or None."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        for alias in split_aliases(split):
            if alias in splits:
                return _saved_files(folder / alias, split)
        raise ValueError(f"{folder} has no split {split!r}, only {sorted(splits)}")
    if not (folder / "state.json").is_file():
        return None
    saved = json.loads((folder / "state.json").read_text())
    return [folder / file["filename"] for file in saved["_data_files"]]

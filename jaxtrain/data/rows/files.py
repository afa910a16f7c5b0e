"""Rows of one file after another, never all in memory, from any position onward.

A unit is what is read by itself: a file, or a row group of a parquet file. A position
in it is two integers, which a checkpoint keeps. Going back to one costs, by format:

    jsonl, txt, csv     nothing: a byte offset
    the same as .gz     decompressing the file up to it, without parsing
    parquet             decoding one row group up to it
    arrow               nothing: a record batch, mapped into memory
"""

import csv
import dataclasses
import gzip
import io
import json
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.data.rows.formats import BadRow, UnreadableRow

# Suffix of a file (without .gz) -> reader in `datasets`, and here.
READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
}
Position = tuple[int, int]
START: Position = (0, 0)

_BATCH_ROWS = 1000  # of parquet rows decoded at once
_BOM = b"\xef\xbb\xbf"


class Item(NamedTuple):
    """One row, not parsed yet: its line or row number from 1, and where it ends."""

    payload: Any
    number: int
    end: Position


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file, or (`group`) one row group of a parquet file."""

    path: pathlib.Path
    reader: str
    group: int = 0

    def items(self, start: Position = START) -> Iterator[Item]:
        """The rows behind a position.

        Raises:
            ValueError: the file cannot be read; names it.
        """
        try:
            yield from _FORMATS[self.reader][0](self, start)
        except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error) as error:
            raise ValueError(f"cannot read {self.path}: {error}") from error

    def parse(self, item: Item) -> dict[str, Any]:
        """The row of an item. Raises BadRow where it is none."""
        return _FORMATS[self.reader][1](item.payload)

    def row(self, item: Item) -> Mapping[str, Any]:
        """The row of an item; an `UnreadableRow` where it is none."""
        try:
            return self.parse(item)
        except BadRow as bad:
            return UnreadableRow(str(bad))

    def place(self, item: Item) -> str:
        """Where an item stands, for messages."""
        kind = "row" if self.reader in ("parquet", "arrow") else "line"
        return f"{self.path.name} {kind} {item.number}"


def reader_of(file: pathlib.Path) -> str | None:
    """What reads a file, told by its suffix; None for other files."""
    name = file.name.lower().removesuffix(".gz")
    return READERS.get(pathlib.PurePath(name).suffix)


def is_read_by_rows(path: pathlib.Path) -> bool:
    """Whether `make_units` takes a data file: not one JSON array, nor Arrow in gzip."""
    name = path.name.lower()
    if name.removesuffix(".gz").endswith(".json"):
        return _first_byte(path) != b"["
    return not (reader_of(path) in ("parquet", "arrow") and name.endswith(".gz"))


def make_units(path: pathlib.Path) -> list[Unit]:
    """The units of a data file.

    Raises:
        ValueError: a format that cannot be read as a stream; says what to do.
    """
    name = path.name.lower()
    suffix = pathlib.PurePath(name.removesuffix(".gz")).suffix
    reader = reader_of(path)
    if reader is None:
        raise ValueError(f"{path} has no known suffix: use one of {', '.join(READERS)}")
    if reader == "csv" and suffix == ".tsv":
        reader = "tsv"
    if reader in ("parquet", "arrow") and name.endswith(".gz"):
        raise ValueError(
            f"data.streaming = True: {path} cannot be read from the middle; decompress "
            f"it (gunzip), as {reader} compresses by itself"
        )
    if suffix == ".json" and _first_byte(path) == b"[":
        raise ValueError(
            f"data.streaming = True: {path} is one JSON array, which has to be read as "
            "a whole; write one object a line (jq -c '.[]' FILE > FILE.jsonl), or set "
            "data.streaming = false"
        )
    if reader != "parquet":
        return [Unit(path, reader)]
    try:
        groups = pq.read_metadata(path).num_row_groups
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return [Unit(path, reader, group) for group in range(groups)]


def _open(path: pathlib.Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), 1 << 20)
    return path.open("rb", buffering=1 << 20)


def _first_byte(path: pathlib.Path) -> bytes:
    with _open(path) as file:
        return file.read(4096).removeprefix(_BOM).lstrip()[:1]


# --- lines ------------------------------------------------------------------------


def _lines(unit: Unit, start: Position) -> Iterator[Item]:
    """Lines that are not blank. A position is (byte offset, line number)."""
    offset, number = start
    with _open(unit.path) as file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            number += 1
            if not line.isspace():
                yield Item(line, number, (offset, number))


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(_BOM))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRow(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow("is not a JSON object")
    return row


def _parse_text(line: bytes) -> dict[str, Any]:
    try:
        text = line.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8 ({error})") from None
    return {"text": text.removesuffix("\n").removesuffix("\r")}


# --- csv --------------------------------------------------------------------------


def _csv(unit: Unit, start: Position) -> Iterator[Item]:
    """Records, which may span lines; the reader takes no line before it needs it."""
    csv.field_size_limit(sys.maxsize)  # documents are longer than the default
    delimiter = "\t" if unit.reader == "tsv" else ","
    with _open(unit.path) as file:
        offset, number = START

        def lines() -> Iterator[str]:
            nonlocal offset, number
            while line := file.readline():
                offset, number = offset + len(line), number + 1
                yield line.removeprefix(_BOM).decode(errors="replace")

        header = next(csv.reader(lines(), delimiter=delimiter), None)
        if header is None:
            return
        if start != START:
            offset, number = start
            file.seek(offset)
        for cells in csv.reader(lines(), delimiter=delimiter):
            if cells:
                yield Item((header, cells), number, (offset, number))


def _parse_csv(payload: tuple[list[str], list[str]]) -> dict[str, Any]:
    header, cells = payload
    if len(cells) != len(header):
        raise BadRow(f"has {len(cells)} cells, the header has {len(header)}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    # The verdict of a labeled row; every other column that is read is text.
    verdict = {"true": True, "1": True, "false": False, "0": False}
    if "label" in row:
        row["label"] = verdict.get(row["label"].lower(), row["label"])
    return row


# --- columns ----------------------------------------------------------------------


def _parquet(unit: Unit, start: Position) -> Iterator[Item]:
    """Rows of a row group. A position is (rows of the group read, 0)."""
    done, at = start[0], 0
    with pq.ParquetFile(unit.path, memory_map=True) as file:
        groups = [file.metadata.row_group(group) for group in range(unit.group)]
        before = sum(group.num_rows for group in groups)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[unit.group]):
            for index in range(max(done - at, 0), len(batch)):
                end = at + index + 1
                yield Item((batch, index), before + end, (end, 0))
            at += len(batch)


def _arrow(unit: Unit, start: Position) -> Iterator[Item]:
    """Rows of an IPC stream or file. A position is (record batch, rows of it read)."""
    with pa.memory_map(str(unit.path)) as source:
        before = 0
        for number, batch in enumerate(_record_batches(source)):
            if number >= start[0]:
                done = start[1] if number == start[0] else 0
                for index in range(done, len(batch)):
                    end = (number, index + 1)
                    yield Item((batch, index), before + index + 1, end)
            before += len(batch)


def _record_batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        return (file.get_batch(i) for i in range(file.num_record_batches))
    return iter(reader)


def _parse_cells(payload: tuple[pa.RecordBatch, int]) -> dict[str, Any]:
    batch, index = payload
    names = batch.schema.names
    return {name: batch.column(i)[index].as_py() for i, name in enumerate(names)}


_Read: TypeAlias = Callable[[Unit, Position], Iterator[Item]]
_FORMATS: Mapping[str, tuple[_Read, Callable[[Any], dict[str, Any]]]] = {
    "json": (_lines, _parse_json),
    "text": (_lines, _parse_text),
    "csv": (_csv, _parse_csv),
    "tsv": (_csv, _parse_csv),
    "parquet": (_parquet, _parse_cells),
    "arrow": (_arrow, _parse_cells),
}

"""Rows of local data files, the one place where their formats are parsed.

Rows in memory (`indexed.FileRows`) and streams (`stream.source`) both read through the
units here, so a file means the same to both. A unit is what is read by itself: a file,
or a row group of a parquet file. A position in it is two integers, which a checkpoint
keeps. Going back to one costs, by format:

    jsonl, txt, csv     nothing: a byte offset
    a JSON array        nothing: a byte offset
    the same as .gz     decompressing the file up to it, without parsing
    parquet             decoding one row group up to it
    arrow               nothing: a record batch, mapped into memory
    parquet, arrow .gz  decompressing all of the file into memory
    array_record        nothing: a record's number

In a bucket, the same but for arrow, whose batches before the position are read, and for
array_record, which is copied to the local disk file by file as it is opened.

Text is UTF-8, with or without a byte order mark. A line that is not is a bad row; a
file in UTF-16 or UTF-32 is refused as a whole.
"""

import array
import csv
import dataclasses
import gzip
import io
import json
import pathlib
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.data.rows.array_records import count_records, parse_example, read_records
from jaxtrain.data.rows.formats import BadRow, UnreadableRow, refuse_surrogates
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.reading import BLOCK as REMOTE_CHUNK
from jaxtrain.storage.reading import AnyFile, RemoteFile

# Suffix of a file (without .gz) -> how it is read.
READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".array_record": "array_record",
}
SUFFIXES = f"{', '.join([*READERS][:-1])} (each also .gz), {[*READERS][-1]}"
_SHARD = re.compile(r"(?<=\.array_record)-\d+-of-\d+$")  # TensorFlow Datasets' names
Position = tuple[int, int]
START: Position = (0, 0)

_BATCH_ROWS = 1000  # of parquet rows decoded at once
_CHUNK = 1 << 20  # bytes of a JSON array that are read at once
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape; half of one, or a pair
_CONVERT = "convert it: iconv -f {} -t UTF-8 OLD > NEW"


class Item(NamedTuple):
    """A row that is not parsed yet, its line or row number (from 1), and its end."""

    payload: Any
    number: int
    end: Position


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file, or (`group`) one row group of a parquet file.

    `is_checked`: the file was read as a whole before, and has not changed since.
    """

    path: AnyFile
    reader: str
    group: int = 0
    is_checked: bool = False

    def items(self, start: Position = START) -> Iterator[Item]:
        """The rows behind a position.

        Raises:
            ValueError: the file cannot be read; names it.
        """
        try:
            yield from _FORMATS[self.reader][0](self, start)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise ValueError(f"cannot read {self.path}: {error}") from error

    def parse(self, item: Item) -> dict[str, Any]:
        """The row of an item. Raises BadRow if the item is not a row."""
        return _FORMATS[self.reader][1](item.payload)

    def row(self, item: Item) -> Mapping[str, Any]:
        """The row of an item, or an `UnreadableRow` if the item is not a row."""
        try:
            return self.parse(item)
        except BadRow as bad:
            return UnreadableRow(str(bad), self.place(item.number))

    def place(self, number: int) -> str:
        """Where an item of that number stands, for messages."""
        by_rows = self.reader in ("parquet", "arrow", "array", "array_record")
        return f"{self.path.name} {'row' if by_rows else 'line'} {number}"

    def index(self) -> np.ndarray:
        """int64[rows, 3]: each row's position, as `items` takes it, and its number.

        Raises:
            ValueError: the file cannot be read; names it.
        """
        if self.reader == "array_record":
            return _numbered(count_records(self.path), 0)
        if self.reader == "parquet":
            try:
                return _index_row_group(self)
            except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
                raise ValueError(f"cannot read {self.path}: {error}") from error
        ends = array.array("q")  # of integers, not of objects
        for item in self.items():
            ends.extend((*item.end, item.number))
        table = np.frombuffer(ends, np.int64).reshape(-1, 3)
        starts = np.concatenate([np.zeros((1, 2), np.int64), table[:-1, :2]])
        return np.concatenate([starts[: len(table)], table[:, 2:]], axis=1)


def reader_of(file: pathlib.PurePath | RemoteFile) -> str | None:
    """What reads a file, told by its suffix; None for other files."""
    return READERS.get(pathlib.PurePath(_bare_name(file)).suffix)


def make_units(path: AnyFile) -> list[Unit]:
    """The units of a data file.

    Raises:
        ValueError: no known suffix, an encoding other than UTF-8, or a file that
            cannot be read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, forever
        raise ValueError(f"{path} is a pipe, a device or a folder: name a file")
    reader = reader_of(path)
    if reader is None:
        raise ValueError(f"{path} has no known suffix: use one of {SUFFIXES}")
    if reader == "array_record" and is_compressed(path):
        raise ValueError(f"{path}: decompress it, so that its records can be found")
    try:
        if reader == "parquet":
            with _columns(path) as source:
                groups = pq.read_metadata(source).num_row_groups
            return [Unit(path, reader, group) for group in range(groups)]
        if reader in ("arrow", "array_record"):
            return [Unit(path, reader)]
        with _open(path) as file:
            head = file.read(4096)
        if encoding := _wide_encoding(head):
            raise ValueError(
                f"{path} line 1: the text is {encoding}, and only UTF-8 is read; "
                + _CONVERT.format(encoding)
            )
        if reader == "json" and _is_array(path, head):
            reader = "array"
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return [Unit(path, reader)]


def _bare_name(path: pathlib.PurePath | RemoteFile) -> str:
    return _SHARD.sub("", path.name.lower().removesuffix(".gz"))


def is_compressed(path: AnyFile) -> bool:
    """Whether a file is read through gzip."""
    return path.suffix.lower() == ".gz"


def _open(path: AnyFile) -> io.BufferedReader:
    if is_compressed(path):
        packed = path.open("rb") if isinstance(path, RemoteFile) else path
        return io.BufferedReader(gzip.open(packed, "rb"), _CHUNK)
    chunk = REMOTE_CHUNK if isinstance(path, RemoteFile) else _CHUNK
    return io.BufferedReader(path.open("rb", buffering=0), chunk)


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32, by a byte order mark or its zero bytes; else ""."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # Without a mark: text of letters has a zero in every second byte, or three of four.
    evens, odds = head[:8:2], head[1:8:2]
    for zeros, others, order in ((evens, odds, "BE"), (odds, evens, "LE")):
        if zeros and not any(zeros):
            quiet = others.count(0) >= len(others) // 2
            return f"UTF-{32 if quiet else 16}{order}"
    return ""


def _is_array(path: AnyFile, head: bytes) -> bool:
    """Whether a file is one JSON array of rows, not one row a line."""
    text = head.removeprefix(_BOM).lstrip(_SPACE)
    if text[:1] != b"[":
        return False
    if _bare_name(path).endswith(".json"):
        return True
    # In a .jsonl, a first line that is an array of something else is a bad row, and so
    # is a whole array of rows if other lines follow.
    if text[1:].lstrip(_SPACE)[:1] not in (b"{", b"]"):
        return False
    with _open(path) as file:
        lines = (line for line in file if not line.isspace())
        try:
            json.loads(next(lines).removeprefix(_BOM))
        except (ValueError, RecursionError):
            return True
        return next(lines, None) is None


# --- lines ------------------------------------------------------------------------


def _lines(unit: Unit, start: Position) -> Iterator[Item]:
    """Lines that are not blank. A position is (byte offset, line number)."""
    offset, number = start
    with _open(unit.path) as file:
        file.seek(offset)
        for line in file:
            text = line if offset else line.removeprefix(_BOM)
            offset += len(line)
            number += 1
            if text and not text.isspace():
                yield Item(text, number, (offset, number))


def _parse_json(line: bytes) -> dict[str, Any]:
    """As Python's json: the last of equal keys counts, integers are exact."""
    # A mark stands inside of a file where files were joined.
    text = _decode(line.removeprefix(_BOM).rstrip(_SPACE))
    try:
        row = json.loads(text)
    except RecursionError:
        raise BadRow("is not JSON that can be read (nested too deeply)") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if error.lineno > 1:  # of an element of an array
            place = f"its line {error.lineno} {place}"
        hint = ""
        if text.strip() in ("{", "["):
            hint = "; a row is one line: jq -c . OLD > NEW"
        raise BadRow(f"is not JSON ({error.msg} at {place}){hint}") from None
    except ValueError as error:  # an integer of too many digits
        raise BadRow(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow("is not a JSON object")
    if "\\u" in text and _SURROGATE.search(text):
        try:
            refuse_surrogates(json.dumps(row, ensure_ascii=False))
        except RecursionError:
            raise BadRow("is not JSON that can be read (nested too deeply)") from None
    return row


def _parse_text(line: bytes) -> dict[str, Any]:
    return {"text": _decode(line).removesuffix("\n").removesuffix("\r")}


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        if line.startswith(b"\x1f\x8b"):
            raise BadRow(
                "is compressed by gzip: let the file's name end in .gz"
            ) from None
        raise BadRow(_not_utf8(error.object[error.start])) from None


def _not_utf8(byte: int) -> str:
    hint = _CONVERT.format("LATIN1")
    return f"is not UTF-8 (byte 0x{byte:02x}); if the file is Latin-1, {hint}"


# --- one JSON array ---------------------------------------------------------------


def _elements(unit: Unit, start: Position) -> Iterator[Item]:
    """The elements of an array. A position is (byte offset, rows read)."""
    offset, number = start
    with _open(unit.path) as file:
        file.seek(offset)
        scanner = _ArrayScanner(file, unit.path)
        if start == START:
            scanner.skip(_BOM)
            scanner.expect(b"[")
        while not scanner.ends():
            if number:
                scanner.expect(b",")
            number += 1
            element = scanner.take_element(number)
            yield Item(element, number, (offset + scanner.taken, number))


class _ArrayScanner:
    """Cuts the elements of a JSON array out of a file, holding few of them at a time.

    Bytes are scanned as Latin-1, in which all that structures JSON is the same and one
    character is one byte; each element is decoded and parsed by itself.
    """

    _scan = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)

    def __init__(self, file: IO[bytes], path: AnyFile) -> None:
        self.taken = 0  # bytes of the file before what comes next
        self._file, self._path = file, path
        self._text, self._at, self._ended = "", 0, False

    def skip(self, mark: bytes) -> None:
        """Skip the bytes `mark` if they come next."""
        self._read(_CHUNK)
        if self._text.startswith(mark.decode("latin-1"), self._at):
            self._move(self._at + len(mark))

    def peek(self) -> bytes:
        """The next byte that is no space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at].encode("latin-1")
                self._move(self._at + 1)
            if self._ended:
                return b""
            self._read(_CHUNK)

    def expect(self, mark: bytes) -> None:
        """Skip white space and the byte `mark`, which must come next.

        Raises:
            ValueError: something else comes next.
        """
        if (found := self.peek()) != mark:
            shown = repr(found.decode("latin-1")) if found else "the file's end"
            raise self._broken(f"{shown} stands where {mark.decode()!r} should")
        self._move(self._at + 1)

    def ends(self) -> bool:
        """Whether the array ends here.

        Raises:
            ValueError: it ends, but something follows it.
        """
        if self.peek() != b"]":
            return False
        self._move(self._at + 1)
        if self.peek():
            raise self._broken("there is something after its end")
        return True

    def take_element(self, number: int) -> bytes:
        """The bytes of the next element.

        Raises:
            ValueError: what comes next is not valid JSON.
        """
        self.peek()
        while True:
            try:
                _, end = self._scan.raw_decode(self._text, self._at)
            except RecursionError:
                raise self._broken(f"row {number} is nested too deeply") from None
            except ValueError as error:
                if self._ended:
                    reason = getattr(error, "msg", error)
                    raise self._broken(f"row {number}: {reason}") from None
            else:
                # A number at the end of what was read may go on behind it.
                if end < len(self._text) or self._ended:
                    element = self._text[self._at : end]
                    self._move(end)
                    return element.encode("latin-1")
            self._read(max(_CHUNK, len(self._text) - self._at))

    def _move(self, at: int) -> None:
        self.taken += at - self._at
        self._at = at

    def _read(self, size: int) -> None:
        chunk = self._file.read(size)
        self._ended = not chunk
        self._text = self._text[self._at :] + chunk.decode("latin-1")
        self._at = 0

    def _broken(self, reason: str) -> ValueError:
        """An error that names the line, for which the file is read again."""
        position = self._file.tell() - (len(self._text) - self._at)
        with _open(self._path) as file:
            line = 1 + file.read(position).count(b"\n")
        return ValueError(f"{self._path} line {line}: is not one JSON array ({reason})")


# --- csv --------------------------------------------------------------------------


class _Lines(Iterator[str]):
    """Lines of a file as the csv reader asks for them; bytes that are not UTF-8 stay.

    `offset` is behind the last line given, `number` is its number.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.offset = self.number = 0

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        text = line if self.offset else line.removeprefix(_BOM)
        self.offset += len(line)
        self.number += 1
        return text.decode(errors="surrogateescape")


@dataclasses.dataclass(frozen=True)
class _Record:
    """Cells of a csv file, or why there are none."""

    header: list[str]
    cells: list[str]
    reason: str = ""


def _csv(unit: Unit, start: Position) -> Iterator[Item]:
    """Records, which may span lines. A position is (byte offset, line number)."""
    csv.field_size_limit(sys.maxsize)  # documents are longer than the default
    delimiter = "\t" if unit.reader == "tsv" else ","
    with _open(unit.path) as file:
        lines = _Lines(file)
        header = _read_header(unit, csv.reader(lines, delimiter=delimiter))
        if header is None:
            return
        if start != START:
            lines.offset, lines.number = start
            file.seek(lines.offset)
        records = csv.reader(lines, delimiter=delimiter)
        while True:
            first, begin = lines.number + 1, lines.offset
            try:
                cells, reason = next(records), ""
            except StopIteration:
                return
            except csv.Error as error:  # the next line starts a new record
                cells, reason = [], _csv_reason(error)
            if not file.peek(1) and _is_open(unit, begin, delimiter):
                reason = "opens a quote that is never closed"
            blank = len(cells) == 1 < len(header) and not cells[0].strip()
            if reason or (cells and not blank):
                record = _Record(header, cells, reason)
                yield Item(record, first, (lines.offset, lines.number))


def _read_header(unit: Unit, records: Iterator[list[str]]) -> list[str] | None:
    """The names of the columns; None of an empty file.

    Raises:
        ValueError: they are not UTF-8, or two are the same.
    """
    try:
        header = next((cells for cells in records if cells), None)
    except csv.Error as error:
        raise ValueError(f"{unit.path} line 1: {_csv_reason(error)}") from error
    for name in header or ():
        if byte := _undecoded(name):
            raise ValueError(f"{unit.path} line 1: the header {_not_utf8(byte)}")
        if name and header and header.count(name) > 1:
            raise ValueError(
                f"{unit.path} line 1: two columns are called {shown(name)}; rename one"
            )
    return header


def _csv_reason(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "has a carriage return outside of quotes; end lines with LF or CR LF"
    return f"is not CSV ({error})"


def _is_open(unit: Unit, begin: int, delimiter: str) -> bool:
    """Whether the file's last record, which begins there, ends in an open quote.

    The csv reader takes the file's end for the quote unless it is strict.
    """
    with _open(unit.path) as file:
        file.seek(begin)
        text = file.read().decode(errors="surrogateescape")
    try:
        list(
            csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        )
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _undecoded(text: str) -> int:
    """The first byte that was not UTF-8, kept as U+DC80 and up by Python; else 0."""
    if text.isascii():
        return 0
    return next((ord(c) - 0xDC00 for c in text if "\udc80" <= c <= "\udcff"), 0)


def _parse_csv(record: _Record) -> dict[str, Any]:
    if record.reason:
        raise BadRow(record.reason)
    header, cells = record.header, record.cells
    if byte := next(filter(None, map(_undecoded, cells)), 0):
        raise BadRow(_not_utf8(byte))
    if len(cells) != len(header):
        raise BadRow(f"has {len(cells)} cells, the header has {len(header)}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    # The verdict of a labeled row; every other column that is read is text.
    verdict = {"true": True, "1": True, "false": False, "0": False}
    if "label" in row:
        row["label"] = verdict.get(row["label"].lower(), row["label"])
    return row


# --- columns ----------------------------------------------------------------------


def _columns(path: AnyFile) -> pa.NativeFile:
    """Open a columnar file: mapped into memory, or decompressed into memory.

    From a file in a bucket only the requested parts are read.
    """
    if is_compressed(path):
        with _open(path) as file:
            return pa.BufferReader(file.read())
    if isinstance(path, RemoteFile):
        return pa.PythonFile(path.open("rb", buffering=0), "r")
    return pa.memory_map(str(path))


def _parquet(unit: Unit, start: Position) -> Iterator[Item]:
    """Rows of a row group. A position is (rows of the group read, 0)."""
    done, at = start[0], 0
    with _columns(unit.path) as source, pq.ParquetFile(source) as file:
        before = _rows_before(unit, file)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[unit.group]):
            if not unit.is_checked:
                _check_columns(batch)
            for index in range(max(done - at, 0), len(batch)):
                end = at + index + 1
                yield Item((batch, index), before + end, (end, 0))
            at += len(batch)


def _index_row_group(unit: Unit) -> np.ndarray:
    with _columns(unit.path) as source, pq.ParquetFile(source) as file:
        before = _rows_before(unit, file)
        return _numbered(file.metadata.row_group(unit.group).num_rows, before)


def _numbered(count: int, before: int) -> np.ndarray:
    """The index of rows whose position is (rows before it, 0)."""
    rows = np.arange(count)
    return np.stack([rows, np.zeros_like(rows), before + rows + 1], axis=1)


def _rows_before(unit: Unit, file: pq.ParquetFile) -> int:
    groups = (file.metadata.row_group(group) for group in range(unit.group))
    return sum(group.num_rows for group in groups)


def _arrow(unit: Unit, start: Position) -> Iterator[Item]:
    """Rows of an IPC stream or file. A position is (record batch, rows of it read)."""
    with _columns(unit.path) as source:
        before = 0
        for number, batch in enumerate(_record_batches(source)):
            if number >= start[0]:
                if not unit.is_checked:
                    _check_columns(batch)
                done = start[1] if number == start[0] else 0
                for index in range(done, len(batch)):
                    end = (number, index + 1)
                    yield Item((batch, index), before + index + 1, end)
            before += len(batch)


def _record_batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        return (file.get_batch(i) for i in range(file.num_record_batches))
    return iter(reader)


def _check_columns(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid where a damaged file's offsets lead out of its own bytes.

    Arrow follows offsets unchecked, and ends the process at those of other places. Text
    that is not UTF-8 makes one row bad, not the file; but of a nested column Arrow then
    looks at no offsets behind it, so that the file is refused.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            is_text = column.type in (pa.string(), pa.large_string())
            if not (is_text and "UTF8" in str(error)):
                raise pa.ArrowInvalid(
                    f"column {shown(name)} is damaged ({error}); write the file again"
                ) from error


def _parse_cells(payload: tuple[pa.RecordBatch, int]) -> dict[str, Any]:
    batch, index = payload
    names = batch.schema.names
    try:
        row = {name: batch.column(i)[index].as_py() for i, name in enumerate(names)}
    except ValueError as error:  # text that is not UTF-8, a date that is none
        raise BadRow(f"cannot be read from its columns ({error})") from None
    return drop_filled(row)


def drop_filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow columns without the nulls that Arrow fills into it.

    Arrow gives every struct of a column the keys of all of them, null where a row had
    none: an argument of one tool would stand in the calls of all. So a null inside of
    a struct is taken for a key that is not there; a null that the data did hold cannot
    be told from it. A column that is null, or an element of a list, stays.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        # The elements are of one type: numbers and texts hold nothing.
        first = next((element for element in value if element is not None), None)
        if isinstance(first, dict | list):
            return [_without_nulls(element) for element in value]
    return value


# --- records ----------------------------------------------------------------------


def _records(unit: Unit, start: Position) -> Iterator[Item]:
    """Records of an ArrayRecord file. A position is (records read, 0)."""
    for at, record in enumerate(read_records(unit.path, start[0]), start[0] + 1):
        yield Item(record, at, (at, 0))


def _parse_record(record: bytes) -> dict[str, Any]:
    if (row := parse_example(record)) is not None:
        return row
    if record.lstrip(_SPACE)[:1] == b"{":
        return _parse_json(record)
    raise BadRow(
        f"is neither a JSON object nor a tf.train.Example: it begins with"
        f" {record[:8]!r}; write a JSON object a record"
    )


_Read: TypeAlias = Callable[[Unit, Position], Iterator[Item]]
_FORMATS: Mapping[str, tuple[_Read, Callable[[Any], dict[str, Any]]]] = {
    "json": (_lines, _parse_json),
    "array": (_elements, _parse_json),
    "text": (_lines, _parse_text),
    "csv": (_csv, _parse_csv),
    "tsv": (_csv, _parse_csv),
    "parquet": (_parquet, _parse_cells),
    "arrow": (_arrow, _parse_cells),
    "array_record": (_records, _parse_record),
}

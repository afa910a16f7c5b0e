"""Records of ArrayRecord files, and the rows in them: JSON or tf.train.Example.

A file holds byte strings by number; what they mean its writer alone knows. Two ways are
common for texts: a JSON object a record, and a `tf.train.Example` as TensorFlow
Datasets and its users write it. The latter is a protocol buffer, read here without
TensorFlow: Example.features (1) > Features.feature (1, a map) > name (1) and Feature
(2), which is bytes_list (1), float_list (2) or int64_list (3), each of `value` (1).
"""

import functools
import itertools
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxtrain.config.folders import bucket_cache
from jaxtrain.data.rows.formats import IDS, MASKS, PADDING, BadRow
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.mirror import mirror_files
from jaxtrain.storage.reading import AnyFile, RemoteFile

_AT_ONCE = 64  # records
_OPEN_FILES = 8
# No threads and no reading ahead: what is asked for is read.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# Columns whose one number is a list of one.
_LISTS = (IDS, "labels", *MASKS, PADDING)


def count_records(file: AnyFile) -> int:
    """How many records there are; of a file in a bucket in its local copy.

    Raises:
        ValueError: it is no ArrayRecord file, or the package for it is missing.
    """
    return _open(file).num_records()


def read_records(file: AnyFile, start: int = 0) -> Iterator[bytes]:
    """The records from number `start` on. A file in a bucket is copied at first.

    Raises:
        ValueError: as of `count_records`, or a record does not match its checksum.
    """
    reader = _open(file)
    count = reader.num_records()
    for at in range(start, count, _AT_ONCE):
        try:
            yield from reader.read(at, min(at + _AT_ONCE, count))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error


def _open(file: AnyFile) -> Any:
    path = file
    if isinstance(file, RemoteFile):
        path = mirror_files(file.address, {"": file}, bucket_cache())
    assert isinstance(path, pathlib.Path)
    found = path.stat()
    reader = _reader(str(path), found.st_size, found.st_mtime_ns)
    if not reader.ok():
        _reader.cache_clear()
        raise ValueError(f"{file} is not an ArrayRecord file, or its end is missing")
    return reader


@functools.lru_cache(maxsize=_OPEN_FILES)
def _reader(path: str, size: int, changed_ns: int) -> Any:
    """Reads ranges of records; has no position, so that threads may share it."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ValueError(
            f"{path} is read by the package array_record, which is not there ({error}):"
            " pip install array_record, or write the rows as jsonl"
        ) from error
    return array_record_module.ArrayRecordReader(path, _OPTIONS)


# --- tf.train.Example -----------------------------------------------------------------

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_Field = tuple[int, int, Any]  # number, wire type, and an integer or bytes


def parse_example(record: bytes) -> dict[str, Any] | None:
    """The row of a tf.train.Example; None of a record that is none.

    Of bytes and numbers one value is a scalar, and several are a list; columns of
    token ids and masks are always lists. Bytes are UTF-8.

    Raises:
        BadRow: a feature's bytes are no text.
    """
    try:
        features = _features(record)
    except (_NoMessageError, IndexError, struct.error):
        return None
    row: dict[str, Any] = {}
    for name, (kind, values) in features.items():
        found = _TYPES[kind](values)
        if kind == 1:
            try:
                found = [value.decode() for value in found]
            except UnicodeDecodeError as error:
                raise BadRow(
                    f"is a tf.train.Example whose {shown(name)} is no UTF-8 text"
                    f" ({error.reason} at byte {error.start})"
                ) from None
        row[name] = found[0] if len(found) == 1 and name not in _LISTS else found
    if row.get("label") in (0, 1):  # there is no type for a verdict
        row["label"] = bool(row["label"])
    return row


class _NoMessageError(Exception):
    """These bytes are no message of the kind that is looked for."""


def _features(record: bytes) -> dict[str, tuple[int, list[_Field]]]:
    """By name the kind of a feature's list and what stands in it, undecoded."""
    found = {}
    for features in _messages(record, 1):
        for entry in _messages(features, 1):
            parts = {number: value for number, _, value in _fields(entry)}
            key, feature = parts.pop(1, None), parts.pop(2, b"")
            if parts or not (isinstance(key, bytes) and isinstance(feature, bytes)):
                raise _NoMessageError
            lists = list(_fields(feature))
            if any(n not in _TYPES or t != _BYTES for n, t, _ in lists):
                raise _NoMessageError
            if lists:  # the last one counts; a feature may be empty
                kind, _, value = lists[-1]
                try:
                    name = key.decode()
                except UnicodeDecodeError:
                    raise _NoMessageError from None
                found[name] = (kind, list(_fields(value)))
    if not found:
        raise _NoMessageError
    return found


def _messages(data: bytes, number: int) -> list[bytes]:
    """The messages that `data` consists of, all of them fields of that number."""
    fields = list(_fields(data))
    if any((n, t) != (number, _BYTES) for n, t, _ in fields):
        raise _NoMessageError
    return [value for _, _, value in fields]


def _fields(data: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, kind, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise _NoMessageError
        if at + size > len(data):
            raise _NoMessageError
        yield tag >> 3, kind, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]  # IndexError: cut off
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _NoMessageError


def _bytes_of(fields: list[_Field]) -> list[bytes]:
    if any((n, t) != (1, _BYTES) for n, t, _ in fields):
        raise BadRow("is a tf.train.Example with a damaged list of bytes")
    return [value for _, _, value in fields]


def _numbers(
    one: int, unpack: Callable[[bytes], list[Any]], single: Callable[[Any], Any]
) -> Callable[[list[_Field]], list[Any]]:
    """Reads numbers that are packed, as is usual, or of wire type `one` each."""

    def read(fields: list[_Field]) -> list[Any]:
        values = []
        for number, kind, value in fields:
            if number != 1 or kind not in (_BYTES, one):
                raise BadRow("is a tf.train.Example with a damaged list of numbers")
            values.append(unpack(value) if kind == _BYTES else [single(value)])
        return list(itertools.chain.from_iterable(values))

    return read


def _unpack_floats(data: bytes) -> list[float]:
    if len(data) % 4:
        raise BadRow("is a tf.train.Example with a damaged list of numbers")
    return np.frombuffer(data, "<f4").tolist()


def _unpack_integers(data: bytes) -> list[int]:
    """Varints one after the other, as signed 64 bits."""
    found = np.frombuffer(data, np.uint8)
    if not len(found):
        return []
    ends = np.flatnonzero(found < 128) + 1
    starts = np.concatenate([[0], ends[:-1]])
    if not len(ends) or ends[-1] != len(found) or (ends - starts).max() > 10:
        raise BadRow("is a tf.train.Example with a damaged list of numbers")
    shifts = 7 * (np.arange(len(found)) - np.repeat(starts, ends - starts))
    parts = (found & 127).astype(np.uint64) << shifts.astype(np.uint64)
    return np.add.reduceat(parts, starts).view(np.int64).tolist()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_TYPES: dict[int, Callable[[list[_Field]], list[Any]]] = {
    1: _bytes_of,
    2: _numbers(_FIXED32, _unpack_floats, lambda data: struct.unpack("<f", data)[0]),
    3: _numbers(_VARINT, _unpack_integers, _signed),
}

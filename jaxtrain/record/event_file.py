"""TensorBoard's event files: scalars and texts, in a few protocol buffers.

Written here because the libraries that write them import PyTorch or TensorFlow, where
one is installed, and a run has no other use for either.

A file is a row of records, each its length, the length's checksum, the bytes of one
`Event` and their checksum. Of its messages, the fields that are used:

    Event        1 wall_time, 2 step, 3 file_version, 5 summary, 7 session_log
    SessionLog   1 status
    Summary      1 value: 1 tag, 2 simple_value, 8 tensor, 9 metadata
    metadata     1 plugin_data: 1 plugin_name
    tensor       1 dtype, 2 tensor_shape: 2 dim: 1 size; 8 string_val
"""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping

import numpy as np

_START = 1  # a session begins: TensorBoard drops earlier events from its step on
_STRING = 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how a field's value is written


class EventFile:
    """A new event file in `folder`, which hides earlier files' events from a step on.

    What was written is on disk when a method returns.
    """

    def __init__(self, folder: pathlib.Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, by seconds. The
        # nanoseconds keep a quick restart from writing over the file before.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{now}"
        self._file = (folder / name).open("xb")
        self._write(_text_field(3, "brain.Event:2"))
        self._write(
            _int_field(2, first_step) + _field(7, _BYTES, _int_field(1, _START))
        )
        self._file.flush()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by their tags, in float32."""
        for tag, value in values.items():
            with np.errstate(over="ignore"):
                number = struct.pack("<f", np.float32(value))
            self._summarize(step, _text_field(1, tag) + _field(2, _FIXED32, number))
        self._file.flush()

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Record a text, which TensorBoard shows as Markdown."""
        plugin = _field(1, _BYTES, _text_field(1, "text"))
        shape = _field(2, _BYTES, _int_field(1, 1))
        tensor = _int_field(1, _STRING) + _field(2, _BYTES, shape)
        value = (
            _text_field(1, f"{tag}/text_summary")
            + _field(8, _BYTES, tensor + _text_field(8, text))
            + _field(9, _BYTES, plugin)
        )
        self._summarize(step, value)
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        self._file.close()

    def _summarize(self, step: int, value: bytes) -> None:
        summary = _field(1, _BYTES, value)
        self._write(_int_field(2, step) + _field(5, _BYTES, summary))

    def _write(self, event: bytes) -> None:
        event = _field(1, _FIXED64, struct.pack("<d", time.time())) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _varint(number: int) -> bytes:
    """A natural number, seven bits a byte, the lowest first."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _field(number: int, kind: int, value: bytes) -> bytes:
    length = _varint(len(value)) if kind == _BYTES else b""
    return _varint(number << 3 | kind) + length + value


def _int_field(number: int, value: int) -> bytes:
    return _field(number, _VARINT, _varint(value))


def _text_field(number: int, text: str) -> bytes:
    return _field(number, _BYTES, text.encode("utf-8", errors="replace"))


def _make_crc_table() -> tuple[int, ...]:
    table = []
    for remainder in range(256):
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
        table.append(remainder)
    return tuple(table)


_CRC_TABLE = _make_crc_table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), masked as the format wants it: rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8
    return struct.pack("<I", masked & 0xFFFFFFFF)

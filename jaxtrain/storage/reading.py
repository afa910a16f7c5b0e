"""Files in a bucket as they were listed, and reading parts of them.

A `RemoteFile` has what readers of files need of a `pathlib.Path`: its name, its size,
and `open`. Nothing but the bytes that are asked for is read, long ranges as several
requests at once. All requests ask for the version that was listed, so nobody gets one
half of a file and one of what took its place. A fault of the network is tried again
within a limit (`errors.retrying`).
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.storage import folders
from jaxtrain.storage.address import AnyPath, is_remote, name
from jaxtrain.storage.errors import one_line, retrying
from jaxtrain.storage.fetch import tag_of
from jaxtrain.storage.objects import read_range

# Of a longer range, so many bytes are one request.
_PIECE = 8 << 20
READS_AT_ONCE = 32
# What a file read from front to back asks for at once.
BLOCK = 4 << 20


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file in a bucket: its address, its bytes, and its version (`fetch.tag_of`)."""

    address: str
    size: int
    tag: str

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return name(self.address)

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    def exists(self) -> bool:
        """True: it was listed."""
        return True

    def is_file(self) -> bool:
        """True: a bucket holds nothing else."""
        return True

    def stat(self) -> Any:
        """`st_size` alone, in bytes."""
        return types.SimpleNamespace(st_size=self.size)

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """A file object for reading bytes; `buffering` as of `open`.

        Raises:
            OSError: the bucket does not give it, or it is another file by now.
        """
        if mode != "rb":
            raise ValueError(f"{self.address} is opened for reading bytes alone")
        raw = _Reader(self)
        return raw if buffering == 0 else io.BufferedReader(raw, BLOCK)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a range, up to the end if `stop` is None.

        Raises:
            OSError: the bucket does not give it, or it is another file by now.
        """
        stop = self.size if stop is None else min(stop, self.size)
        places = range(start, stop, _PIECE)
        found = self.read_all([(at, min(at + _PIECE, stop)) for at in places])
        return found[0] if len(found) == 1 else b"".join(found)

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of several ranges, each by a request of its own, many at once.

        Raises:
            OSError: the bucket does not give it, or it is another file by now.
        """
        if len(ranges) == 1:
            return [self._read_piece(ranges[0])]
        return list(_pool().map(self._read_piece, ranges))

    def _read_piece(self, place: tuple[int, int]) -> bytes:
        start, stop = place
        if start == stop:
            return b""

        def read() -> bytes | None:
            found = read_range(self.address, start, stop, self.tag)
            if found is not None and len(found) != stop - start:
                raise ConnectionError(f"{len(found)} bytes came of {stop - start}")
            return found

        try:
            found = retrying(read, f"reading {self.address}")
        except Exception as error:  # the libraries have no common base of theirs
            raise OSError(f"{self.address}: {one_line(error)}") from error
        if found is None:
            raise OSError(
                f"{self.address} was replaced or deleted while it was in use: find out"
                " what writes there, and start again"
            )
        return bytes(found)


class _Reader(io.RawIOBase):
    """A raw file object on a `RemoteFile`: a read is a request for these bytes."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}
        self._at = max(bases[whence] + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        found = self._file.read(self._at, self._at + len(view))
        view[: len(found)] = found
        self._at += len(found)
        return len(found)


AnyFile = pathlib.Path | RemoteFile


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(
        READS_AT_ONCE, thread_name_prefix="bucket"
    )


def list_files(address: AnyPath) -> Mapping[str, RemoteFile]:
    """The files at an address by their paths below it; "" stands for the file itself.

    Raises:
        ValueError: a path leads out of the folder.
        OSError: there is nothing of this name, or the bucket does not give it.
    """
    found = {}
    for path, info in _listed(address).items():
        folders.refuse_escape(address, path)
        at = os.fspath(address).rstrip("/")
        whole = f"{at}/{path}" if path else at
        found[path] = RemoteFile(whole, int(info["size"]), tag_of(info))
    if not found:
        raise FileNotFoundError(f"{os.fspath(address)}: there is nothing of this name")
    return found


def _listed(address: AnyPath) -> Mapping[str, Mapping[str, Any]]:
    assert is_remote(address)
    try:
        return folders.files_below(address)
    except ValueError:
        raise
    except Exception as error:  # the libraries have no common base of theirs
        raise OSError(f"{os.fspath(address)}: {one_line(error)}") from error

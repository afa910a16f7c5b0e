"""Reading tensors of safetensors files, on the disk or in a bucket, slice by slice.

A file on the disk is mapped into memory, and a slice is a view of it, so that bytes are
read only when they are copied to their destination; safetensors would copy them once
more. From a file in a bucket only the requested rows are read; a row is what an index
into a tensor's first axis gives.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from jaxtrain.models.hf_files import read_header, reading
from jaxtrain.storage.reading import AnyFile, RemoteFile

_TYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16,
    "I16": np.int16, "U32": np.uint32, "I32": np.int32, "U64": np.uint64,
    "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


@contextlib.contextmanager
def open_weights(file: AnyFile) -> Iterator[Any]:
    """The tensors of a file: `keys()`, `get_slice(name)` and `get_tensor(name)`.

    Raises:
        ValueError: the file is damaged.
    """
    if isinstance(file, RemoteFile):
        yield RemoteTensors(file)
        return
    with reading(file), safe_open(str(file), framework="numpy"):
        pass  # it looks for damage
    yield MappedTensors(file)


class _Slice:
    """What slices tell of their tensor, as a slice of `safe_open` does."""

    kind: str
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def get_dtype(self) -> str:
        """Its type, as safetensors names it."""
        return self.kind

    def get_shape(self) -> list[int]:
        """The length of each axis."""
        return list(self.shape)


@dataclasses.dataclass(frozen=True)
class MappedSlice(_Slice):
    """A tensor in a mapped file, of which an index is a view that can't be written.

    `stored`: its bytes, as uint8.
    """

    stored: np.ndarray
    kind: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> np.ndarray:
        values = self.stored.view(_TYPES[self.kind]).reshape(self.shape)
        return np.asarray(values[index])


@dataclasses.dataclass(frozen=True)
class RemoteSlice(_Slice):
    """A tensor in a bucket that is read when indexed, like a slice of `safe_open`.

    `start` is the position of its first byte in the file. An index is one request:
    it reads the range that it asks for on the first axis with more than one place,
    and all of the axes after it, as parts of these would need a request each.
    """

    file: RemoteFile
    start: int
    kind: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> np.ndarray:
        parts = index if isinstance(index, tuple) else (index,)
        bounds = [
            range(size)[part]
            for part, size in zip(parts, self.shape, strict=False)
            if part is not Ellipsis
        ]
        # Behind axes of which one place is asked for, a range lies in one piece.
        axis = next((i for i, each in enumerate(bounds) if len(each) != 1), len(bounds))
        axis = min(axis, len(self.shape) - 1)
        dtype = np.dtype(_TYPES[self.kind])
        first, stop = 0, 1
        for at, size in enumerate(self.shape[: axis + 1]):
            part = bounds[at] if at < len(bounds) else range(size)
            first, stop = first * size + part.start, first * size + part.stop
        row = math.prod(self.shape[axis + 1 :]) * dtype.itemsize
        stop = max(first, stop)
        data = self.file.read(self.start + first * row, self.start + stop * row)
        ahead = [1] * max(axis, 0) + [stop - first] if self.shape else []
        values = np.frombuffer(data, dtype).reshape((*ahead, *self.shape[axis + 1 :]))
        rest = (slice(each.start, each.stop) for each in bounds[axis + 1 :])
        return np.asarray(values[(*[slice(None)] * (axis + 1), *rest)])


class _Tensors:
    """The tensors of a safetensors file, with `safe_open`'s methods."""

    def __init__(self, file: AnyFile) -> None:
        self._header, self._start = read_header(file)

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._header)

    def get_slice(self, name: str) -> Any:
        """A tensor that is read when it is indexed."""
        entry = self._header[name]
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        return self._slice(begin, end, entry["dtype"], tuple(entry["shape"]))

    def get_tensor(self, name: str) -> np.ndarray:
        """A whole tensor, as an array of its own."""
        return np.array(self.get_slice(name)[...])

    def _slice(self, begin: int, end: int, kind: str, shape: tuple[int, ...]) -> Any:
        raise NotImplementedError


class MappedTensors(_Tensors):
    """The tensors of a file on the disk."""

    def __init__(self, file: pathlib.Path) -> None:
        super().__init__(file)
        self._bytes = np.asarray(np.memmap(file, np.uint8, "r"))

    def _slice(
        self, begin: int, end: int, kind: str, shape: tuple[int, ...]
    ) -> MappedSlice:
        return MappedSlice(self._bytes[begin:end], kind, shape)


class RemoteTensors(_Tensors):
    """The tensors of a file in a bucket."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__(file)
        self._file = file

    def _slice(
        self, begin: int, end: int, kind: str, shape: tuple[int, ...]
    ) -> RemoteSlice:
        return RemoteSlice(self._file, begin, kind, shape)

"""Reading tensors of safetensors files, on the disk or in a bucket, slice by slice.

Only the rows that are asked for are read from a file in a bucket; a row is what an
index of a tensor's first axis gives.
"""

import contextlib
import dataclasses
import math
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
    with contextlib.ExitStack() as stack:
        with reading(file):
            opened = stack.enter_context(safe_open(str(file), framework="numpy"))
        yield opened


@dataclasses.dataclass(frozen=True)
class RemoteSlice:
    """A tensor in a bucket that is read when indexed, like a slice of `safe_open`.

    `start` is the position of its first byte in the file. An index is one request:
    it reads the range that it asks for on the first axis with more than one place,
    and all of the axes after it, as parts of these would need a request each.
    """

    file: RemoteFile
    start: int
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


class RemoteTensors:
    """The tensors of a safetensors file in a bucket, with `safe_open`'s methods."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._header, self._start = read_header(file)

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._header)

    def get_slice(self, name: str) -> RemoteSlice:
        """A tensor that is read when it is indexed."""
        entry = self._header[name]
        start = self._start + entry["data_offsets"][0]
        return RemoteSlice(self._file, start, entry["dtype"], tuple(entry["shape"]))

    def get_tensor(self, name: str) -> np.ndarray:
        """A whole tensor."""
        return self.get_slice(name)[...]

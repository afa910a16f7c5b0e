"""Many token sequences in flat arrays, in memory while they are few, else in a file.

Whoever makes sequences appends them block by block, so that memory holds one block
however many there are.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from jaxtrain.data.rows.tokenize import Example

_HELD_BYTES = 32 << 20  # of tokens and masks, before they go to a file


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences behind one another: int32 tokens, which of them are trained, lengths.

    `tokens` int32[N] and `trained` bool[N] may be mapped from files; `lengths`
    int64[sequences] adds up to N.
    """

    tokens: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Sequences":
        """Concatenate examples, in their order."""
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(e.ids for e in examples)]),
            np.concatenate([np.zeros(0, bool), *(e.trained for e in examples)]),
            np.fromiter((len(e.ids) for e in examples), np.int64, len(examples)),
        )

    @property
    def starts(self) -> np.ndarray:
        """int64[sequences]: the place of each one's first token."""
        return np.cumsum(self.lengths) - self.lengths

    def __iter__(self) -> Iterator[Example]:
        """The sequences one by one, as views."""
        ends = np.cumsum(self.lengths).tolist()
        for start, stop in zip([0, *ends], ends, strict=False):
            yield Example(self.tokens[start:stop], self.trained[start:stop])


class SequenceWriter:
    """Takes blocks of sequences, and gives all of them back as one."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Files, if any are needed, are made in `folder` and have no name there.

        Unset: in the system's folder for temporary files.
        """
        self._folder = folder
        self._tokens = _Growing(np.dtype(np.int32), folder)
        self._trained = _Growing(np.dtype(bool), folder)
        self._lengths: list[np.ndarray] = [np.zeros(0, np.int64)]

    def append(self, block: Sequences) -> None:
        """Put these behind the others."""
        self._tokens.append(block.tokens)
        self._trained.append(block.trained)
        self._lengths.append(block.lengths)

    def finish(self) -> Sequences:
        """All sequences; nothing may be appended any more."""
        return Sequences(
            self._tokens.finish(), self._trained.finish(), np.concatenate(self._lengths)
        )


def write_sequences(
    blocks: Iterable[Sequences], folder: str | os.PathLike[str] | None
) -> Sequences:
    """All sequences of some blocks, of which one at a time is in memory."""
    writer = SequenceWriter(folder)
    for block in blocks:
        writer.append(block)
    return writer.finish()


class _Growing:
    """An array that grows at its end."""

    def __init__(
        self, dtype: np.dtype[Any], folder: str | os.PathLike[str] | None
    ) -> None:
        self._dtype, self._folder = dtype, folder
        self._held: list[np.ndarray] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def append(self, values: np.ndarray) -> None:
        self._held.append(np.asarray(values, self._dtype))
        self._bytes += values.nbytes
        if self._bytes > _HELD_BYTES:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        for values in self._held:
            self._file.write(np.ascontiguousarray(values).data)
        self._held, self._bytes = [], 0

    def finish(self) -> np.ndarray:
        if self._file is None:
            return np.concatenate([np.zeros(0, self._dtype), *self._held])
        with contextlib.closing(self._file) as file:
            self._write()
            file.flush()
            # The mapping keeps the file's content; slices of plain arrays are faster.
            return np.asarray(np.memmap(file, self._dtype, "r"))

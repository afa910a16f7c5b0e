"""Reference log-probs on disk: a file that grows, with a checksum for each batch.

    identity.json     what the numbers depend on
    logps.float32     [rows 2], the sums of chosen and rejected
    checksums.jsonl   a line for each batch: the rows up to its end, and its hash

A run that was killed leaves at most a batch without its line, or a file that ends
early: the rest goes on from there. Whatever does not match its checksum, or belongs to
something else, is renamed and made anew.
"""

import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np
import xxhash

from jaxtrain.run.durable import flush, naming, write_whole

logger = logging.getLogger(__name__)

_ROW_BYTES = 8  # float32 sums of chosen and rejected


class SumsCache:
    """A float32[rows, 2] array in a folder. One process writes it; all read it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self._file = directory / "logps.float32"
        self._identity = directory / "identity.json"
        self._checksums = directory / "checksums.jsonl"

    def open(self, identity: Mapping[str, str]) -> int:
        """Create the folder or check its content; return how many rows can be kept.

        A folder with another identity is renamed to `<name>.stale`, and a damaged one
        to `<name>.damaged`; an earlier folder of that name is deleted.
        """
        if self._identity.exists() or self._file.exists():
            try:
                self._check_identity(identity)
                return self._sound_rows()
            except _Unusable as found:
                self._set_aside(found)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._identity, json.dumps(dict(identity), indent=2))
        return 0

    def truncate(self, rows: int) -> None:
        """Keep only the first `rows` rows; the caller scores and appends the others."""
        kept = b""
        if rows:
            kept = self._file.read_bytes()[: rows * _ROW_BYTES]
        with naming(self._file):
            self._file.write_bytes(kept)
        line = _line(rows, kept) if rows else ""
        write_whole(self._checksums, line)

    def append(self, pairs: np.ndarray) -> None:
        """Add a batch, float32[rows, 2]."""
        data = np.ascontiguousarray(pairs, np.float32).tobytes()
        with naming(self._file), self._file.open("ab") as file:
            file.write(data)
        rows = self._file.stat().st_size // _ROW_BYTES
        with naming(self._checksums), self._checksums.open("a") as file:
            file.write(_line(rows, data))

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        for path in (self._file, self._checksums, self.directory):
            flush(path)

    def read(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The sums of the chosen and of the rejected, mapped into memory."""
        pairs = np.memmap(self._file, np.float32, "r", shape=(rows, 2))
        return pairs[:, 0], pairs[:, 1]

    def _check_identity(self, identity: Mapping[str, str]) -> None:
        try:
            found = json.loads(self._identity.read_text("utf-8"))
            differing = sorted({key for key, _ in found.items() ^ identity.items()})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise _Unusable("damaged", f"identity.json: {error}") from error
        if differing:
            names = " and ".join(differing)
            raise _Unusable("stale", f"they were computed for other {names}")

    def _sound_rows(self) -> int:
        """Number of rows that match their checksums, up to an incomplete batch."""
        rows = 0
        if not self._file.is_file() or not self._file.stat().st_size:
            return rows
        if not self._checksums.is_file():
            raise _Unusable(
                "stale", "they have no checksums; earlier releases took none"
            )
        with self._file.open("rb") as file:
            for end, expected in self._batches():
                data = file.read((end - rows) * _ROW_BYTES)
                if len(data) < (end - rows) * _ROW_BYTES:
                    break  # a run was killed, or the machine stopped
                if xxhash.xxh3_64_hexdigest(data) != expected:
                    reason = f"rows {rows} to {end - 1} do not match their checksum"
                    raise _Unusable("damaged", reason)
                rows = end
        return rows

    def _batches(self) -> Iterator[tuple[int, str]]:
        """The row count after each batch, and its hash; stops at an incomplete line."""
        last = 0
        for line in self._checksums.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            try:
                end, expected = json.loads(line)
                is_next = isinstance(end, int) and end > last
            except (ValueError, TypeError) as error:
                raise _Unusable("damaged", f"checksums.jsonl: {error}") from error
            if not is_next:
                raise _Unusable("damaged", "checksums.jsonl is out of order")
            last = end
            yield end, expected

    def _set_aside(self, found: "_Unusable") -> None:
        aside = self.directory.with_name(f"{self.directory.name}.{found.kind}")
        if aside.exists():
            shutil.rmtree(aside)  # of an earlier time
        self.directory.rename(aside)
        advice = "; check the disk" if found.kind == "damaged" else ""
        logger.warning(
            "the reference log-probs in %s are %s (%s), so they are computed again; the"
            " old ones were moved to %s%s",
            self.directory, found.kind, found, aside.name, advice,
        )  # fmt: skip


class _Unusable(Exception):
    """The cached sums cannot be used; `kind` is "damaged" or "stale"."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _line(rows: int, data: bytes) -> str:
    return f"{json.dumps([rows, xxhash.xxh3_64_hexdigest(data)])}\n"

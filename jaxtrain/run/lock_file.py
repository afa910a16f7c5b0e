"""The file of a lock: on a disk, or as an object in a bucket.

On a disk it is made by a link and renewed by its time of change. In a bucket each write
is under a condition, so that of two that write at one moment one fails.
"""

import contextlib
import dataclasses
import os
import pathlib
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from jaxtrain.run.durable import naming
from jaxtrain.storage import objects
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.errors import retrying


@dataclasses.dataclass(frozen=True)
class Seen:
    """`version` is another whenever the file was written or renewed.

    `changed`: when that was, in seconds since 1970 by the storage's clock.
    """

    content: bytes
    version: str
    changed: float


class LockFile(Protocol):
    """What a lock needs of its file."""

    def look(self) -> Seen | None:
        """The file as it is; None if there is none."""

    def create(self, content: bytes) -> bool:
        """Make it, whole from its first moment; False if there is one."""

    def renew(self, seen: Seen, content: bytes) -> None:
        """Change its version, if it is still the one that was seen."""

    def put_away(self, is_same: Callable[[Seen | None], bool], seen: Seen) -> None:
        """Remove the file that was seen, but not one that was made since."""

    def remove(self) -> None:
        """Remove it."""

    def tidy(self) -> None:
        """Remove what killed processes left beside it."""


def lock_file(workdir: Any, name: str) -> LockFile:
    """The lock's file in a work directory, which is made if it is a folder."""
    if is_remote(workdir):
        return InBucket(f"{os.fspath(workdir).rstrip('/')}/{name}")
    return OnDisk(workdir / name)


class OnDisk:
    """A file. Its scratch files beside it have names of their own."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def look(self) -> Seen | None:
        try:
            # Opened anew, which makes shared storage ask its server.
            with self._path.open("rb") as file:
                content, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        return Seen(content, str(changed), changed / 1e9)

    def create(self, content: bytes) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._aside()
        with naming(scratch):
            scratch.write_bytes(content)
        try:
            os.link(scratch, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with self._path.open("xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        finally:
            scratch.unlink(missing_ok=True)
        return True

    def renew(self, seen: Seen, content: bytes) -> None:
        os.utime(self._path)

    def put_away(self, is_same: Callable[[Seen | None], bool], seen: Seen) -> None:
        aside = self._aside()
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            self._path.rename(aside)
            if not is_same(OnDisk(aside).look()) and not self._path.exists():
                aside.rename(self._path)  # and what was moved is its lock
            aside.unlink(missing_ok=True)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def tidy(self) -> None:
        for remains in self._path.parent.glob(f"{self._path.name}.*"):
            remains.unlink(missing_ok=True)

    def _aside(self) -> pathlib.Path:
        return self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}")


class InBucket:
    """An object."""

    def __init__(self, address: str) -> None:
        self._address = address

    def look(self) -> Seen | None:
        found = objects.read(self._address)
        if found is None:
            return None
        return Seen(found.content, found.version, found.changed)

    def create(self, content: bytes) -> bool:
        made = retrying(
            lambda: objects.create(self._address, content), f"writing {self._address}"
        )
        if made:
            return True
        # The reply to a write that was done may have been lost, and the write repeated.
        found = self.look()
        return found is not None and found.content == content

    def renew(self, seen: Seen, content: bytes) -> None:
        objects.replace(self._address, content, seen.version)

    def put_away(self, is_same: Callable[[Seen | None], bool], seen: Seen) -> None:
        objects.delete(self._address, seen.version)

    def remove(self) -> None:
        if (seen := self.look()) is not None:
            objects.delete(self._address, seen.version)

    def tidy(self) -> None:
        pass

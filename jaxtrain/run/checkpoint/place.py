"""Where checkpoints lie, and what differs there: a disk renames, a bucket cannot.

On a disk a step's folder appears and leaves by one atomic rename. In a bucket there is
no rename: a step counts while the object `COMMIT_FILE` is in it, which is written last
and deleted first.
"""

import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from orbax.checkpoint.path import atomicity

from jaxtrain.run.checkpoint.storage import SyncedRename, commit_marker
from jaxtrain.run.durable import flush
from jaxtrain.run.saved_record import COMMIT_FILE
from jaxtrain.storage import folders
from jaxtrain.storage.address import is_remote, scheme_of
from jaxtrain.storage.errors import one_line

logger = logging.getLogger(__name__)

_TRASH = ".trash"


class Place(Protocol):
    """What a `CheckpointManager` asks of the folder that it keeps checkpoints in.

    `trash`: where Orbax is to move what it deletes; None where it cannot move, and
    deletes nothing.
    `temporary_path_class`: how Orbax makes a step appear.
    """

    trash: str | None
    temporary_path_class: type[atomicity.TemporaryPathBase]

    def has(self, name: str) -> bool:
        """Whether there is anything of this name."""

    def rename(self, name: str, other: str) -> None:
        """Rename a step's folder, whole or not at all."""

    def remove(self, step: int) -> None:
        """Delete a step whole where Orbax could be killed and leave a part that counts.

        It counts no more when this returns; the rest may go in the background.
        """

    def stray_names(self) -> list[str]:
        """All names in the folder, where one that is no folder can be told."""

    def empty_trash(self) -> None:
        """Delete what no longer counts, or does not yet; with no save running."""

    def close(self) -> None:
        """Wait for what goes on in the background."""


def place_of(directory: Any, before_commit: Callable[[], None] | None) -> Place:
    """The place for a folder on a disk, or for an address.

    Args:
        before_commit: called in a bucket when all of a step is written, before it
            counts.
    """
    if is_remote(directory):
        return InBucket(directory, before_commit)
    return OnDisk(directory)


class OnDisk:
    """A folder, local or on a shared disk, with atomic renames."""

    trash: str | None = _TRASH
    temporary_path_class: type[atomicity.TemporaryPathBase] = SyncedRename

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._deleter = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-delete")

    def has(self, name: str) -> bool:
        return os.path.lexists(self._directory / name)

    def rename(self, name: str, other: str) -> None:
        (self._directory / name).rename(self._directory / other)
        flush(self._directory)

    def remove(self, step: int) -> None:
        pass  # Orbax renames it before any of it is deleted

    def stray_names(self) -> list[str]:
        return [path.name for path in self._directory.glob("*")]

    def empty_trash(self) -> None:
        trash = self._directory / _TRASH
        if trash.exists():
            # Orbax may fill a new trash while this one is being deleted.
            trash.rename(trash.with_name(f"{_TRASH}-{time.time_ns()}"))
        # What an interrupted process left goes too.
        for remains in self._directory.glob(f"{_TRASH}-*"):
            self._deleter.submit(shutil.rmtree, remains, ignore_errors=True)

    def close(self) -> None:
        self._deleter.shutdown()


class InBucket:
    """Below an address: nothing is renamed, a marker tells what counts.

    Reads of a step name no generations, which the readers of arrays could not take.
    Nobody can mix two writers' objects unnoticed all the same: who writes holds the
    lock; a step is written once, and its marker is deleted before anything of it is;
    and what is read is compared with the checksums of all arrays and of the record,
    so a step that was replaced while it was read is damaged to its reader.
    """

    trash: str | None = None

    def __init__(
        self, directory: Any, before_commit: Callable[[], None] | None
    ) -> None:
        self._directory = directory
        self._is_tidy = False
        self.temporary_path_class = commit_marker(before_commit)
        self._deleter = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-delete")

    def has(self, name: str) -> bool:
        return (self._directory / name).exists()

    def rename(self, name: str, other: str) -> None:
        source, target = self._directory / name, self._directory / other
        folders.move(source, target, marker=COMMIT_FILE)

    def remove(self, step: int) -> None:
        folders.delete(self._directory / str(step), [COMMIT_FILE])
        self._deleter.submit(_remove, self._directory / str(step))

    def stray_names(self) -> list[str]:
        return []  # an object that is no folder is no checkpoint either

    def empty_trash(self) -> None:
        if self._is_tidy:
            return
        self._is_tidy = True  # from now on nothing is left half by anyone
        found = folders.sizes(self._directory)
        whole = {name.removesuffix(f"/{COMMIT_FILE}") for name in found}
        folders.delete(
            self._directory, [at for at in found if at.partition("/")[0] not in whole]
        )

    def close(self) -> None:
        self._deleter.shutdown()


def _remove(folder: Any) -> None:
    """Delete what is left of a step that counts no more; the next start does too."""
    try:
        folders.remove(folder)
    except Exception as error:
        logger.warning("%s is not deleted yet: %s", folder, one_line(error))


def is_on_s3(directory: Any) -> bool:
    """Whether Orbax cannot write arrays there itself."""
    return is_remote(directory) and scheme_of(directory) == "s3"

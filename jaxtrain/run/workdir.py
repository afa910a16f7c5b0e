"""The work directory of a run: a folder, or an address with a folder on this machine.

In a bucket checkpoints, the lock and exports lie at the address. All else, the records,
is written to the local folder (`run.buffer`), and what has changed is uploaded whole:
at intervals, before each checkpoint counts, and at the end. So what stands in the
records up to a checkpoint is in the bucket when the checkpoint is, and a run that was
killed goes on from the records there, cut after its checkpoint as on a disk.
"""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxtrain.run import lock
from jaxtrain.run.buffer import as_home, local_folder
from jaxtrain.run.exported import NAMES, NOTE
from jaxtrain.run.ledger import LEDGER
from jaxtrain.storage import errors, fetch, folders
from jaxtrain.storage.address import is_remote, join
from jaxtrain.storage.checks import PROBE

__all__ = ["Mirror", "WorkDirectory", "as_home", "open_workdir"]

logger = logging.getLogger(__name__)

UPLOAD_SECS = 30.0
# What a run reads that goes on. Files of trackers from earlier starts stay as they are.
_READ_FOLDERS = ("reference",)
_APART = (lock.NAME, NOTE, PROBE)
_SCRATCH = (".tmp", ".partial", ".old")
# Where a run has failed for another reason, for its last records.
_LAST_LIMIT_SECS = 20.0


@dataclasses.dataclass(frozen=True)
class WorkDirectory:
    """`home`: as the user gave it. `folder`: on this machine, where records go.

    `save_records`: see to it that all records of now are at `home`.
    """

    home: Any
    folder: pathlib.Path
    save_records: Callable[[], None] | None = None


@contextlib.contextmanager
def open_workdir(home: Any) -> Iterator[WorkDirectory]:
    """Hold the lock of a work directory and make it ready for a run.

    Every process calls this; the first one locks, fetches the records, uploads them.

    Raises:
        ValueError: another run holds the lock.
        ConnectionError: the bucket was lost; names the last step that is committed.
    """
    folder, is_first = local_folder(home), jax.process_index() == 0
    with lock.hold(home, is_first_process=is_first):
        if not is_remote(home):
            yield WorkDirectory(home, folder)
        elif is_first:
            with _mirrored(home, folder) as mirror:
                yield WorkDirectory(home, folder, mirror.flush)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            yield WorkDirectory(home, folder)


@contextlib.contextmanager
def _mirrored(home: Any, folder: pathlib.Path) -> Iterator["Mirror"]:
    """The records of `home` in `folder`, and back again.

    Raises:
        ConnectionError: as of `open_workdir`.
    """
    started, mirror = time.monotonic(), None
    try:
        _fetch_records(home, folder)
        mirror = Mirror(folder, home)
        yield mirror
        mirror.close()
    except BaseException as error:
        is_lost = isinstance(error, Exception) and errors.is_network(error)
        if mirror is not None:
            mirror.abandon(0.0 if is_lost else _LAST_LIMIT_SECS)
        if is_lost:
            secs = time.monotonic() - (started if mirror is None else mirror.reached)
            raise ConnectionError(lock.describe_loss(home, secs, error)) from error
        raise


def _fetch_records(home: Any, folder: pathlib.Path) -> None:
    """Put the records of an earlier start in place of what this machine has of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = folders.files_at(home)
    for name in _READ_FOLDERS:
        below = folders.files_below(join(home, name))
        found |= {f"{name}/{path}": info for path, info in below.items()}
    for name, info in found.items():
        if not name.startswith(_APART):
            folders.refuse_escape(home, name)
            fetch.download(info, folder / name)


class Mirror:
    """Uploads what changes in a folder, in the background and when it is told to."""

    def __init__(self, folder: pathlib.Path, home: Any) -> None:
        """Take what is in `folder` now for what is at `home`."""
        self._folder, self._home = folder, home
        self._done = {path: _stamp(path) for path in self._files()}
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        self.reached = time.monotonic()  # when the last upload went well
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def flush(self, limit_secs: float | None = None) -> None:
        """Upload what has changed; returns when it is there.

        Raises:
            Exception: the network was at fault for `errors.LIMIT_SECS`, or what the
                bucket refuses.
        """
        with self._turn:
            for path in self._files():
                try:
                    stamp = _stamp(path)
                    if self._done.get(path) == stamp:
                        continue
                    name = path.relative_to(self._folder).as_posix()
                    folders.upload_file(path, join(self._home, name), limit_secs)
                except FileNotFoundError:
                    if path.exists():
                        raise  # the bucket is gone, not the file
                    continue
                self._done[path] = stamp
            self.reached = time.monotonic()

    def close(self) -> None:
        """Upload the rest and stop."""
        self._stop()
        self.flush()

    def abandon(self, limit_secs: float) -> None:
        """Stop where the run has failed; its last records are uploaded if possible."""
        self._stop()
        try:
            self.flush(limit_secs)
        except Exception as error:
            logger.warning(
                "the last records are not in %s, but in %s: %s",
                *(self._home, self._folder, errors.one_line(error)),
            )

    def _stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(UPLOAD_SECS):
            try:
                self.flush(limit_secs=0.0)
            except Exception as error:
                # Whether the bucket is lost is for the lock and the checkpoints to say.
                logger.warning(
                    "%s: the records could not be uploaded and will be later: %s",
                    *(self._home, errors.one_line(error)),
                )

    def _files(self) -> list[pathlib.Path]:
        return [
            path
            for path in sorted(self._folder.rglob("*"))
            if path.is_file() and _is_record(path.relative_to(self._folder))
        ]


def _is_record(path: pathlib.Path) -> bool:
    first = path.parts[0]
    is_export = first.removesuffix(".partial").removesuffix(".old") in NAMES
    return not (
        is_export
        or path.name.endswith(_SCRATCH)
        or first.startswith(_APART)
        or first == LEDGER
    )


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns

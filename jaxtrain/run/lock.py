"""One run at a time writes to a work directory.

A file in it names the holder: host, process and since when. Whether a holder is still
there is known at once where it is a process of this machine. Of one elsewhere, or in
another container, only the file tells, whose time of change the holder renews every
`_BEAT_SECS`: it counts as gone if that stands still for `_SILENT_SECS`. No clock of
another machine is believed and no lock of the file system is needed, so that this holds
on shared storage and in buckets too (`lock_file`). A holder that cannot renew its lock
in a bucket for `errors.LIMIT_SECS` has lost the bucket, and ends. Nothing here imports
jax.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from jaxtrain.run import lock_file
from jaxtrain.run.buffer import local_folder
from jaxtrain.run.ledger import LEDGER, read_saved
from jaxtrain.storage import errors
from jaxtrain.storage.address import is_remote

logger = logging.getLogger(__name__)

NAME = "run.lock"
_BEAT_SECS = 15.0
# Longer than what a file system may keep of a file's attributes (NFS, FUSE: a minute).
_SILENT_SECS = 120.0
# Past this by the clock, waiting is spared.
_LONG_AGO_SECS = 3600.0
_POLL_SECS = 0.5
_MOST_TRIES = 5


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a work directory.

    `place` tells a machine since its start, and a container in it, from all others;
    `started` a process from an earlier one of the same number.
    """

    host: str
    place: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def of_this_process(cls) -> "Holder":
        """This process, as a new holder."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        started, token = _start_of(pid) or "", uuid.uuid4().hex
        return cls(platform.node(), _place(), pid, started, now, token)

    def is_here(self) -> bool:
        """Whether this machine's table of processes has to know it."""
        return (self.host, self.place) == (platform.node(), _place())

    def is_alive(self) -> bool:
        """Whether the process still runs, for one that `is_here`."""
        return _start_of(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def hold(workdir: Any, *, is_first_process: bool) -> Iterator[None]:
    """Hold `workdir` for the time of the block; the first process does it for all.

    Raises:
        ValueError: another run holds it; names that run, and what to do.
    """
    if not is_first_process:
        yield
        return
    lock, own = _Lock(workdir), Holder.of_this_process()
    for _ in range(_MOST_TRIES):
        refuse_if_held(workdir)
        seen = lock.look()
        if seen is not None and seen in _GONE:
            lock.put_away(seen)
        if lock.create(own):
            break
    else:
        raise ValueError(f"{lock.path}: cannot be written; give another workdir")
    lock.file.tidy()
    beat = _Beat(lock, own)
    try:
        yield
    finally:
        beat.stop()
        try:
            if lock.is_of(own):
                lock.file.remove()
        except Exception as error:
            if not errors.is_network(error):
                raise
            # The bucket is lost; the next run finds that this process is gone.
            logger.warning("%s remains: %s", lock.path, errors.one_line(error))


def refuse_if_held(workdir: Any, *, may_wait: bool = True) -> None:
    """Refuse a work directory that a run writes to at this moment.

    Args:
        may_wait: look for as long as it takes whether a holder elsewhere is alive. Else
            one that cannot be judged at once is let be.

    Raises:
        ValueError: names the holder, and what to do.
    """
    lock = _Lock(workdir)
    seen = lock.look()
    if seen is None or seen in _GONE:
        return
    if seen.holder is not None and seen.holder.is_here():
        is_held = seen.holder.is_alive()
    elif may_wait:
        is_held = _moves(lock, seen)
    else:
        return
    if is_held:
        raise ValueError(
            f"workdir = {str(workdir)!r}: another run writes to it"
            f" ({seen.holder or 'it does not say which'}). Wait for that run, stop it,"
            f" or give another workdir; if it is gone for certain, delete {lock.path}"
        )
    _GONE.add(seen)


@dataclasses.dataclass(frozen=True)
class _Sight:
    """A lock as it was seen; `holder` is None where the file is damaged."""

    holder: Holder | None
    seen: lock_file.Seen


_GONE: set[_Sight] = set()  # locks whose holders were found gone


class _Lock:
    """The lock of a work directory, on a disk or in a bucket."""

    def __init__(self, workdir: Any) -> None:
        self.workdir = workdir
        self.path = workdir / NAME
        self.file = lock_file.lock_file(workdir, NAME)

    def look(self) -> _Sight | None:
        """The lock as it is; None if there is none."""
        return _read(self.file.look())

    def create(self, own: Holder) -> bool:
        """Make it; False if there is one."""
        return self.file.create(_content(own))

    def put_away(self, gone: _Sight) -> None:
        """Remove a lock whose holder is gone, but not one that was made since."""
        self.file.put_away(lambda seen: _read(seen) in _GONE, gone.seen)

    def is_of(self, own: Holder) -> bool:
        """Whether this process holds it."""
        found = self.look()
        return found is not None and found.holder == own


def _content(own: Holder) -> bytes:
    # In s3:// a version depends on the content alone.
    beat = {"renewed": time.time_ns()}
    return f"{json.dumps(dataclasses.asdict(own) | beat)}\n".encode()


def _read(seen: lock_file.Seen | None) -> _Sight | None:
    if seen is None:
        return None
    try:
        fields = json.loads(seen.content)
        fields.pop("renewed", None)
        return _Sight(Holder(**fields), seen)
    except (ValueError, TypeError, AttributeError):
        return _Sight(None, seen)


def _moves(lock: _Lock, seen: _Sight) -> bool:
    """Whether the holder renews its lock, watched for as long as it may be silent."""
    if time.time() - seen.seen.changed > _LONG_AGO_SECS:
        return False
    logger.info(
        "%s was left by %s: looking for up to %.0f s whether it still runs",
        *(lock.path, seen.holder or "a run that it does not name", _SILENT_SECS),
    )
    until = time.monotonic() + _SILENT_SECS
    while time.monotonic() < until:
        time.sleep(_POLL_SECS)
        now = lock.look()
        if now is None:
            return False  # it has just ended
        if now != seen:
            return True
    return False


class _Beat:
    """A thread that renews the lock, and ends the process where it has lost it.

    In a bucket a second one watches the first, for a request may hang.
    """

    def __init__(self, lock: _Lock, own: Holder) -> None:
        self._lock, self._own = lock, own
        self._stopped = threading.Event()
        self._renewed = time.monotonic()
        self._error: BaseException = TimeoutError("no answer")
        tasks = [self._run, *([self._watch] if is_remote(lock.workdir) else [])]
        self._threads = [
            threading.Thread(target=task, name="run-lock", daemon=True)
            for task in tasks
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_BEAT_SECS):
            try:
                if not self._renew():
                    return
                self._renewed = time.monotonic()
            except Exception as error:
                self._error = error
                logger.warning(
                    "%s cannot be renewed: %s", self._lock.path, errors.one_line(error)
                )

    def _watch(self) -> None:
        """End the process if the bucket has been silent for too long."""
        while not self._stopped.wait(_BEAT_SECS):
            secs = time.monotonic() - self._renewed
            if secs > errors.LIMIT_SECS:
                _end_process(describe_loss(self._lock.workdir, secs, self._error))
                return

    def _renew(self) -> bool:
        """Show that this process is alive; False where another has the lock."""
        found = self._lock.look()
        if found is None:  # deleted by hand
            self._lock.create(self._own)
        elif found.holder in (None, self._own):
            self._lock.file.renew(found.seen, _content(self._own))
        else:
            _end_process(
                f"{self._lock.workdir}: {found.holder} took this work directory"
                f" over, as this process was silent for {_SILENT_SECS:.0f} s;"
                " it ends, so that two runs never write to one"
            )
            return False
        return True


def describe_loss(workdir: Any, secs: float, error: BaseException) -> str:
    """What is said of a bucket that no longer answers: the last step that is safe."""
    step = read_saved(local_folder(workdir) / LEDGER)
    safe = f"step {step} is committed" if step else "no step is committed yet"
    return (
        f"{workdir} has not answered for {secs:.0f} s ({errors.one_line(error)});"
        f" {safe}: the same command goes on from there"
    )


def _end_process(reason: str) -> None:
    """Leave at once: whatever is written from here on would be in the other's way."""
    print(f"jaxtrain: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _place() -> str:
    """This machine since its start, and the container: numbers of processes are its."""
    parts = []
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
        parts.append(boot.read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if there is none.

    Where the system does not tell, "" stands for one that runs.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        if pathlib.Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    # The name in parentheses may hold spaces and parentheses of its own.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]

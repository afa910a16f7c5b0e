"""One run at a time writes to a work directory.

A file in it names the holder: host, process and since when. Whether a holder is still
there is known at once where it is a process of this machine. Of one elsewhere, or in
another container, only the file tells, whose time of change the holder renews every
`_BEAT_SECS`: it counts as gone if that stands still for `_SILENT_SECS`. No clock of
another machine is believed and no lock of the file system is needed, so that this holds
on shared storage too. Nothing here imports jax.
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

from jaxtrain.run.durable import naming

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
def hold(workdir: pathlib.Path, *, is_first_process: bool) -> Iterator[None]:
    """Hold `workdir` for the time of the block; the first process does it for all.

    Raises:
        ValueError: another run holds it; names that run, and what to do.
    """
    if not is_first_process:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path, own = workdir / NAME, Holder.of_this_process()
    for _ in range(_MOST_TRIES):
        refuse_if_held(workdir)
        if _look(path) in _GONE:
            _put_aside(path)
        if _create(path, own):
            break
    else:
        raise ValueError(f"{path}: cannot be written; give another workdir")
    for remains in workdir.glob(f"{NAME}.*"):  # of killed processes
        remains.unlink(missing_ok=True)
    beat = _Beat(path, own)
    try:
        yield
    finally:
        beat.stop()
        if _is_of(own, path):
            path.unlink(missing_ok=True)


def refuse_if_held(workdir: pathlib.Path, *, may_wait: bool = True) -> None:
    """Refuse a work directory that a run writes to at this moment.

    Args:
        may_wait: look for as long as it takes whether a holder elsewhere is alive. Else
            one that cannot be judged at once is let be.

    Raises:
        ValueError: names the holder, and what to do.
    """
    path = workdir / NAME
    seen = _look(path)
    if seen is None or seen in _GONE:
        return
    if seen.holder is not None and seen.holder.is_here():
        is_held = seen.holder.is_alive()
    elif may_wait:
        is_held = _moves(path, seen)
    else:
        return
    if is_held:
        raise ValueError(
            f"workdir = {str(workdir)!r}: another run writes to it"
            f" ({seen.holder or 'it does not say which'}). Wait for that run, stop it,"
            f" or give another workdir; if it is gone for certain, delete {path}"
        )
    _GONE.add(seen)


@dataclasses.dataclass(frozen=True)
class _Sight:
    """A lock as it was seen; `holder` is None where the file is damaged."""

    holder: Holder | None
    changed_ns: int


_GONE: set[_Sight] = set()  # locks whose holders were found gone


def _moves(path: pathlib.Path, seen: _Sight) -> bool:
    """Whether the holder renews its lock, watched for as long as it may be silent."""
    if time.time() - seen.changed_ns / 1e9 > _LONG_AGO_SECS:
        return False
    logger.info(
        "%s was left by %s: looking for up to %.0f s whether it still runs",
        *(path, seen.holder or "a run that it does not name", _SILENT_SECS),
    )
    until = time.monotonic() + _SILENT_SECS
    while time.monotonic() < until:
        time.sleep(_POLL_SECS)
        now = _look(path)
        if now is None:
            return False  # it has just ended
        if now != seen:
            return True
    return False


def _look(path: pathlib.Path) -> _Sight | None:
    try:
        # Opened anew, which makes shared storage ask its server.
        with path.open("rb") as file:
            text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        return _Sight(Holder(**json.loads(text)), changed)
    except (ValueError, TypeError):
        return _Sight(None, changed)


def _is_of(own: Holder, path: pathlib.Path) -> bool:
    seen = _look(path)
    return seen is not None and seen.holder == own


def _put_aside(path: pathlib.Path) -> None:
    """Remove a lock whose holder is gone, but not one that was made since."""
    aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        if _look(aside) not in _GONE and not path.exists():
            aside.rename(path)  # and what was moved is its lock
        aside.unlink(missing_ok=True)


def _create(path: pathlib.Path, own: Holder) -> bool:
    """Make the lock, whole from its first moment; False if there is one."""
    text = json.dumps(dataclasses.asdict(own)) + "\n"
    scratch = path.with_name(f"{NAME}.{own.token}")
    with naming(scratch):
        scratch.write_text(text, encoding="utf-8")
    try:
        os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


class _Beat:
    """A thread that renews the lock, and ends the process where another has it."""

    def __init__(self, path: pathlib.Path, own: Holder) -> None:
        self._path, self._own = path, own
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-lock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_BEAT_SECS):
            try:
                found = _look(self._path)
                if found is None:  # deleted by hand
                    _create(self._path, self._own)
                elif found.holder in (None, self._own):
                    os.utime(self._path)
                else:
                    _end_process(
                        f"{self._path.parent}: {found.holder} took this work directory"
                        f" over, as this process was silent for {_SILENT_SECS:.0f} s;"
                        " it ends, so that two runs never write to one"
                    )
                    return
            except OSError as error:
                logger.warning("%s cannot be renewed: %s", self._path, error)


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

"""A disk that does not answer, as a run starts and as it exports.

While steps are trained, `preemption.Watchdog` ends a run that finishes nothing. Before
and after that nobody can say how long is too long: rows are tokenized, weights loaded
and models written. So the disks themselves are asked, again and again: can something be
written to the work directory, and read from where the model and the rows are?
"""

import contextlib
import errno
import faulthandler
import mmap
import os
import pathlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from jaxtrain.config import RunConfig
from jaxtrain.config.folders import cache_folder
from jaxtrain.data.batches.mixture import parse_mixture
from jaxtrain.run import preemption
from jaxtrain.storage.address import is_remote

_MOST_SECS = 60.0  # between two questions
_BLOCK = 4096  # what can be read past the system's cache

_SILENT = (
    "error: {} has not answered for {:g} s (training.step_timeout_secs), as the run"
    " {}: its disk, or the server that it is mounted from, hangs. The stacks below tell"
    " what waits for it. Mend that and give the same command again, which goes on from"
    " the newest checkpoint; if the disk is only slow, raise"
    " training.step_timeout_secs\n"
)


def watch_disks(run: RunConfig, workdir: Any) -> "DiskWatch":
    """A watch of all folders on this machine that a run reads or writes."""
    lora, data = run.lora, run.data
    parts = parse_mixture(data.train) or ((str(data.train), 1.0),)
    read = [
        run.model.name_or_path,
        run.model.tokenizer_name_or_path,
        lora.init_from if lora is not None else "",
        *(name for name, _ in parts),
        *data.eval_paths.values(),
    ]
    written = [os.fspath(workdir), data.cache_dir, cache_folder()]
    return DiskWatch(
        written=map(str, filter(None, written)),
        read=map(str, filter(None, read)),
        timeout_secs=run.loop.step_timeout_secs,
    )


class DiskWatch(contextlib.AbstractContextManager["DiskWatch"]):
    """End the process if a disk does not answer in time, in a `with` block.

    It says which, and prints all threads' stacks; the exit code is 1. While a
    `Watchdog` is active it is silent. Should Python itself be stuck, as in reading a
    mapped file, a C thread ends the process after twice the time.
    """

    def __init__(
        self, *, written: Iterable[str], read: Iterable[str], timeout_secs: float
    ) -> None:
        """Names that are addresses, or of nothing on this machine, are passed over.

        With `timeout_secs` 0 nothing is watched.
        """
        self._timeout_secs = timeout_secs
        self._stopped = threading.Event()
        self._asked: dict[str, float] = {}  # place -> when a question was put to it
        self._judge = threading.Thread(target=self._watch, name="disks", daemon=True)
        asks = {name: _read_from for name in read} | dict.fromkeys(written, _write_to)
        self._asks = {name: ask for name, ask in asks.items() if not is_remote(name)}

    def __enter__(self) -> "DiskWatch":
        if self._timeout_secs:
            for place, ask in self._asks.items():
                threading.Thread(
                    target=self._ask, args=(place, ask), name="disk", daemon=True
                ).start()
            self._judge.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._timeout_secs:
            self._judge.join()  # so that it sets no more timers
            faulthandler.cancel_dump_traceback_later()

    def _ask(self, place: str, ask: Callable[[pathlib.Path], None]) -> None:
        while not self._stopped.is_set():
            self._asked[place] = time.monotonic()
            with contextlib.suppress(OSError):  # an error is an answer
                ask(pathlib.Path(place).expanduser())
            self._asked.pop(place)
            self._stopped.wait(min(_MOST_SECS, self._timeout_secs / 4))

    def _watch(self) -> None:
        before = preemption.count_watched()
        while not self._stopped.wait(min(1.0, self._timeout_secs / 4)):
            if preemption.is_watched():
                continue
            has_trained = preemption.count_watched() > before
            doing = "ends" if has_trained else "starts"
            faulthandler.dump_traceback_later(
                2 * self._timeout_secs, exit=True, file=sys.__stderr__ or 2
            )
            for place, since in list(self._asked.items()):
                if time.monotonic() - since > self._timeout_secs:
                    text = _SILENT.format(place, self._timeout_secs, doing)
                    os.write(2, text.encode())
                    faulthandler.dump_traceback(file=sys.__stderr__ or 2)
                    os._exit(1)


def _write_to(folder: pathlib.Path) -> None:
    """Write something to a folder's disk, wait until it is there, leave nothing."""
    # What does not exist yet will be made on the disk of what does.
    found = next(at for at in (folder, *folder.absolute().parents) if at.is_dir())
    with tempfile.TemporaryFile(dir=found) as file:
        file.write(b"does this disk answer?")
        file.flush()
        os.fsync(file.fileno())


def _read_from(path: pathlib.Path) -> None:
    """Read something of a file, or of any file in a folder, from the disk."""
    if path.is_dir():
        files = [entry for entry in os.scandir(path) if entry.is_file()]
        if not files:
            return
        path = pathlib.Path(random.choice(files))
    # A pipe must not be waited for.
    flags = os.O_RDONLY | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, flags)  # a file system that always caches
    try:
        blocks = os.fstat(descriptor).st_size // _BLOCK
        with mmap.mmap(-1, _BLOCK) as block:
            os.preadv(descriptor, [block], _BLOCK * random.randint(0, blocks))
    finally:
        os.close(descriptor)

"""Prepare chunks of rows in several processes, and return them in order.

The other processes run `worker.py` in a fresh interpreter and receive their tasks
through a pipe. They are not forked, because that may hang after jax has started
threads. Nor do they import the user's main module again, as `multiprocessing` would, so
a notebook or a script without a `__main__` guard works. A chunk depends on its rows
alone. So the result is the same to the bit for any number of processes, even if some of
them fail.

Starting a process takes a second or two. So this process begins alone and measures its
speed. If the remaining rows would take it longer, it starts others and continues to
work itself.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtrain.data.prepare.chunks import Chunk, make_chunk, take_rows
from jaxtrain.data.prepare.kinds import Folder, Recipe
from jaxtrain.data.prepare.worker import Task, load_chunk

logger = logging.getLogger(__name__)

_SECS_EACH = 3.0  # work for which one more process is worth its start
_QUEUED = 2  # chunks that a process has been given, so that it need not wait
# With more processes than this, handing out and collecting chunks keeps this one busy.
_MOST_HELPED = 8

_Future = concurrent.futures.Future[Chunk | None]


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources for preparing rows; the result does not depend on them.

    Attributes:
        processes: the largest number of processes to use, including this one.
        scratch: an existing folder for temporary files; None uses the system's.
        worth_secs: other processes are started if the remaining rows would take this
            one longer than this many seconds.
    """

    processes: int = 1
    scratch: Folder = None
    worth_secs: float = 5.0


ALONE = Resources()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_chunks(rows: Any, recipe: Recipe, resources: Resources) -> Iterator[Chunk]:
    """Yield the chunks of all rows, in order.

    Raises:
        ValueError: as for `make_chunk`.
    """
    size, total = recipe.options.batch_size, len(rows)
    pending: collections.deque[tuple[int, _Future]] = collections.deque()
    began = time.monotonic()

    def make(first: int) -> Chunk:
        taken = take_rows(rows, first, min(first + size, total))
        return make_chunk(taken, first, recipe)

    def oldest() -> Chunk:
        first, future = pending.popleft()
        return future.result() or make(first)  # None: the process that had it has died

    with contextlib.ExitStack() as stack:
        pool: _Pool | None = None
        for first in range(0, total, size):
            if pool is None and first and resources.processes > 1:
                rest = (time.monotonic() - began) * (total - first) / first
                if rest > resources.worth_secs:
                    count = min(resources.processes - 1, int(rest / _SECS_EACH) + 1)
                    pool = stack.enter_context(_Pool(count, rows, recipe, resources))
            while pending and pool and pool.count > _MOST_HELPED and pool.is_busy:
                yield oldest()
            if pool is not None and not pool.is_busy:
                pending.append((first, pool.submit(first, min(first + size, total))))
            else:
                future: _Future = concurrent.futures.Future()
                future.set_result(make(first))
                pending.append((first, future))
            most = 4 * _QUEUED * (pool.count if pool else 0)
            while pending and (pending[0][1].done() or len(pending) > most):
                yield oldest()
        while pending:
            yield oldest()


class _Pool:
    """Processes that make chunks, and for each a thread here that waits for it."""

    def __init__(
        self, count: int, rows: Any, recipe: Recipe, resources: Resources
    ) -> None:
        self.count = count
        self._rows, self._recipe = rows, recipe
        self._scratch = resources.scratch
        self._lock = threading.Lock()
        self._ready = 0  # processes that wait for work or do some
        self._given = 0  # chunks that are with them or queued
        self._tasks: queue.SimpleQueue[tuple[Task, _Future] | None]
        self._tasks = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._closed = False

    def __enter__(self) -> "_Pool":
        self._folder = tempfile.TemporaryDirectory(
            prefix="jaxtrain-prepare-", dir=self._scratch
        )
        for _ in range(self.count):
            thread = threading.Thread(target=self._serve, name="jaxtrain-prepare")
            self._threads.append(thread)
            thread.start()
        logger.debug("preparing rows in %d more processes", self.count)
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._started:
                process.kill()  # between chunks, or nobody wants what it makes
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._folder.cleanup()

    @property
    def is_busy(self) -> bool:
        """Whether a chunk submitted now would have to wait in a queue."""
        return self._given >= _QUEUED * self._ready

    def submit(self, first: int, stop: int) -> _Future:
        """Submit a chunk; the result is None if the process that had it has died."""
        future: _Future = concurrent.futures.Future()
        own = not _travels(self._rows)
        rows = take_rows(self._rows, first, stop) if own else None
        with self._lock:
            self._given += 1
            if self._ready:
                self._tasks.put((Task(first, stop, rows), future))
            else:
                self._answer(future, None)
        return future

    def _answer(self, future: _Future, chunk: Chunk | None) -> None:
        self._given -= 1
        future.set_result(chunk)

    def _serve(self) -> None:
        """Start one process and hand it tasks, on a thread."""
        try:
            link = self._start()
        except Exception as error:  # of any library that pickles its objects
            if not self._closed:
                logger.warning(
                    "rows are prepared by fewer processes: one did not start: %s: %s",
                    type(error).__name__, error,
                )  # fmt: skip
            return
        with self._lock:
            self._ready += 1
        with contextlib.closing(link):
            while (given := self._tasks.get()) is not None:
                task, future = given
                try:
                    link.send(task)
                    found = link.recv()
                except (OSError, EOFError) as error:
                    self._lose(future, error)
                    return
                try:
                    if isinstance(found, Exception):
                        raise found
                    chunk = load_chunk(self._folder.name, task, found)
                except Exception as error:
                    with self._lock:
                        self._given -= 1
                    future.set_exception(error)
                else:
                    with self._lock:
                        self._answer(future, chunk)

    def _lose(self, future: _Future, error: Exception) -> None:
        """Continue without this process; the last one returns the queued chunks."""
        with self._lock:
            self._ready -= 1
            self._answer(future, None)
            while not self._ready and not self._tasks.empty():
                if (given := self._tasks.get()) is None:
                    break
                self._answer(given[1], None)
            if not self._closed:
                logger.warning(
                    "rows are prepared by fewer processes: one died (%s); if memory is"
                    " short, use a smaller data.dataset_num_proc",
                    type(error).__name__,
                )

    def _start(self) -> Any:
        """Start a process, and return the pipe to it when it is ready for tasks."""
        ours, theirs = multiprocessing.Pipe()
        program = "from jaxtrain.data.prepare.worker import main; main({})"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", program.format(theirs.fileno())],
                env=_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us, and we end it
            )
        with self._lock:
            self._started.append(process)
            if self._closed:
                process.kill()
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie
        rows = self._rows if _travels(self._rows) else None
        ours.send((self._recipe, rows, self._folder.name))
        if isinstance(problem := ours.recv(), Exception):
            raise problem
        return ours


def _travels(rows: Any) -> bool:
    """Whether rows are sent to another process as file names instead of values."""
    if isinstance(rows, list | tuple):
        return False
    return bool(getattr(rows, "cache_files", True))  # of `datasets`: [] in memory


@functools.lru_cache(maxsize=1)
def _environment() -> Mapping[str, str]:
    """Ours; modules are found where we find them, and one core is used."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    ours = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    return os.environ | ours | {"TOKENIZERS_PARALLELISM": "false"}

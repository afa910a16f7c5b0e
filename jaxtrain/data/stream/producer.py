"""What makes streamed batches ahead: a thread, and workers that tokenize for it."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections.abc import Sequence
from typing import Any

from jaxtrain.data.batches.pipeline import Reading
from jaxtrain.data.prepare.kinds import Recipe
from jaxtrain.data.stream.source import RawRow, Share
from jaxtrain.data.stream.windows import Key, Window, make_window


class Producer:
    """Makes batches on a thread, a few ahead."""

    def __init__(
        self,
        make_lanes: Any,
        make_batches: Any,
        reading: Reading,
        recipes: tuple[Recipe, ...],
    ) -> None:
        self._made: queue.Queue[Any] = queue.Queue(reading.prefetch)
        self._stop = threading.Event()
        workers = reading.num_workers
        self._pool: concurrent.futures.Executor
        if workers:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                # Forking a process that has threads, as jax does, may hang it.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(recipes,),
            )
        else:
            self._pool = concurrent.futures.ThreadPoolExecutor(1, "jaxtrain-tokenize")

        def produce() -> None:
            try:
                for made in make_batches(make_lanes(self._pool, workers)):
                    if not self._put(made):
                        return
            except BaseException as error:
                self._put(error)

        self._thread = threading.Thread(
            target=produce, name="jaxtrain-stream", daemon=True
        )
        self._thread.start()

    def get(self) -> Any:
        """What was made next; raises what went wrong in making it."""
        made = self._made.get()
        if isinstance(made, BaseException):
            self._made.put(made)  # for whoever asks again
            raise made
        return made

    def _put(self, made: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._made.put(made, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def close(self) -> None:
        """Stop the thread and the pool; what is being made is lost."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._thread.join()


_RECIPES: list[Recipe] = []  # a worker process's own


def _start_worker(recipes: Sequence[Recipe]) -> None:
    """Take the tokenizers; leave signals to the parent, and end when it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def follow() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    _RECIPES[:] = recipes


def run_window(part: int, rows: Sequence[RawRow], key: Key, share: Share) -> Window:
    """A window of a source, made in a worker process."""
    return make_window(_RECIPES[part], rows, key, share)

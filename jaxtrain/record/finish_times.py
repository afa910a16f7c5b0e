"""When results become ready on the device, noted while the loop does something else."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax

# How long `close` waits for a result that may never come, of a device that hangs.
_CLOSE_SECS = 5.0


class FinishTimes:
    """A thread that waits for one result after the other and notes the time.

    The loop itself can only tell when it comes to look: after it has waited for rows,
    compiled a new shape or written a log. This thread sleeps in the wait, without
    Python's lock, so its times are the device's whatever the loop is doing.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._queue: queue.SimpleQueue[tuple[Any, Future[float]] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    def watch(self, result: Any) -> Future[float]:
        """Return a future of the time at which `result`, device arrays, is ready.

        Watch results in the order in which the device computes them. If waiting for
        the result raises an error, the future raises it.
        """
        if self._thread is None:
            # A daemon: a device that hangs must not keep the process from leaving.
            self._thread = threading.Thread(
                target=self._wait_for_each, name="finish-times", daemon=True
            )
            self._thread.start()
        finished: Future[float] = Future()
        self._queue.put((result, finished))
        return finished

    def close(self) -> None:
        """End the thread; results that are still waited for have a few seconds."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_SECS)
            self._thread = None

    def _wait_for_each(self) -> None:
        while (watched := self._queue.get()) is not None:
            result, finished = watched
            try:
                jax.block_until_ready(result)
            except BaseException as error:  # the loop raises it, where it waits
                finished.set_exception(error)
            else:
                finished.set_result(self._clock())
            del result, watched  # frees the arrays before the next wait

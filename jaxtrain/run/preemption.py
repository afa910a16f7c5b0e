"""Leave in good order: SIGTERM saves a checkpoint, and a hang becomes an error."""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxtrain.run import interrupts

logger = logging.getLogger(__name__)

EXIT_CODE = interrupts.TEMPORARY


class Preempted(SystemExit):
    """A checkpoint is saved after SIGTERM; uncaught, the process exits with 75.

    `results`: what the loop would have returned.
    """

    def __init__(self, step: int, results: Mapping[str, Any]) -> None:
        super().__init__(EXIT_CODE)
        self.step = step
        self.results = results


class PreemptionWatch(contextlib.AbstractContextManager["PreemptionWatch"]):
    """Take note of SIGTERM in a `with` block; call `requested` after each step.

    With several processes, a signal to one of them is enough: all learn of it, and
    agree on the step after which they leave. In that case jax itself listens.
    """

    def __init__(self) -> None:
        self._requested = self._listens = False
        self._previous: Any = None

    def __enter__(self) -> "PreemptionWatch":
        # Python allows handlers in the main thread only.
        is_main = threading.current_thread() is threading.main_thread()
        self._listens = is_main and jax.process_count() == 1
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._take_note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self, step: int) -> bool:
        """Whether to leave after `step`: the same answer on every process.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, and something swallowed it.
        """
        interrupts.check()
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._requested

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if not self._requested:
            os.write(2, b"SIGTERM: saving after this step, then leaving\n")
        self._requested = True


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """End the process and print all threads' stacks if `feed` is not called in time.

    A collective that waits for a stuck process would wait for ever, and so would a
    save on a disk that does not answer. The exit code 1 lets the launcher restart all
    processes. A C thread ends the process, so this works when Python itself is stuck.
    Just before, a Python thread prints what to do. Both write to stderr.
    """

    def __init__(self, timeout_secs: float) -> None:
        """With `timeout_secs` 0 the watchdog does nothing."""
        self._timeout_secs = timeout_secs
        self._stopped = threading.Event()
        self._fed = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.feed()
        _starts.append(self._fed)
        _watched.set()
        if self._timeout_secs:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        _watched.clear()
        if self._timeout_secs:
            faulthandler.cancel_dump_traceback_later()

    def feed(self) -> None:
        """Report that something was finished; the timeout starts again from now."""
        self._fed = time.monotonic()
        if self._timeout_secs:
            # A notebook's sys.stderr is no file; the one Python started with is.
            faulthandler.dump_traceback_later(
                self._timeout_secs, exit=True, file=sys.__stderr__ or 2
            )

    def _watch(self) -> None:
        ahead = min(1.0, 0.2 * self._timeout_secs)
        while True:
            left = self._fed + self._timeout_secs - ahead - time.monotonic()
            if left <= 0:
                break
            if self._stopped.wait(left):
                return
        os.write(2, _STUCK.format(self._timeout_secs).encode())


def is_watched() -> bool:
    """Whether a `Watchdog` is active in this process."""
    return _watched.is_set()


def count_watched() -> int:
    """How many times a `Watchdog` was started in this process."""
    return len(_starts)


_watched = threading.Event()
_starts: list[float] = []
_STUCK = (
    "error: nothing was finished for {:g} s (training.step_timeout_secs): a disk, a"
    " device or another process of the run does not answer. The stacks below tell where"
    " it is stuck. Mend that and give the same command again, which goes on from the"
    " newest checkpoint; if a step, a batch of an evaluation or a save needs as long,"
    " raise training.step_timeout_secs\n"
)

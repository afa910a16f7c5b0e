"""Goodput: the share of a run's wall time that went into steps that count."""

import time
from collections.abc import Callable, Mapping


class Goodput:
    """Seconds of training steps over seconds since the run was first started.

    Its state travels in checkpoints. So after a restart the time the run was down, the
    compilation, and the steps since the last checkpoint, which are trained again, all
    count as lost.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds, the same on every start (not a process's own)."""
        self._clock = clock
        self._start = self._first_start = clock()
        self._productive_secs = 0.0

    def add(self, secs: float) -> None:
        """A step took so long."""
        self._productive_secs += secs

    def secs_since_start(self) -> float:
        """Wall time since this start of the run, whatever came before."""
        return self._clock() - self._start

    def share(self) -> float:
        """Productive time over wall time, 0 to 1."""
        wall_secs = self._clock() - self._first_start
        return min(self._productive_secs / wall_secs, 1.0) if wall_secs > 0 else 0.0

    def get_state(self) -> dict[str, float]:
        return {
            "first_start": self._first_start,
            "productive_secs": self._productive_secs,
        }

    def set_state(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's state; an empty one leaves this start the first."""
        self._first_start = state.get("first_start", self._first_start)
        self._productive_secs = state.get("productive_secs", 0.0)

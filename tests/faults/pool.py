"""Cases by worker processes: each is a warm fork, and does one case after another.

The process that hands out the cases starts nothing (no threads, no jax), so that a fork
of it may. Whatever it has imported is there in all workers. A worker that ends, or that
takes too long, loses its case alone: another one takes its place.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_POLL_SECS = 0.5
_SET_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)
_OWN_FAULT = 70  # exit code of a worker that failed, not its case

Case = dict[str, Any]
# Made in the worker of that number; does the case of a name.
MakeWork = Callable[[int], Callable[[str], Case]]


def die_with_parent() -> None:
    """Let this process be killed when the one that forked it ends, however it does."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_SET_SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)


def run_all(
    next_name: Callable[[], str | None],
    make_work: MakeWork,
    count: int,
    limit_secs: float,
) -> Iterator[Case]:
    """Do cases by `count` processes; yields each as it is done.

    Args:
        next_name: the case to do next, None if there is none for now. It is asked
            when a worker is free, so it may look at what was yielded before.
        limit_secs: a worker that takes longer for a case is ended. That case says so,
            as does one whose worker ended by itself.

    Raises:
        RuntimeError: the harness itself failed in a worker.
    """
    workers: dict[int, _Worker] = {}
    try:
        while True:
            for number in range(count):
                if number not in workers or workers[number].name is None:
                    if (name := next_name()) is None:
                        break
                    if number not in workers:
                        workers[number] = _Worker(make_work, number)
                    workers[number].give(name)
            if all(worker.name is None for worker in workers.values()):
                return
            for number, case in _wait(workers, limit_secs):
                if not workers[number].is_alive():
                    del workers[number]
                yield case
    finally:
        for worker in workers.values():
            worker.end()


def _wait(workers: dict[int, "_Worker"], limit_secs: float) -> list[tuple[int, Case]]:
    """The cases that are done, each with its worker's number; waits a little."""
    busy = {n: worker for n, worker in workers.items() if worker.name is not None}
    multiprocessing.connection.wait([w.pipe for w in busy.values()], _POLL_SECS)
    found = ((n, worker.take(limit_secs)) for n, worker in busy.items())
    return [(n, case) for n, case in found if case is not None]


class _Worker:
    """One process, and the name of the case that it is doing (None: none)."""

    def __init__(self, make_work: MakeWork, number: int) -> None:
        self.name: str | None = None
        self._begun = 0.0
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self._process = fork.Process(
            target=_serve, args=(theirs, make_work, number), daemon=True
        )
        sys.stdout.flush()
        self._process.start()
        theirs.close()

    def give(self, name: str) -> None:
        self.name, self._begun = name, time.monotonic()
        self.pipe.send(name)

    def take(self, limit_secs: float) -> Case | None:
        """What became of the case, None if it is still being done."""
        name, ended = self.name, None
        try:
            if self.pipe.poll():
                case = self.pipe.recv()
                self.name = None
                return case
        except (EOFError, OSError):
            self._process.join()  # the pipe is closed, so it ends
        if self._process.exitcode == _OWN_FAULT:
            raise RuntimeError("the harness failed in a worker; see above")
        if self._process.exitcode is not None:
            ended = f"the process ended with {self._process.exitcode}"
        elif time.monotonic() - self._begun > limit_secs:
            ended = "the process hung"
        if ended is None:
            return None
        self.end()
        self.name = None
        return {"name": name, "kind": ended, "handled": False}

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Any, make_work: MakeWork, number: int) -> None:
    """In the worker: do what is asked for until nobody asks."""
    die_with_parent()
    try:
        work = make_work(number)
        while True:
            pipe.send(work(pipe.recv()))
    except EOFError:
        pass
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_OWN_FAULT)

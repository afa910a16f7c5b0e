"""Ctrl-C, also where a library swallows it.

Python raises KeyboardInterrupt wherever the program is. Some libraries catch everything
while they import or load, and the program would go on as if nobody had pressed a key.
So the key press is noted, and asked for again between the parts of a run.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: not failed, start it again.
TEMPORARY = 75

_pressed = _watches = False


class Terminated(SystemExit):
    """SIGTERM came where no checkpoint can be saved; what is saved stays."""

    def __init__(self) -> None:
        super().__init__(TEMPORARY)


def leave_on_sigterm() -> None:
    """Let SIGTERM end what is open in good order, and the process with 75.

    While steps are trained `run.preemption` saves one first. Within another program,
    whose signals are its own, this does nothing.
    """
    if _watches:
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"SIGTERM: leaving; the same command goes on from what is saved\n")
    raise Terminated


def watch() -> None:
    """Note every SIGINT from now on; it raises KeyboardInterrupt as before."""
    global _watches
    _watches = True
    signal.signal(signal.SIGINT, _note)
    hook = sys.unraisablehook
    if getattr(hook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, hook)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and the program still runs."""
    if _pressed:
        raise KeyboardInterrupt


def _report(
    others: Callable[["sys.UnraisableHookArgs"], Any],
    unraisable: "sys.UnraisableHookArgs",
) -> None:
    """Tell of what Python could not raise, unless it is a key press, which is noted.

    It cannot within callbacks of its garbage collector, of which jax has one.

    Args:
        others: tells of anything else; the hook that there was before.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        others(unraisable)


def _note(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt

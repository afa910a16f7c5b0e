"""Ctrl-C, also where a library swallows it.

Python raises KeyboardInterrupt wherever the program is. Some libraries catch everything
while they import or load, and the program would go on as if nobody had pressed a key.
So the key press is noted, and asked for again between the parts of a run.
"""

import os
import signal
import sys
from types import FrameType

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
    sys.unraisablehook = _report


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and the program still runs."""
    if _pressed:
        raise KeyboardInterrupt


def _report(unraisable: "sys.UnraisableHookArgs") -> None:
    """Tell of what Python could not raise, unless it is a key press, which is noted.

    It cannot within callbacks of its garbage collector, of which jax has one.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)


def _note(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
